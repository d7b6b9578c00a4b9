"""The cost of a whole step under one layout of every group."""

import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import compress, count, starmap

import numpy as np

from autoshard.cost.arguments import ArgumentPricer
from autoshard.cost.cuts_and_joins import JoinedCopies
from autoshard.cost.hidden_gathers import MatmulsBeside
from autoshard.cost.lifetimes import kept_weights, read_at_turn
from autoshard.cost.machine import Machine
from autoshard.cost.memory import OpBytes, PeakMemory
from autoshard.cost.norms import SharedNorms
from autoshard.cost.op_shares import Moved, Share
from autoshard.cost.scores import AttentionScores
from autoshard.cost.shards import local_bytes
from autoshard.cost.single_rows import shard_seconds
from autoshard.cost.strategies import OpCost, price_op
from autoshard.cost.transfers import Transfer, collective, result_moves, transfer_by_part
from autoshard.cost.values import StepCost, Traffic
from autoshard.graph.program import Layout, Op, Program
from autoshard.graph.propagation import Apart, picker, torn_axes
from autoshard.graph.softmaxes import with_maxima
from autoshard.graph.tying import price_look
from autoshard.hardware.collectives import wire_bytes
from autoshard.hardware.efficiency import memory_seconds

__all__ = ["StepPricer"]

_WORKING = OpBytes._fields.index("working")

# Of what takes less, ops or the fetching of weights ahead of them, so much is waited for were the
# other as long; the less the longer that takes. By 276 programs for v5e that decode.
_UNHIDDEN = 0.2

# What makes two collectives the same one -> the collective as the step counts it.
_Traffics = dict[tuple[object, ...], Traffic]


