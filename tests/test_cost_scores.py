"""The scores of attention that a TPU writes beside their exponentials."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from test_cost_step import MACHINE, cost_of
from test_graph_rules import program_of

from autoshard.cost.scores import SharedKeyScores
from autoshard.graph.program import WHOLE, Program
from autoshard.graph.propagation import propagate
from autoshard.hardware.efficiency import memory_seconds

LENGTH, HEADS, WIDTH = 1024, 16, 128
SCORES = 4 * HEADS * LENGTH * LENGTH * 4  # batch 4, in float32


def attention(x: Any, query: Any, key: Any, n_shared: int) -> Any:
    """Heads of the query, so many of which share one of the key and value."""
    heads = jnp.einsum("btd,dhk->bthk", x, query)
    keys = jnp.repeat(jnp.einsum("btd,dhk->bthk", x, key), n_shared, axis=2)
    scores = jnp.einsum("bthk,bshk->bhts", heads, keys).astype("float32")
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores).astype(keys.dtype), keys)


def step(n_shared: int = 2) -> Program:
    return program_of(
        lambda x, query, key: attention(x, query, key, n_shared),
        *((4, LENGTH, 2048), (2048, HEADS, WIDTH), (2048, HEADS // n_shared, WIDTH)),
        dtype="bfloat16",
    )


def written(program: Program, dims: tuple[int, ...], summed: set[int]) -> list[Any]:
    fixed = zip((argument.group for argument in program.arguments), dims, strict=True)
    layouts = propagate(program, {group: (dim,) for group, dim in fixed}, (8,))
    return list(SharedKeyScores(program, MACHINE).written(layouts, summed.__contains__))


@pytest.mark.parametrize(("place", "is_read_again"), [(0, True), (2, False)])
def test_they_are_where_the_query_is_summed_or_they_are(place: int, is_read_again: bool) -> None:
    program = step()
    matmuls = [i for i, op in enumerate(program.ops) if op.kind == "contraction"]
    ((sums, n_bytes, seconds),) = written(program, (WHOLE,) * 3, {matmuls[place]})
    assert program.ops[sums].primitive == "reduce_sum"
    assert n_bytes == SCORES
    twice = memory_seconds(MACHINE.chip, SCORES, SCORES)
    assert seconds == (twice if is_read_again else 0.0)


def test_they_are_not_for_another_sum_nor_where_each_head_has_a_key() -> None:
    key = [i for i, op in enumerate(step().ops) if op.kind == "contraction"][1]
    assert written(step(), (WHOLE,) * 3, {key}) == []
    assert written(step(n_shared=1), (WHOLE,) * 3, set(range(100))) == []


def test_those_of_a_query_that_is_summed_take_memory_and_time() -> None:
    # data and both weights split along what the projections sum, or whole
    summed, whole = (cost_of(step(), *dims) for dims in ((2, 0, 0), (WHOLE,) * 3))
    assert {one.kind for one in summed.traffic} == {"all-reduce"}
    more = summed.memory.activations - whole.memory.activations
    assert more == pytest.approx(SCORES, rel=0.05)
    # The projections are faster by less than the scores are read and written in.
    assert summed.compute_seconds > whole.compute_seconds
