"""Solves choice problems: proven optima, or the best answer in a time limit with its bound.

Over one choice `s_v` a node, with the tables of `autoshard.search.problem`:

    minimise    max_k ( sum_v c^k_v[s_v] + sum_uv c^k_uv[s_u, s_v] )         `cost_of`
    subject to  sum_{v live at t} m_v[s_v] <= limit, every time t            `peak_usage`

    1. exact reduction: rules that keep an optimal choice                    `reduce_graph`
    2. two sums: bounds and answers from weighted means of them              `_Search.weigh`
    3. where much is left, a bound by dual ascent and answers by descent,    `_Search.relax`
       and entries that no better answer can contain go away                 `forbid_dear`
    4. each independent component as a mixed integer program                 `solve_graph`
       with equality marginals, by HiGHS                                     `build_program`
    5. in a time limit only: balls of nodes around a known answer, solved    `_Search.polish`
       exactly in turn

Without a time limit the answer depends on the problem alone.
"""

import math
import time
from collections.abc import Callable

import numpy as np

from autoshard.search.choice_graph import ChoiceGraph, Floats
from autoshard.search.components import solve_graph
from autoshard.search.local_search import State, ball_around, free_ball
from autoshard.search.problem import Infeasible, Problem, Solution, cost_of, peak_usage, sums_of
from autoshard.search.reduction import reduce_graph
from autoshard.search.relaxation import Ascent

__all__ = ["solve"]

# A relative gap below this is rounding.
_PROVEN = 1e-6
# Finite edge entries from which a bound and an answer come before HiGHS, and from which a time
# limit goes to improving answers instead of to HiGHS.
_LARGE = 10_000
_TOO_LARGE = 150_000
_ROUNDS = 3
# So many steps of dual ascent come before another answer is made of one.
_ANSWER_EVERY = 5
_MOST_WEIGHTS = 10
# A weight that leaves the other sum to choose among answers alike in the first.
_ALMOST_ONE = 1.0 - 1e-4
# A relative gap above this forbids next to nothing.
_WIDE = 0.2
_SMALLEST_BALL = 20
_RANK_EVERY = 20


def solve(
    problem: Problem,
    *,
    gap: float = _PROVEN,
    time_limit: float | None = None,
    exact: bool = True,
) -> Solution:
    """Choose a strategy for every node, at least cost within the memory limit.

    Args:
        problem: nodes, edges and the limit.
        gap: stop when `(cost - bound) / cost` is no more than this.
        time_limit: seconds after which to return the best answer so far, about; None to stop by
            gap alone.
        exact: False to stop after dual ascent, which is quick: the bound is mostly within some
            percent of the best one, the answer only a good start.

    Returns:
        The choices with their bound; `status` says `infeasible` where it is proven that nothing
        fits, `unknown` where nothing was found in time.

    >>> from autoshard.search.problem import Edge, Node
    >>> nodes = (Node(costs=(1.0, 3.0), usages=(8.0, 4.0)), Node(costs=(0.0, 0.0)))
    >>> edge = Edge(source=0, target=1, costs=((9.0, math.inf), (2.0, 0.0)))
    >>> solution = solve(Problem(nodes=nodes, edges=(edge,), memory_limit=6.0))
    >>> solution.choices, solution.cost, solution.status
    ((1, 1), 3.0, 'optimal')
    """
    if not problem.nodes:
        return Solution(choices=(), cost=0.0, bound=0.0, gap=0.0, proven=True, feasible=True)
    search = _Search(problem, gap, time_limit)
    try:
        graph = ChoiceGraph.of(problem)
        reduce_graph(graph, thorough=exact)
        search.n_nodes, search.n_edges = len(graph.alive), len(graph.edges())
        if not exact:
            search.relax(graph, rough=True)
            return search.solution()
        if graph.n_sums == 2 and graph.n_entries() <= _TOO_LARGE:
            search.weigh(graph)
        if search.relative_gap() > gap and graph.n_entries() > _LARGE:
            graph = search.tighten(graph)
        search.finish(graph)
    except Infeasible:
        # Nothing (else) is left: what is known already is the best.
        search.bound = search.cost
    return search.solution()


