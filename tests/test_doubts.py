"""Why a plan may not be what it seems."""

from dataclasses import replace
from typing import Any

import pytest
from test_planning import plan

from autoshard.errors import ModelError
from autoshard.layout.rules import Rule
from autoshard.model.keras_import import import_keras
from autoshard.planner.doubts import doubts
from autoshard.planner.planning import Planning
from autoshard.planner.setup import make_setup


@pytest.fixture(scope="module")
def gemma() -> Planning:
    return plan("gemma_7b_en", make_setup("1x8"))


def test_what_is_not_known_of_a_layer_is_said_with_its_path() -> None:
    def reader() -> Any:
        layers = import_keras().layers
        tokens = import_keras().Input((16,), dtype="int32")
        found = layers.Embedding(64, 16, name="words")(tokens)
        for k in range(2):
            found = layers.GRU(16, name=f"gru_{k}", return_sequences=True)(found)
        return import_keras().Model(tokens, layers.LSTM(16, name="lstm")(found))

    found = plan(reader, make_setup("8x1"))
    (doubt,) = doubts(found, (), is_compiled=False)
    assert doubt == (
        "scan in gru_*, lstm: a loop is priced by its kernels and what it reads in each turn: time "
        "and memory may be several times what is predicted"
    )


def test_a_network_of_convolutions_is_said_to_be_priced_too_low(gemma: Planning) -> None:
    def network() -> Any:
        layers = import_keras().layers
        pictures = import_keras().Input((32, 32, 8))
        found = layers.Conv2D(16, 3, name="first")(pictures)
        found = layers.Flatten()(layers.MaxPooling2D()(found))
        return import_keras().Model(pictures, layers.Dense(10, name="last")(found))

    found = plan(network, make_setup("8x1"))
    assert found.traced.program.layers_with("unknown") == {}
    assert ["convolutions" in doubt for doubt in doubts(found, (), is_compiled=True)] == [True]
    assert list(doubts(gemma, gemma.candidates[0].rules, is_compiled=False)) == []


def test_sizes_that_are_taken_for_want_of_any_are_told_of() -> None:
    def network() -> Any:
        pictures = import_keras().Input((None, None, 3), name="pictures")
        found = import_keras().layers.Conv2D(8, 3, padding="same", name="only")(pictures)
        return import_keras().Model(pictures, found)

    found = plan(network, make_setup("8x1"))
    doubt = next(doubts(found, (), is_compiled=True))
    assert "of the sizes that pictures leaves open 1 is taken" in doubt


def test_sizes_that_are_too_small_for_the_model_are_told_with_their_error() -> None:
    def network() -> Any:
        pictures = import_keras().Input((None, None, 3), name="pictures")
        return import_keras().Model(pictures, import_keras().layers.Conv2D(8, 3)(pictures))

    with pytest.raises(ModelError, match="cannot be traced.*that pictures leaves open 1 is taken"):
        plan(network, make_setup("8x1"))


def test_made_up_names_are_told_of_where_a_rule_takes_any_number_of_them() -> None:
    def network() -> Any:
        keras = import_keras()
        rows = found = keras.Input((256,), name="rows")
        for _ in range(5):
            found = keras.layers.Dense(256)(found)
        return keras.Model(rows, found)

    planning = plan(network, make_setup("1x8"))
    for pattern in (r"dense_\d+/kernel", "dense_(1|2|3|4)/kernel"):
        rules = (Rule(pattern=pattern, spec=(None, "model")),)
        (doubt,) = doubts(planning, rules, is_compiled=True)
        assert "Keras made up" in doubt and "dense_" in doubt
    for pattern in (".*kernel", r"dense(_\d+)?/kernel"):
        rules = (Rule(pattern=pattern, spec=(None, "model")),)
        assert list(doubts(planning, rules, is_compiled=True)) == []


def test_weights_that_stay_in_float32_are_told_of() -> None:
    found = plan("smollm3_3b_en", make_setup("1x4", workload="prefill"))
    (doubt,) = doubts(found, found.candidates[0].rules, is_compiled=True)
    assert "SmolLM3CausalLM makes them whatever dtype it is given" in doubt


def test_weights_of_two_dtypes_are_no_doubt(gemma: Planning) -> None:
    prefill = replace(gemma, setup=make_setup("8x1", workload="prefill"))
    for dtypes, n_doubts in ((("float32",), 1), (("bfloat16", "float32"), 0)):
        variables = tuple(
            replace(variable, dtype=dtypes[k % len(dtypes)])
            for k, variable in enumerate(gemma.traced.table.variables)
        )
        table = replace(gemma.traced.table, variables=variables)
        found = replace(prefill, traced=replace(gemma.traced, table=table))
        assert len(list(doubts(found, (), is_compiled=True))) == n_doubts


def test_a_frozen_model_is_told_of() -> None:
    def frozen() -> Any:
        keras = import_keras()
        rows = keras.Input((256,), name="rows")
        model = keras.Model(rows, keras.layers.Dense(512, name="only")(rows))
        model.trainable = False
        return model

    (doubt,) = doubts(plan(frozen, make_setup("8x1")), (), is_compiled=True)
    assert "no weight of" in doubt and "computes no gradient" in doubt
    prefill = plan(frozen, make_setup("8x1", workload="prefill"))
    assert list(doubts(prefill, (), is_compiled=True)) == []


def test_another_optimizer_than_a_model_is_compiled_with_is_told_of(gemma: Planning) -> None:
    def network() -> Any:
        keras = import_keras()
        rows = keras.Input((256,), name="rows")
        model = keras.Model(rows, keras.layers.Dense(512, name="only")(rows))
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model

    def of(optimizer: str, **options: Any) -> list[str]:
        found = plan(network, make_setup("8x1", optimizer=optimizer, **options))
        return list(doubts(found, (), is_compiled=True))

    (doubt,) = of("adam")
    assert "compiled with sgd, but planned for adam" in doubt
    assert of("sgd") == of("adam", workload="prefill") == []
    # KerasHub compiles its tasks, which says nothing of what their user has in mind
    assert gemma.traced.whole.compiled_with == ""


def test_devices_that_repeat_each_other_are_told_of(gemma: Planning) -> None:
    (doubt,) = doubts(gemma, (), is_compiled=False)
    assert "each of the 8 devices does all the work" in doubt and "ask for 8 devices" in doubt
    alone = replace(gemma.setup, workload=replace(gemma.setup.workload, batch=1))
    (doubt,) = doubts(replace(gemma, setup=alone), (), is_compiled=False)
    assert "a batch of a multiple of 8" in doubt


def test_no_mesh_is_advised_that_was_planned_and_ranks_behind(gemma: Planning) -> None:
    (doubt,) = doubts(gemma, (), is_compiled=False, is_best_shape=True)
    assert doubt == (
        "nothing is split: each of the 8 devices does all the work; "
        "the shapes of the mesh that split the batch rank behind"
    )
