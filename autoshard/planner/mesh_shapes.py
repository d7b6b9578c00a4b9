"""The choice of the mesh's shape: every way to arrange the devices in two axes is planned.

A layout is worth showing where no other, of any shape, is both faster and smaller.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autoshard.errors import MeshError
from autoshard.hardware.targets import Target
from autoshard.mesh import Mesh, parse_mesh, round_up
from autoshard.model.workload import DEFAULT_BATCH
from autoshard.planner.planning import Planning, run_planner
from autoshard.planner.setup import Setup, make_setup
from autoshard.planner.stopwatch import Stopwatch
from autoshard.planner.tracing import TracedModel
from autoshard.search.descent import Scored
from autoshard.units import whole_number
from autoshard.xla.attached import attached_target

__all__ = ["Tradeoff", "make_setups", "mesh_shapes", "plan_shapes", "tradeoffs"]

# A layout that saves less than this share of memory is not worth a line.
_SAVING = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Tradeoff:
    """A layout that no other beats in both time and memory.

    Attributes:
        mesh: its mesh.
        scored: the layout and its cost.
    """

    mesh: Mesh
    scored: Scored


def mesh_shapes(n_devices: int) -> tuple[Mesh, ...]:
    """Every mesh of a data axis and a model axis over so many devices.

    >>> [str(mesh) for mesh in mesh_shapes(8)]
    ['1x8', '2x4', '4x2', '8x1']
    """
    if n_devices < 1:
        raise MeshError(f"{n_devices} devices are no mesh; give one or more")
    parse_mesh(f"1x{n_devices}")  # refuses too many
    sizes = (size for size in range(1, n_devices + 1) if n_devices % size == 0)
    return tuple(parse_mesh(f"{size}x{n_devices // size}") for size in sizes)


def make_setups(
    n_devices: int,
    *,
    axes: Sequence[str] | None = None,
    target: str | Target | None = None,
    batch: int | None = None,
    **options: Any,
) -> tuple[Setup, ...]:
    """A setup for each shape over whose data axis the batch divides.

    Args:
        n_devices: how many devices.
        axes: names of the two axes, the data axis first.
        target: as for `make_setup`.
        batch: sequences of the global batch; by default 8, or what every shape divides.
        **options: as for `make_setup`.

    Raises:
        MeshError: the axes are not two.
        UsageError: a number is not whole.
    """
    if axes is not None and len(axes) != 2:
        raise MeshError(
            f"devices are arranged in two axes, and {len(axes)} names are given; name two, or give "
            "the mesh"
        )
    n_devices, batch = whole_number("devices", n_devices), whole_number("batch", batch)
    shapes = mesh_shapes(n_devices)
    batch = round_up(DEFAULT_BATCH, n_devices) if batch is None else batch
    if target == "attached":  # asked for once
        target = attached_target()
    return tuple(
        make_setup(
            str(mesh),
            axes=axes,
            target=target,
            batch=batch,
            **options,
        )
        for mesh in shapes
        if batch % mesh.n_data == 0
    )


def plan_shapes(
    traced: TracedModel, setups: Sequence[Setup], *, top: int, watch: Stopwatch
) -> tuple[Planning, ...]:
    """Plan a model on every mesh, the best first.

    Args:
        traced: the model.
        setups: one a mesh, else alike.
        top: how many layouts to keep of each.
        watch: measures the stages.
    """
    found = []
    for setup in setups:
        watch.progress(f"mesh {setup.mesh}")
        found.append(run_planner(traced, setup, top=top, watch=watch))
    return tuple(sorted(found, key=lambda planning: planning.best.rank))


def tradeoffs(plannings: Sequence[Planning]) -> tuple[Tradeoff, ...]:
    """The Pareto set of time and memory over all meshes, the fastest first.

    Where something fits, what does not is left out.
    """
    every = [
        Tradeoff(mesh=planning.setup.mesh, scored=scored)
        for planning in plannings
        for scored in planning.result.front
    ]
    every = [one for one in every if not one.scored.excess_bytes] or every
    every.sort(key=lambda one: (one.scored.cost.step_seconds, one.scored.cost.memory.peak_bytes))
    kept: list[Tradeoff] = []
    for one in every:
        peak = one.scored.cost.memory.peak_bytes
        if not kept or peak < (1 - _SAVING) * kept[-1].scored.cost.memory.peak_bytes:
            kept.append(one)
    return tuple(kept)