class _Search:
    """The best answer and bound so far, and the clock."""

    def __init__(self, problem: Problem, gap: float, time_limit: float | None) -> None:
        self.problem = problem
        self.gap = gap
        self.deadline = math.inf if time_limit is None else time.monotonic() + time_limit
        self.choices: tuple[int, ...] | None = None
        self.cost, self.bound = math.inf, -math.inf
        self.state: State | None = None
        self.weights: Floats | None = None
        self.n_nodes = self.n_edges = 0

    def left(self) -> float:
        """Seconds until the time limit."""
        return math.inf if self.deadline == math.inf else self.deadline - time.monotonic()

    def until(self, share: float) -> Callable[[], bool]:
        """A test whether this share of the time left now has gone."""
        end = math.inf if self.deadline == math.inf else time.monotonic() + share * self.left()
        return lambda: end < math.inf and time.monotonic() >= end

    def offer(self, state: State) -> None:
        """Keep an answer if it is feasible and better."""
        if not state.feasible:
            return
        choices = state.graph.choices(state.chosen)
        cost = cost_of(self.problem, choices)
        limit = self.problem.memory_limit
        if cost < self.cost and (
            limit is None or peak_usage(self.problem, choices) <= limit * (1 + 1e-9)
        ):
            self.choices, self.cost, self.state = choices, cost, state

    def raise_bound(self, bound: float) -> None:
        """Take over a bound on every answer better than the best known."""
        self.bound = max(self.bound, min(bound, self.cost))

    def relative_gap(self) -> float:
        """`(cost - bound) / cost`; 0 where they are the same, infinity without one of them."""
        if self.cost == self.bound:
            return 0.0
        if math.inf in (self.cost, -self.bound):
            return math.inf
        return max(0.0, self.cost - self.bound) / (abs(self.cost) or 1.0)

    def solution(self) -> Solution:
        """The result as a value."""
        return Solution(
            choices=self.choices or (),
            cost=self.cost,
            bound=min(self.bound, self.cost),
            gap=self.relative_gap(),
            proven=self.relative_gap() <= _PROVEN,
            feasible=self.choices is not None,
            n_reduced_nodes=self.n_nodes,
            n_reduced_edges=self.n_edges,
        )

    def weigh(self, graph: ChoiceGraph) -> None:
        """Bound the larger of two sums by weighted means of them.

        Mostly the first sum is the larger: then its least is the bound, and the answer that has
        the least second sum among those of least first sum is optimal. Else, on a large problem,
        look for the best weight: the least mean is concave in the weight, and below the mean of
        every answer, a line in the weight; the next weight is where the lines of the last answers
        with either sum the larger meet.
        """
        ends: dict[bool, tuple[float, float]] = {}
        weight = 1.0
        for number in range(_MOST_WEIGHTS):
            before = self.bound
            first, second = self._solve_mean(graph, weight)
            if self.bound > before:
                self.weights = np.array([weight, 1.0 - weight])
            stuck = ends.get(first > second) == (first, second)
            if self.relative_gap() <= self.gap or (stuck and number > 1) or self.left() < 0:
                return
            if first == math.inf:  # no answer, and no line to meet
                return
            ends[first > second] = first, second
            if number == 0:
                weight = _ALMOST_ONE
            elif graph.n_entries() <= _LARGE:
                return
            elif len(ends) == 1:
                weight = 0.0
            else:
                (a, b), (c, d) = ends[True], ends[False]
                weight = (d - b) / ((a - c) + (d - b))

    def _solve_mean(self, whole: ChoiceGraph, weight: float) -> tuple[float, float]:
        """Offer the answer to one weighted mean and its bound; returns both sums of it."""
        graph = whole.weighted(np.array([weight, 1.0 - weight]))
        reduce_graph(graph)
        start = self._first_state(graph)
        chosen, bound = solve_graph(graph, self.gap / 2, 0.3 * self.left(), start)
        state = State(graph, chosen)
        if not state.feasible:
            return math.inf, math.inf
        choices = graph.choices(chosen)
        present = {u: int(np.flatnonzero(whole.kept[u] == choices[u])[0]) for u in whole.alive}
        self.offer(State(whole, present))
        self.raise_bound(bound)
        return sums_of(self.problem, choices)

    def _first_state(self, graph: ChoiceGraph) -> State:
        state = State(graph, {u: int(graph.costs[u].sum(axis=0).argmin()) for u in graph.alive})
        state.descend(self.until(0.1))
        return state

    def tighten(self, graph: ChoiceGraph) -> ChoiceGraph:
        """Shrink a large problem by bounds and answers, in rounds while that pays."""
        for _ in range(_ROUNDS):
            before = graph.n_entries()
            ascent = self.relax(graph)
            if self.left() < math.inf and (before > _TOO_LARGE or self.relative_gap() > _WIDE):
                self.polish(self.until(0.3))
            if self.cost == math.inf or self.relative_gap() <= self.gap:
                break
            # The best answer so far keeps the graph that it is of.
            graph = graph.copy()
            ascent.forbid_dear(graph, self.cost + _PROVEN * abs(self.cost))
            reduce_graph(graph)
            if graph.n_entries() > 0.8 * before:
                break
        return graph

    def relax(self, graph: ChoiceGraph, *, rough: bool = False) -> Ascent:
        """Raise the bound by dual ascent; the choices met on the way start descents."""
        self.offer(self._first_state(graph))
        # Mostly the first sum is the larger, and so the one to bound.
        weights = np.eye(graph.n_sums)[0] if self.weights is None else self.weights
        ascent, over = Ascent(graph, weights, rough=rough), self.until(0.3)
        while ascent.improving() and not over() and self.relative_gap() > self.gap:
            answers = (ascent.n_steps + 1) % _ANSWER_EVERY == 0
            chosen = ascent.step(self.cost, choose=answers)
            self.raise_bound(ascent.best_bound)
            if answers:
                state = State(graph, chosen)
                state.repair(over)
                self.offer(state)
        return ascent

    def finish(self, graph: ChoiceGraph) -> None:
        """Solve what is left."""
        if self.relative_gap() <= self.gap:
            return
        if self.left() < math.inf and graph.n_entries() > _TOO_LARGE:
            self.relax(graph)
            self.polish(self.until(1.0))
            return
        state = self._first_state(graph)
        self.offer(state)
        seconds = 0.7 * self.left()
        chosen, bound = solve_graph(graph, self.gap, seconds, state)
        self.raise_bound(bound)
        state = State(graph, chosen)
        if not state.feasible:
            state.descend(self.until(0.5))
        self.offer(state)
        if self.left() < math.inf and self.relative_gap() > self.gap:
            self.polish(self.until(1.0))

    def polish(self, over: Callable[[], bool]) -> None:
        """Solve balls of nodes exactly, all else as in the best answer, until the time is over."""
        if self.state is None:
            return
        state, random = self.state, np.random.default_rng(0)
        graph = state.graph
        nodes, size, n_tried = list(graph.alive), 2.0 * _SMALLEST_BALL, 0
        while not over() and self.relative_gap() > self.gap:
            if n_tried % _RANK_EVERY == 0:
                nodes.sort(key=lambda u: -state.cost_at(u))
            n_tried += 1
            # Mostly where it costs most, everywhere now and then.
            seed = nodes[int(len(nodes) * random.random() ** 3)]
            ball = ball_around(graph, seed, int(size), random)
            part = free_ball(state, ball)
            try:
                reduce_graph(part)
                present = dict.fromkeys(part.alive, 0)
                seconds = max(0.1, min(5.0, self.left()))
                start = time.monotonic()
                chosen, _ = solve_graph(part, self.gap, seconds, State(part, present))
                quick = time.monotonic() - start < 1.0
            except Infeasible:
                continue
            size = min(size * 1.1, len(nodes)) if quick else max(size * 0.7, _SMALLEST_BALL)
            values = dict(enumerate(part.choices(chosen)))
            after = State(graph, {**state.chosen, **{u: values[i] for i, u in enumerate(ball)}})
            if after.feasible and after.cost < state.cost:
                state = after
                self.offer(state)
