"""A plan put to work: a small Gemma on eight devices builds, trains, predicts and generates."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import autoshard
from autoshard.errors import PlanFileError
from autoshard.model.keras_import import import_keras_hub
from autoshard.sharding_plan import Plan

VOCABULARY, BATCH, LENGTH = 64, 8, 16


def small_gemma_backbone() -> Any:
    """Two blocks, eight heads, nothing that eight devices do not divide."""
    keras_hub = import_keras_hub()
    return keras_hub.models.GemmaBackbone(
        vocabulary_size=VOCABULARY,
        num_layers=2,
        num_query_heads=8,
        num_key_value_heads=8,
        hidden_dim=64,
        intermediate_dim=256,
        head_dim=8,
        dtype="float32",
    )


@pytest.fixture(scope="module")
def plan() -> Plan:
    return autoshard.plan(
        small_gemma_backbone, "1x8", seq_len=LENGTH, dtype="float32", memory_limit="600kB"
    )


@pytest.fixture
def keras() -> Iterator[Any]:
    """Keras as it was before: no distribution, a fixed seed."""
    import keras as module

    module.utils.set_random_seed(0)
    yield module
    module.distribution.set_distribution(None)


def causal_lm(keras: Any) -> Any:
    keras_hub = import_keras_hub()
    keras.utils.set_random_seed(1)
    return keras_hub.models.GemmaCausalLM(small_gemma_backbone(), preprocessor=None)


def data() -> tuple[dict[str, Any], Any]:
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, (BATCH, LENGTH))
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    return inputs, np.roll(tokens, -1, axis=1)


def randomise(model: Any) -> None:
    """Give every weight random values, LoRA's zero factors too."""
    generator = np.random.default_rng(2)
    for weight in model.weights:
        weight.assign(generator.normal(0, 0.05, weight.shape).astype(weight.dtype))


def losses(keras: Any, model: Any) -> list[float]:
    inputs, labels = data()
    model.compile(
        optimizer=keras.optimizers.Adam(1e-2),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    # KerasHub's own fit wants a preprocessor's data set; Keras' takes arrays.
    history = keras.Model.fit(
        model, inputs, labels, batch_size=BATCH, epochs=4, verbose=0, shuffle=False
    )
    return list(history.history["loss"])


def test_every_variable_lies_as_planned(plan: Plan, keras: Any) -> None:
    from jax.sharding import NamedSharding

    keras.distribution.set_distribution(plan.distribution())
    model = causal_lm(keras)
    specs = plan.partition_specs(model.backbone)
    mesh = plan.device_mesh().backend_mesh
    for weight in model.backbone.weights:
        planned = NamedSharding(mesh, specs[weight.path])
        assert weight.value.sharding.is_equivalent_to(planned, weight.value.ndim), weight.path
    assert any(any(spec) for spec in specs.values()), "the plan splits something"


@pytest.mark.parametrize("lora", [False, True])
def test_fit_lowers_the_loss(plan: Plan, keras: Any, lora: bool) -> None:
    keras.distribution.set_distribution(plan.distribution())
    model = causal_lm(keras)
    if lora:
        model.backbone.enable_lora(4)
    history = losses(keras, model)
    assert history[-1] < history[0]


def test_predictions_equal_the_unsharded_model(plan: Plan, keras: Any) -> None:
    inputs, _ = data()
    results = []
    for distribution in (None, plan.distribution()):
        keras.distribution.set_distribution(distribution)
        model = causal_lm(keras)
        model.backbone.enable_lora(4)
        randomise(model)
        results.append(np.asarray(model.predict_on_batch(inputs)))
    # float32 sums of up to 256 terms in another order: 256 x 2^-24 of values around 1
    np.testing.assert_allclose(results[0], results[1], atol=2e-4)


def test_generate_runs_and_equals_the_unsharded_model(plan: Plan, keras: Any) -> None:
    tokens = np.random.default_rng(3).integers(1, VOCABULARY, (BATCH, 8)).astype("int32")
    prompt = {
        "token_ids": np.pad(tokens, ((0, 0), (0, 8))),
        "padding_mask": np.pad(np.ones_like(tokens), ((0, 0), (0, 8))),
    }
    results = []
    for distribution in (None, plan.distribution()):
        keras.distribution.set_distribution(distribution)
        model = causal_lm(keras)
        randomise(model)
        model.compile(sampler="greedy")
        results.append(np.asarray(model.generate(prompt, stop_token_ids=None)["token_ids"]))
    assert (results[0][:, :8] == tokens).all()
    assert (results[0] == results[1]).all()


def test_layers_without_names_are_told_and_another_model_with_them_is_refused(keras: Any) -> None:
    def unnamed() -> Any:
        dense = [keras.layers.Dense(512), keras.layers.Dense(512), keras.layers.Dense(10)]
        return keras.Sequential([keras.Input((64,)), *dense])

    with pytest.warns(UserWarning, match="Keras made up dense"):
        plan = autoshard.plan(unnamed(), "2x4")
    assert plan.rules
    with pytest.raises(PlanFileError, match="takes nothing of sequential"):
        plan.partition_specs(unnamed())
