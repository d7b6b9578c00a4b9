"""What each op adds to a step, as the layouts around it are."""

from collections.abc import Sequence
from dataclasses import replace

from autoshard.cost.hidden_gathers import MatmulsBeside
from autoshard.cost.lifetimes import kept_weights, read_at_turn
from autoshard.cost.machine import Machine
from autoshard.cost.memory import PeakMemory
from autoshard.cost.op_shares import Moved, Share
from autoshard.cost.single_rows import shard_seconds
from autoshard.cost.strategies import OpCost, price_op
from autoshard.cost.transfers import Transfer
from autoshard.cost.values import Traffic
from autoshard.graph.program import Layout, Op, Program
from autoshard.graph.softmaxes import with_maxima
from autoshard.graph.tying import price_look
from autoshard.hardware.collectives import wire_bytes
from autoshard.hardware.efficiency import memory_seconds

__all__ = ["OpPricer"]


class OpPricer:
    """Prices the ops of one program on one machine, each by the layouts around it.

    Ops that look alike (those of different blocks do) share their prices.

    Args:
        program: the program.
        machine: the chips and links.
        peak: says what an op adds to memory.

    Attributes:
        beside: which gathers run beside another matmul.
        kept: the weights that the forward half keeps for the backward one, by identity.
    """

    def __init__(self, program: Program, machine: Machine, peak: PeakMemory) -> None:
        self.ops = program.ops
        self.machine = machine
        self.peak = peak
        self.beside = MatmulsBeside(program, machine)
        on_tpu = machine.compiles_for_tpu
        self.kept = kept_weights(program.ops) if on_tpu else set()
        self._maxima = with_maxima(program.ops) if on_tpu else set()
        self._read_at_turn = read_at_turn(program.ops) if on_tpu else set()
        self._prices: dict[tuple[int, tuple[Layout, ...]], OpCost] = {}
        kinds: dict[tuple[object, ...], int] = {}
        self._kind_of = [kinds.setdefault(price_look(op), len(kinds)) for op in program.ops]
        self._shares: list[dict[tuple[Layout, ...], Share]] = [{} for _ in program.ops]

    def share(self, index: int, around: tuple[Layout, ...]) -> Share:
        """What an op adds under some layouts; remembered.

        Args:
            index: of the op.
            around: the layouts of its operands and results.
        """
        share = self._shares[index].get(around)
        if share is None:
            share = self._shares[index][around] = self._new_share(index, around)
        return share

    def traffic(self, op: Op, transfer: Transfer) -> Traffic:
        """A collective of an op as a step counts it.

        Args:
            op: the op.
            transfer: the collective of one run.
        """
        link = self.machine.links[transfer.axis]
        return Traffic(
            kind=transfer.kind,
            axis=link.axis,
            n_bytes=transfer.n_bytes,
            wire_bytes=wire_bytes(transfer.kind, transfer.n_bytes, link.size),
            seconds=transfer.seconds,
            overlapped=transfer.overlapped,
            count=op.count * transfer.n_runs,
            layer=op.layer,
            backward=op.backward,
        )

    def _new_share(self, index: int, around: tuple[Layout, ...]) -> Share:
        op = self.ops[index]
        cost = self._op_cost(index, around)
        return Share(
            compute_seconds=op.count
            * (
                cost.compute_seconds
                + self._chain_seconds(index, cost)
                + self._maximum_seconds(index, around, cost)
                + self.peak.copies.seconds(op, around[-1])
            ),
            fetch_seconds=op.count * cost.fetch_seconds,
            moves=tuple(self._moved(index, around, transfer) for transfer in cost.transfers),
            in_loop=cost.in_loop,
            moved_operands=frozenset(
                (op.operands[t.operand].identity, t.axis)
                for t in cost.transfers
                if t.operand is not None
            ),
            n_bytes=self.peak.op_bytes(index, around, cost),
        )

    def _moved(self, index: int, around: Sequence[Layout], transfer: Transfer) -> Moved:
        op = self.ops[index]
        if index in self._maxima and transfer.adds_pieces:
            seconds = transfer.alone_seconds + self._max_seconds(op, around)
            transfer = replace(transfer, alone_seconds=seconds)
        traffic = self.traffic(op, transfer)
        if transfer.operand is not None and transfer.kind == "all-gather":
            is_alone = op.operands[transfer.operand].identity in self._read_at_turn
            traffic = replace(traffic, overlapped=traffic.overlapped and not is_alone)
        beside = self._beside(op, transfer, traffic)
        return Moved(self._once(op, transfer), transfer, traffic, beside)

    def _chain_seconds(self, index: int, cost: OpCost) -> float:
        """What it takes a TPU to write what fused ops make for a matmul, and to read that again."""
        n_bytes = sum(self.peak.chained_bytes(index, cost)) if self.machine.compiles_for_tpu else 0
        if n_bytes <= self.machine.on_chip_bytes:
            return 0.0
        return memory_seconds(self.machine.chip, n_bytes, n_bytes)

    def _maximum_seconds(self, index: int, around: Sequence[Layout], cost: OpCost) -> float:
        """What it takes a TPU to find the maxima of a matmul's result after it is summed."""
        is_summed = any(transfer.operand is None for transfer in cost.transfers)
        if not (is_summed and index in self._maxima):
            return 0.0
        return self._max_seconds(self.ops[index], around)

    def _max_seconds(self, op: Op, around: Sequence[Layout]) -> float:
        """What it takes a TPU to find the maxima of the result of an op apart from it.

        Two-byte elements by the cycles of the compiler for v5e: each counts as two that are added.
        """
        return 2 * shard_seconds(op.results[0], around[-1], self.machine)

    def _op_cost(self, index: int, around: tuple[Layout, ...]) -> OpCost:
        """The price of op `index`, the layouts of its operands and results given; remembered."""
        op = self.ops[index]
        key = (self._kind_of[index], around)
        price = self._prices.get(key)
        if price is None:
            price = self._prices[key] = price_op(op, around, self.machine)
        return price

    def _beside(self, op: Op, transfer: Transfer, moved: Traffic) -> Traffic | None:
        """A gather that op waits for as it is if it runs beside another matmul that reads the same.

        None where there is none.
        """
        if transfer.overlapped or transfer.operand is None or transfer.kind != "all-gather":
            return None
        may = self.beside.may_hide(op, op.operands[transfer.operand])
        return replace(moved, overlapped=True) if may else None

    def _once(self, op: Op, transfer: Transfer) -> tuple[object, ...]:
        """What makes two transfers the same one; last, in which groups of devices.

        Equal gathers made in different groups of devices stay apart in the backward pass, from each
        other and from those of the forward pass; in the latter the TPU compiler finds them.
        """
        if transfer.operand is None:
            # XLA adds partial sums before an all-reduce, but not before a reduce-scatter.
            merged = transfer.kind == "all-reduce"
            made = op.results[transfer.result].identity
            into = op.sum_into if merged and not transfer.result else made
            return ("result", into, transfer.kind, transfer.axis, transfer.target, None)
        identity = op.operands[transfer.operand].identity
        shared = self.machine.compiles_for_tpu and (not op.backward or identity in self.kept)
        return (identity, transfer.axis, transfer.target, None if shared else transfer.within)
