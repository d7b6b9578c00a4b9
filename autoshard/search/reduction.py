"""Exact reduction of a choice problem: every rule keeps an optimal choice.

Rules, cheap ones first, until none applies:

- `_make_consistent`: a strategy that costs infinity, or that some neighbour forbids whatever that
  one chooses, goes away (arc consistency).
- `_split_separable`: an edge whose table is `a[i] + b[j]` goes into the costs of its nodes. So do
  the edges of a node with one strategy.
- `_merge_follower`: a node whose strategy each strategy of a neighbour forces becomes part of it.
- `_drop_dominated`: with the strategy j of one neighbour given, strategy a goes away when some b
  costs no more whatever the other neighbours do, and holds no more memory (dead-end elimination:
  Desmet 1992, Goldstein 1994). For a node with one neighbour this leaves the best strategies for
  each j, one of them where there is one order, and the node becomes a follower.
- `_eliminate_series`: a node without memory between two others becomes an edge (Bertele and
  Brioschi 1972) where that edge is no larger than the two it replaces.
- `_bound_memory`: a strategy that exceeds the limit with the least usage of all others goes away;
  a time at which the largest usages together meet the limit is forgotten.

With two sums, "costs no more" means in both of them.
"""

import numpy as np
import numpy.typing as npt

from autoshard.search.choice_graph import ChoiceGraph, Floats, Indices
from autoshard.search.problem import Infeasible

__all__ = ["reduce_graph"]

Mask = npt.NDArray[np.bool_]

# A later strategy replaces an earlier one only where it is better by more than rounding could
# add up to along a cycle of replacements, so such cycles cannot happen.
_CLEARLY = 1000.0

# Comparing the strategies of one node by more numbers than this costs a bound more than it gains.
_COSTLY = 3_000


def reduce_graph(graph: ChoiceGraph, *, thorough: bool = True) -> None:
    """Apply every rule until none changes the graph.

    Args:
        graph: changed in place.
        thorough: False to leave `_drop_dominated` out for the nodes of the largest tables.

    Raises:
        Infeasible: the problem has no feasible choice.
    """
    _bound_memory(graph)
    while graph.light or graph.heavy:
        while graph.light:
            node = next(iter(graph.light))
            del graph.light[node]
            _apply_cheap_rules(graph, node)
        if graph.heavy:
            node = next(iter(graph.heavy))
            del graph.heavy[node]
            if not _eliminate_series(graph, node) and (thorough or not _is_costly(graph, node)):
                _drop_dominated(graph, node)
        if not (graph.light or graph.heavy):
            _bound_memory(graph)


def _apply_cheap_rules(graph: ChoiceGraph, node: int) -> None:
    _make_consistent(graph, node)
    # What changes meanwhile stays fresh: it has yet to be made consistent.
    fresh, graph.fresh[node] = graph.fresh[node], set()
    for other in list(graph.tables[node]):
        if other not in fresh and other not in graph.fresh[node]:
            continue
        if _split_separable(graph, node, other):
            continue
        if _merge_follower(graph, other, node):
            continue
        if _merge_follower(graph, node, other):
            return


def _make_consistent(graph: ChoiceGraph, node: int) -> None:
    keep = np.isfinite(graph.costs[node][0])
    for other in graph.fresh[node]:
        keep &= np.isfinite(graph.tables[node][other][0]).any(axis=1)
    if not keep.all():
        graph.restrict(node, keep)


def _split_separable(graph: ChoiceGraph, u: int, v: int) -> bool:
    table = graph.tables[u][v]
    n_sums, n_rows, n_columns = table.shape
    if n_columns == 1:
        rows, columns = table[:, :, 0], np.zeros((n_sums, 1))
    elif n_rows == 1:
        rows, columns = np.zeros((n_sums, 1)), table[:, 0, :]
    elif not np.isfinite(table[0]).all():
        return False
    else:
        rows, columns = table[:, :, 0], table[:, 0, :] - table[:, 0, :1]
        rest = table - rows[:, :, None] - columns[:, None, :]
        if np.abs(rest).max() > graph.tolerance:
            return False
    graph.disconnect(u, v)
    graph.costs[u] = graph.costs[u] + rows
    graph.costs[v] = graph.costs[v] + columns
    return True


def _merge_follower(graph: ChoiceGraph, node: int, parent: int) -> bool:
    finite = np.isfinite(graph.tables[parent][node][0])
    if (finite.sum(axis=1) != 1).any():
        return False
    graph.merge(node, parent, finite.argmax(axis=1))
    return True


