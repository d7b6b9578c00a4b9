import gzip
import itertools
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from iopddl import read_iopddl

from autoshard.errors import UsageError
from autoshard.search import components, reduction, solver
from autoshard.search.choice_graph import ChoiceGraph
from autoshard.search.problem import Edge, Node, Problem, cost_of, peak_usage
from autoshard.search.solver import solve

COSTS = st.one_of(st.integers(0, 20).map(float), st.just(math.inf))
SMOOTH = st.floats(0.0, 1e-3)


def table(draw, rows, columns, costs):
    row = st.lists(costs, min_size=columns, max_size=columns).map(tuple)
    return draw(st.lists(row, min_size=rows, max_size=rows).map(tuple))


@st.composite
def problems(draw, costs=COSTS, two_sums=None):
    two_sums = draw(st.booleans()) if two_sums is None else two_sums
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    nodes, edges = [], []
    for size in sizes:
        (cost, parallel) = table(draw, 2, size, costs)
        (usage,) = table(draw, 1, size, st.integers(0, 9).map(float))
        lo, hi = draw(st.tuples(st.integers(0, 5), st.integers(0, 5)))
        nodes.append(
            Node(
                costs=cost,
                usages=usage if draw(st.booleans()) else (),
                interval=(lo, hi) if draw(st.booleans()) else None,
                parallel_costs=parallel if two_sums and draw(st.booleans()) else (),
            )
        )
    ends = st.integers(0, len(sizes) - 1)
    for u, v in draw(st.lists(st.tuples(ends, ends), max_size=9)):
        first = table(draw, sizes[u], sizes[v], costs)
        second = table(draw, sizes[u], sizes[v], costs)
        parallel = second if two_sums and draw(st.booleans()) else ()
        edges.append(Edge(source=u, target=v, costs=first, parallel_costs=parallel))
    limit = draw(st.one_of(st.none(), st.integers(0, 30).map(float)))
    return Problem(nodes=tuple(nodes), edges=tuple(edges), memory_limit=limit)


def least_cost(problem):
    limit = math.inf if problem.memory_limit is None else problem.memory_limit
    choices = itertools.product(*(range(len(node.costs)) for node in problem.nodes))
    fitting = (c for c in choices if peak_usage(problem, c) <= limit)
    return min((cost_of(problem, c) for c in fitting), default=math.inf)


def assert_solved(problem, solution):
    expected = least_cost(problem)
    assert solution.proven
    assert solution.feasible == (expected < math.inf)
    if solution.feasible:
        assert solution.cost == pytest.approx(expected, rel=1e-6, abs=1e-12)
        assert solution.cost == cost_of(problem, solution.choices)
        assert solution.bound <= solution.cost
        if problem.memory_limit is not None:
            assert peak_usage(problem, solution.choices) <= problem.memory_limit
    else:
        assert (solution.status, solution.choices) == ("infeasible", ())


@settings(max_examples=300, deadline=None)
@given(problems())
def test_the_solver_finds_what_exhaustive_enumeration_finds(problem):
    assert_solved(problem, solve(problem))


@settings(max_examples=100, deadline=None)
@given(problems(costs=SMOOTH))
def test_costs_of_microseconds_are_solved_as_exactly_as_large_ones(problem):
    assert_solved(problem, solve(problem))


@settings(max_examples=100, deadline=None)
@given(problems())
def test_bounds_before_the_program_and_lazy_memory_rows_change_no_answer(problem):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver, "_LARGE", -1)
        patch.setattr(components, "_ALL_MEMORY_ENTRIES", -1)
        assert_solved(problem, solve(problem))


@settings(max_examples=100, deadline=None)
@given(problems(), st.sampled_from([0, 10**6]))
def test_a_bound_that_is_not_exact_is_one_however_much_was_compared(problem, costly):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduction, "_COSTLY", costly)
        solution = solve(problem, exact=False)
    expected = least_cost(problem)
    assert solution.bound <= expected * (1 + 1e-6) + 1e-12
    assert not solution.feasible or solution.cost >= expected * (1 - 1e-6)


@settings(max_examples=50, deadline=None)
@given(problems())
def test_a_time_limit_keeps_answers_feasible_and_bounds_below_them(problem):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver, "_LARGE", -1)
        patch.setattr(solver, "_TOO_LARGE", -1)
        solution = solve(problem, time_limit=0.05)
    expected = least_cost(problem)
    assert solution.bound <= expected
    if solution.feasible:
        assert solution.cost == cost_of(problem, solution.choices) >= expected
        if problem.memory_limit is not None:
            assert peak_usage(problem, solution.choices) <= problem.memory_limit
    elif solution.proven:
        assert expected == math.inf


def test_a_step_takes_the_longer_of_its_two_sums():
    # Strategy 0: 4 s of compute hide 3 s of transfers: max(4, 3) = 4.
    # Strategy 1: 1 s of compute does not hide 6 s: max(1, 6) = 6.
    # With the fixed second node (2 s of compute, 0 s): max(6, 3) = 6 against max(3, 6) = 6; with
    # 3 s of it, max(7, 3) = 7 against max(4, 6) = 6.
    moving = Node(costs=(4.0, 1.0), parallel_costs=(3.0, 6.0))
    fixed = Node(costs=(3.0,), parallel_costs=(0.0,))
    assert solve(Problem(nodes=(moving,))).choices == (0,)
    solution = solve(Problem(nodes=(moving, fixed)))
    assert (solution.choices, solution.cost) == ((1, 0), 6.0)


