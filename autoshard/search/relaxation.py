"""A quick lower bound and first answers for a reduced problem too large to start HiGHS on.

The bound is dual ascent on the local polytope by sequential tree-reweighted message passing
(Kolmogorov 2006): costs move between nodes and edges without a change to the cost of any choice,

    node_u = c_u + sum_v M[u][v],    edge_uv[i, j] = c_uv[i, j] - M[u][v][i] - M[v][u][j],

so the least of every node and edge add up to a bound. Memory enters by prices on times
(Lagrange multipliers, subgradient steps): with price p_t a byte, a strategy costs
`sum_t p_t usage` more and the bound is less by `sum_t p_t limit`. With two sums every weighted
mean of them is a bound on their maximum.

A choice through an entry costs at least the bound plus what that entry lies above the least of
its node or edge: with a known answer, entries that exceed it go away (`forbid_dear`).
"""

from collections.abc import Sequence

import numpy as np

from autoshard.search.choice_graph import ChoiceGraph, Floats
from autoshard.search.local_search import State

__all__ = ["Ascent", "Relaxation"]

_MOST_STEPS = 200
# Steps without memory prices at the start; steps without gain before prices move by half as much.
_WARM_UP = 10
_PATIENCE = 8
# The relative gain that counts, and how many steps without one end it.
_FINE = (1e-4, 25)
_ROUGH = (1e-3, 10)


class Relaxation:
    """Messages and prices over a graph that does not change meanwhile.

    Args:
        graph: the reduced problem.
        weights: weight of each sum, adding up to 1.
    """

    def __init__(self, graph: ChoiceGraph, weights: Floats) -> None:
        self._graph = graph
        self._order = tuple(graph.alive)
        # A sum of weight 0 is left out: 0 times a forbidden entry is no number.
        used = weights > 0
        weights = weights[used]
        self._costs = {u: weights @ graph.costs[u][used] for u in self._order}
        self._tables: dict[int, dict[int, Floats]] = {u: {} for u in self._order}
        self._messages: dict[int, dict[int, Floats]] = {u: {} for u in self._order}
        for u, v, table in graph.edges():
            mean = np.tensordot(weights, table[used], 1)
            self._tables[u][v], self._tables[v][u] = mean, mean.T
            self._messages[u][v] = np.zeros(mean.shape[0])
            self._messages[v][u] = np.zeros(mean.shape[1])
        rank = {node: rank for rank, node in enumerate(self._order)}
        self._later = {u: [v for v in self._tables[u] if rank[v] > rank[u]] for u in self._order}
        self._earlier = {u: [v for v in self._tables[u] if rank[v] < rank[u]] for u in self._order}
        self.prices = np.zeros(graph.n_times)
        self._priced = dict(self._costs)

    def set_prices(self, prices: Floats) -> None:
        """Put a price on a byte at each time."""
        self.prices = prices
        total = np.concatenate([[0.0], prices.cumsum()])
        for u in self._order:
            cost = self._costs[u]
            for load in self._graph.loads[u]:
                cost = cost + load.usages * (total[load.stop] - total[load.start])
            self._priced[u] = cost

    def sweep(self, *, choose: bool) -> dict[int, int]:
        """Pass messages forward and backward.

        Returns:
            The choice met on the way; empty unless it is asked for.
        """
        for u in self._order:
            self._send(u, self._later[u])
        chosen: dict[int, int] = {}
        for u in self._order[::-1]:
            if choose:
                here, tables = self._messages[u], self._tables[u]
                decided = self._priced[u] + sum(
                    tables[v][:, chosen[v]] if v in chosen else here[v] for v in tables
                )
                chosen[u] = int(decided.argmin())
            self._send(u, self._earlier[u])
        return chosen

    def _send(self, u: int, ahead: Sequence[int]) -> None:
        """Move what a node costs to its edges with the nodes ahead, and on to those."""
        here, tables = self._messages[u], self._tables[u]
        share = self.node_costs(u) / max(len(ahead), len(tables) - len(ahead), 1)
        for v in ahead:
            here[v] = here[v] - share
            self._messages[v][u] = (tables[v] - here[v][:, None]).min(axis=0)

    def node_costs(self, u: int) -> Floats:
        """What the strategies of a node cost after all moves."""
        total: Floats = self._priced[u] + sum(self._messages[u].values())
        return total

    def edge_costs(self, u: int, v: int) -> Floats:
        """What pairs cost after all moves."""
        table: Floats = self._tables[u][v] - self._messages[u][v][:, None] - self._messages[v][u]
        return table

    def bound(self) -> float:
        """No choice within the limits costs less."""
        total = sum(float(self.node_costs(u).min()) for u in self._order)
        for u in self._order:
            total += sum(float(self.edge_costs(u, v).min()) for v in self._tables[u] if u < v)
        if self._graph.limit < np.inf:
            total -= float(self.prices.sum()) * self._graph.limit
        return total

    def least_choices(self) -> dict[int, int]:
        """The cheapest strategy of each node after all moves."""
        return {u: int(self.node_costs(u).argmin()) for u in self._order}

    def forbid_dear(self, graph: ChoiceGraph, slack: float) -> None:
        """Forbid what no choice within `slack` of the bound can contain.

        Args:
            graph: where to forbid it: the graph of the relaxation or a copy.
            slack: cost of a known answer minus the bound.
        """
        above = {u: (c := self.node_costs(u)) - c.min() for u in self._order}
        for u in self._order:
            keep = above[u] <= slack
            for v, table in graph.tables[u].items():
                if u < v:
                    edge = self.edge_costs(u, v)
                    total = edge - edge.min() + above[u][:, None] + above[v]
                    dear = (total > slack) & np.isfinite(table[0])
                    if dear.any():
                        table[:, dear] = np.inf
                        graph.touch_edge(u, v)
            graph.costs[u] = np.where(keep, graph.costs[u], np.inf)
            if not keep.all():
                graph.touch(u)


