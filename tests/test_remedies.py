"""Where nothing fits: the changes that would, each true."""

from types import SimpleNamespace
from typing import Any

import keras
import pytest
from test_end_to_end import small_gemma_backbone

from autoshard.errors import NothingFitsError
from autoshard.mesh import parse_mesh
from autoshard.pipeline import make_plan, plan
from autoshard.planner.remedies import (
    Advice,
    _more_devices,
    _other_shapes,
    _smaller_batches,
    as_options,
    remedies,
)
from autoshard.planner.setup import Setup, make_setup
from autoshard.planner.stopwatch import Stopwatch
from autoshard.planner.tracing import trace_model
from autoshard.report.plan import plan_text

# On a GPU: a TPU's core would hold all activations of so small a model beside its memory.
REQUEST = {
    "mesh": "1x2",
    "target": "gpu:h100-sxm:2",
    "dtype": "float32",
    "seq_len": 16,
    "memory_limit": "700kB",
}


def test_every_remedy_fits_when_it_is_asked_for() -> None:
    outcome = make_plan(small_gemma_backbone, **REQUEST)
    assert not outcome.plan.fits
    assert [next(iter(one.change)) for one in outcome.advice.remedies] == [
        "workload",
        "batch",
        "mesh",
    ]
    for remedy in outcome.advice.remedies:
        changed = make_plan(small_gemma_backbone, **{**REQUEST, **remedy.change})
        assert changed.plan.fits, remedy
        assert changed.plan.predicted.peak_bytes_per_device == remedy.peak_bytes


def test_more_devices_on_the_data_axis_come_with_the_batch_they_divide() -> None:
    request = {**REQUEST, "mesh": "2", "batch": 2, "memory_limit": "500kB"}
    outcome = make_plan(small_gemma_backbone, **request)
    (remedy,) = [one for one in outcome.advice.remedies if "mesh" in one.change]
    changed = make_plan(small_gemma_backbone, **{**request, **remedy.change})
    assert changed.plan.fits
    assert changed.plan.predicted.peak_bytes_per_device == remedy.peak_bytes


def test_none_is_searched_for_where_weights_alone_are_too_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setup = make_setup(**{**REQUEST, "memory_limit": "2kB"})
    traced = trace_model(small_gemma_backbone, setup.workload, setup.target.chip)
    monkeypatch.setattr("autoshard.planner.remedies.run_planner", None)
    tried: list[str] = []
    watch = Stopwatch(progress=tried.append)
    assert remedies(small_gemma_backbone, traced, setup, 0, watch) == Advice(
        in_vain=(
            {"generate": False},
            {"mesh": "2x1"},
            {"workload": "lora", "lora_rank": 4, "batch": 1},
            {"batch": 1},
            {"mesh": "1x32", "target": "gpu:h100-sxm:4x8", "batch": 8},
        )
    )
    assert "try --batch 1" in tried


def test_what_cannot_be_enough_is_not_tried() -> None:
    tried: list[str] = []
    request = {**REQUEST, "batch": 100_000, "memory_limit": "5MB"}
    outcome = make_plan(small_gemma_backbone, **request, on_progress=tried.append)
    (batch,) = [one for one in outcome.advice.remedies if list(one.change) == ["batch"]]
    changed = make_plan(small_gemma_backbone, **{**request, **batch.change})
    assert changed.plan.fits
    # Sixteen halvings of the batch, as many of low-rank training, four doublings of the devices,
    # and another shape.
    assert sum(stage.startswith("try ") for stage in tried) <= 3 * 4 + 1


def test_where_no_change_helps_that_is_said() -> None:
    request = {**REQUEST, "memory_limit": "2kB"}
    with pytest.raises(NothingFitsError) as error:
        plan(small_gemma_backbone, **request)
    assert (
        "; nor does it fit, predicted, with generate=False, or mesh='2x1', or workload='lora', "
        "lora_rank=4, batch=1, or batch=1, or mesh='1x32', target='gpu:h100-sxm:4x8', batch=8;"
    ) in str(error.value)
    assert (
        "\n  nor does it fit, predicted, with --no-generate, or --mesh 2x1, or --workload lora "
        "--lora-rank 4 --batch 1, or --batch 1, or --mesh 1x32 --target gpu:h100-sxm:4x8 "
        "--batch 8\n"
    ) in plan_text(make_plan(small_gemma_backbone, **request))


