"""The collectives of a partitioned program: kind, bytes, devices, layer, and what they block.

A collective is one movement of one logical array. An operation that moves several arrays at once
(XLA combines all-reduces) becomes one value for each of them; the first carries the launch.

`n_bytes` is the whole logical array at one device: an all-reduce's and a permute's buffer, an
all-gather's result, a reduce-scatter's input, an all-to-all's local buffer.

What runs beside the computation: `-start`/`-done` pairs (unless marked as synchronous, or with next
to nothing between them), and the asynchronous collectives that the TPU compiler puts inside
fusions, of which it makes several clones with one channel: a channel is counted once. An
`all-reduce-scatter` fusion is a reduce-scatter, and blocks; those that sum several arrays share
a channel, and each counts. A plain operation blocks.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from autoshard.hardware.collectives import KINDS, wire_bytes
from autoshard.mesh import Mesh
from autoshard.xla.groups import Groups, axes_of, parse_groups, parse_pairs
from autoshard.xla.hlo import Computation, HloModule, Instruction, Shape
from autoshard.xla.loops import execution_counts
from autoshard.xla.names import alternatives, layer_of, phase_of, template

__all__ = [
    "Collective",
    "Site",
    "collective_sites",
    "estimated_cycles",
    "merge_collectives",
    "read_collectives",
]

_NO_WORK = frozenset({"bitcast", "constant", "get-tuple-element", "parameter", "tuple"})
# One buffer in as many pieces as there are devices, not several arrays.
_ONE_BUFFER = ("all-to-all",)
# What the TPU compiler writes for an instruction whose cycles it cannot tell.
_NO_ESTIMATE = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """Movements of one logical array between the devices of a group.

    Attributes:
        kind: `all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all` or `collective-permute`.
        n_bytes: bytes of the whole logical array at one device.
        dtype: element type as HLO names it, the target's (see `autoshard.xla.normalise`).
        group_size: devices that take part in one group.
        axis: the mesh axes between whose devices it runs, joined by commas.
        layer: path of the layer that it belongs to, or its template; empty where XLA says none.
        phase: `forward`, `backward` or `update`.
        overlapped: whether it runs beside the computation.
        count: how often the array is moved in one step.
        launches: how often an operation starts for it (0 for further arrays of a combined one).
    """

    kind: str
    n_bytes: int
    dtype: str
    group_size: int
    axis: str
    layer: str
    phase: str
    overlapped: bool
    count: int = 1
    launches: int = 1

    @property
    def wire_bytes(self) -> float:
        """Bytes through one device, all executions together, by the ring formulas."""
        return self.count * wire_bytes(self.kind, self.n_bytes, self.group_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One array that a collective moves, with its place in the text.

    Attributes:
        kind: as `Collective.kind`.
        computation: the computation that holds `instruction`.
        instruction: the collective's own line.
        index: which of the operation's arrays this is.
        shape: the whole array, as `Collective.n_bytes` counts it.
        op_name: its name stack.
        times: how often it runs in one step.
        overlapped: whether it runs beside the computation.
    """

    kind: str
    computation: Computation
    instruction: Instruction
    index: int
    shape: Shape
    op_name: str
    times: int
    overlapped: bool


def read_collectives(
    module: HloModule,
    mesh: Mesh,
    layers: Mapping[str, str] | None = None,
    normalise: Callable[[Site], Site] | None = None,
) -> tuple[Collective, ...]:
    """Read every collective of a program that `mesh.n_devices` devices run together.

    Args:
        module: the partitioned, optimised program.
        mesh: the mesh whose row-major positions are the program's partitions.
        layers: the model's layers (`autoshard.xla.names.layer_paths`), to attribute collectives to.
        normalise: turns a site into what the target would do in its place.

    Returns:
        The collectives, equal ones merged, those of the entry computation before those of loops.
    """
    differentiated = any("transpose(" in i.op_name for c in module for i in c.instructions)
    found: list[Collective] = []
    for raw in collective_sites(module, mesh.n_devices):
        site = normalise(raw) if normalise else raw
        groups = _groups(site, mesh)
        if max(map(len, groups), default=1) == 1:
            continue
        axes = axes_of(groups, mesh)
        found.append(
            Collective(
                kind=site.kind,
                n_bytes=site.shape.n_bytes,
                dtype=site.shape.dtype,
                group_size=_group_size(site, groups, axes, mesh),
                axis=",".join(axes),
                layer=layer_of(site.op_name, layers or {}),
                phase=phase_of(site.op_name, differentiated=differentiated),
                overlapped=site.overlapped,
                count=site.times,
                launches=site.times if site.index == 0 else 0,
            )
        )
    return merge_collectives(found)


def merge_collectives(
    collectives: Iterable[Collective], blocks: Collection[str] = ()
) -> tuple[Collective, ...]:
    """Add up the counts of collectives that are equal but for them.

    Args:
        collectives: any collectives.
        blocks: templates of repeated blocks; layers that differ only in the index are one.
    """
    merged: dict[Collective, tuple[int, int]] = {}
    for collective in collectives:
        layer = template(collective.layer, blocks)
        key = replace(collective, layer=layer, count=1, launches=1)
        count, launches = merged.get(key, (0, 0))
        merged[key] = (count + collective.count, launches + collective.launches)
    return tuple(replace(k, count=c, launches=n) for k, (c, n) in merged.items())


def estimated_cycles(module: HloModule) -> int | None:
    """The compiler's own estimate of the cycles of a step, loops included; None without one.

    A fusion's cycles cover what is inside it, so only scheduled instructions are added. Where the
    compiler has no estimate of one, as of the softmax of 8,192 tokens, it gives the largest number
    there is: then there is none of the step.
    """
    total = 0
    for name, times in execution_counts(module).items():
        cycles = [one.estimated_cycles for one in module.computations[name].instructions]
        if max(cycles, default=0) >= _NO_ESTIMATE:
            return None
        total += times * sum(cycles)
    return total or None


