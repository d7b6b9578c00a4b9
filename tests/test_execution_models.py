"""Models of several kinds, run under a layout on several meshes: the layout changes no result."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoshard.execution.agreement import compare
from autoshard.execution.placement import placed_by
from autoshard.execution.requests import Part, PartOutcome, RunRequest
from autoshard.execution.tolerance import tolerance_of
from autoshard.execution.worker import run_part
from autoshard.layout.distribution import keras_distribution
from autoshard.layout.rules import LayoutRules, Rule
from autoshard.mesh import Mesh, parse_mesh
from autoshard.model.build import build
from autoshard.model.loading import sharded_loading
from autoshard.model.recipe import AbstractModel
from autoshard.model.values import with_values
from autoshard.model.workload import Workload

BATCH = 4
MESHES = ("1x8", "2x4")
MODELS = ("gemma", "gemma4", "llama", "mixtral", "bart", "bert", "vit")
GENERATING = ("gemma", "gemma4", "llama", "mixtral", "bart")
RUNS = [
    (model, part)
    for model in MODELS
    for part in ("predict", "generate", "fit")
    if part != "generate" or model in GENERATING
]


@pytest.fixture(autouse=True)
def no_distribution() -> Iterator[None]:
    yield
    import keras

    keras.distribution.set_distribution(None)


@cache
def described(name: str) -> AbstractModel:
    return build(f"small_models:{name}", dtype="float32")


def split_all(model: AbstractModel, mesh: Mesh) -> LayoutRules:
    """A rule for each variable: its first dimension that the last mesh axis divides is split."""
    size, axis = mesh.shape[-1], mesh.axis_names[-1]
    rules = []
    for variable in model.table().variables:
        divisible = [i for i, n in enumerate(variable.shape) if n % size == 0]
        if divisible:
            spec = tuple(axis if i == divisible[0] else None for i in range(len(variable.shape)))
            rules.append(Rule(pattern=variable.path, spec=spec))
    return tuple(rules)


def asked(name: str, part: Part, mesh: Mesh | None, rules: LayoutRules = ()) -> RunRequest:
    workload = Workload(
        kind="train" if part == "fit" else "prefill", batch=BATCH, seq_len=16, dtype="float32"
    )
    return RunRequest(
        part=part,
        model=f"small_models:{name}",
        workload=workload,
        mesh=mesh,
        rules=rules,
        with_margins=mesh is None,
    )


def ran(request: RunRequest) -> PartOutcome:
    return run_part(request, lambda stage: None)


@cache
def unsharded(name: str, part: Part) -> PartOutcome:
    return ran(asked(name, part, None))


@pytest.mark.parametrize("text", MESHES)
@pytest.mark.parametrize(("name", "part"), RUNS)
def test_a_layout_changes_where_weights_lie_and_no_result(name: str, part: Part, text: str) -> None:
    mesh, model = parse_mesh(text), described(name)
    rules = split_all(model, mesh)
    found = ran(asked(name, part, mesh, rules))
    assert found.placed is not None
    assert not found.placed.misplaced
    assert found.placed.n_split == len(rules) > 0
    reference = unsharded(name, part).arrays
    agreements = compare(part, found.arrays, reference, tolerance_of(model), 4)
    assert agreements
    assert all(item.holds for item in agreements), agreements
    if part == "fit":
        losses = found.arrays["losses"]
        assert len(losses) == 3
        assert losses[-1] < losses[0]


# Keras' save_weights copies its variables by a protocol of numpy 1.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
@pytest.mark.parametrize("text", MESHES)
@pytest.mark.parametrize("name", MODELS)
def test_weights_are_saved_and_loaded_under_a_layout(name: str, text: str, tmp_path: Path) -> None:
    mesh, rules = parse_mesh(text), split_all(described(name), parse_mesh(text))
    file = str(tmp_path / "model.weights.h5")
    import jax

    distribution = keras_distribution(rules, mesh, jax.devices())
    with distribution.scope():
        model = with_values(described(name), seed=1).model
        values = [np.asarray(weight.value) for weight in model.weights]
        model.save_weights(file)
        for load in (lambda: model.load_weights(file), lambda: loaded_in_shards(model, file)):
            for weight in model.weights:
                weight.assign(np.zeros(weight.shape, weight.dtype))
            load()
            for weight, value in zip(model.weights, values, strict=True):
                np.testing.assert_array_equal(np.asarray(weight.value), value, weight.path)
            assert not placed_by(model, rules, distribution.device_mesh).misplaced


def loaded_in_shards(model: Any, file: str) -> None:
    with sharded_loading():
        model.load_weights(file)


def test_a_weight_that_lies_otherwise_is_named() -> None:
    import jax

    mesh, model = parse_mesh("1x8"), described("gemma")
    rules = split_all(model, mesh)
    first, *others = rules
    distribution = keras_distribution(others, mesh, jax.devices())
    with distribution.scope():
        built = with_values(model, seed=1).model
        found = placed_by(built, rules, distribution.device_mesh)
    assert found.n_split == len(rules)
    (line,) = found.misplaced
    assert line.startswith(f"{first.pattern} lies as ")
    assert line.endswith('planned ("model", None)')
