"""Building models without values, from each kind of reference."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autoshard.errors import ModelError, UnknownNameError, UsageError
from autoshard.model.build import build
from autoshard.model.fold import check_periods, fold
from autoshard.model.inputs import output_structure
from autoshard.model.keras_import import import_keras, import_keras_hub
from autoshard.model.step import make_step, trace
from autoshard.model.workload import Workload
from autoshard.pipeline import plan
from autoshard.planner.tracing import trace_model

SMALL: dict[str, Any] = {
    "vocabulary_size": 32,
    "num_layers": 5,
    "num_query_heads": 2,
    "num_key_value_heads": 1,
    "hidden_dim": 8,
    "intermediate_dim": 16,
    "head_dim": 4,
}


def small_gemma(**options: Any) -> Any:
    return import_keras_hub().models.GemmaCausalLM(
        backbone=import_keras_hub().models.GemmaBackbone(**(SMALL | options)), preprocessor=None
    )


def plain_network() -> Any:
    keras = import_keras()
    inputs = keras.Input((4,), name="features")
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(inputs), name="plain")


def written_out() -> Any:
    """Blocks of a model's own, of which no configuration tells how many there are."""
    keras = import_keras()
    found = inputs = keras.Input((4,), name="features")
    for k in range(4):
        layers = [keras.layers.Dense(4, name=name) for name in ("up", "down")]
        found = keras.Sequential(layers, name=f"block_{k}")(found)
    return keras.Model(inputs, found, name="written_out")


def no_model() -> int:
    return 3


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_gemma_7b_has_eleven_families_and_no_values() -> None:
    model = build("gemma_7b_en", dtype="bfloat16")
    table = model.table()
    assert table.n_parameters == 8_537_680_896
    assert table.n_bytes == 2 * table.n_parameters
    # Embedding and final norm, and nine variables of each of the 28 blocks.
    families = table.families()
    assert sorted(len(family.paths) for family in families) == [1, 1, *[28] * 9]
    assert all(variable._value is None for variable in model.model.variables)
    assert model.task == "GemmaCausalLM"


