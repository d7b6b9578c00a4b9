"""What one device's share of an op takes, beside what the TPU compiler says of it."""

from dataclasses import replace

import jax.numpy as jnp
import pytest
from test_cost_step import MACHINE
from test_graph_rules import program_of

from autoshard.cost.strategies import price_op
from autoshard.graph.program import WHOLE, Op
from autoshard.hardware.efficiency import memory_seconds

CHIP = MACHINE.chip


def microseconds(op: Op) -> float:
    return 1e6 * price_op(op, ((WHOLE,),) * len(op.arrays), MACHINE).compute_seconds


def matmul(rows: int, contracted: int, columns: int) -> Op:
    shapes = ((rows, contracted), (contracted, columns))
    op = program_of(lambda x, w: jnp.tanh(x) @ w, *shapes, dtype="bfloat16").ops[-1]
    return op


# By the TPU compiler for v5e: the vocabularies of GPT-2 large and of Falcon 1B with a sequence,
# a quarter and an eighth of that of Gemma 7B with four and with all eight.
@pytest.mark.parametrize(
    ("rows", "contracted", "columns", "compiled"),
    [
        (512, 1280, 50_257, 533),
        (512, 2048, 50_304, 736),
        (2048, 3072, 64_000, 4520),
        (4096, 3072, 32_000, 4188),
    ],
)
def test_few_rows_do_not_hide_what_the_step_returns(
    rows: int, contracted: int, columns: int, compiled: float
) -> None:
    op = matmul(rows, contracted, columns)
    assert op.is_returned
    assert microseconds(op) == pytest.approx(compiled, rel=0.05)
    assert microseconds(replace(op, is_returned=False)) < microseconds(op)


def test_what_is_soon_read_again_does_not_go_through_the_main_memory() -> None:
    op = replace(matmul(4096, 1024, 256), is_returned=False)
    kept, brief = (microseconds(replace(op, is_brief=is_brief)) for is_brief in (False, True))
    moving = 1e6 * memory_seconds(CHIP, 4096 * 1024 * 2, 4096 * 256 * 2)
    assert brief < 0.75 * moving and kept == pytest.approx(moving)
    # What does not fit into the vector memory does.
    large = replace(matmul(2**18, 512, 512), is_returned=False)
    kept, brief = (microseconds(replace(large, is_brief=is_brief)) for is_brief in (False, True))
    assert brief == kept


# What follows the attention of Llama 3 8B on eight devices, by the TPU compiler for v5e: each has
# an eighth of the heads, or of the columns.
@pytest.mark.parametrize(
    ("contracted", "columns", "compiled"), [(512, 4096, 115.8), (4096, 512, 91.4)]
)
def test_shallow_matmuls_do_not_hide_what_they_store(
    contracted: int, columns: int, compiled: float
) -> None:
    op = replace(matmul(4096, contracted, columns), is_returned=False, is_brief=True)
    assert microseconds(op) == pytest.approx(compiled, rel=0.03)
