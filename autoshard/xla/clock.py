"""The time of a compiled step on its chip.

    compute     the TPU compiler's estimated cycles / the chip's clock; elsewhere what is predicted
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

__all__ = ["StepTime", "collective_seconds", "link_of", "step_time"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of one step, by what takes them.

    Attributes:
        compute_seconds: computation.
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


def step_time(
    step: CompiledStep, mesh: Mesh | None = None, *, compute_seconds: float | None = None
) -> StepTime:
    """Time a compiled program.

    Args:
        step: the program.
        mesh: given to time collectives on the links that this mesh's axes have, instead of on a
            plain ring.
        compute_seconds: what its computation takes where the compiler counts no cycles, as that
            of GPUs.

    Raises:
        XlaError: neither says what the computation takes.
    """
    target = parse_target(step.target)
    if step.estimated_cycles is not None and target.chip.clock_hz is not None:
        compute_seconds = step.estimated_cycles / target.chip.clock_hz
    if compute_seconds is None:
        raise XlaError(f"the compiler for '{step.target}' estimates no time")
    link = _links(target, mesh) if mesh else _rings(target.chip)
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