def subclassed() -> Any:
    layers = import_keras().layers

    class Network(import_keras().Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.head = layers.Dense(3, name="head")

        def call(self, inputs: Any) -> Any:
            return self.head(inputs)

    return Network()


def called() -> Any:
    model = subclassed()
    model(import_keras().Input((4,)))
    return model


def test_a_model_that_was_not_called_has_no_weights_yet() -> None:
    with pytest.raises(ModelError, match=r"nothing to lay out.*with a keras\.Input"):
        build(subclassed).table()
    assert build(called).table().n_parameters == 15
    with pytest.raises(ModelError, match="does not say what inputs it takes"):
        output_structure(build(called).model)


def test_a_layer_that_holds_another_counts_by_its_own_weights() -> None:
    class Scale(import_keras().layers.Layer):  # type: ignore[misc]
        def build(self, shape: Any) -> None:
            self.drop = import_keras().layers.Dropout(0.1)
            self.scale = self.add_weight(shape=shape[-1:], name="scale")

        def call(self, inputs: Any) -> Any:
            return self.drop(inputs) * self.scale

    def network() -> Any:
        rows = import_keras().Input((4,), name="rows")
        return import_keras().Model(rows, Scale(name="only", dtype="float32")(rows))

    assert build(network).dtype == "float32"
    with pytest.raises(UsageError, match="made with dtype float32, and bfloat16 is asked for"):
        build(network, dtype="bfloat16")


def test_names_that_are_no_path_are_unknown_models() -> None:
    with pytest.raises(UnknownNameError, match="unknown model"):
        build("a" * 300)


def test_a_dtype_that_is_none_is_said_before_keras_is_asked() -> None:
    with pytest.raises(UnknownNameError, match="unknown dtype 'bf16'; did you mean bfloat16"):
        build("gemma_2b_en", dtype="bf16")


def test_low_rank_factors_leave_little_to_train() -> None:
    table = build("gemma_2b_en", lora_rank=4).table()
    # 18 blocks; query: A (8, 2048, 4), B (4, 256); value: A (1, 2048, 4), B (4, 256).
    assert table.n_trainable == 18 * (8 * 2048 * 4 + 4 * 256 + 2048 * 4 + 4 * 256) == 1_363_968
    assert table.n_parameters == 2_506_172_416 + 1_363_968


def test_a_second_mixtral_in_the_process_has_the_paths_of_the_first() -> None:
    first, second = build("mixtral_8_7b_en").table(), build("mixtral_8_7b_en").table()
    assert [v.path for v in first.variables] == [v.path for v in second.variables]
    # 32 blocks of 10 variables, embedding, its reverse and the last norm.
    assert len(first.variables) == 323
    assert len(first.families()) == 13
    assert any("moe_block_31/" in v.path for v in first.variables)


def test_building_leaves_keras_counters_as_they_were() -> None:
    keras = import_keras()
    keras.layers.Dense(1)
    before = keras.layers.Dense(1).name
    fold(build("mixtral_8_7b_en"), periods=1)
    after = keras.layers.Dense(1).name
    assert int(after.removeprefix("dense_")) == int(before.removeprefix("dense_")) + 1


def test_outputs_that_keras_asks_the_map_for_are_in_the_table() -> None:
    """Compared with what Keras asks during a real trace."""
    from autoshard.model.abstract import recording_scope

    model = fold(build("gemma_2b_en"), periods=3)
    with recording_scope() as recorder:
        step = make_step(model, Workload(kind="prefill", batch=1, seq_len=4))
        import jax

        jax.eval_shape(
            step.function,
            *(jax.ShapeDtypeStruct(a.shape, jax.numpy.dtype(a.dtype)) for a in step.arguments),
        )
    asked = set(recorder.paths)
    assert "decoder_block_0/attention/query/output" in asked
    assert asked <= set(model.table().output_paths)


def test_a_callable_by_name_is_built_without_values() -> None:
    model = build(f"{__name__}:small_gemma", dtype="bfloat16")
    assert model.task == "GemmaCausalLM"
    assert {v.dtype for v in model.table().variables} == {"bfloat16"}
    assert all(v._value is None for v in model.backbone.weights)
    folded = fold(model, periods=3)
    assert folded.folding.blocks[0].traced == 3


def test_a_callable_has_the_name_by_which_another_process_finds_it() -> None:
    assert build(small_gemma).name == f"{__name__}:small_gemma"
    assert build(lambda: small_gemma()).name == "<lambda>"


def test_a_model_with_values_keeps_them() -> None:
    given = small_gemma()
    model = build(given)
    assert model.model is given
    assert model.table().n_parameters == given.count_params()
    assert fold(model, periods=3).folding.blocks[0].n_blocks == 5
    assert all(v._value is not None for v in given.weights)
    assert model.dtype == "float32"
    assert trace_model(given, Workload(dtype=None)).workload.dtype == "float32"
    with pytest.raises(UsageError, match="made with dtype float32, and bfloat16 is asked for"):
        build(given, dtype="bfloat16")


def test_a_backbone_is_planned_in_its_task_however_deep_it_is() -> None:
    for n_layers in (2, 5):
        backbone = small_gemma(num_layers=n_layers).backbone
        for given in (backbone, lambda made=backbone: made):
            model = build(given)
            assert model.task == fold(model, periods=2).task == "GemmaCausalLM"
    assert model.backbone is backbone


def test_a_callable_makes_what_it_would_without_us_unless_a_dtype_is_asked_for() -> None:
    name = f"{__name__}:small_gemma"
    assert build(name).dtype == build(name).table().dtype == "float32"
    assert build(name, dtype="bfloat16").table().dtype == "bfloat16"
    assert build("gemma_2b_en").dtype is None
    with pytest.raises(UsageError, match="made with dtype float32"):
        build(lambda: small_gemma(dtype="float32"), dtype="bfloat16")


def test_a_dtype_in_which_no_step_is_planned_can_be_read_but_not_planned() -> None:
    model = build(lambda: small_gemma(dtype="mixed_float16"))
    assert model.dtype == "mixed_float16"
    assert model.table().dtype == "float32"
    with pytest.raises(UsageError, match=r"made with dtype mixed_float16.* one of bfloat16"):
        model.adapted(Workload(dtype=None))


def test_a_model_with_weights_in_eight_bits_keeps_them_so() -> None:
    model = build(small_gemma, dtype="int8")
    recipe = model.recipe
    assert recipe is not None and recipe.config is not None
    config = dict(recipe.config)
    for given in (lambda: recipe.make(config), recipe.make(config)):
        assert build(given).dtype == build(given, dtype="int8").dtype == "int8"
        with pytest.raises(UsageError, match="made with dtype int8, and bfloat16 is asked for"):
            build(given, dtype="bfloat16")
    assert build("llama3_8b_en_int8").dtype == "int8"
    with pytest.raises(UsageError, match="made with dtype int8, and float32 is asked for"):
        build("llama3_8b_en_int8", dtype="float32")


def test_a_model_is_planned_whatever_was_built_before_it() -> None:
    made = [small_gemma(dtype="bfloat16") for _ in range(2)]
    first, second = (
        plan(model, "1x8", workload="prefill", seq_len=512, generate=False) for model in made
    )
    assert first.rules == second.rules


def test_a_model_that_is_no_backbone_is_taken_whole() -> None:
    model = build(plain_network)
    assert model.task == "Functional"
    assert fold(model, periods=3).folding.blocks == ()
    step = make_step(model, Workload(kind="train", batch=2, optimizer="sgd"))
    assert step.loss == "mean square of the outputs"
    trace(step)
    with pytest.raises(UsageError, match="has no enable_lora, which KerasHub's backbones have"):
        build(plain_network, lora_rank=2)


def test_a_sequential_model_takes_what_the_model_inside_it_takes() -> None:
    def sequential() -> Any:
        layers = import_keras().layers
        return import_keras().Sequential([import_keras().Input((8,)), layers.Dense(4)])

    step = make_step(build(sequential), Workload(kind="train", batch=2, optimizer="sgd"))
    assert [argument.shape for argument in step.arguments if argument.role == "data"][0] == (2, 8)
    trace(step)


# Keras' saving reads a variable in a way that numpy 2 warns about.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize`:UserWarning")
def test_files_are_read(tmp_path: Path) -> None:
    keras = import_keras()
    backbone = small_gemma().backbone
    expected = build(backbone).table().fingerprint
    backbone.save(tmp_path / "model.keras")
    config = keras.saving.serialize_keras_object(backbone)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert build(str(tmp_path / "model.keras"), dtype="float32").table().fingerprint == expected
    read = build(str(tmp_path / "config.json"), dtype="float32")
    assert read.table().fingerprint == expected
    assert any(stack.traced < stack.n_blocks for stack in fold(read, periods=3).folding.blocks)
    assert build(str(tmp_path), dtype="float32").table().fingerprint == expected
    # A file is planned as it was saved, where nothing else is asked for.
    backbone = small_gemma(dtype="float16").backbone
    backbone.save(tmp_path / "model.keras")
    assert build(str(tmp_path / "model.keras")).table().dtype == "float16"
    assert build(str(tmp_path / "model.keras"), dtype="float32").table().dtype == "float32"


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_task_is_read_with_its_own_dtype(tmp_path: Path) -> None:
    task = import_keras_hub().models.GemmaCausalLM(small_gemma().backbone, preprocessor=None)
    task.save(tmp_path / "task.keras")
    assert build(str(tmp_path / "task.keras")).dtype == "float32"
    with pytest.raises(UsageError, match="made with dtype float32, and bfloat16 is asked for"):
        build(str(tmp_path / "task.keras"), dtype="bfloat16")


@pytest.mark.parametrize(
    ("reference", "error", "text"),
    [
        ("no_such_package:model", UsageError, "cannot import 'no_such_package:model'"),
        (f"{__name__}:nothing", UsageError, "cannot import"),
        (f"{__name__}:no_model", UsageError, "returned int, not a Keras model"),
        ("missing.keras", UsageError, "there is no model 'missing.keras'"),
        (
            __name__,
            UsageError,
            f"is a module: name a callable in it .* as in {__name__}:make_model",
        ),
    ],
)
def test_references_that_lead_nowhere(reference: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        build(reference)


def talkative() -> Any:
    print("building")
    return plain_network()


def failing() -> Any:
    raise RuntimeError("a bug of mine")


def test_a_folder_that_is_no_preset_does_not_hide_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bert_tiny_en_uncased").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    assert build("bert_tiny_en_uncased").task == "BertBackbone"
    with pytest.raises(ModelError, match="'other' is no preset: it has no config.json"):
        build("other")


def test_what_a_callable_prints_is_no_output_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    build(f"{__name__}:talkative")
    assert capsys.readouterr() == ("", "building\n")


def test_an_error_of_a_callable_is_told_with_its_line() -> None:
    line = failing.__code__.co_firstlineno + 1
    text = rf"cannot build .*:failing' \({Path(__file__).name}, line {line}\): RuntimeError: a bug"
    with pytest.raises(ModelError, match=text):
        build(f"{__name__}:failing")


def test_what_needs_tensorflow_is_no_part_of_a_step() -> None:
    def hashing() -> Any:
        raise ImportError("Layer Hashing requires TensorFlow. Install it via `pip install ...`.")

    text = "Layer Hashing requires TensorFlow, which no step on JAX runs: plan the model behind"
    with pytest.raises(ModelError, match=text):
        build(hashing)


def test_low_rank_factors_that_a_model_has_are_those_that_are_planned() -> None:
    model = small_gemma()
    model.backbone.enable_lora(8)
    for given in (model, lambda: model):
        with pytest.raises(UsageError, match="factors of rank 8, and rank 4 is asked for"):
            build(given, lora_rank=4)
    found = plan(model, mesh="1x2", workload="lora")
    assert found.workload.lora_rank == 8
    assert set(found.partition_specs(model)) == {weight.path for weight in model.weights}


def test_fewer_blocks_are_asked_only_of_a_model_that_can_have_them() -> None:
    check_periods(build(small_gemma), 2)
    check_periods(build(small_gemma), 9)  # more than it has
    with pytest.raises(UsageError, match="plain_network' has no blocks that repeat"):
        check_periods(build(plain_network), 2)
    with pytest.raises(UsageError, match="cannot be built with fewer blocks"):
        check_periods(build(written_out), 2)


@pytest.mark.parametrize("is_given", [True, False])
@pytest.mark.parametrize("change", ["frozen", "low rank"])
def test_what_the_author_trains_is_planned(change: str, is_given: bool) -> None:
    def changed() -> Any:
        model = small_gemma()
        if change == "frozen":
            model.backbone.get_layer("token_embedding").trainable = False
        else:
            model.backbone.enable_lora(8)
        return model

    workload = Workload(kind="train", batch=8, seq_len=16, dtype="float32")
    traced = trace_model(changed() if is_given else changed, workload)
    slots = [one for one in traced.program.arguments if one.role == "slot" and one.shape]
    trained = [weight for weight in traced.whole.model.weights if weight.trainable]
    # Adam keeps two moments of each trained parameter, in float32 as the model is.
    n_parameters = sum(math.prod(weight.shape) for weight in trained)
    assert sum(slot.n_bytes * slot.count for slot in slots) == 2 * 4 * n_parameters > 0


def test_a_model_without_values_draws_no_numbers() -> None:
    def reading() -> Any:
        keras = import_keras()
        embedding = keras.layers.Embedding(64, 8, embeddings_initializer=_no_numbers)
        entry = keras.Input((4,), dtype="int32")
        return keras.Model(entry, embedding(entry) @ keras.ops.transpose(embedding.embeddings))

    assert [weight.shape for weight in build(reading).model.weights] == [(64, 8)]


def _no_numbers(shape: tuple[int, ...], dtype: str | None = None) -> Any:
    raise AssertionError("an initializer is called")


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for registered in ("keras_hub>GemmaBackbone", "somebody>Else"):
        path.write_text(json.dumps({"class_name": "Else", "registered_name": registered}))
        with pytest.raises(ModelError, match="is not the configuration of a Keras model"):
            build(str(path), dtype="float32")


def test_a_planning_process_loads_no_tensorflow_and_leaves_imports_alone() -> None:
    code = """
import os, sys
before = list(sys.meta_path)
os.environ["AUTOSHARD_PLANNING_ONLY"] = "1"
from autoshard.model.keras_import import import_keras_hub
import_keras_hub()
import keras
from autoshard.model.build import build
build("gemma_2b_en")
build("gemma_2b_en", dtype="int8")
print(keras.config.backend(), "tensorflow" in sys.modules, sys.meta_path[:1] == before[:1])
print(keras.src.utils.module_utils.tensorflow._available)
"""
    assert run_python(code).split() == ["jax", "False", "True", "None"]


def test_another_backend_is_refused_with_the_way_out() -> None:
    code = """
import os
os.environ["KERAS_BACKEND"] = "numpy"
from autoshard.errors import BackendError
from autoshard.model.keras_import import import_keras
try:
    import_keras()
except BackendError as error:
    print(error)
"""
    assert run_python(code).strip() == (
        "Keras runs on the numpy backend, which ignores layouts; set the environment variable "
        "KERAS_BACKEND=jax before keras is imported"
    )


def test_names_that_keras_made_up_are_told_from_given_ones_like_them() -> None:
    def network() -> Any:
        keras = import_keras()
        steps = keras.Input((4, 8), name="steps")
        found = keras.layers.LSTM(8, name="loop")(steps)  # Keras calls its cell lstm_cell
        found = keras.layers.Dense(8, name="dense_99999")(found)
        return keras.Model(steps, keras.layers.Dense(8)(found), name="network")

    assert build(network).numbered_layers() == {"dense"}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize`:UserWarning")
def test_int8_gives_the_variables_that_quantize_gives() -> None:
    real = import_keras_hub().models.GemmaBackbone(**SMALL, dtype="bfloat16")
    real.quantize("int8")
    expected = {(v.path, tuple(v.shape), str(v.dtype)) for v in real.weights}
    table = build(small_gemma, dtype="int8").table()
    assert {(v.path, v.shape, v.dtype) for v in table.variables} == expected


def test_int8_is_refused_where_there_are_no_policies_by_layer() -> None:
    with pytest.raises(UsageError, match="int8 needs a KerasHub backbone"):
        build(plain_network, dtype="int8")


def test_planning_leaves_the_random_numbers_of_the_program_as_they_were() -> None:
    random.seed(3)
    expected = random.getstate()
    build("bert_tiny_en_uncased").table()
    trace(make_step(build("bert_tiny_en_uncased"), Workload(kind="prefill", batch=1)))
    assert random.getstate() == expected