def collective_sites(module: HloModule, n_devices: int) -> Iterator[Site]:
    """Find the arrays that a program's collectives move, computation by computation."""
    seen: set[tuple[str, int] | None] = set()
    for name, times in execution_counts(module).items():
        computation = module.computations[name]
        # An async-start calls a computation of its own that holds the collective.
        asynchronous = any(
            i.opcode == "async-start" and name in i.called
            for caller in module
            for i in caller.instructions
        )
        for instruction in computation.instructions:
            for site in _sites(computation, instruction, instruction.op_name, times, n_devices):
                yield replace(site, overlapped=site.overlapped or asynchronous)
            if instruction.opcode == "fusion":
                sites = list(_fused(module, instruction, times, n_devices))
                yield from (site for site in sites if _clone_key(site) not in seen)
                seen.update(filter(None, map(_clone_key, sites)))


def _clone_key(site: Site) -> tuple[str, int] | None:
    """What the clones of one asynchronous collective share; None where it has none."""
    channel = site.instruction.channel
    return (site.kind, channel) if site.overlapped and channel else None


def _fused(module: HloModule, fusion: Instruction, times: int, n_devices: int) -> Iterator[Site]:
    for name in fusion.called:
        computation = module.computations[name]
        for inner in computation.instructions:
            op_name = inner.op_name or fusion.op_name
            for site in _sites(computation, inner, op_name, times, n_devices):
                if "all-reduce-scatter" in name and site.kind == "all-reduce":
                    yield replace(site, kind="reduce-scatter", overlapped=False)
                else:
                    yield replace(site, overlapped=True)
            if inner.opcode == "fusion":
                yield from _fused(module, inner, times, n_devices)


def _sites(
    computation: Computation, instruction: Instruction, op_name: str, times: int, n_devices: int
) -> Iterator[Site]:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return
    started = instruction.opcode.endswith("-start")
    overlapped = started and _runs_beside_work(computation, instruction)
    shapes = _moved(kind, started, instruction, n_devices)
    for index, shape in enumerate(shapes):
        yield Site(
            kind=kind,
            computation=computation,
            instruction=instruction,
            index=index,
            shape=shape,
            op_name=_array_name(computation, instruction, op_name, index, len(shapes)),
            times=times,
            overlapped=overlapped,
        )


def _runs_beside_work(computation: Computation, start: Instruction) -> bool:
    """Whether what runs before a collective ends reads and writes as many bytes as it moves.

    The GPU compiler makes any collective asynchronous, and beside some it runs no more than what
    prepares the scale of the next norm. The permutations of a ring have its matmul beside them,
    wherever each one ends.
    """
    if '"is_sync":true' in start.attributes:
        return False
    if start.opcode.startswith("collective-permute"):
        return True
    missing = sum(shape.n_bytes for shape in start.shapes)
    known = computation.by_name
    after = itertools.dropwhile(lambda one: one is not start, computation.instructions)
    for instruction in itertools.islice(after, 1, None):
        if instruction.opcode.endswith("-done") and start.name in instruction.operands:
            return False
        if instruction.opcode not in _NO_WORK:
            read = [known[name] for name in instruction.operands if name in known]
            missing -= sum(shape.n_bytes for one in (instruction, *read) for shape in one.shapes)
            if missing <= 0:
                return True
    return False


def _moved(kind: str, started: bool, instruction: Instruction, n_devices: int) -> tuple[Shape, ...]:
    """The logical arrays that the instruction moves, each as `Collective.n_bytes` wants it."""
    shapes = instruction.shapes
    if started and kind in ("all-gather", "collective-permute", "reduce-scatter"):
        # The result of a start is (operands, results, contexts): take the results.
        arrays = len(instruction.operands) or 1
        shapes = shapes[arrays : 2 * arrays]
    if kind == "reduce-scatter":
        size = max(map(len, parse_groups(instruction.attributes, n_devices)))
        return tuple(replace(s, dimensions=(size, *s.dimensions)) for s in shapes)
    if kind in _ONE_BUFFER and len(shapes) > 1:
        return (replace(shapes[0], dimensions=(len(shapes), *shapes[0].dimensions)),)
    return shapes


def _groups(site: Site, mesh: Mesh) -> Groups:
    attributes = site.instruction.attributes
    if site.kind == "collective-permute":
        return tuple(pair for pair in parse_pairs(attributes) if pair[0] != pair[1])
    return parse_groups(attributes, mesh.n_devices)


def _group_size(site: Site, groups: Groups, axes: tuple[str, ...], mesh: Mesh) -> int:
    if site.kind != "collective-permute":
        return max(map(len, groups))
    size = 1
    for axis in axes:
        size *= mesh.sizes[axis]
    return size


def _array_name(
    computation: Computation, instruction: Instruction, op_name: str, index: int, n_arrays: int
) -> str:
    """The name stack of the `index`-th array that an operation moves."""
    names = alternatives(op_name)
    if op_name and (n_arrays == 1 or len(names) == n_arrays):
        # XLA writes the names of what it combined in the order of the operands.
        return names[index] if n_arrays > 1 else op_name
    name: str | None = instruction.operands[index]
    # Between the array and its maker stand at most a few changes of layout.
    for _ in range(8):
        maker = computation.by_name.get(name or "")
        if maker is None or maker.op_name:
            break
        name = maker.operands[0] if len(maker.operands) == 1 else None
    return maker.op_name if maker else names[0]