def test_nodes_that_are_never_live_together_share_the_memory():
    # Each fast strategy takes all 10 bytes. The first two nodes meet at time 1; the third comes
    # after both. So one of the first two is slow (cost 1), and the third is fast.
    def node(start, stop):
        return Node(costs=(0.0, 1.0), usages=(10.0, 0.0), interval=(start, stop))

    nodes = (node(0, 2), node(1, 3), node(3, 4))
    solution = solve(Problem(nodes=nodes, memory_limit=10.0))
    assert solution.cost == 1.0
    assert solution.choices[2] == 0


def test_an_odd_cycle_of_forbidden_equal_choices_is_infeasible():
    # Two colours for a triangle: arc consistent, and impossible.
    differ = ((math.inf, 0.0), (0.0, math.inf))
    edges = tuple(Edge(source=u, target=v, costs=differ) for u, v in ((0, 1), (1, 2), (0, 2)))
    solution = solve(Problem(nodes=(Node(costs=(0.0, 0.0)),) * 3, edges=edges))
    assert (solution.status, solution.choices, solution.proven) == ("infeasible", (), True)
    assert solution.cost == math.inf


def test_a_problem_without_nodes_costs_nothing():
    solution = solve(Problem(nodes=()))
    assert (solution.choices, solution.cost, solution.status) == ((), 0.0, "optimal")


def test_the_same_problem_gives_the_same_choices():
    # Every choice costs the same: which one it is must not depend on anything else.
    flat = ((1.0,) * 4,) * 4
    edges = tuple(Edge(source=u, target=u + 1, costs=flat) for u in range(5))
    problem = Problem(nodes=(Node(costs=(1.0,) * 4, usages=(1.0,) * 4),) * 6, edges=edges)
    assert solve(problem).choices == solve(problem).choices == (0,) * 6


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Node(costs=()), "a node has no strategy; give it at least one cost"),
        (lambda: Node(costs=(1.0,), usages=(1.0, 2.0)), "a node has 1 costs and 2 usages"),
        (
            lambda: Problem(
                nodes=(Node(costs=(1.0,)),), edges=(Edge(source=0, target=3, costs=((0.0,),)),)
            ),
            "edge 0 joins nodes 0 and 3; there are 1 nodes",
        ),
        (
            lambda: Problem(
                nodes=(Node(costs=(1.0,)),) * 2,
                edges=(Edge(source=0, target=1, costs=((0.0, 1.0),)),),
            ),
            "the costs of edge 0 are not 1 rows of 1",
        ),
        (
            lambda: solve(Problem(nodes=(Node(costs=(math.nan,)),))),
            "a cost is not a number; forbid a choice with +inf",
        ),
    ],
)
def test_a_malformed_problem_says_what_is_wrong(make, text):
    with pytest.raises(UsageError) as error:
        make()
    assert str(error.value) == text


def test_a_contest_file_is_read_and_solved(tmp_path):
    # Strategies (0, 1) are forbidden, (0, 0) needs 6 + 6 bytes of 10, (1, 0) costs 5 + 1 + 2 and
    # (1, 1) costs 5 + 1 + 9.
    path = tmp_path / "small.json"
    path.write_text(
        '{"problem": {"name": "small", "usage_limit": 10,'
        ' "nodes": {"intervals": [[0, 2], [1, 3]], "costs": [[0, 5], [1, 1]],'
        ' "usages": [[6, 2], [6, 6]]},'
        ' "edges": {"nodes": [[0, 1]], "costs": [[0, 1000000000000000000, 2, 9]]}}}'
    )
    solution = solve(read_iopddl(path))
    assert (solution.choices, solution.cost, solution.status) == ((1, 0), 8.0, "optimal")


def test_a_file_that_is_no_contest_instance_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(UsageError, match="other.json is not an IOPDDL instance: KeyError"):
        read_iopddl(path)
    path = tmp_path / "cut.json.gz"
    path.write_bytes(gzip.compress(b"{}")[:-9])
    with pytest.raises(UsageError, match="cut.json.gz is not an IOPDDL instance: EOFError"):
        read_iopddl(path)


@pytest.mark.parametrize(("letter", "optimum"), [("B", 532_843), ("G", 217_039)])
def test_contest_instances_are_solved_to_the_proven_optimum(letter, optimum):
    folder = os.environ.get("AUTOSHARD_IOPDDL")
    path = Path(folder or ".") / f"asplos-2025-iopddl-{letter}.json.gz"
    if not folder or not path.exists():
        pytest.skip("AUTOSHARD_IOPDDL names no folder that holds the contest's instances")
    problem = read_iopddl(path)
    solution = solve(problem)
    assert (solution.cost, solution.proven) == (optimum, True)
    assert problem.memory_limit is not None
    assert peak_usage(problem, solution.choices) <= problem.memory_limit


def test_what_a_merged_edge_forbids_goes_away_without_comparing_strategies():
    # The second node follows the first; added to the edge with the third, its own leaves the
    # first's third strategy no finite entry.
    random, n = np.random.default_rng(0), 20
    direct, around = random.random((2, n, n))
    direct[3, 0], around[3, 1:] = math.inf, math.inf
    follows = np.where(np.eye(n, dtype=bool), 0.0, math.inf)
    edges = [
        Edge(source=u, target=v, costs=tuple(map(tuple, costs.tolist())))
        for u, v, costs in ((0, 1, follows), (0, 2, direct), (1, 2, around))
    ]
    graph = ChoiceGraph.of(Problem(nodes=(Node(costs=(0.0,) * n),) * 3, edges=tuple(edges)))
    reduction.reduce_graph(graph, thorough=False)
    assert list(graph.alive) == [0, 2]
    assert 3 not in graph.kept[0]
    assert np.isfinite(graph.tables[0][2]).any(axis=2).all()
