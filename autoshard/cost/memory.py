"""Peak bytes a device: argument + temporary + output - alias, as the target's compiler counts.

- Arguments (weights, optimizer slots, state, cache) are exact: the bytes of each shard.
- A step with gradients keeps, from the forward to the backward half, the results of contractions
  and lookups; elementwise results are fused into their readers or recomputed there.
- A gradient dies at its update, so only the largest is alive.
- Beside that one op's working set is alive: what it makes, as it makes it, and what it gathers
  first. Elementwise ops, reshapes and broadcasts make nothing: they are fused into their readers.
"""

from collections.abc import Sequence
from fractions import Fraction

from autoshard.cost.strategies import OpCost, layout_of, local_bytes, n_parts
from autoshard.cost.values import Memory
from autoshard.graph.program import Layout, Op, Program

__all__ = ["PeakMemory"]

_KEPT = ("contraction", "gather")
_FUSED = ("broadcast", "elementwise", "reshape")


class PeakMemory:
    """Predicts the peak of one device for many layouts of one program.

    Args:
        program: the step.
        axis_sizes: devices along each mesh axis.
    """

    def __init__(self, program: Program, axis_sizes: Sequence[int]) -> None:
        self._axis_sizes = axis_sizes
        self._has_backward = any(op.backward for op in program.ops)
        self._weights = {argument.group for argument in program.arguments}
        self._returned = {(out.group, out.n_bytes) for out in program.outputs}
        self._held: dict[str, list[tuple[int | None, int, int | Fraction]]] = {}
        for argument in program.arguments:
            entry = (argument.group, argument.n_bytes, argument.count)
            self._held.setdefault(argument.role, []).append(entry)
        self._held["output"] = [(out.group, out.n_bytes, out.count) for out in program.outputs]
        self._gradients = [
            (argument.group, argument.n_bytes)
            for argument in program.arguments
            if self._has_backward and argument.role == "weight" and argument.trainable
        ]
        self._parts: dict[Layout, int] = {}

    def peak(self, layouts: Sequence[Layout], activations: int) -> Memory:
        """The peak under a layout.

        Args:
            layouts: one a group.
            activations: bytes that the ops keep, and the largest working set: see `op_bytes`.
        """
        gradients = (self._shard(n_bytes, group, layouts) for group, n_bytes in self._gradients)
        return Memory(
            weights=self._all("weight", layouts) + self._all("state", layouts),
            gradients=max(gradients, default=0),
            optimizer=self._all("slot", layouts),
            activations=self._all("data", layouts) + self._all("output", layouts) + activations,
            kv_cache=self._all("cache", layouts),
        )

    def op_bytes(self, op: Op, around: Sequence[Layout], cost: OpCost) -> tuple[int, int]:
        """What one op keeps for the backward half, and its working set beside that.

        Args:
            op: the op.
            around: layouts of its operands, then of its results.
            cost: its choice and transfers.
        """
        sizes = self._axis_sizes
        gathered = sum(
            transfer.n_bytes
            for transfer in cost.transfers
            if transfer.operand is not None and transfer.kind == "all-gather"
        )
        kept = working = 0
        for array, layout in zip(op.results, around[len(op.operands) :], strict=True):
            if op.kind in _FUSED or (array.group, array.n_bytes) in self._returned:
                continue
            made = local_bytes(array.n_bytes, layout_of(array, cost.choice), sizes)
            shard = local_bytes(array.n_bytes, layout, sizes)
            if array.group in self._weights:
                # A gradient: its shard is counted as such, not what it is reduced from.
                working += max(0, made - shard)
            else:
                kept += shard
                working += made
        if self._has_backward and not op.backward and op.kind in _KEPT:
            return kept * op.count, gathered
        return 0, gathered + working

    def _all(self, role: str, layouts: Sequence[Layout]) -> int:
        return int(
            sum(
                self._shard(n_bytes, group, layouts) * count
                for group, n_bytes, count in self._held.get(role, ())
            )
        )

    def _shard(self, n_bytes: int, group: int | None, layouts: Sequence[Layout]) -> int:
        if group is None:
            return n_bytes
        layout = layouts[group]
        parts = self._parts.get(layout)
        if parts is None:
            parts = self._parts[layout] = n_parts(layout, self._axis_sizes)
        return -(-n_bytes // parts)
