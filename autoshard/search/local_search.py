"""Feasible answers to a reduced problem, better step by step: no bound, but quick.

`State.descend` changes one node at a time for the better. `free_ball` takes the nodes around one
and leaves the rest as it is, to solve the ball exactly (large neighbourhood search, Shaw 1998);
that serves problems too large for HiGHS in the time given.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

from autoshard.search.choice_graph import ChoiceGraph, Floats, Load

__all__ = ["State", "ball_around", "free_ball"]

# The price on memory above the limit starts at this part of the cost, and rises by this factor.
_FIRST_PRICE = 1e-3
_PRICE_STEP = 4.0
_N_PRICES = 12


class State:
    """A present strategy for every node of a graph, with the sums and memory that follow.

    Args:
        graph: the reduced problem; it does not change while the state is in use.
        chosen: node -> strategy; it may break limits.
    """

    def __init__(self, graph: ChoiceGraph, chosen: Mapping[int, int]) -> None:
        self.graph = graph
        self.chosen = dict(chosen)
        self.sums = np.zeros(graph.n_sums)
        self.n_forbidden = 0
        for u in graph.alive:
            self._add(graph.costs[u][:, chosen[u]])
        for u, v, table in graph.edges():
            self._add(table[:, chosen[u], chosen[v]])
        change = np.zeros(graph.n_times + 1)
        for u in graph.alive:
            for load in graph.loads[u]:
                change[load.start] += load.usages[chosen[u]]
                change[load.stop] -= load.usages[chosen[u]]
        self.used: Floats = change.cumsum()[:-1]

    def _add(self, costs: Floats) -> None:
        if np.isfinite(costs).all():
            self.sums += costs
        else:
            self.n_forbidden += 1

    @property
    def feasible(self) -> bool:
        """No forbidden entry, and memory within the limit."""
        limit = self.graph.limit * (1 + 1e-9)
        return not self.n_forbidden and bool(self.used.max(initial=0.0) <= limit)

    @property
    def cost(self) -> float:
        """The objective on the graph, when feasible."""
        return float(self.sums.max())

    def cost_at(self, u: int) -> float:
        """What a node costs with its edges, more than the least its own strategies cost."""
        costs, present = self.graph.costs[u].max(axis=0), self.chosen[u]
        edges = (t[:, present, self.chosen[v]].max() for v, t in self.graph.tables[u].items())
        return float(costs[present] - costs.min() + sum(edges))

    def repair(self, over: Callable[[], bool]) -> None:
        """Descend with a rising price on memory above the limit, then without regard to cost."""
        price = _FIRST_PRICE * max(abs(self.cost), self.graph.tolerance)
        for _ in range(_N_PRICES):
            if self.feasible:
                break
            self.descend(over, price)
            price *= _PRICE_STEP
        self.descend(over)

    def descend(self, over: Callable[[], bool], price: float = math.inf) -> None:
        """Give each node its best strategy in turn, until none changes or the time is over.

        Args:
            over: whether the time is over.
            price: what memory above the limit costs, by the limit and the time that it is held;
                with infinity a choice within the limits is better than any other.
        """
        waiting = dict.fromkeys(self.graph.alive)
        while waiting and not over():
            u = next(iter(waiting))
            del waiting[u]
            if self._improve(u, price):
                waiting.update(dict.fromkeys(self.graph.tables[u]))

    def _improve(self, u: int, price: float) -> bool:
        present = self.chosen[u]
        costs = self.graph.costs[u].copy()
        forbidden = np.zeros(costs.shape[1])
        for v, table in self.graph.tables[u].items():
            column = table[:, :, self.chosen[v]]
            finite = np.isfinite(column)
            forbidden += ~finite[0]
            costs += np.where(finite, column, 0.0)
        sums = self.sums[:, None] + costs - costs[:, [present]]
        objective = sums.max(axis=0)
        broken, overuse = forbidden, self._overuse(u)
        if price < math.inf:
            objective = objective + price * overuse
        else:
            broken = broken + overuse
        best = int(np.lexsort((objective, broken))[0])
        margin = self.graph.tolerance
        if (broken[best], objective[best] + margin) >= (broken[present], objective[present]):
            return False
        self.chosen[u] = best
        self.sums = sums[:, best]
        self.n_forbidden += int(forbidden[best] - forbidden[present])
        for load in self.graph.loads[u]:
            self.used[load.start : load.stop] += load.usages[best] - load.usages[present]
        return True

    def _overuse(self, u: int) -> Floats:
        """Memory above the limit, summed over the times that the node is live, by strategy."""
        loads, n = self.graph.loads[u], len(self.graph.kept[u])
        if not loads:
            return np.zeros(n)
        start, stop = min(x.start for x in loads), max(x.stop for x in loads)
        used = self.used[start:stop]
        most = sum(float(x.usages.max() - x.usages[self.chosen[u]]) for x in loads)
        if used.max() + most <= self.graph.limit:
            return np.zeros(n)
        usages = np.repeat(used[None], n, axis=0)
        for load in loads:
            change = load.usages - load.usages[self.chosen[u]]
            usages[:, load.start - start : load.stop - start] += change[:, None]
        over: Floats = np.maximum(usages - self.graph.limit, 0.0).sum(axis=1) / self.graph.limit
        return over


def ball_around(graph: ChoiceGraph, node: int, size: int, random: np.random.Generator) -> list[int]:
    """The nodes nearest to one, by edges and then by a common time of memory, at most `size`."""
    ball, queue = {node: None}, [node]
    for u in queue:
        for v in graph.tables[u]:
            if v not in ball and len(ball) < size:
                ball[v] = None
                queue.append(v)
    if len(ball) < size and graph.loads[node]:
        span = graph.loads[node][0]
        for v in random.permutation([u for u in graph.alive if u not in ball]).tolist():
            if len(ball) == size:
                break
            if any(x.start < span.stop and span.start < x.stop for x in graph.loads[v]):
                ball[v] = None
    return sorted(ball)


def free_ball(state: State, ball: list[int]) -> ChoiceGraph:
    """The problem of a ball with all other nodes as they are.

    Nodes are numbered by their place in the ball; one more node, the last, has one strategy that
    stands for the cost and memory of everything outside.
    """
    graph, place = state.graph, {u: i for i, u in enumerate(ball)}
    costs, inside = [], np.zeros((len(state.sums), 1))
    rest = state.used.copy()
    for u in ball:
        cost = graph.costs[u].copy()
        for v, table in graph.tables[u].items():
            if v not in place:
                cost += table[:, :, state.chosen[v]]
            elif u < v:
                inside[:, 0] += table[:, state.chosen[u], state.chosen[v]]
        inside[:, 0] += cost[:, state.chosen[u]]
        costs.append(cost)
        for load in graph.loads[u]:
            rest[load.start : load.stop] -= load.usages[state.chosen[u]]
    costs.append(state.sums[:, None] - inside)
    loads = [[Load(x.start, x.stop, x.usages) for x in graph.loads[u]] for u in ball]
    times = sorted({t for x in loads for load in x for t in range(load.start, load.stop)})
    loads.append([Load(t, t + 1, rest[t : t + 1]) for t in times])
    sizes = [cost.shape[1] for cost in costs]
    part = ChoiceGraph(
        limit=graph.limit,
        n_times=graph.n_times,
        tolerance=graph.tolerance,
        n_strategies=sizes,
        costs=costs,
        kept=[np.arange(size) for size in sizes],
        loads=loads,
        tables=[{} for _ in sizes],
        alive=dict.fromkeys(range(len(sizes))),
    )
    for u in ball:
        for v, table in graph.tables[u].items():
            if v in place and u < v:
                part.connect(place[u], place[v], table.copy())
    for node in part.alive:
        part.touch(node)
    return part
