"""Peak bytes a device: argument + temporary + output - alias, as the target's compiler counts.

- Arguments (weights, optimizer slots, state, cache) are exact: the bytes of each shard.
- A step with gradients keeps, from the forward to the backward half, the results of contractions
  and lookups; elementwise results are fused into their readers or recomputed there.
- A gradient dies at its update, so only the largest is alive.
- Beside that one op's own results are alive, those that the step returns counted once.
"""

from collections.abc import Sequence

from autoshard.cost.strategies import local_bytes
from autoshard.cost.values import Memory
from autoshard.graph.program import Argument, Layout, Program

__all__ = ["peak_memory"]

_KEPT = ("contraction", "gather")


def peak_memory(program: Program, layouts: Sequence[Layout], axis_sizes: Sequence[int]) -> Memory:
    """Predict the peak of one device.

    Args:
        program: the step.
        layouts: one a group.
        axis_sizes: devices along each mesh axis.
    """

    def shard(n_bytes: int, group: int | None) -> int:
        return n_bytes if group is None else local_bytes(n_bytes, layouts[group], axis_sizes)

    def held(*roles: str) -> int:
        return sum(
            shard(argument.n_bytes, argument.group) * argument.count
            for argument in program.arguments
            if argument.role in roles
        )

    gradients = max(
        (shard(a.n_bytes, a.group) for a in program.arguments if _has_gradient(a)), default=0
    )
    outputs = sum(shard(out.n_bytes, out.group) * out.count for out in program.outputs)
    return Memory(
        weights=held("weight", "state"),
        gradients=gradients,
        optimizer=held("slot"),
        activations=held("data") + outputs + _activations(program, layouts, axis_sizes),
        kv_cache=held("cache"),
    )


def _has_gradient(argument: Argument) -> bool:
    return argument.role == "weight" and argument.trainable


def _activations(program: Program, layouts: Sequence[Layout], axis_sizes: Sequence[int]) -> int:
    """What is kept for the backward half, and the largest working set of one op."""
    has_backward = any(op.backward for op in program.ops)
    weights = {argument.group for argument in program.arguments}
    returned = {(out.group, out.n_bytes) for out in program.outputs}
    kept = working = 0
    for op in program.ops:
        n_bytes = sum(
            local_bytes(array.n_bytes, layouts[array.group], axis_sizes)
            for array in op.results
            if array.group not in weights and (array.group, array.n_bytes) not in returned
        )
        if has_backward and not op.backward and op.kind in _KEPT:
            kept += n_bytes * op.count
        elif op.kind != "broadcast":
            working = max(working, n_bytes)
    return kept + working
