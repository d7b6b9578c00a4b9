"""The time of a compiled step on its chip.

    compute     the TPU compiler's estimated cycles / the chip's clock
    collectives ring formulas (`autoshard.hardware.collectives`) over a plain ring of the group:
                2 x the one-way link bandwidth, 1 us a device of the group on TPUs
    time      = compute + blocking + max(0, overlapped - compute)

Overlap is taken as perfect: what runs beside the computation costs only what it exceeds it by. An
operation that moves several arrays pays its latency once.

With a mesh the collectives are timed on the links that its axes really have, across slices and
nodes too. The plain ring makes verdicts on one chip comparable whatever the mesh.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from autoshard.cost.values import step_seconds
from autoshard.errors import XlaError
from autoshard.hardware.chips import Chip
from autoshard.hardware.collectives import seconds
from autoshard.hardware.links import AxisLink, group_link, ring_link
from autoshard.hardware.targets import Target, parse_target
from autoshard.mesh import Mesh
from autoshard.xla.collectives import Collective
from autoshard.xla.compiled import CompiledStep

__all__ = ["StepTime", "collective_seconds", "link_of", "step_time", "step_time_beside"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of one step, by what takes them.

    Attributes:
        compute_seconds: computation, by the compiler's cycles.
        blocking_seconds: collectives that nothing runs beside.
        overlapped_seconds: collectives that run beside the computation.
    """

    compute_seconds: float
    blocking_seconds: float
    overlapped_seconds: float

    @property
    def step_seconds(self) -> float:
        """Time of the step, as the cost model has it."""
        return step_seconds(self.compute_seconds, self.blocking_seconds, self.overlapped_seconds)


def step_time(step: CompiledStep, mesh: Mesh | None = None) -> StepTime:
    """Time a program of the TPU compiler.

    Args:
        step: the program.
        mesh: given to time collectives on the links that this mesh's axes have, instead of on a
            plain ring.

    Raises:
        XlaError: the compiler gave no cycles, as for `cpu`.
    """
    target = parse_target(step.target)
    clock = target.chip.clock_hz
    if step.estimated_cycles is None or clock is None:
        raise XlaError(f"the compiler for '{step.target}' estimates no time")
    link = _links(target, mesh) if mesh else _rings(target.chip)
    return _timed(step, step.estimated_cycles / clock, link)


def step_time_beside(step: CompiledStep, compute_seconds: float, mesh: Mesh) -> StepTime:
    """Time a program whose compiler counts no cycles, as the GPU's.

    Args:
        step: the program.
        compute_seconds: what its computation takes, from elsewhere.
        mesh: the collectives are timed on the links of its axes.
    """
    return _timed(step, compute_seconds, _links(parse_target(step.target), mesh))


def _timed(
    step: CompiledStep, compute_seconds: float, link: Callable[[Collective], AxisLink]
) -> StepTime:
    by_overlap = {True: 0.0, False: 0.0}
    for collective in step.collectives:
        by_overlap[collective.overlapped] += collective_seconds(collective, link(collective))
    return StepTime(
        compute_seconds=compute_seconds,
        blocking_seconds=by_overlap[False],
        overlapped_seconds=by_overlap[True],
    )


def collective_seconds(collective: Collective, link: AxisLink) -> float:
    """Seconds of all executions of a collective over a link."""
    once = seconds(collective.kind, collective.n_bytes, link)
    # The formula is affine in the bytes: at zero bytes the latency is left.
    latency = seconds(collective.kind, 0, link)
    return collective.count * (once - latency) + collective.launches * latency


def link_of(collective: Collective, mesh: Mesh, target: Target) -> AxisLink:
    """What a collective runs on: the links of its axes, for as many devices as its groups have."""
    link = group_link(collective.axis.split(","), mesh, target)
    return replace(link, size=collective.group_size)


def _rings(chip: Chip) -> Callable[[Collective], AxisLink]:
    return lambda collective: ring_link(chip, collective.group_size, collective.axis)


def _links(target: Target, mesh: Mesh) -> Callable[[Collective], AxisLink]:
    return lambda collective: link_of(collective, mesh, target)
