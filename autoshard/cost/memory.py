"""Peak bytes a device: argument + temporary + output - alias, as the target's compiler counts.

- Arguments (weights, optimizer slots, state, cache) are exact: the bytes of each shard. A cache
  that is joined from what the blocks return is there twice in the end.
- What an op makes is held until it is read last; from the forward to the backward half, once for
  each block that the op stands for. Fused ops make nothing (see `autoshard.graph.liveness`).
- While an op runs there is beside that what it gathers, partial sums that it will scatter, and the
  second copy of a result that is made in pieces.
- New values of weights and slots that are gathered, for they were made in shards, are held to the
  end.
- A result that is copied into the order it is returned in is there twice (see
  `autoshard.cost.results`). So is one that is made of two sums of pieces, and then sliced, and so
  are some scores of attention (see `autoshard.cost.scores`).
- A gradient dies at its update, unless it is the first or waits for others to be added to.
- TPUs put off the reduce-scatter of gradients to the end of the backward half, so that partial sums
  of all blocks wait there, as many as there is room for in the chip's memory. (gemma_2b_en on 4x2,
  18 blocks: 54 sums of 31 MiB each.)
- What fused ops make for a convolution, or for a matmul of a GPU, is written, and held until the
  last that reads it. For a matmul of a TPU it is if the matmul's sums go round in a ring, which
  reads it once a round: where the matmul before can write it beside its own result, and where the
  ring takes it slice by slice.
- Some of what the backward half gathers anew of the forward half's a TPU gathers before the turn,
  and keeps.
- A TPU's heap leaves room idle between the arrays of a training step. How much is luck; what is
  usual is added.
- Small arrays that the step makes, gradients among them, live on the chip, as many as find place
  there, but for those that the forward half leaves to the backward one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from autoshard.cost.collective_matmul import PIECES_IN_PLACE
from autoshard.cost.lifetimes import Bytes, alive, lifetimes
from autoshard.cost.machine import Machine
from autoshard.cost.results import ResultCopies
from autoshard.cost.shards import local_bytes
from autoshard.cost.strategies import OpCost
from autoshard.cost.transfers import Transfer, is_all_reduced
from autoshard.cost.transposing import cuts_tiles
from autoshard.cost.values import Memory
from autoshard.graph.liveness import FUSED
from autoshard.graph.program import WHOLE, Argument, Array, Chain, Layout, Op, Program
from autoshard.graph.splits import layout_of

__all__ = ["OpBytes", "PeakMemory"]


class OpBytes(NamedTuple):
    """What one op adds to memory, in bytes of one device.

    Attributes:
        made: what it leaves for its readers, gradients of weights apart.
        gathered: what it gathers first.
        chained: what fused ops write for it, and later ops read too.
        working: what there is beside that while it runs.
        gradient: the gradients of weights that it makes, as they lie in the end.
        put_off: partial sums of these that may wait after it.
        early: what it gathers of the forward half, which may be there since the turn.
    """

    made: int
    gathered: int
    chained: int
    working: int
    gradient: int
    put_off: int
    early: int


# Group, bytes of the whole array, and how many like it the whole model has.
_Held = tuple[int, int, int | Fraction]

# Of what a TPU's program of training takes beside its arguments so much is idle: the median of 112
# programs for v5e, by what the compiler says they take and have in use at once (half: 3 to 20%).
_IDLE_SHARE = 0.06

# Of what a TPU gathers of the forward half behind the matmuls of the backward one so much is there
# since the turn: the median of 13 whole programs for v5e (8 to 52%). It runs one collective at a
# time; those that wait for nothing run where there is no other.
_EARLY_SHARE = 0.2

# The largest cache that is rebuilt in a TPU's vector memory, of that.
_REBUILT_SHARE = 0.25


class PeakMemory:
    """Predicts the peak of one device for many layouts of one program.

    Args:
        program: the step.
        machine: what it runs on.

    Attributes:
        copies: of the program's results.
    """

    def __init__(self, program: Program, machine: Machine) -> None:
        self._program = program
        self._machine = machine
        self._axis_sizes = machine.axis_sizes
        self._vmem = machine.chip.vmem_bytes
        self._counts = np.array([float(op.count) for op in program.ops])
        self._writes_chains = machine.chip.kind == "gpu"
        trains = any(op.backward for op in program.ops)
        self._idle_share = _IDLE_SHARE if trains and machine.compiles_for_tpu else 0.0
        self._lifetimes = lifetimes(program)
        # What the backward half may gather early.
        self._read_forward = set[int]()
        if machine.compiles_for_tpu and self._lifetimes.last_forward is not None:
            self._read_forward = {
                array.identity
                for op in program.ops
                for array in op.operands
                if not (op.backward or array.is_held)
            }
        self._last_dims = {
            argument.group: argument.dims[-1]
            for argument in program.arguments
            if argument.role == "weight" and argument.shape and argument.shape[-1] > 1
        }
        self._gradients = [
            (index, self._lifetimes.gradients[array.group], array.n_bytes)
            for index, op in enumerate(program.ops)
            for array in op.results
            if op.kind not in FUSED and array.group in self._lifetimes.gradients
        ]
        self.copies = ResultCopies(program, machine)
        self._held = _held_by_role(program.arguments)
        self._rebuilt = [
            (argument.group, argument.n_bytes, argument.count)
            for argument in program.arguments
            if argument.is_rebuilt
        ]
        self._held["output"] = [(out.group, out.n_bytes, 1) for out in program.outputs]

    def peak(self, layouts: Sequence[Layout], ops: Bytes) -> Memory:
        """The peak under a layout.

        Args:
            layouts: one a group.
            ops: [ops, fields of `OpBytes`], what `op_bytes` says of each op in order.
        """
        held = Memory(
            weights=self._all("weight", layouts) + self._all("state", layouts),
            gradients=0,
            optimizer=self._all("slot", layouts),
            activations=self._all("data", layouts) + self._all("output", layouts),
            kv_cache=self._all("cache", layouts),
        )
        rebuilt = self._sum(self._rebuilt, layouts)
        if rebuilt > _REBUILT_SHARE * self._vmem:
            held = replace(held, activations=held.activations + rebuilt)
        if not len(ops):
            return held
        room = (self._machine.chip.hbm_bytes - held.peak_bytes) / (1 + self._idle_share)
        temporary, gradients = self._at_peak(layouts, ops, room)
        temporary += int(self._idle_share * (temporary + gradients))
        return replace(held, activations=held.activations + temporary, gradients=gradients)

    def _at_peak(self, layouts: Sequence[Layout], ops: Bytes, room: float) -> tuple[int, int]:
        """What the ops have made that is in memory when that is most: gradients apart."""
        times = self._lifetimes
        made, gathered, chained, working, gradient, put_off, early = ops.T
        n, limit = len(ops), self._machine.on_chip_bytes
        gathered = gathered.copy()
        for first, again in times.gathered_again:
            gathered[again] = max(0.0, gathered[again] - gathered[first])
        n_bytes = np.concatenate([made, chained, gathered])
        held = n_bytes * times.copies
        small = np.where((n_bytes <= limit) & times.may_be_on_chip, held, 0.0)
        on_chip = alive(n, small, times.start, times.end)
        on_chip += np.where(working <= limit, working, 0.0)
        on_chip = on_chip.clip(max=limit)
        gradient = gradient.copy()
        for index, group, whole in self._gradients:
            # It is brought into the layout of its weight at once, if that takes more.
            gradient[index] = max(gradient[index], self._shard(whole, group, layouts))
        gradients = alive(n, gradient, times.own, times.last_read)
        small = np.where(gradient <= limit, gradient, 0.0)
        gradients -= alive(n, small, times.own, times.last_read).clip(max=limit - on_chip)
        temporary = alive(n, held, times.start, times.end) + working - on_chip
        if early.any():
            turn = np.full(n, times.last_forward)
            temporary += alive(n, _EARLY_SHARE * early * self._counts, turn, times.own)
        if put_off.any():
            # While their op runs they are in `working`.
            waiting = alive(n, put_off, times.own, np.full(n, times.sums_end)) - put_off
            waiting[times.sums_end] += (put_off * (self._counts - 1)).sum()
            gradients += waiting.clip(max=(room - temporary - gradients).clip(min=0))
        peak = (temporary + gradients).argmax()
        return int(temporary[peak]), int(gradients[peak])

    def op_bytes(self, index: int, around: Sequence[Layout], cost: OpCost) -> OpBytes:
        """What one op adds to memory.

        Args:
            index: of the op.
            around: layouts of its operands, then of its results.
            cost: its choice and transfers.
        """
        op, sizes = self._program.ops[index], self._axis_sizes
        gathers = [
            (transfer, op.operands[transfer.operand])
            for transfer in cost.transfers
            if transfer.operand is not None and transfer.kind == "all-gather"
        ]
        gathered = sum(transfer.n_bytes for transfer, _ in gathers)
        early = sum(
            transfer.n_bytes
            for transfer, array in gathers
            if op.backward and self._may_be_early(transfer, array)
        )
        left = working = gradient = put_off = 0
        for array, layout in zip(op.results, around[len(op.operands) :], strict=True):
            n_bytes = int(cost.share * array.n_bytes)
            made = local_bytes(n_bytes, layout_of(array, cost.choice), sizes)
            shard = local_bytes(n_bytes, layout, sizes)
            sliced_late = op.slicing is not None and cost.share == 1
            if cost.is_copied or (sliced_late and cost.is_windowed):
                working += made
            if op.kind in FUSED:
                continue
            apart = made if made != shard or self._is_summed_apart(index, cost) else 0
            if self.copies.is_returned(array) and not sliced_late:
                working += self.copies.n_bytes(op, layout) + apart
                continue
            is_gradient = array.group in self._lifetimes.gradients
            if is_gradient and self._lifetimes.last_read[index] > index:
                gradient += max(made, shard)  # reduced where it is added to others, or at the end
                continue
            if is_gradient:
                gradient += shard
            else:
                left += shard // cost.n_summed
            working += apart
            put_off += made if is_gradient and self._is_put_off(op, cost) else 0
        working += self._turned_bytes(index, around, cost)
        kept, own = self.chained_bytes(index, cost)
        return OpBytes(
            made=left,
            gathered=gathered,
            chained=kept,
            working=working + own,
            gradient=gradient,
            put_off=put_off,
            early=early,
        )

    def _may_be_early(self, transfer: Transfer, array: Array) -> bool:
        """Whether a gather of the backward half waits for nothing but the forward one."""
        is_whole = transfer.pieces == 1
        return transfer.overlapped and is_whole and array.identity in self._read_forward

    def _is_summed_apart(self, index: int, cost: OpCost) -> bool:
        """Whether an all-reduce leaves what it sums beside the sums.

        A TPU sums in place what a matmul makes, but not where something is gathered meanwhile: an
        activation, beside the last matmul of the forward half, once more for its own gradient.
        """
        op = self._program.ops[index]
        return (
            index == self._lifetimes.last_forward
            and self._machine.compiles_for_tpu
            and is_all_reduced(cost.transfers)
            and any(
                transfer.operand is not None and not op.operands[transfer.operand].is_held
                for transfer in cost.transfers
                if transfer.kind == "all-gather"
            )
        )

    def _turned_bytes(self, index: int, around: Sequence[Layout], cost: OpCost) -> int:
        """What a TPU writes of a transposed weight of which a ring takes slices.

        It is brought into their order first, if they cut tiles of it apart: those of `table.T`
        along the table's last dimension.
        """
        op, sizes = self._program.ops[index], self._axis_sizes
        n_bytes = 0
        for transfer in cost.transfers:
            if transfer.operand is None or transfer.pieces <= PIECES_IN_PLACE:
                continue
            axis = self._machine.axis_of(transfer.axis)
            dim = around[transfer.operand][axis]
            factor = None if dim == WHOLE else op.operands[transfer.operand].factors[dim]
            if factor is None or not cuts_tiles(op.factor_sizes[factor], transfer.pieces):
                continue
            n_bytes += sum(
                local_bytes(array.n_bytes, layout_of(array, cost.choice), sizes)
                for position, array in enumerate(op.operands)
                if position != transfer.operand and self._is_last_of_turned(factor, array)
            )
        return n_bytes

    def _is_last_of_turned(self, factor: int, array: Array) -> bool:
        """Whether an array is a weight transposed, and a factor that weight's last dimension."""
        last = self._last_dims.get(array.group)
        return not array.is_held and last is not None and array.factors[last] == factor

    def _is_put_off(self, op: Op, cost: OpCost) -> bool:
        """Whether partial sums of a gradient wait to be reduce-scattered."""
        return (
            self._machine.compiles_for_tpu
            and op.kind == "contraction"
            and op.backward
            and any(
                transfer.kind == "reduce-scatter" and not transfer.in_ring
                for transfer in cost.transfers
            )
        )

    def chained_bytes(self, index: int, cost: OpCost) -> tuple[int, int]:
        """What fused ops write for a matmul: what its later readers read too, and what it alone.

        The first reader writes for all; what a later one writes again is gone after it.
        """
        op = self._program.ops[index]
        chained = self._program.chained_operands.get(index, {})
        written: dict[Chain, int] = {}
        for array in op.operands:
            chain = chained.get(array.identity)
            if chain is not None and self._is_written(op, array, chain, cost):
                layout = layout_of(array, cost.choice)
                written[chain] = local_bytes(array.n_bytes, layout, self._axis_sizes)
        kept = sum(n_bytes for chain, n_bytes in written.items() if chain.readers[0] == index)
        return kept, 0 if self._writes_chains else sum(written.values()) - kept

    def _is_written(self, op: Op, array: Array, chain: Chain, cost: OpCost) -> bool:
        """Whether a matmul reads from memory what fused ops make for it."""
        if self._writes_chains or op.is_convolution:
            return True
        return not chain.takes_place and any(
            transfer.in_ring
            and (
                chain.follows_matmul
                or op.results[0].factors[transfer.target[self._machine.axis_of(transfer.axis)]]
                in array.factors
            )
            for transfer in cost.transfers
        )

    def _all(self, role: str, layouts: Sequence[Layout]) -> int:
        return self._sum(self._held.get(role, ()), layouts)

    def _sum(self, arrays: Iterable[_Held], layouts: Sequence[Layout]) -> int:
        return int(
            sum(self._shard(n_bytes, group, layouts) * count for group, n_bytes, count in arrays)
        )

    def _shard(self, n_bytes: int, group: int, layouts: Sequence[Layout]) -> int:
        return local_bytes(n_bytes, layouts[group], self._axis_sizes)


def _held_by_role(arguments: Sequence[Argument]) -> dict[str, list[_Held]]:
    """The arguments of each role; those of a family, which lie alike, as one."""
    alike: dict[tuple[object, ...], list[Argument]] = {}
    for argument in arguments:
        name = argument.group if argument.family is None else argument.family
        look = (argument.role, name, argument.dims, argument.n_bytes)
        alike.setdefault(look, []).append(argument)
    held: dict[str, list[_Held]] = {}
    for first, *rest in alike.values():
        count = sum((one.count for one in rest), first.count)
        held.setdefault(first.role, []).append((first.group, first.n_bytes, count))
    return held
