"""Solves a reduced problem by its independent components, each as one program.

Memory rows that can bind go in together where they are few, and otherwise lazily, where an answer
breaks them. HiGHS keeps a row to 1e-6 of the limit only: an answer that exceeds the limit by less
is cut off by a cover row, "not all of these strategies or larger ones", which is exact.
"""

import math
import time

import numpy as np

from autoshard.search.choice_graph import ChoiceGraph
from autoshard.search.local_search import State
from autoshard.search.milp import Answer, build_program, cover_row, memory_row, solve_program
from autoshard.search.problem import Infeasible

__all__ = ["solve_graph"]

# Memory entries up to which every row goes in at once.
_ALL_MEMORY_ENTRIES = 100_000


def solve_graph(
    graph: ChoiceGraph, gap: float, seconds: float, start: State
) -> tuple[dict[int, int], float]:
    """Choices of every component, from `start` where HiGHS found none, and the bound on all."""
    chosen, bound = dict(start.chosen), 0.0
    size = max(abs(start.cost), 1e-3 * graph.scale())
    deadline = time.monotonic() + seconds
    for nodes in _components(graph):
        if all(len(graph.kept[u]) == 1 for u in nodes):
            # One choice: its edges are gone, and the reduction has checked its memory.
            bound += float(np.sum([graph.costs[u] for u in nodes], axis=0).max())
            chosen |= dict.fromkeys(nodes, 0)
            continue
        left = deadline - time.monotonic() if seconds < math.inf else math.inf
        answer = _solve_component(graph, nodes, gap, left, size)
        chosen |= answer.values or {}
        bound += answer.bound
    return chosen, bound


def _solve_component(
    graph: ChoiceGraph, nodes: list[int], gap: float, seconds: float, size: float
) -> Answer:
    program = build_program(graph, nodes, size)
    times, n_entries = _binding_times(graph, nodes)
    included = set(times if n_entries <= _ALL_MEMORY_ENTRIES else ())
    rows = [memory_row(graph, program, t) for t in sorted(included)]
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic() if seconds < math.inf else math.inf
        answer = solve_program(program, rows, gap, left)
        if answer.infeasible:
            raise Infeasible("no choice keeps the memory limit")
        if answer.values is None or not times:
            return answer
        used = State(graph, dict.fromkeys(graph.alive, 0) | answer.values).used
        broken = [t for t in times if used[t] > graph.limit * (1 + 1e-9)]
        if not broken or (seconds < math.inf and time.monotonic() > deadline):
            return answer
        for t in broken:
            known = t in included
            rows.append(
                cover_row(graph, program, t, answer.values)
                if known
                else memory_row(graph, program, t)
            )
        included.update(broken)


def _binding_times(graph: ChoiceGraph, nodes: list[int]) -> tuple[list[int], int]:
    """Times at which the limit can bind, and the number of entries of their memory rows.

    A time up to the next of which nothing ends has its loads in the row of the next.
    """
    most, count = np.zeros(graph.n_times + 1), np.zeros(graph.n_times + 1, dtype=np.int64)
    ends = np.zeros(graph.n_times + 1, dtype=bool)
    for node in nodes:
        for load in graph.loads[node]:
            for total, amount in ((most, load.usages.max()), (count, len(load.usages))):
                total[load.start] += amount
                total[load.stop] -= amount
            ends[load.stop] = True
    binding = (most.cumsum()[:-1] > graph.limit * (1 + 1e-9)) & ends[1:]
    return binding.nonzero()[0].tolist(), int(count.cumsum()[:-1][binding].sum())


def _components(graph: ChoiceGraph) -> list[list[int]]:
    """Sets of nodes that can be solved apart.

    Nodes in one set are joined by edges, by memory, or by costs that differ in the two sums.
    """
    coupled: list[int] = []
    components: list[list[int]] = []
    seen: set[int] = set()
    for root in graph.alive:
        if root in seen:
            continue
        seen.add(root)
        component = [root]
        for u in component:
            component.extend(v for v in graph.tables[u] if v not in seen)
            seen.update(graph.tables[u])
        apart = all(
            not graph.loads[u]
            and all((t == t[:1]).all() for t in (graph.costs[u], *graph.tables[u].values()))
            for u in component
        )
        if apart:
            components.append(sorted(component))
        else:
            coupled += component
    return [*components, sorted(coupled)] if coupled else components
