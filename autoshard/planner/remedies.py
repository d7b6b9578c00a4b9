"""What would make a step fit that does not: changes of the request, each planned in turn."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autoshard.errors import MeshError, ModelError, UsageError
from autoshard.hardware.targets import target_of
from autoshard.mesh import Mesh, round_up
from autoshard.model.workload import DEFAULT_LORA_RANK
from autoshard.planner.mesh_shapes import mesh_shapes
from autoshard.planner.planning import run_planner
from autoshard.planner.pricing import make_scorer
from autoshard.planner.setup import Setup
from autoshard.planner.stopwatch import Stopwatch
from autoshard.planner.tracing import TracedModel, trace_model
from autoshard.search.candidates import family_choices, smallest_shards

__all__ = ["Advice", "Change", "Remedy", "as_arguments", "as_options", "remedies"]

_MOST_DOUBLINGS = 4
# Of one kind; each traces the step and searches, a few seconds for a small model.
_MOST_TRIALS = 4

Change = Mapping[str, str | int | tuple[str, ...]]
"""Arguments of `autoshard.plan` to give in place of the request's."""

_Changes = Iterator[tuple[Change, Setup]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A change of the request under which the step fits.

    Attributes:
        change: the arguments to give, such as `{"batch": 2}`.
        step_seconds: predicted.
        peak_bytes: predicted, of one device.
    """

    change: Change
    step_seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What to change where nothing fits.

    Attributes:
        remedies: the least change of each kind under which the step fits.
        in_vain: of each other kind the furthest that was tried.
    """

    remedies: tuple[Remedy, ...] = ()
    in_vain: tuple[Change, ...] = ()

    def refusal(self, written: Callable[[Change], str]) -> str:
        """That nothing helps, in one line, or "" where something does or nothing was tried.

        Args:
            written: `as_options` or `as_arguments`.
        """
        if self.remedies or not self.in_vain:
            return ""
        return f"nor does it fit, predicted, with {', or '.join(map(written, self.in_vain))}"


def as_options(change: Change) -> str:
    """A change as options of `autoshard plan`.

    >>> as_options({"workload": "lora", "lora_rank": 4, "generate": False})
    '--workload lora --lora-rank 4 --no-generate'
    """
    return " ".join(_option(name.replace("_", "-"), value) for name, value in change.items())


def _option(name: str, value: str | int | tuple[str, ...]) -> str:
    if value is False:
        return f"--no-{name}"
    return f"--{name} {','.join(value) if isinstance(value, tuple) else value}"


def as_arguments(change: Change) -> str:
    """A change as arguments of `autoshard.plan`.

    >>> as_arguments({"workload": "lora", "lora_rank": 4})
    "workload='lora', lora_rank=4"
    """
    return ", ".join(f"{name}={value!r}" for name, value in change.items())


def remedies(
    model: Any,
    traced: TracedModel,
    setup: Setup,
    peak_bytes: int,
    watch: Stopwatch,
    planned: Sequence[Mesh] = (),
) -> Advice:
    """The least change of each kind under which a layout keeps the memory limit.

    Of other shapes of the mesh it is the one with the fastest step.

    Args:
        model: what `autoshard.plan` takes.
        traced: the same, its step that of the setup.
        setup: the request for which no layout fits.
        peak_bytes: predicted of the layout that is nearest to fitting.
        watch: announces each change.
        planned: other meshes of as many devices for which no layout fits either.
    """

    def trace(changed: Setup) -> TracedModel:
        if changed.workload == setup.workload:
            return traced
        return trace_model(model, changed.workload, setup.target.chip)

    # What an odd axis leaves whole tells nothing of the shards of another.
    has_odd_part = _even_part(setup.mesh) < setup.mesh.shape[-1]
    shapes = itertools.islice(_other_shapes(setup, planned), _MOST_TRIALS)
    found = [
        _first_that_fits(_without_generate(setup, traced), setup, None, trace, watch),
        _fastest([_first_that_fits(iter([shape]), setup, None, trace, watch) for shape in shapes]),
        _first_that_fits(_adapted(setup), setup, 0, trace, watch),
        _first_that_fits(_smaller_batches(setup), setup, peak_bytes, trace, watch),
        _first_that_fits(
            _more_devices(setup), setup, None if has_odd_part else peak_bytes, trace, watch
        ),
    ]
    return Advice(
        remedies=tuple(one for one in found if isinstance(one, Remedy)),
        in_vain=tuple(one for one in found if isinstance(one, Mapping)),
    )


def _fastest(tried: Sequence[Remedy | Change | None]) -> Remedy | Change | None:
    """Of several changes the one with the fastest step that fits; where none does, the last."""
    fitting = [one for one in tried if isinstance(one, Remedy)]
    return min(fitting, key=lambda one: one.step_seconds, default=tried[-1] if tried else None)


def _first_that_fits(
    changes: _Changes,
    tried: Setup,
    peak_bytes: int | None,
    trace: Callable[[Setup], TracedModel],
    watch: Stopwatch,
) -> Remedy | Change | None:
    """The first change under which the step fits, else the furthest that was tried, if any.

    Half the sequences, or twice the devices, take half the memory at the least: changes that
    cannot be enough are passed over.

    Args:
        changes: from small to large.
        tried: a request for which nothing fits.
        peak_bytes: predicted for that; 0 where it tells nothing of the first change, None where
            none tells anything of the next.
        trace: makes the step of a request.
        watch: announces each change.
    """
    furthest, n_trials = None, 0
    for change, changed in changes:
        if n_trials == _MOST_TRIALS:
            break
        share = min(1.0, changed.workload.batch / tried.workload.batch)
        share *= tried.mesh.n_devices / changed.mesh.n_devices
        if (peak_bytes or 0) * share > changed.memory_limit:
            furthest = change
            continue
        watch.progress(f"try {as_options(change)}")
        try:
            traced = trace(changed)
        except (ModelError, UsageError):
            break  # the model has no such step
        furthest, n_trials = change, n_trials + 1
        if _held_bytes(traced, changed) > changed.memory_limit:
            continue
        best = run_planner(traced, changed, top=1, without_generate=False).best
        needed = best.cost.memory.peak_bytes
        if not best.excess_bytes:
            seconds = best.cost.step_seconds
            return Remedy(change=change, step_seconds=seconds, peak_bytes=needed)
        if peak_bytes is not None:
            tried, peak_bytes = changed, needed
    return furthest


def _held_bytes(traced: TracedModel, setup: Setup) -> int:
    """What weights and slots take on a device at the least, their shards the smallest.

    Where that alone is too much, no layout fits, and none is searched for.
    """
    scorer = make_scorer(traced.program, setup)
    shards = smallest_shards(family_choices(traced.program, setup.mesh), setup.mesh)
    memory = scorer.score(shards).cost.memory
    return memory.weights + memory.optimizer


def _without_generate(setup: Setup, traced: TracedModel) -> _Changes:
    """Rules for outputs under which `generate` is slow or fails, where it was to be kept."""
    if setup.generate and traced.whole.generates:
        yield {"generate": False}, replace(setup, generate=False)


def _other_shapes(setup: Setup, planned: Sequence[Mesh]) -> _Changes:
    """The same devices in two axes of other lengths, those with about as long a data axis first."""
    n_data = setup.mesh.n_data
    known = {mesh.shape for mesh in (setup.mesh, *planned)}
    shapes = [
        mesh
        for mesh in mesh_shapes(setup.mesh.n_devices)
        if mesh.shape not in known and setup.workload.batch % mesh.n_data == 0
    ]
    for mesh in sorted(shapes, key=lambda mesh: abs(math.log(mesh.n_data / n_data))):
        change: dict[str, str | tuple[str, ...]] = {"mesh": str(mesh)}
        if len(setup.mesh.shape) == len(mesh.shape):
            mesh = replace(mesh, axis_names=setup.mesh.axis_names)
        else:
            change["axes"] = mesh.axis_names
        yield change, replace(setup, mesh=mesh)


def _adapted(setup: Setup) -> _Changes:
    """Low-rank factors in place of the whole model, with a smaller batch if need be."""
    if setup.workload.kind == "train":
        workload = replace(setup.workload, kind="lora", lora_rank=DEFAULT_LORA_RANK)
        adapted = replace(setup, workload=workload)
        change: Change = {"workload": "lora", "lora_rank": DEFAULT_LORA_RANK}
        yield change, adapted
        for smaller, changed in _smaller_batches(adapted):
            yield {**change, **smaller}, changed


def _smaller_batches(setup: Setup) -> _Changes:
    """Half the batch, and half of that, as far down as the data axis divides."""
    n_data = setup.mesh.n_data
    batch = setup.workload.batch
    while batch > n_data:
        batch = max(batch // 2 // n_data, 1) * n_data
        workload = replace(setup.workload, batch=batch)
        yield {"batch": batch}, replace(setup, workload=workload)


def _more_devices(setup: Setup) -> _Changes:
    """Twice the devices of the same chip along the last axis, and twice that.

    An odd part of that axis, which few dimensions divide by, is tried along the first one too.
    """
    n_slices, shape = setup.target.n_slices, setup.mesh.shape
    even = _even_part(setup.mesh)
    shapes = [shape]
    if even < shape[-1] and len(shape) > 1:
        shapes.append((shape[0] * shape[-1] // even, *shape[1:-1], even))
    doubled = (
        (*shape[:-1], shape[-1] * 2**n) for n in range(1, _MOST_DOUBLINGS + 1) for shape in shapes
    )
    for shape in doubled:
        try:
            mesh = replace(setup.mesh, shape=shape)
            one = target_of(setup.target.chip, mesh.n_devices // n_slices)
        except MeshError:  # more devices than there are
            return
        target = replace(one, n_slices=n_slices * one.n_slices)
        n_data = mesh.n_data
        batch = round_up(setup.workload.batch, n_data)
        change: dict[str, Any] = {"mesh": str(mesh), "target": str(target), "batch": batch}
        if n_slices > 1:  # the target says it; slices that were asked for would multiply it
            change["slices"] = 1
        workload = replace(setup.workload, batch=batch)
        yield change, replace(setup, mesh=mesh, target=target, workload=workload)


def _even_part(mesh: Mesh) -> int:
    """The largest power of two that divides the last axis."""
    return mesh.shape[-1] & -mesh.shape[-1]
