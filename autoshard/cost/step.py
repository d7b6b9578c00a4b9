"""The cost of a whole step under one layout of every group."""

import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import compress, count, starmap

import numpy as np

from autoshard.cost.arguments import ArgumentPricer
from autoshard.cost.cuts_and_joins import JoinedCopies
from autoshard.cost.machine import Machine
from autoshard.cost.memory import OpBytes, PeakMemory
from autoshard.cost.norms import SharedNorms
from autoshard.cost.op_pricing import OpPricer
from autoshard.cost.op_shares import Share
from autoshard.cost.scores import AttentionScores
from autoshard.cost.shards import local_bytes
from autoshard.cost.single_rows import shard_seconds
from autoshard.cost.transfers import Transfer, collective, result_moves, transfer_by_part
from autoshard.cost.values import StepCost, Traffic
from autoshard.graph.program import Layout, Program
from autoshard.graph.propagation import Apart, picker, torn_axes

__all__ = ["StepPricer"]

_WORKING = OpBytes._fields.index("working")

# Of what takes less, ops or the fetching of weights ahead of them, so much is waited for were the
# other as long; the less the longer that takes. By 276 programs for v5e that decode.
_UNHIDDEN = 0.2

# What makes two collectives the same one -> the collective as the step counts it.
_Traffics = dict[tuple[object, ...], Traffic]


class StepPricer:
    """Prices layouts of one program on one machine.

    From one layout to the next only those ops are looked at around which something changes, so that
    a search that changes little at a time is quick.

    Attributes:
        ops: prices each op by the layouts around it.
        arguments: prices the arguments by their layouts.
    """

    def __init__(self, program: Program, machine: Machine) -> None:
        self.program = program
        self.machine = machine
        self._peak = PeakMemory(program, machine)
        self.ops = OpPricer(program, machine, self._peak)
        self._around = [picker(op.groups) for op in program.ops]
        self._touching = program.touching()
        self._norms = SharedNorms(program, machine)
        self._scores = AttentionScores(program, machine)
        self._joined = JoinedCopies(program.ops, machine)
        # The matmuls to whose results something is added before a rule may move them.
        biased = {out.made_by for out in program.layer_outputs if not out.as_made}
        self._biased = biased if machine.compiles_for_tpu else set()
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
        shares = {
            index: self.ops.share(index, seen) for index, seen in (torn | apart.around).items()
        }
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
                    if beside is not None and self.ops.beside.hides(
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
            hidden = any(self.ops.beside.may_hide(op, array) for array in op.operands)
            if index in self._biased:
                # Added apart from the matmul, to what has been moved.
                seconds += op.count * shard_seconds(op.results[0], want, self.machine)
            for place, transfer in enumerate(result_moves(op, have, want, self.machine)):
                moved = self.ops.traffic(op, transfer)
                traffic["asked", index, place] = replace(moved, overlapped=hidden)
                seconds += transfer.memory_seconds * op.count
        return seconds

    def _wait_for_last_weight(self, traffic: _Traffics) -> None:
        """Let the gather of the weight block that the end of the forward half keeps.

        Beside collectives of another axis that block the TPU compiler started 8 of 51 such gathers
        early, and 7 of 10 where there were none.
        """
        if not self.ops.kept:
            return
        blocking = {t.axis for t in traffic.values() if not (t.overlapped or t.backward)}
        for once, moved in traffic.items():
            if moved.overlapped and moved.kind == "all-gather" and once[0] in self.ops.kept:
                traffic[once] = replace(moved, overlapped=blocking <= {moved.axis})

    def _follow(self, layouts: Sequence[Layout]) -> None:
        """Price anew the ops around which a layout is another than it was."""
        pairs = zip(layouts, self._last, strict=True)
        changed = compress(count(), starmap(operator.ne, pairs))
        for index in {index for group in changed for index in self._touching[group]}:
            share = self.ops.share(index, self._around[index](layouts))
            self._compute[index] = share.compute_seconds
            self._fetching[index] = share.fetch_seconds
            self._n_bytes[index] = share.n_bytes
            if share.moves:
                self._moving[index] = share
            else:
                self._moving.pop(index, None)
        self._last = layouts

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
            yield self.ops.traffic(op, replace(dealt, n_runs=op.n_meetings))

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
