"""What would make a step fit that does not: changes of the request, each planned in turn."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from autoshard.errors import MeshError, ModelError, UsageError
from autoshard.hardware.targets import target_of
from autoshard.mesh import Mesh, round_up
from autoshard.model.workload import DEFAULT_LORA_RANK
from autoshard.planner.planning import Planning, run_planner
from autoshard.planner.pricing import make_scorer
from autoshard.planner.setup import Setup
from autoshard.planner.stopwatch import Stopwatch
from autoshard.planner.tracing import TracedModel, trace_model
from autoshard.search.candidates import family_choices, smallest_shards

__all__ = ["Remedy", "remedies"]

_MOST_DOUBLINGS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A change of the request under which the step fits.

    Attributes:
        change: the options to give, such as `--batch 2`.
        step_seconds: predicted.
        peak_bytes: predicted, of one device.
    """

    change: str
    step_seconds: float
    peak_bytes: int

    @property
    def arguments(self) -> str:
        """The change as arguments of `autoshard.plan`, such as `batch=2`."""
        return re.sub(r"--(\S+) (\S+)", _argument, self.change)


def _argument(option: re.Match[str]) -> str:
    name, value = option[1].replace("-", "_"), option[2]
    return f"{name}={value if value.isdecimal() else repr(value)}"


def remedies(model: Any, traced: TracedModel, setup: Setup, watch: Stopwatch) -> tuple[Remedy, ...]:
    """The least change of each kind under which a layout keeps the memory limit.

    Args:
        model: what `autoshard.plan` takes.
        traced: the same, its step that of the setup.
        setup: the request for which no layout fits.
        watch: announces each change.
    """
    found = []
    for changes in (_adapted(setup), _smaller_batches(setup), _more_devices(setup)):
        for change, changed in changes:
            watch.progress(f"try {change}")
            same = changed.workload == setup.workload
            try:
                planned = (
                    traced if same else trace_model(model, changed.workload, setup.target.chip)
                )
            except (ModelError, UsageError):
                break  # the model has no such step
            if _held_bytes(planned, changed) > changed.memory_limit:
                continue
            remedy = _remedy(change, run_planner(planned, changed, top=1))
            if remedy is not None:
                found.append(remedy)
                break
    return tuple(found)


def _held_bytes(traced: TracedModel, setup: Setup) -> int:
    """What weights and slots take on a device at the least, their shards the smallest.

    Where that alone is too much, no layout fits, and none is searched for.
    """
    scorer = make_scorer(traced.program, setup)
    shards = smallest_shards(family_choices(traced.program, setup.mesh), setup.mesh)
    memory = scorer.score(shards).cost.memory
    return memory.weights + memory.optimizer


def _remedy(change: str, planning: Planning) -> Remedy | None:
    if planning.best.excess_bytes:
        return None
    cost = planning.best.cost
    return Remedy(change=change, step_seconds=cost.step_seconds, peak_bytes=cost.memory.peak_bytes)


def _adapted(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """Low-rank factors in place of the whole model, with a smaller batch if need be."""
    if setup.workload.kind == "train":
        workload = replace(setup.workload, kind="lora", lora_rank=DEFAULT_LORA_RANK)
        adapted = replace(setup, workload=workload)
        name = f"--workload lora --lora-rank {DEFAULT_LORA_RANK}"
        yield name, adapted
        for smaller, changed in _smaller_batches(adapted):
            yield f"{name} {smaller}", changed


def _smaller_batches(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """Half the batch, and half of that, as long as the data axis divides it."""
    n_data = setup.mesh.sizes[setup.mesh.data_axis]
    batch = setup.workload.batch
    while batch % 2 == 0 and (batch // 2) % n_data == 0:
        batch //= 2
        workload = replace(setup.workload, batch=batch)
        yield f"--batch {batch}", replace(setup, workload=workload)


def _more_devices(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """Twice the devices of the same chip along the last axis, and twice that."""
    mesh, n_slices = setup.mesh, setup.target.n_slices
    for _ in range(_MOST_DOUBLINGS):
        try:
            mesh = Mesh(shape=(*mesh.shape[:-1], 2 * mesh.shape[-1]), axis_names=mesh.axis_names)
            one = target_of(setup.target.chip, mesh.n_devices // n_slices)
        except MeshError:  # more devices than there are
            return
        target = replace(one, n_slices=n_slices * one.n_slices)
        n_data = mesh.sizes[mesh.data_axis]
        batch = round_up(setup.workload.batch, n_data)
        change = f"--mesh {mesh} --target {target} --batch {batch}"
        change += " in place of slices" if n_slices > 1 else ""
        workload = replace(setup.workload, batch=batch)
        yield change, replace(setup, mesh=mesh, target=target, workload=workload)