class StepPricer:
    """Prices layouts of one program on one machine; `arguments` prices those of its arguments.

    What an op adds is remembered by the layouts around it, and ops that look alike (those of
    different blocks do) share their prices. From one layout to the next only those ops are looked
    at around which something changes, so that a search that changes little at a time is quick.
    """

    def __init__(self, program: Program, machine: Machine) -> None:
        self.program = program
        self.machine = machine
        self._peak = PeakMemory(program, machine)
        self._prices: dict[tuple[int, tuple[Layout, ...]], OpCost] = {}
        kinds: dict[tuple[object, ...], int] = {}
        self._kind_of = [kinds.setdefault(price_look(op), len(kinds)) for op in program.ops]
        self._around = [picker(op.groups) for op in program.ops]
        self._touching = program.touching()
        self.beside = MatmulsBeside(program, machine)
        self._maxima = with_maxima(program.ops) if machine.compiles_for_tpu else set()
        self._norms = SharedNorms(program, machine)
        self._kept = kept_weights(program.ops) if machine.compiles_for_tpu else set()
        self._read_at_turn = read_at_turn(program.ops) if machine.compiles_for_tpu else set()
        self._scores = AttentionScores(program, machine)
        self._joined = JoinedCopies(program.ops, machine)
        # The matmuls to whose results something is added before a rule may move them.
        biased = {out.made_by for out in program.layer_outputs if not out.as_made}
        self._biased = biased if machine.compiles_for_tpu else set()
        self._shares: list[dict[tuple[Layout, ...], Share]] = [{} for _ in program.ops]
        self.arguments = ArgumentPricer(program, machine)
        self._paid = [
            (paid, picker([argument.group for argument in paid]))
            for paid in self.arguments.paid(program.arguments)
        ]
        self._places = {op.layer: op.place for op in program.ops}
        self._argument_prices: dict[tuple[int, tuple[Layout, ...], bool], float] = {}
        # The layouts priced last, and what each op adds under them.
        self._last: Sequence[Layout | None] = (None,) * len(program.groups)
        self._compute = np.zeros(len(program.ops))
        self._fetching = np.zeros(len(program.ops))
        self._n_bytes = np.zeros((len(program.ops), len(OpBytes._fields)))
        self._moving: dict[int, Share] = {}

    def price(self, layouts: Sequence[Layout], apart: Apart | None = None) -> StepCost:
        """The step under some layouts.

        Args:
            layouts: one a group.
            apart: what lies otherwise than its group.
        """
        self._follow(layouts)
        apart = apart or Apart()
        torn = {i: (*self._around[i](layouts)[:-1], own) for i, own in apart.torn.items()}
        shares = {index: self._share(index, seen) for index, seen in (torn | apart.around).items()}
        moving = {**self._moving, **shares}

        def is_summed(index: int) -> bool:
            return index in moving and moving[index].is_all_reduced

        scores = list(self._scores.written(layouts, apart.moved, is_summed))
        n_bytes = self._n_bytes
        if shares or scores:
            n_bytes = n_bytes.copy()
            for index, share in shares.items():
                n_bytes[index] = share.n_bytes
            for written in scores:
                n_bytes[written.sums, _WORKING] += written.n_bytes
        traffic: _Traffics = {}
        compute = self._ops_seconds(shares)
        compute += self._arguments_seconds(layouts, moving)
        compute += self._move(traffic, moving, layouts)
        compute += sum(written.seconds for written in scores)
        compute += self._joined.seconds(layouts, is_summed)
        compute += self._norms.seconds(moving, apart.moved)
        self._wait_for_last_weight(traffic)
        compute += self._move_as_asked(traffic, apart.moved)
        for index, own in apart.torn.items():
            shared = layouts[self.program.ops[index].results[0].group]
            for place, moved in enumerate(self._tearing(index, own, shared)):
                traffic["torn", index, place] = moved
        return StepCost(
            compute_seconds=compute,
            blocking_seconds=sum(t.seconds * t.count for t in traffic.values() if not t.overlapped),
            overlapped_seconds=sum(t.seconds * t.count for t in traffic.values() if t.overlapped),
            traffic=tuple(traffic.values()),
            memory=self._peak.peak(layouts, n_bytes),
        )

    def _ops_seconds(self, apart: Mapping[int, Share]) -> float:
        """Of all ops and of fetching their weights meanwhile; some lie apart."""
        ops, fetching = float(self._compute.sum()), float(self._fetching.sum())
        ops += sum(share.compute_seconds - self._compute[i] for i, share in apart.items())
        fetching += sum(share.fetch_seconds - self._fetching[i] for i, share in apart.items())
        shorter, longer = sorted((ops, fetching))
        return float(longer + _UNHIDDEN * shorter**2 / longer) if longer else 0.0

    def _move(
        self, traffic: _Traffics, moving: Mapping[int, Share], layouts: Sequence[Layout]
    ) -> float:
        """Add the collectives of some ops; returns what they cost compute, in seconds."""
        seconds, places = 0.0, self._places
        windowed: dict[tuple[object, ...], Transfer] = {}
        for index in sorted(moving):
            for once, transfer, moved, beside in moving[index].moves:
                # An array is gathered once however many ops read it, and a sum of partial sums is
                # all-reduced once: once in all what every block reads or adds to.
                known = traffic.get(once)
                if known is None:
                    if beside is not None and self.beside.hides(
                        index, transfer, layouts, moving, self._compute
                    ):
                        moved = beside
                    traffic[once] = moved
                    seconds += transfer.memory_seconds * moved.count
                elif moved.count < known.count and places[moved.layer] == places[known.layer]:
                    traffic[once] = replace(known, count=moved.count)
                    seconds -= transfer.memory_seconds * (known.count - moved.count)
                if transfer.pieces > 1:
                    windowed[once] = transfer
        if not windowed:
            return seconds
        readers = Counter(m.once[:-1] for share in moving.values() for m in share.moves)
        for once, transfer in windowed.items():
            # Piece by piece only what no other op needs in the same layout.
            if readers[once[:-1]] == 1:
                moved = traffic[once]
                seconds += transfer.alone_seconds * moved.count
                hidden = moved.overlapped or self.machine.hides_permutes
                traffic[once] = replace(moved, overlapped=hidden)
        return seconds

    def _move_as_asked(
        self, traffic: _Traffics, asked: Mapping[int, tuple[Layout, Layout]]
    ) -> float:
        """Add what moves results to and from where rules ask for them; returns seconds as well."""
        seconds = 0.0
        for index, (have, want) in asked.items():
            op = self.program.ops[index]
            # The result is gathered beside another matmul that reads what this one does.
            hidden = any(self.beside.may_hide(op, array) for array in op.operands)
            if index in self._biased:
                # Added apart from the matmul, to what has been moved.
                seconds += op.count * shard_seconds(op.results[0], want, self.machine)
            for place, transfer in enumerate(result_moves(op, have, want, self.machine)):
                moved = self._traffic(op, transfer)
                traffic["asked", index, place] = replace(moved, overlapped=hidden)
                seconds += transfer.memory_seconds * op.count
        return seconds

    def _wait_for_last_weight(self, traffic: _Traffics) -> None:
        """Let the gather of the weight block that the end of the forward half keeps.

        Beside collectives of another axis that block the TPU compiler started 8 of 51 such gathers
        early, and 7 of 10 where there were none.
        """
        if not self._kept:
            return
        blocking = {t.axis for t in traffic.values() if not (t.overlapped or t.backward)}
        for once, moved in traffic.items():
            if moved.overlapped and moved.kind == "all-gather" and once[0] in self._kept:
                traffic[once] = replace(moved, overlapped=blocking <= {moved.axis})

    def _beside(self, op: Op, transfer: Transfer, moved: Traffic) -> Traffic | None:
        """A gather that op waits for as it is if it runs beside another matmul that reads the same.

        None where there is none.
        """
        if transfer.overlapped or transfer.operand is None or transfer.kind != "all-gather":
            return None
        may = self.beside.may_hide(op, op.operands[transfer.operand])
        return replace(moved, overlapped=True) if may else None

    def _follow(self, layouts: Sequence[Layout]) -> None:
        """Price anew the ops around which a layout is another than it was."""
        pairs = zip(layouts, self._last, strict=True)
        changed = compress(count(), starmap(operator.ne, pairs))
        for index in {index for group in changed for index in self._touching[group]}:
            share = self._share(index, self._around[index](layouts))
            self._compute[index] = share.compute_seconds
            self._fetching[index] = share.fetch_seconds
            self._n_bytes[index] = share.n_bytes
            if share.moves:
                self._moving[index] = share
            else:
                self._moving.pop(index, None)
        self._last = layouts

    def _share(self, index: int, around: tuple[Layout, ...]) -> Share:
        """What op `index` adds, the layouts of its operands and results given; remembered."""
        share = self._shares[index].get(around)
        if share is None:
            share = self._shares[index][around] = self._new_share(index, around)
        return share

    def _new_share(self, index: int, around: tuple[Layout, ...]) -> Share:
        op = self.program.ops[index]
        cost = self._op_cost(index, around)
        return Share(
            compute_seconds=op.count
            * (
                cost.compute_seconds
                + self._chain_seconds(index, cost)
                + self._maximum_seconds(index, around, cost)
                + self._peak.copies.seconds(op, around[-1])
            ),
            fetch_seconds=op.count * cost.fetch_seconds,
            moves=tuple(self._moved(index, around, transfer) for transfer in cost.transfers),
            in_loop=cost.in_loop,
            moved_operands=frozenset(
                (op.operands[t.operand].identity, t.axis)
                for t in cost.transfers
                if t.operand is not None
            ),
            n_bytes=self._peak.op_bytes(index, around, cost),
        )

    def _moved(self, index: int, around: Sequence[Layout], transfer: Transfer) -> Moved:
        op = self.program.ops[index]
        if index in self._maxima and transfer.adds_pieces:
            seconds = transfer.alone_seconds + self._max_seconds(op, around)
            transfer = replace(transfer, alone_seconds=seconds)
        traffic = self._traffic(op, transfer)
        if transfer.operand is not None and transfer.kind == "all-gather":
            is_alone = op.operands[transfer.operand].identity in self._read_at_turn
            traffic = replace(traffic, overlapped=traffic.overlapped and not is_alone)
        beside = self._beside(op, transfer, traffic)
        return Moved(self._once(op, transfer), transfer, traffic, beside)

    def _chain_seconds(self, index: int, cost: OpCost) -> float:
        """What it takes a TPU to write what fused ops make for a matmul, and to read that again."""
        n_bytes = sum(self._peak.chained_bytes(index, cost)) if self.machine.compiles_for_tpu else 0
        if n_bytes <= self.machine.on_chip_bytes:
            return 0.0
        return memory_seconds(self.machine.chip, n_bytes, n_bytes)

    def _maximum_seconds(self, index: int, around: Sequence[Layout], cost: OpCost) -> float:
        """What it takes a TPU to find the maxima of a matmul's result after it is summed."""
        is_summed = any(transfer.operand is None for transfer in cost.transfers)
        if not (is_summed and index in self._maxima):
            return 0.0
        return self._max_seconds(self.program.ops[index], around)

    def _max_seconds(self, op: Op, around: Sequence[Layout]) -> float:
        """What it takes a TPU to find the maxima of the result of an op apart from it.

        Two-byte elements by the cycles of the compiler for v5e: each counts as two that are added.
        """
        return 2 * shard_seconds(op.results[0], around[-1], self.machine)

    def _op_cost(self, index: int, around: tuple[Layout, ...]) -> OpCost:
        """The price of op `index`, the layouts of its operands and results given; remembered."""
        op = self.program.ops[index]
        key = (self._kind_of[index], around)
        price = self._prices.get(key)
        if price is None:
            price = self._prices[key] = price_op(op, around, self.machine)
        return price

    def _traffic(self, op: Op, transfer: Transfer) -> Traffic:
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

    def _tearing(self, index: int, own: Layout, shared: Layout) -> Iterator[Traffic]:
        """What moves where a matmul's result lies otherwise than its group.

        One of the arrays is dealt out again at each elementwise op where the two meet; which one
        makes no difference, for all are of one size.
        """
        op = self.program.ops[index]
        (own, shared), machine = self.machine.simplest((own, shared))
        n_bytes = local_bytes(op.results[0].n_bytes, shared, machine.axis_sizes)
        for axis in torn_axes(own, shared):
            dealt = collective("all-to-all", axis, n_bytes, machine, None, shared, True)
            if machine is not self.machine:
                dealt = transfer_by_part(dealt, self.machine)
            yield self._traffic(op, replace(dealt, n_runs=op.n_meetings))

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
        shared = self.machine.compiles_for_tpu and (not op.backward or identity in self._kept)
        return (identity, transfer.axis, transfer.target, None if shared else transfer.within)

    def _arguments_seconds(self, layouts: Sequence[Layout], moving: Mapping[int, Share]) -> float:
        """What the arguments cost beside the ops; the price of each is remembered."""
        total, prices, arguments = 0.0, self._argument_prices, self.arguments
        for place, (paid, laid_of) in enumerate(self._paid):
            laid = laid_of(layouts)
            is_fused = arguments.updates.is_fused(paid[0], laid, layouts, moving)
            seconds = prices.get((place, laid, is_fused))
            if seconds is None:
                seconds = sum(
                    arguments.seconds(argument, layout, is_fused=is_fused)
                    for argument, layout in zip(paid, laid, strict=True)
                )
                prices[place, laid, is_fused] = seconds
            total += seconds
        return total
