"""The reduced choice problem as a mixed integer program, solved by HiGHS through scipy.

The program, over binary `x_u[i]` (node u takes strategy i) and continuous `e_uv[i, j] >= 0`:

    minimise    sum_u c_u . x_u + sum_uv c_uv . e_uv + t      `build_program`
    sum_i x_u[i] = 1                            every node    `_add_choices`
    sum_j e_uv[i, j] = x_u[i]                   every u, i    `_add_marginals`
    sum_i e_uv[i, j] = x_v[j]                   every v, j    `_add_marginals`
    t >= sum_u d_u . x_u + sum_uv d_uv . e_uv,  t >= 0        `_add_excess`
    sum_{u live at T} m_u . x_u <= limit        some times T  `memory_row`

where `d` is how much more an entry adds to the second sum than to the first; without a second sum
there is no `t`. Only finite entries have an `e`. The equality marginals make the relaxation that
of the local polytope; the weak rows `e >= x_u + x_v - 1` would leave it useless. Objective and
memory rows are scaled, for the tolerances of HiGHS are absolute.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from autoshard.search.choice_graph import ChoiceGraph, Floats, Indices

__all__ = [
    "Answer",
    "Milp",
    "Row",
    "build_program",
    "cover_row",
    "memory_row",
    "solve_program",
]

# Sizes at which the absolute tolerances of HiGHS, 1e-6 on rows and integers, are small enough. In
# a row with much larger entries a binary a little off breaks the row, and HiGHS repairs in vain.
_OBJECTIVE_SIZE = 1e3
_EXCESS_SIZE = 10.0

# Its status for a proof that there is no answer.
_INFEASIBLE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What HiGHS said.

    Args:
        values: present strategy of each node of the program; None when it found no choice.
        bound: no choice that keeps the rows given costs less.
        infeasible: no choice keeps the rows given.
    """

    values: dict[int, int] | None
    bound: float
    infeasible: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A further row: `entries . columns <= upper`."""

    columns: Indices
    entries: Floats
    upper: float


@dataclass(slots=True)
class Milp:
    """Rows and columns of the program; a row is `lower <= entries . columns <= upper`.

    Args:
        scale: factor on the costs that makes the objective one of a fixed size.
        starts: first column of each node.
        sizes: number of strategies of each node.
        costs: blocks of the objective, in the order of their columns.
    """

    scale: float
    starts: dict[int, int] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    costs: list[Floats] = field(default_factory=list)
    n_columns: int = 0
    n_binary: int = 0
    rows: list[Indices] = field(default_factory=list)
    columns: list[Indices] = field(default_factory=list)
    entries: list[Floats] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)

    def add_columns(self, costs: Floats) -> Indices:
        """Append columns with these costs, (sums, columns), and return their numbers."""
        self.costs.append(costs)
        first, self.n_columns = self.n_columns, self.n_columns + costs.shape[1]
        return np.arange(first, self.n_columns)

    def add_entries(self, rows: Indices, columns: Indices, entries: Floats) -> None:
        """Append matrix entries; `rows` count from the first row not yet added."""
        self.rows.append(rows + len(self.lower))
        self.columns.append(columns)
        self.entries.append(entries)

    def add_rows(self, lower: Sequence[float], upper: Sequence[float]) -> None:
        """Close the rows whose entries were appended."""
        self.lower.extend(lower)
        self.upper.extend(upper)


def build_program(graph: ChoiceGraph, nodes: Sequence[int], size: float) -> Milp:
    """The program of some nodes, without memory rows.

    Args:
        graph: the reduced problem.
        nodes: a union of its connected components.
        size: what the objective is about, above 0.
    """
    program = Milp(scale=_OBJECTIVE_SIZE / size)
    for node in nodes:
        _add_choices(program, node, graph.costs[node])
    program.n_binary = program.n_columns
    inside = set(nodes)
    for u, v, table in graph.edges():
        if u in inside:
            _add_marginals(program, u, v, table)
    if graph.n_sums == 2:
        _add_excess(program)
    return program


def _add_choices(program: Milp, node: int, costs: Floats) -> None:
    columns = program.add_columns(costs)
    program.starts[node] = int(columns[0])
    program.sizes[node] = len(columns)
    program.add_entries(np.zeros_like(columns), columns, np.ones(len(columns)))
    program.add_rows([1.0], [1.0])


def _add_marginals(program: Milp, u: int, v: int, table: Floats) -> None:
    i, j = np.isfinite(table[0]).nonzero()
    pairs = program.add_columns(table[:, i, j])
    for node, strategy in ((u, i), (v, j)):
        n = program.sizes[node]
        choices = program.starts[node] + np.arange(n)
        program.add_entries(strategy, pairs, np.ones(len(pairs)))
        program.add_entries(np.arange(n), choices, np.full(n, -1.0))
        program.add_rows([0.0] * n, [0.0] * n)


def _add_excess(program: Milp) -> None:
    costs = np.concatenate(program.costs, axis=1)
    scale = program.scale * _EXCESS_SIZE / _OBJECTIVE_SIZE
    excess = (costs[1] - costs[0]) * scale
    column = program.add_columns(np.array([[1.0], [0.0]]) / scale)
    used = excess.nonzero()[0]
    program.add_entries(np.zeros_like(used), used, excess[used])
    program.add_entries(np.zeros_like(column), column, np.array([-1.0]))
    program.add_rows([-np.inf], [0.0])


def memory_row(graph: ChoiceGraph, program: Milp, time: int) -> Row:
    """Usage of the nodes live at a time, in parts of the limit, is at most 1."""
    columns, usages = _live_columns(graph, program, time)
    return Row(columns=columns, entries=usages / graph.limit, upper=1.0)


def cover_row(graph: ChoiceGraph, program: Milp, time: int, values: Mapping[int, int]) -> Row:
    """Not all nodes live at a time, which together exceed the limit, use that much or more."""
    columns, usages = _live_columns(graph, program, time)
    taken = dict(zip(columns.tolist(), usages.tolist(), strict=True))
    covered, n_nodes = [], 0
    for node, start in program.starts.items():
        usage = taken.get(start + values[node], 0.0)
        if usage > 0:
            n_nodes += 1
            own = range(start, start + program.sizes[node])
            covered += [column for column in own if taken[column] >= usage]
    return Row(columns=np.array(covered), entries=np.ones(len(covered)), upper=n_nodes - 1.0)


def _live_columns(graph: ChoiceGraph, program: Milp, time: int) -> tuple[Indices, Floats]:
    columns, usages = [], []
    for node, start in program.starts.items():
        live = [x.usages for x in graph.loads[node] if x.start <= time < x.stop]
        if live:
            columns.append(start + np.arange(len(live[0])))
            usages.append(np.sum(live, axis=0))
    return np.concatenate(columns), np.concatenate(usages)


def solve_program(program: Milp, extra: Sequence[Row], gap: float, seconds: float) -> Answer:
    """Solve with more rows.

    Args:
        program: from `build_program`.
        extra: memory and cover rows that hold as well.
        gap: relative distance of cost and bound at which to stop.
        seconds: time limit, infinite for none.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    rows, columns, entries = list(program.rows), list(program.columns), list(program.entries)
    upper = [*program.upper, *(row.upper for row in extra)]
    lower = [*program.lower, *[-np.inf] * len(extra)]
    for number, row in enumerate(extra, start=len(program.lower)):
        rows.append(np.full(len(row.columns), number))
        columns.append(row.columns)
        entries.append(row.entries)
    matrix = csr_array(
        (np.concatenate(entries), (np.concatenate(rows), np.concatenate(columns))),
        shape=(len(lower), program.n_columns),
    )
    costs = np.concatenate(program.costs, axis=1)[0]
    result = milp(
        costs * program.scale,
        integrality=(np.arange(program.n_columns) < program.n_binary).astype(np.int64),
        bounds=Bounds(0.0, np.inf),
        constraints=LinearConstraint(matrix, np.array(lower), np.array(upper)),
        options={"mip_rel_gap": gap, "time_limit": max(seconds, 0.01)},
    )
    return _read(program, result)


def _read(program: Milp, result: Any) -> Answer:
    if result.status == _INFEASIBLE:
        return Answer(values=None, bound=np.inf, infeasible=True)
    bound = result.mip_dual_bound
    bound = -np.inf if bound is None or np.isnan(bound) else float(bound) / program.scale
    if result.x is None:
        return Answer(values=None, bound=bound)
    values = {
        node: int(result.x[start : start + program.sizes[node]].argmax())
        for node, start in program.starts.items()
    }
    return Answer(values=values, bound=bound)
