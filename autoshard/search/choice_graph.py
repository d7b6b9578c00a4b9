"""A choice problem under reduction: numpy tables that shrink, and how to undo each step.

Every change keeps an optimal choice of the problem it came from. A node that goes away leaves a
record of what it takes for each choice of the nodes that it depends on, so `choices` turns
choices for the nodes that are left into choices for all.
"""

import copy
import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from autoshard.errors import UsageError
from autoshard.search.problem import Infeasible, Node, Problem

__all__ = ["ChoiceGraph", "Load"]

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

# What rounding may do to a sum of costs, relative to the largest.
_ROUNDING = 1e-13


@dataclass(slots=True)
class Load:
    """Memory held from time `start` up to before `stop`, a number a strategy."""

    start: int
    stop: int
    usages: Floats


@dataclass(slots=True)
class _Record:
    """What `node` takes, in its own first numbering, by the first numbering of `parents`."""

    node: int
    parents: tuple[int, ...]
    choice: Indices


@dataclass(slots=True)
class ChoiceGraph:
    """The mutable state of the reduction.

    Args:
        limit: most bytes at any time, or infinity.
        n_times: how many points in time there are.
        tolerance: costs that differ by less count as equal.
        n_strategies: of each node, before any was left out.
        costs: a table (sums, strategies) a node; there are one or two sums.
        kept: the first numbers of the strategies that a node still has.
        loads: the memory of a node; of no interest are times that the limit cannot bind.
        tables: neighbour -> table (sums, own strategies, neighbour's strategies), a node. The
            table of the other direction is a view of the same numbers.
        alive: the nodes that are left, in order.
        light, heavy: nodes to look at again, by cheap and by costly rules.
        records: what was left out, in order, from which the answer is put together again.

    Attributes:
        fresh: of each node the neighbours to which the edge has changed since its cheap rules were
            tried.
    """

    limit: float
    n_times: int
    tolerance: float
    n_strategies: list[int]
    costs: list[Floats]
    kept: list[Indices]
    loads: list[list[Load]]
    tables: list[dict[int, Floats]]
    alive: dict[int, None]
    light: dict[int, None] = field(default_factory=dict)
    heavy: dict[int, None] = field(default_factory=dict)
    records: list[_Record] = field(default_factory=list)
    fresh: list[set[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.fresh = [set() for _ in self.costs]

    @classmethod
    def of(cls, problem: Problem) -> "ChoiceGraph":
        """The whole problem, nothing reduced yet."""
        parallel = any(node.parallel_costs for node in problem.nodes)
        n_sums = 2 if parallel or any(edge.parallel_costs for edge in problem.edges) else 1
        limit = math.inf if problem.memory_limit is None else problem.memory_limit
        loads, n_times = _loads_of(problem.nodes) if limit < math.inf else ([], 0)
        graph = cls(
            limit=limit,
            n_times=n_times,
            tolerance=0.0,
            n_strategies=[len(node.costs) for node in problem.nodes],
            costs=[_costs_of(n.costs, n.parallel_costs, n_sums) for n in problem.nodes],
            kept=[np.arange(len(node.costs)) for node in problem.nodes],
            loads=loads or [[] for _ in problem.nodes],
            tables=[{} for _ in problem.nodes],
            alive=dict.fromkeys(range(len(problem.nodes))),
        )
        for edge in problem.edges:
            table = _costs_of(edge.costs, edge.parallel_costs, n_sums)
            if edge.source == edge.target:
                graph.costs[edge.source] += np.diagonal(table, axis1=1, axis2=2)
            else:
                graph.connect(edge.source, edge.target, table)
        graph.tolerance = _ROUNDING * graph.scale()
        for node in graph.alive:
            graph.touch(node)
        return graph

    def copy(self) -> "ChoiceGraph":
        """A graph that changes apart from this one."""
        twin = copy.deepcopy(self)
        for u in self.alive:
            for v, table in twin.tables[u].items():
                if u < v:
                    # A deep copy of a view is no view.
                    twin.tables[v][u] = table.swapaxes(1, 2)
        return twin

    def scale(self) -> float:
        """The largest finite cost, or 1."""
        arrays = [self.costs[u] for u in self.alive]
        arrays += [t for u in self.alive for v, t in self.tables[u].items() if u < v]
        largest = (np.abs(a, where=np.isfinite(a), out=np.zeros(a.shape)).max() for a in arrays)
        return float(max(largest, default=0.0)) or 1.0

    @property
    def n_sums(self) -> int:
        """One or two sums."""
        return next((len(self.costs[node]) for node in self.alive), 1)

    def touch(self, node: int) -> None:
        """Have every rule look at the node again."""
        self.light[node] = None
        self.heavy[node] = None

    def touch_edge(self, u: int, v: int) -> None:
        """Have every rule look at the edge between two nodes again."""
        self._refresh(u, v)
        self.touch(u)
        self.touch(v)

    def _refresh(self, u: int, v: int) -> None:
        self.fresh[u].add(v)
        self.fresh[v].add(u)

    def connect(self, u: int, v: int, table: Floats) -> None:
        """Add a table (sums, strategies of u, strategies of v) to the edge between two nodes."""
        if v in self.tables[u]:
            table = self.tables[u][v] + table
        self.tables[u][v] = table
        self.tables[v][u] = table.swapaxes(1, 2)
        self.touch_edge(u, v)

    def disconnect(self, u: int, v: int) -> Floats:
        """Take the edge between two nodes away and return its table, rows for u."""
        del self.tables[v][u]
        self.fresh[u].discard(v)
        self.fresh[v].discard(u)
        self.touch(u)
        self.touch(v)
        return self.tables[u].pop(v)

    def restrict(self, node: int, keep: npt.NDArray[np.bool_]) -> None:
        """Leave a node only some of its strategies.

        Raises:
            Infeasible: none are left, so the problem has no feasible choice.
        """
        if not keep.any():
            raise Infeasible(f"no strategy of node {node} can be part of any choice")
        self.costs[node] = self.costs[node][:, keep]
        self.kept[node] = self.kept[node][keep]
        for load in self.loads[node]:
            load.usages = load.usages[keep]
        for other, table in self.tables[node].items():
            table = np.ascontiguousarray(table[:, keep])
            self.tables[node][other] = table
            self.tables[other][node] = table.swapaxes(1, 2)
            self._refresh(other, node)
            self.touch(other)
        self.touch(node)

    def merge(self, node: int, parent: int, choice: Indices) -> None:
        """Let a node follow a neighbour: `choice` is its strategy for each of the neighbour's."""
        table = self.disconnect(parent, node)
        rows = np.arange(len(choice))
        self.costs[parent] = self.costs[parent] + self.costs[node][:, choice]
        self.costs[parent] += table[:, rows, choice]
        for other in list(self.tables[node]):
            self.connect(parent, other, self.disconnect(node, other)[:, choice])
        for load in self.loads[node]:
            self._add_load(parent, Load(load.start, load.stop, load.usages[choice]))
        self._remove(node, (parent,), choice)

    def eliminate(self, node: int, table: Floats, choice: Indices) -> None:
        """Replace a node between two others by a table of what it costs at its best.

        Args:
            node: holds no memory and has two neighbours.
            table: (sums, strategies of the first neighbour, of the second).
            choice: the node's strategy for each pair.
        """
        u, v = self.tables[node]
        self.disconnect(node, u)
        self.disconnect(node, v)
        self.connect(u, v, table)
        self._remove(node, (u, v), choice)

    def _remove(self, node: int, parents: tuple[int, ...], choice: Indices) -> None:
        first = np.full([self.n_strategies[parent] for parent in parents], -1)
        first[np.ix_(*(self.kept[parent] for parent in parents))] = self.kept[node][choice]
        self.records.append(_Record(node, parents, first))
        self.loads[node] = []
        for group in (self.alive, self.light, self.heavy):
            group.pop(node, None)

    def _add_load(self, node: int, load: Load) -> None:
        for other in self.loads[node]:
            if (other.start, other.stop) == (load.start, load.stop):
                other.usages = other.usages + load.usages
                return
        self.loads[node].append(load)

    def choices(self, chosen: dict[int, int]) -> tuple[int, ...]:
        """First-numbering choices of all nodes from present ones of the nodes left."""
        first = {node: int(self.kept[node][choice]) for node, choice in chosen.items()}
        for record in reversed(self.records):
            first[record.node] = int(record.choice[tuple(first[p] for p in record.parents)])
        return tuple(first[node] for node in range(len(self.n_strategies)))

    def n_entries(self) -> int:
        """Pairs of choices on edges that are not forbidden."""
        return sum(int(np.isfinite(table[0]).sum()) for _, _, table in self.edges())

    def weighted(self, weights: Floats) -> "ChoiceGraph":
        """A graph apart from this one whose one cost is a weighted mean of the sums."""
        twin = self.copy()
        for u in self.alive:
            twin.costs[u] = (weights @ self.costs[u])[None]
            twin.touch(u)
        for u, v, table in self.edges():
            mean = np.tensordot(weights, np.where(np.isinf(table), 0.0, table), 1)[None]
            mean[:, np.isinf(table[0])] = np.inf
            twin.tables[u][v], twin.tables[v][u] = mean, mean.swapaxes(1, 2)
            twin.touch_edge(u, v)
        return twin

    def edges(self) -> list[tuple[int, int, Floats]]:
        """Every edge once, `(u, v, table)` with u < v."""
        return [(u, v, t) for u in self.alive for v, t in self.tables[u].items() if u < v]


def _costs_of(costs: object, parallel_costs: object, n_sums: int) -> Floats:
    """Costs of both sums in one array; what is infinite in one is so in both."""
    sums = [costs] if n_sums == 1 else [costs, parallel_costs or costs]
    array = np.array(sums, dtype=np.float64)
    if np.isnan(array).any() or np.isneginf(array).any():
        raise UsageError("a cost is not a number; forbid a choice with +inf")
    if n_sums == 2:
        array[:, np.isinf(array).any(axis=0)] = np.inf
    return array


def _loads_of(nodes: tuple[Node, ...]) -> tuple[list[list[Load]], int]:
    """Loads on a time axis that has only the starts of intervals: usage peaks at one of them."""
    live = [n for n in nodes if n.usages and n.interval and n.interval[0] < n.interval[1]]
    times = np.unique([n.interval[0] for n in live if n.interval])
    n_times = max(len(times), 1)
    loads: list[list[Load]] = []
    for node in nodes:
        start, stop = 0, n_times
        if node.interval is not None:
            start, stop = (int(i) for i in np.searchsorted(times, node.interval))
        some = bool(node.usages) and max(node.usages) > 0 and start < stop
        loads.append([Load(start, stop, np.array(node.usages))] if some else [])
    return loads, n_times
