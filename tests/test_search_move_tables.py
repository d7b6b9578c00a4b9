"""Tables of moves: what is priced once for all pairs of a kind, against each pair by itself."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from test_cost_memory import updated
from test_graph_axis_parts import HEADS
from test_graph_axis_parts import PROGRAM as FEWER_HEADS
from test_graph_rules import program_of

from autoshard.cost.collective_matmul import may_decompose, windowed_dims
from autoshard.cost.machine import Machine
from autoshard.cost.step import StepPricer
from autoshard.cost.strategies import candidate_choices
from autoshard.cost.transfers import folded_sums, lies_in_op, transfers_between
from autoshard.graph.axis_parts import AxisParts
from autoshard.graph.program import Array, Op, Program
from autoshard.hardware.targets import parse_target
from autoshard.mesh import parse_mesh
from autoshard.search.lower_bound import _layouts
from autoshard.search.move_tables import MoveTables


def attention() -> Program:
    """Scores, whose rows are normed, of heads that share a key; sums that are added to others."""

    def attend(x: Any, query: Any, key: Any, out: Any) -> Any:
        queries = jnp.einsum("btd,dnh->btnh", x, query)
        scores = jnp.einsum("btnh,bsh->bnts", queries, x @ key)
        shares = jnp.exp(scores) / jnp.sum(jnp.exp(scores), axis=-1, keepdims=True)
        heads = jnp.einsum("bnts,bsh->btnh", shares, x @ key)
        return x + jnp.einsum("btnh,nhd->btd", heads, out)

    shapes = (8, 16, 32), (32, 8, 16), (32, 16), (8, 16, 32)
    return program_of(attend, *shapes, dtype="bfloat16", for_tpu=True)


def stream() -> Program:
    """A sum that two matmuls read, with dimensions enough for each of three axes."""

    def step(x: Any, up: Any, gate: Any, down: Any) -> Any:
        x = x + 1
        return x + (jnp.tanh(x @ up) * (x @ gate)) @ down

    return program_of(step, (8, 16, 64), (64, 128), (64, 128), (128, 64), for_tpu=True)


def lookups() -> Program:
    def look_up(table: Any, other: Any, where: Any) -> Any:
        rows = jnp.take(table, where.astype("int32"), axis=0)
        return rows @ table.T, jnp.zeros((8, 16, 32)).at[where.astype("int32")[0, :8]].add(other)

    return program_of(look_up, (64, 32), (8, 16, 32), (8, 16), for_tpu=True)


@pytest.mark.parametrize(
    ("make", "mesh", "target", "parts"),
    [
        (attention, "1x8", "tpu:v5e", None),
        (attention, "2x4", "tpu:v5e", None),
        (attention, "2x4", "cpu", None),
        (stream, "2x2x2", "tpu:v5e", None),
        (lambda: updated(1), "2x4", "tpu:v5e", None),
        (lambda: updated(1), "2x4", "gpu:h100-sxm", None),
        (lookups, "2x4", "tpu:v5e", None),
        (lambda: FEWER_HEADS, "1x8", "tpu:v5e", HEADS),
    ],
)
def test_pairs_to_which_the_same_happens_cost_the_same(
    make: Any, mesh: str, target: str, parts: AxisParts | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = parse_mesh(mesh, ("data", "seq", "model")[-mesh.count("x") - 1 :])
    machine = Machine.of(grid, parse_target(target, grid.n_devices), parts=parts)
    program, priced = make(), 0
    pricer = StepPricer(program, machine)
    tables, sums = MoveTables(pricer), MoveTables._sums

    def counted(*of: Any) -> tuple[float, float]:
        nonlocal priced
        priced += 1
        return sums(*of)

    monkeypatch.setattr(MoveTables, "_sums", counted)
    n_pairs = 0
    for op in program.ops:
        groups = [program.groups[array.group] for array in op.arrays]
        layouts = [list(_layouts(group.sizes, machine.parts)) for group in groups]
        choices = list(candidate_choices(op, layouts, machine.axis_sizes))
        for position, array in enumerate(op.arrays):
            operand = position if position < len(op.operands) else None
            table = tables.table(op, array, operand, choices, layouts[position])
            expected = [
                [by_itself(op, array, operand, choice, lay, pricer) for lay in layouts[position]]
                for choice in choices
            ]
            n_pairs += table[0].size
            np.testing.assert_allclose(table, np.transpose(expected, (2, 0, 1)), atol=0, rtol=1e-9)
    assert priced < n_pairs
    if mesh == "2x2x2":
        assert priced < n_pairs / 20


def by_itself(
    op: Op, array: Array, operand: int | None, choice: Any, layout: Any, pricer: StepPricer
) -> tuple[float, float]:
    """What is waited for, and all that is moved, compute hiding what it may."""
    machine = pricer.machine
    made, partial = lies_in_op(op, array, operand, choice)
    moves = transfers_between(op, array, operand, made, partial, layout, machine)
    hidden = windowed_dims(op, array, operand, machine)
    if operand is None:
        moves = folded_sums(moves, machine)
    elif pricer.ops.beside.may_hide(op, array):
        hidden = set(range(len(array.factors)))
    waited = sum(
        move.seconds
        for move in moves
        if not move.overlapped
        and not may_decompose(move, machine)
        and not (move.kind == "all-gather" and layout[machine.axis_of(move.axis)] in hidden)
    )
    written = sum(move.memory_seconds for move in moves)
    return waited + written, sum(move.seconds for move in moves)
