"""Tables of moves: what is priced once for all pairs of a kind, against each pair by itself."""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from test_cost_memory import updated
from test_graph_rules import program_of

from autoshard.cost.machine import Machine
from autoshard.cost.step import StepPricer
from autoshard.cost.strategies import candidate_choices
from autoshard.cost.transfers import lies_in_op
from autoshard.graph.program import Program
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


def lookup() -> Program:
    def look_up(table: Any, where: Any) -> Any:
        return jnp.take(table, where.astype("int32"), axis=0) @ table.T

    return program_of(look_up, (64, 32), (8, 16), for_tpu=True)


@pytest.mark.parametrize(
    ("mesh", "target"),
    [("1x8", "tpu:v5e:2x4"), ("2x4", "tpu:v5e:2x4"), ("2x2x2", "tpu:v5e:2x4"), ("2x4", "cpu")],
)
@pytest.mark.parametrize("make", [attention, lookup, lambda: updated(1)])
def test_pairs_to_which_the_same_happens_cost_the_same(make: Any, mesh: str, target: str) -> None:
    program, grid = make(), parse_mesh(mesh, ("data", "seq", "model")[-mesh.count("x") - 1 :])
    machine = Machine.of(grid, parse_target(target, grid.n_devices))
    pricer = StepPricer(program, machine)
    tables = MoveTables(pricer)
    n_priced = n_pairs = 0
    for op in program.ops:
        groups = [program.groups[array.group] for array in op.arrays]
        layouts = [list(_layouts(group.sizes, machine.parts)) for group in groups]
        choices = list(candidate_choices(op, layouts, machine.axis_sizes))
        for position, array in enumerate(op.arrays):
            operand = position if position < len(op.operands) else None
            table = tables.table(op, array, operand, choices, layouts[position])
            assert table.shape == (2, len(choices), len(layouts[position]))
            pairs = itertools.product(enumerate(choices), enumerate(layouts[position]))
            for (row, choice), (column, layout) in pairs:
                lying = lies_in_op(op, array, operand, choice)
                expected = tables._sums(tables._way(op, array, operand), *lying, layout)
                n_pairs += 1
                n_priced += np.allclose(table[:, row, column], expected, rtol=1e-12)
    assert n_priced == n_pairs