def _is_costly(graph: ChoiceGraph, node: int) -> bool:
    """Whether comparing a node's strategies takes long: two axes make two dozen layouts."""
    n_sums, n = graph.costs[node].shape
    widest = max((table.shape[2] for table in graph.tables[node].values()), default=1)
    return bool(n_sums * n * n * widest > _COSTLY)


def _drop_dominated(graph: ChoiceGraph, node: int) -> None:
    n = graph.costs[node].shape[1]
    if n == 1:
        return
    no_heavier = np.ones((n, n), dtype=bool)
    for load in graph.loads[node]:
        no_heavier &= load.usages[:, None] >= load.usages[None, :]
    costs = graph.costs[node]
    own = costs[:, :, None] - costs[:, None]
    least = {v: _least_differences(table) for v, table in graph.tables[node].items()}
    for other in list(least):
        table = graph.tables[node][other]
        # inf - inf: a is forbidden by one neighbour and b by another; nan counts as no better.
        with np.errstate(invalid="ignore"):
            rest = sum((d for v, d in least.items() if v != other), own)
            given = rest[:, :, :, None] + _differences(table)
        dropped = _dominated(given, no_heavier, graph.tolerance) & np.isfinite(table[0])
        if dropped.any():
            table[:, dropped] = np.inf
            graph.touch_edge(node, other)
            least[other] = _least_differences(table)
    if not least:
        keep = ~_dominated(own[..., None], no_heavier, graph.tolerance)[:, 0]
        if not keep.all():
            graph.restrict(node, keep)


def _differences(table: Floats) -> Floats:
    """`table[k, a, j] - table[k, b, j]` at `[k, a, b, j]`: +inf where a is forbidden anyway."""
    with np.errstate(invalid="ignore"):
        difference: Floats = table[:, :, None] - table[:, None]
    difference[np.isnan(difference)] = np.inf
    return difference


def _least_differences(table: Floats) -> Floats:
    least: Floats = _differences(table).min(axis=3)
    return least


def _dominated(given: Floats, no_heavier: Mask, tolerance: float) -> Mask:
    """Where `[a, j]` some b is no worse than a: `given[k, a, b, j] >= 0` for every sum k."""
    with np.errstate(invalid="ignore"):
        total = given.sum(axis=0)
    n = len(no_heavier)
    earlier = np.tri(n, k=-1, dtype=bool)[:, :, None]
    no_worse: Mask = np.all(given >= -tolerance, axis=0)
    clear = earlier | (total > _CLEARLY * tolerance)
    dominated: Mask = (no_worse & no_heavier[:, :, None] & clear).any(axis=1)
    return dominated


def _eliminate_series(graph: ChoiceGraph, node: int) -> bool:
    if len(graph.tables[node]) != 2 or graph.loads[node]:
        return False
    (u, to_u), (v, to_v) = graph.tables[node].items()
    paths = graph.costs[node][:, :, None, None] + to_u[:, :, :, None] + to_v[:, :, None, :]
    choice: Indices = paths.sum(axis=0).argmin(axis=0)
    table = np.take_along_axis(paths, choice[None, None], axis=1)[:, 0]
    if len(table) > 1 and (table > paths.min(axis=1)).any():
        return False
    old = sum(int(np.isfinite(t[0]).sum()) for t in (to_u, to_v))
    if v in graph.tables[u]:
        old += int(np.isfinite(graph.tables[u][v][0]).sum())
        new = int(np.isfinite(graph.tables[u][v][0] + table[0]).sum())
    else:
        new = int(np.isfinite(table[0]).sum())
    if new > old:
        return False
    graph.eliminate(node, table, choice)
    return True


def _bound_memory(graph: ChoiceGraph) -> None:
    if not any(graph.loads[node] for node in graph.alive):
        return
    least, most = np.zeros((2, graph.n_times + 1))
    for node in graph.alive:
        for load in graph.loads[node]:
            for total, usage in ((least, load.usages.min()), (most, load.usages.max())):
                total[load.start] += usage
                total[load.stop] -= usage
    least, most = least.cumsum(), most.cumsum()
    slack = 1e-9 * graph.limit
    if least.max() > graph.limit + slack:
        raise Infeasible(
            f"the least usage of every node together is {least.max():.0f} bytes; "
            f"the limit is {graph.limit:.0f}"
        )
    n_binding = np.concatenate([[0], (most > graph.limit + slack).cumsum()])
    for node in graph.alive:
        graph.loads[node] = [
            load for load in graph.loads[node] if n_binding[load.stop] > n_binding[load.start]
        ]
        keep = np.ones(len(graph.kept[node]), dtype=bool)
        for load in graph.loads[node]:
            rest = least[load.start : load.stop].max() - load.usages.min()
            keep &= load.usages + rest <= graph.limit + slack
        if not keep.all():
            graph.restrict(node, keep)