def test_batches_that_do_not_halve_are_rounded_down() -> None:
    # 14 / 2 = 7, whose next smaller multiple of two is 6; then 3, and 2.
    offered = [change for change, _ in _smaller_batches(make_setup("2x4", batch=14))]
    assert offered == [{"batch": 6}, {"batch": 2}]


def test_more_gpus_than_a_node_has_are_several_nodes() -> None:
    change, changed = next(_more_devices(make_setup("1x8", target="gpu:h100-sxm:8")))
    assert change == {"mesh": "1x16", "target": "gpu:h100-sxm:2x8", "batch": 8}
    assert changed.target.n_devices == changed.mesh.n_devices == 16


def test_the_error_names_the_remedies() -> None:
    with pytest.raises(NothingFitsError, match="workload='lora', lora_rank=4, batch=4 would fit"):
        plan(small_gemma_backbone, **REQUEST)


def test_a_model_without_low_rank_factors_is_offered_the_rest() -> None:
    def dense() -> keras.Model:
        inputs = keras.Input((256,))
        hidden = keras.layers.Dense(1024, name="up")(inputs)
        return keras.Model(inputs, keras.layers.Dense(256, name="down")(hidden))

    outcome = make_plan(dense, "1x2", dtype="float32", memory_limit="3MB")
    assert not outcome.plan.fits
    assert [next(iter(one.change)) for one in outcome.advice.remedies] == ["mesh"]


def test_an_odd_part_of_the_last_axis_is_tried_along_the_first() -> None:
    offered = [change["mesh"] for change, _ in _more_devices(make_setup("1x12"))]
    assert offered[:4] == ["1x24", "3x8", "1x48", "3x16"]


def test_other_shapes_are_those_that_the_batch_divides_over() -> None:
    setup = make_setup("1x12", axes=["data", "model"])
    offered = {change["mesh"]: changed for change, changed in _other_shapes(setup, ())}
    assert list(offered) == ["2x6", "4x3"]
    assert offered["2x6"].mesh.axis_names == ("data", "model")
    (change, changed), *_ = _other_shapes(setup, [parse_mesh("2x6")])
    assert change == {"mesh": "4x3"}


def test_a_shape_is_tried_though_another_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def planned(traced: Any, setup: Setup, *, top: int, without_generate: bool) -> Any:
        fits = setup.mesh.shape == (8, 1)
        memory = SimpleNamespace(peak_bytes=10 if fits else 10**12)
        cost = SimpleNamespace(memory=memory, step_seconds=1.0)
        return SimpleNamespace(best=SimpleNamespace(cost=cost, excess_bytes=0 if fits else 1))

    monkeypatch.setattr("autoshard.planner.remedies.run_planner", planned)
    monkeypatch.setattr("autoshard.planner.remedies._held_bytes", lambda *_: 0)
    setup = make_setup("1x8")
    traced = trace_model(small_gemma_backbone, setup.workload, setup.target.chip)
    advice = remedies(small_gemma_backbone, traced, setup, 10**12, Stopwatch())
    assert {"mesh": "8x1"} in [remedy.change for remedy in advice.remedies]


def test_two_axes_in_place_of_three_come_with_their_names() -> None:
    setup = make_setup("2x2x2", axes=["batch", "seq", "model"])
    (change, changed), *_ = _other_shapes(setup, ())
    assert as_options(change) == "--mesh 2x4 --axes batch,model"
    assert make_setup(**change) == changed


def test_no_more_devices_are_offered_than_a_mesh_may_have() -> None:
    offered = [change for change, _ in _more_devices(make_setup("64x128"))]
    assert len(offered) == 3  # 65,536; the next doubling passes 100,000


def test_slices_are_not_multiplied_by_a_target_that_names_them() -> None:
    change, changed = next(_more_devices(make_setup("2x8", slices=2)))
    assert change == {"mesh": "2x16", "target": "tpu:v5e:4x4:2", "batch": 8, "slices": 1}
    assert make_setup(**change) == changed
