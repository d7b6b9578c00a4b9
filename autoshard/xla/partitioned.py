"""XLA's partitioner for CPU devices, read as the partitioner of the target.

It decides on the same collectives. But where the gradients of several matmuls that read one array
are partial sums (those of query, key and value), it reduces each, and the target's compiler adds
them first. Such are all-reduces of equal bytes in the backward pass, between the devices of one
data shard, of layers that stand side by side in a block; gradients of weights are sums over the
data axis.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from autoshard.cost.values import StepCost, step_seconds
from autoshard.hardware.targets import Target
from autoshard.mesh import Mesh
from autoshard.xla.clock import collective_seconds, link_of
from autoshard.xla.collectives import Collective
from autoshard.xla.compiled import CompiledStep
from autoshard.xla.names import template

__all__ = ["partitioned_seconds", "target_collectives"]

# Kind, mesh axis, bytes, whether of the backward pass.
_Key = tuple[str, str, int, bool]


def target_collectives(
    step: CompiledStep, data_axis: str, cost: StepCost | None = None
) -> tuple[Collective, ...]:
    """The collectives of a program as the target runs them.

    Args:
        step: the program.
        data_axis: name of the mesh axis that splits the data.
        cost: the prediction of it: what it foresees as bfloat16 the target rounds to that.
    """
    if not step.on_cpu:
        return step.collectives
    blocks = [stack.template for stack in step.blocks]
    apart: list[Collective] = []
    siblings: dict[tuple[object, ...], list[Collective]] = defaultdict(list)
    for one in step.collectives:
        if _may_be_added(one, data_axis) and "*" in template(_parent(one), blocks):
            siblings[one.axis, one.n_bytes, one.dtype, _parent(one)].append(one)
        else:
            apart.append(one)
    added = [max(several, key=lambda one: one.count) for several in siblings.values()]
    # Each moves on its own: how XLA for CPUs combines them into one launch is its own affair.
    moved = (replace(one, launches=one.count) for one in (*apart, *added))
    return tuple(moved if cost is None else _rounded(moved, cost))


def _rounded(collectives: Iterable[Collective], cost: StepCost) -> Iterator[Collective]:
    """With the gathers of float32 that are foreseen with half their bytes, and not with all."""
    foreseen = {(item.kind, item.axis, item.n_bytes) for item in cost.traffic}
    for one in collectives:
        sizes = [n for n in (one.n_bytes, one.n_bytes // 2) if (one.kind, one.axis, n) in foreseen]
        if one.kind == "all-gather" and one.dtype == "f32" and sizes == [one.n_bytes // 2]:
            yield replace(one, n_bytes=one.n_bytes // 2, dtype="bf16")
        else:
            yield one


def _parent(one: Collective) -> str:
    """The layer that holds the one it serves."""
    return one.layer.rpartition("/")[0]


def _may_be_added(one: Collective, data_axis: str) -> bool:
    within = data_axis not in one.axis.split(",")
    return one.kind == "all-reduce" and one.phase == "backward" and within


def partitioned_seconds(step: CompiledStep, cost: StepCost, mesh: Mesh, target: Target) -> float:
    """Predicted compute, with the partitioner's collectives on the target's links.

    Args:
        step: the program, compiled for CPU devices or by a compiler that counts no cycles.
        cost: the prediction of it. It says too which collectives the target hides behind compute,
            or which share of those of one size and pass; of those that it does not foresee, gathers
            block, as those of activations do, and the others go by their kind.
        mesh: the mesh.
        target: the chips.
    """
    foreseen: Counter[_Key] = Counter()
    beside_compute: Counter[_Key] = Counter()
    for item in cost.traffic:
        key = (item.kind, item.axis, item.n_bytes, item.backward)
        foreseen[key] += item.count
        beside_compute[key] += item.count * item.overlapped
    collectives = _folded(tuple(target_collectives(step, mesh.data_axis, cost)), foreseen, mesh)
    found = _counts(collectives)
    hidden = blocking = 0.0
    for one in collectives:
        key, link = _key(one), link_of(one, mesh, target)
        by_kind = one.kind != "all-gather" and one.kind in target.chip.overlapped_collectives
        share = beside_compute[key] / foreseen[key] if key in foreseen else float(by_kind)
        seconds = collective_seconds(one, link)
        if one.kind == "reduce-scatter":
            # Some the target sums whole: so many all-reduces are foreseen that are not there.
            whole = ("all-reduce", *key[1:])
            missing = min(1.0, max(0, foreseen[whole] - found[whole]) / found[key])
            share *= 1 - missing
            summed = collective_seconds(replace(one, kind="all-reduce"), link)
            blocking += missing * (summed - seconds)
        hidden += share * seconds
        blocking += (1 - share) * seconds
    return step_seconds(cost.compute_seconds, blocking, hidden)


def _folded(
    collectives: Sequence[Collective], foreseen: Mapping[_Key, int], mesh: Mesh
) -> Sequence[Collective]:
    """With the all-reduces, axis after axis, that the target is foreseen to do over several."""
    groups = {tuple(axis.split(",")) for kind, axis, *_ in foreseen if kind == "all-reduce"}
    for axes in sorted(groups, key=lambda axes: (-len(axes), axes)):
        if len(axes) > 1 and set(axes) <= set(mesh.parallel_axes):
            collectives = list(_folded_over(axes, collectives, foreseen, mesh))
    return collectives


def _folded_over(
    axes: tuple[str, ...],
    collectives: Sequence[Collective],
    foreseen: Mapping[_Key, int],
    mesh: Mesh,
) -> Iterator[Collective]:
    """With the all-reduces over each of some axes as one over all of these."""
    found, done = _counts(collectives), Counter[_Key]()
    n_devices = math.prod(mesh.sizes[axis] for axis in axes)
    for one in collectives:
        whole = replace(one, axis=",".join(axes), group_size=n_devices)
        n_folded = 0
        if one.kind == "all-reduce" and one.axis in axes and _key(whole) in foreseen:
            on_each = min(found[_key(replace(one, axis=axis))] for axis in axes)
            n_folded = min(on_each - done[_key(one)], one.count)
        if not n_folded:
            yield one
            continue
        done[_key(one)] += n_folded
        launches = round(one.launches * n_folded / one.count)
        if one.axis == axes[0]:
            yield replace(whole, count=n_folded, launches=launches)
        if n_folded < one.count:
            rest = one.count - n_folded
            yield replace(one, count=rest, launches=one.launches - launches)


def _counts(collectives: Iterable[Collective]) -> Counter[_Key]:
    counts: Counter[_Key] = Counter()
    for one in collectives:
        counts[_key(one)] += one.count
    return counts


def _key(one: Collective) -> _Key:
    return one.kind, one.axis, one.n_bytes, one.phase == "backward"
