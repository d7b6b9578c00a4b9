"""The layout problem with every intermediate free: a lower bound, and a good first assignment.

XLA lays out the intermediates that no rule names by propagation. Here they are chosen freely, so
the least cost of this problem is a lower bound on the cost of every propagated program, and the
specs it gives the families are where the search starts.

Nodes: a family chooses a spec, a group of arrays a layout, an op the factor it splits over each
mesh axis. Edges: an op and each group it reads or makes, priced by `MoveTables`. An array
that several ops read is gathered once in the program, so each reader is charged an equal share; the
same holds for sums of partial sums. Repeated blocks are tied: their intermediates are laid out
alike. With the solver's two sums

    serial = compute + blocking collectives,  parallel = overlapped + blocking collectives

the objective is their maximum, the step time of `autoshard.cost.values`. Memory counts what is
held throughout: weights and optimizer slots. It is bounded by dual ascent, not solved: the answer
is only where the search starts.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from autoshard.cost.roofline import compute_seconds
from autoshard.cost.shards import Choice, local_bytes
from autoshard.cost.step import StepPricer
from autoshard.cost.strategies import candidate_choices
from autoshard.graph.axis_parts import AxisParts
from autoshard.graph.program import WHOLE, Array, Layout, Op
from autoshard.graph.splits import splits_evenly
from autoshard.graph.tying import tie_blocks
from autoshard.mesh import Mesh, Spec
from autoshard.search.candidates import Choices, first_specs, fixed_layouts
from autoshard.search.move_tables import MoveTables
from autoshard.search.problem import Edge, Node, Problem
from autoshard.search.solver import solve

__all__ = ["Relaxed", "relax"]

_GAP = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxed:
    """The answer of the relaxed problem.

    Attributes:
        assignment: family -> spec; empty where nothing fits the memory.
        bound_seconds: no layout that treats repeated blocks alike has a faster step, by the cost
            model.
    """

    assignment: dict[str, Spec]
    bound_seconds: float


def relax(
    pricer: StepPricer, families: Sequence[Choices], mesh: Mesh, memory_limit: int | None
) -> Relaxed:
    """Solve the relaxed problem.

    Args:
        pricer: prices of the program on the machine.
        families: what may be chosen.
        mesh: the mesh.
        memory_limit: bytes a device for weights and slots, or None.

    Returns:
        The families' specs of its best answer, and its bound in seconds.
    """
    builder = _Builder(pricer, families, mesh)
    solution = solve(
        Problem(
            nodes=tuple(builder.nodes),
            edges=tuple(builder.edges),
            memory_limit=None if memory_limit is None else float(memory_limit),
        ),
        gap=_GAP,
        exact=False,
    )
    assignment = {}
    if solution.feasible:
        for choices, node in zip(families, builder.family_nodes, strict=True):
            assignment[choices.name] = choices.specs[solution.choices[node]]
    return Relaxed(assignment=assignment, bound_seconds=solution.bound)


@dataclass(frozen=True, slots=True)
class _Sharers:
    """The ops that read one array, or add to one sum.

    Attributes:
        n_ops: how many they are.
        n_moves: how often it is moved at the least, where ops of several blocks share it; else 0:
            each block moves its own.
    """

    n_ops: int
    n_moves: int


def _sharers(ops: Sequence[Op], shared_by: Callable[[Op], Sequence[int]]) -> dict[int, _Sharers]:
    """What ops share -> which ones; what an op reads twice counts twice."""
    n_ops: Counter[int] = Counter()
    counts: dict[int, dict[str, set[int]]] = {}
    for op in ops:
        for shared in shared_by(op):
            n_ops[shared] += 1
            places = counts.setdefault(shared, {})
            places.setdefault(op.place, set()).add(op.count)
    return {
        shared: _Sharers(
            n_ops=n_ops[shared],
            n_moves=min((min(of) for of in places.values() if len(of) > 1), default=0),
        )
        for shared, places in counts.items()
    }


class _Builder:
    """Collects the nodes and edges of the relaxed problem."""

    def __init__(self, pricer: StepPricer, families: Sequence[Choices], mesh: Mesh) -> None:
        self.pricer = pricer
        self.program = pricer.program
        self.machine = pricer.machine
        self.sizes = pricer.machine.axis_sizes
        self.nodes: list[Node] = []
        self.edges: list[Edge] = []
        self.family_nodes: list[int] = []
        self.moves = MoveTables(pricer)
        self.stands_for, ops = tie_blocks(self.program)
        self.node_of: list[int] = [-1] * len(self.program.groups)
        self.layouts_of: list[tuple[Layout, ...]] = [()] * len(self.program.groups)
        self.add_arguments(families, mesh)
        self.add_groups()
        self.readers = _sharers(self.program.ops, lambda op: [a.identity for a in op.operands])
        self.addends = _sharers(self.program.ops, lambda op: [op.sum_into])
        for op, groups, count in ops:
            self.add_op(op, groups, count)

    def add_arguments(self, families: Sequence[Choices], mesh: Mesh) -> None:
        """One node a family; its groups (blocks, slots) follow it. Other arguments are fixed."""
        base = first_specs(families)
        family_of = {
            self.stands_for[argument.group]: argument.family
            for argument in self.program.arguments
            if argument.family in base
        }
        for group, layout in fixed_layouts(self.program, base, mesh, self.machine.parts).items():
            group = self.stands_for[group]
            if group not in family_of and self.node_of[group] < 0:
                self.layouts_of[group] = (layout,)
                self.node_of[group] = self.add_node((0.0,))
        for choices in families:
            options = [
                fixed_layouts(self.program, {**base, choices.name: spec}, mesh, self.machine.parts)
                for spec in choices.specs
            ]
            held, seconds = zip(
                *(self.argument_costs(choices.name, option) for option in options), strict=True
            )
            node = self.add_node(seconds, held)
            self.family_nodes.append(node)
            for group, family in family_of.items():
                if family == choices.name:
                    self.node_of[group] = node
                    self.layouts_of[group] = tuple(option[group] for option in options)

    def argument_costs(self, family: str, fixed: Mapping[int, Layout]) -> tuple[float, float]:
        """Bytes a device of a family's weights and slots, and seconds they cost beside the ops."""
        held = seconds = 0.0
        for argument in self.program.arguments:
            if argument.family == family:
                layout = fixed[argument.group]
                n_bytes = local_bytes(argument.n_bytes, layout, self.sizes)
                held += int(n_bytes * argument.count)
                seconds += self.pricer.arguments.least_seconds(argument, layout)
        return held, seconds

    def add_groups(self) -> None:
        """One node a free group that stands for itself, with every layout that divides it."""
        for index, group in enumerate(self.program.groups):
            if self.stands_for[index] == index and self.node_of[index] < 0:
                self.layouts_of[index] = tuple(_layouts(group.sizes, self.machine.parts))
                self.node_of[index] = self.add_node((0.0,) * len(self.layouts_of[index]))

    def add_op(self, op: Op, groups: tuple[int, ...], count: int) -> None:
        """One node an op, and an edge to each group it touches."""
        layouts = [self.layouts_of[group] for group in groups]
        choices = tuple(candidate_choices(op, layouts, self.sizes))
        least = count * op.slicing.share if op.slicing else count
        seconds = tuple(compute_seconds(op, c, self.machine) * least for c in choices)
        node = self.add_node(seconds)
        for position, (array, group) in enumerate(zip(op.arrays, groups, strict=True)):
            operand = position if position < len(op.operands) else None
            is_sum = operand is None
            sharers = self.addends[op.sum_into] if is_sum else self.readers[array.identity]
            share = (sharers.n_moves or count) / sharers.n_ops
            self.add_edge(op, node, choices, array, group, operand, share)

    def add_edge(
        self,
        op: Op,
        node: int,
        choices: tuple[Choice, ...],
        array: Array,
        group: int,
        operand: int | None,
        share: float,
    ) -> None:
        """What moving one array costs, by the op's choice and the group's layout."""
        table = share * self.moves.table(op, array, operand, choices, self.layouts_of[group])
        if table.any():
            serial, parallel = (tuple(map(tuple, costs)) for costs in table.tolist())
            self.edges.append(
                Edge(
                    source=node,
                    target=self.node_of[group],
                    costs=serial,
                    parallel_costs=parallel,
                )
            )

    def add_node(self, costs: tuple[float, ...], usages: tuple[float, ...] = ()) -> int:
        """A node whose costs are compute: they do not count in the parallel sum."""
        self.nodes.append(Node(costs=costs, usages=usages, parallel_costs=(0.0,) * len(costs)))
        return len(self.nodes) - 1


def _layouts(sizes: Sequence[int], parts: AxisParts) -> Iterator[Layout]:
    """Every layout that divides an array, in parts of an axis where a dimension asks for them."""
    dims = range(WHOLE, len(sizes))
    options: list[list[Layout]] = []
    for of in parts.parts:
        apart = any(size % math.prod(of) and size % of[0] == 0 for size in sizes)
        together = [(dim,) * len(of) for dim in dims]
        options.append(list(itertools.product(dims, repeat=len(of))) if apart else together)
    for chosen in itertools.product(*options):
        layout = tuple(itertools.chain(*chosen))
        if splits_evenly(sizes, layout, parts.sizes):
            yield layout
