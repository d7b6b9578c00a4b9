"""The choice problem: one strategy a node, costs on nodes and edges, memory by live interval.

This is the general form of intra-operator parallelism (Alpa, section 4.2; XLA's auto-sharding;
the IOPDDL contest): choose one strategy `s_v` for every node `v` so that

    max( sum_v costs_v[s_v]          + sum_uv costs_uv[s_u][s_v],
         sum_v parallel_costs_v[s_v] + sum_uv parallel_costs_uv[s_u][s_v] )

is least, while at every time the usages of the nodes live then add up to no more than the memory
limit. Time that overlaps needs the second sum: a step takes
`compute + blocking + max(0, overlapped - compute)`, which is
`max(compute + blocking, overlapped + blocking)`. So `costs` hold compute plus blocking
collectives, `parallel_costs` overlapped plus blocking collectives. Where `parallel_costs` are
left out they equal `costs`, and the maximum of the two sums is the plain sum.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autoshard.errors import UsageError

__all__ = ["Edge", "Infeasible", "Node", "Problem", "Solution", "cost_of", "peak_usage", "sums_of"]

Table = tuple[tuple[float, ...], ...]


class Infeasible(Exception):
    """No choice keeps the limits. Raised inside the solver: `solve` says so in its `Solution`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Something to choose a strategy for.

    Args:
        costs: cost of each strategy, at least one; `inf` forbids it.
        usages: bytes of memory that each strategy holds while the node is live; empty for none.
        interval: `(start, stop)`, live at times `start <= t < stop`; None for always.
        parallel_costs: cost of each strategy in the second sum; empty when equal to `costs`.
    """

    costs: tuple[float, ...]
    usages: tuple[float, ...] = ()
    interval: tuple[int, int] | None = None
    parallel_costs: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.costs:
            raise UsageError("a node has no strategy; give it at least one cost")
        for name, values in (("usages", self.usages), ("parallel_costs", self.parallel_costs)):
            if values and len(values) != len(self.costs):
                raise UsageError(f"a node has {len(self.costs)} costs and {len(values)} {name}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """What two choices cost together; parallel edges add up.

    Args:
        source: index of the node whose strategies are the rows.
        target: index of the node whose strategies are the columns.
        costs: a row a source strategy, an entry a target strategy; `inf` forbids the pair.
        parallel_costs: the same for the second sum; empty when equal to `costs`.
    """

    source: int
    target: int
    costs: Table
    parallel_costs: Table = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Nodes, edges between them, and the memory they share.

    Args:
        nodes: what to choose for.
        edges: costs of pairs of choices.
        memory_limit: bytes that the live nodes may hold at any time; None for no limit.

    Raises:
        UsageError: an edge that names no node, or whose table has the wrong shape.
    """

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...] = ()
    memory_limit: float | None = None

    def __post_init__(self) -> None:
        for number, edge in enumerate(self.edges):
            if not (0 <= edge.source < len(self.nodes) and 0 <= edge.target < len(self.nodes)):
                raise UsageError(
                    f"edge {number} joins nodes {edge.source} and {edge.target}; "
                    f"there are {len(self.nodes)} nodes"
                )
            rows = len(self.nodes[edge.source].costs)
            columns = len(self.nodes[edge.target].costs)
            for table in (edge.costs, edge.parallel_costs or edge.costs):
                if len(table) != rows or any(len(row) != columns for row in table):
                    raise UsageError(f"the costs of edge {number} are not {rows} rows of {columns}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The best choice found, and how good any other could be.

    Args:
        choices: a strategy for each node; empty when none was found.
        cost: the objective of `choices`, `inf` when there are none.
        bound: no choice within the limits costs less than this.
        gap: `(cost - bound) / cost`, at least 0.
        proven: `choices` are optimal, or, without choices, it is proven that none exist.
        feasible: `choices` are there and keep every limit.
        n_reduced_nodes: nodes that the exact reduction left to search over.
        n_reduced_edges: edges between those.
    """

    choices: tuple[int, ...]
    cost: float
    bound: float
    gap: float
    proven: bool
    feasible: bool
    n_reduced_nodes: int = 0
    n_reduced_edges: int = 0

    @property
    def status(self) -> str:
        """`optimal`, `feasible`, `infeasible` (proven) or `unknown` (nothing found in time)."""
        if self.feasible:
            return "optimal" if self.proven else "feasible"
        return "infeasible" if self.proven else "unknown"


def sums_of(problem: Problem, choices: Sequence[int]) -> tuple[float, float]:
    """The two sums of one strategy a node, whatever memory it takes.

    >>> nodes = (Node(costs=(1.0, 2.0)), Node(costs=(5.0,), parallel_costs=(9.0,)))
    >>> edge = Edge(source=0, target=1, costs=((3.0,), (0.0,)))
    >>> sums_of(Problem(nodes=nodes, edges=(edge,)), (1, 0))  # 2 + 5 + 0 and 2 + 9 + 0
    (7.0, 11.0)
    """
    serial: list[float] = []
    parallel: list[float] = []
    for node, choice in zip(problem.nodes, choices, strict=True):
        serial.append(node.costs[choice])
        parallel.append((node.parallel_costs or node.costs)[choice])
    for edge in problem.edges:
        row, column = choices[edge.source], choices[edge.target]
        serial.append(edge.costs[row][column])
        parallel.append((edge.parallel_costs or edge.costs)[row][column])
    return math.fsum(serial), math.fsum(parallel)


def cost_of(problem: Problem, choices: Sequence[int]) -> float:
    """The objective of one strategy a node, infinite where that is forbidden."""
    return max(sums_of(problem, choices))


def peak_usage(problem: Problem, choices: Sequence[int]) -> float:
    """The most bytes live at any time under one strategy a node.

    >>> early = Node(costs=(0.0,), usages=(4.0,), interval=(0, 2))
    >>> late = Node(costs=(0.0,), usages=(3.0,), interval=(2, 5))
    >>> always = Node(costs=(0.0,), usages=(1.0,))
    >>> peak_usage(Problem(nodes=(early, late, always)), (0, 0, 0))
    5.0
    """
    constant = 0.0
    starts, stops, amounts = [], [], []
    for node, choice in zip(problem.nodes, choices, strict=True):
        if not node.usages:
            continue
        if node.interval is None:
            constant += node.usages[choice]
        elif node.interval[0] < node.interval[1]:
            starts.append(node.interval[0])
            stops.append(node.interval[1])
            amounts.append(node.usages[choice])
    if not starts:
        return constant
    times = np.unique(starts)
    changes = np.zeros(len(times) + 1)
    np.add.at(changes, np.searchsorted(times, starts), amounts)
    np.subtract.at(changes, np.searchsorted(times, stops), amounts)
    return constant + float(np.cumsum(changes[:-1]).max())