class Ascent:
    """Raises the bound step by step: messages, then prices towards the limit.

    The step of the prices is Polyak's with a guessed gap, halved when it does not help.

    Args:
        graph: the reduced problem.
        weights: of the sums, adding up to 1.
        rough: whether a bound within a percent will do, where memory has no price.
    """

    def __init__(self, graph: ChoiceGraph, weights: Floats, *, rough: bool = False) -> None:
        self._graph, self._rough = graph, rough
        self._relaxation = Relaxation(graph, weights)
        self._best_prices = self._relaxation.prices
        self._reach, self._stalled, self._since_gain = 0.1, 0, 0
        self.best_bound = -np.inf
        self.n_steps = 0

    def improving(self) -> bool:
        """Whether another step is worth its time."""
        return self.n_steps < _MOST_STEPS and self._since_gain < self._ending[1]

    @property
    def _ending(self) -> tuple[float, int]:
        return _ROUGH if self._rough and not self._relaxation.prices.any() else _FINE

    def step(self, known: float, *, choose: bool) -> dict[int, int]:
        """One sweep and a change of prices.

        Args:
            known: cost of the best answer, or infinity.
            choose: whether to make a choice.

        Returns:
            The choice met on the way; empty unless it is asked for.
        """
        chosen = self._relaxation.sweep(choose=choose)
        bound = self._relaxation.bound()
        self.n_steps += 1
        gained = bound > self.best_bound + self._ending[0] * abs(bound)
        self._stalled = 0 if gained else self._stalled + 1
        self._since_gain = 0 if gained else self._since_gain + 1
        if bound > self.best_bound:
            self.best_bound, self._best_prices = bound, self._relaxation.prices
        # While messages alone raise the bound, prices would chase a moving target.
        if self.n_steps > _WARM_UP and not gained and self._graph.limit < np.inf:
            self._move_prices(known)
        return chosen

    def _move_prices(self, known: float) -> None:
        relaxation = self._relaxation
        if self._stalled > _PATIENCE:
            self._reach, self._stalled = self._reach / 2, 0
            relaxation.set_prices(self._best_prices)
            return
        over = State(self._graph, relaxation.least_choices()).used - self._graph.limit
        over[(over < 0) & (relaxation.prices == 0)] = 0.0
        if over.any():
            reach = min(self._reach * abs(self.best_bound), known - self.best_bound)
            size = reach / float(over @ over)
            relaxation.set_prices(np.maximum(relaxation.prices + size * over, 0.0))

    def forbid_dear(self, graph: ChoiceGraph, known: float) -> None:
        """As `Relaxation.forbid_dear`, by the last step's messages and the best prices.

        Args:
            graph: the graph of the ascent or a copy of it.
            known: cost of a known answer, or a little more.
        """
        self._relaxation.set_prices(self._best_prices)
        self._relaxation.forbid_dear(graph, known - self._relaxation.bound())
