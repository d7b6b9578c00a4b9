"""Heads of keys and values that are repeated for those of the query: what is written and read."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from test_cost_step import MACHINE
from test_graph_rules import program_of

from autoshard.cost.machine import Machine
from autoshard.cost.strategies import price_op
from autoshard.graph.program import WHOLE, Array, Op, Repetition
from autoshard.graph.splits import layout_of
from autoshard.hardware.efficiency import memory_seconds
from autoshard.hardware.targets import parse_target
from autoshard.mesh import parse_mesh

BATCH, LENGTH, HEADS, WIDTH = 4, 512, 8, 128
TILE = 15e-9
WHOLE_HEADS, SPLIT_HEADS = (WHOLE,), (2,)


def attention(times: int, rows: int, width: int = WIDTH, dtype: Any = None) -> list[Op]:
    """The op that repeats the keys, and the matmul of the query with them."""

    def logits(query: Any, keys: Any) -> Any:
        keys = jnp.repeat(keys, times, axis=2)
        return jnp.einsum("btnh,bsnh->bnts", query, keys, preferred_element_type=dtype)

    shapes = ((BATCH, rows, HEADS * times, width), (BATCH, LENGTH, HEADS, width))
    ops = program_of(logits, *shapes, dtype="bfloat16").ops
    return [op for op in ops if any(array.repetition for array in op.arrays)]


def writing(times: int, rows: int, layout: tuple[int, ...], width: int = WIDTH) -> float:
    op = attention(times, rows, width)[0]
    return price_op(op, (layout, layout), MACHINE).compute_seconds


@pytest.mark.parametrize(("rows", "for_rows"), [(1, True), (LENGTH, False)])
def test_repeated_heads_are_seen_where_they_are_made_and_read(rows: int, for_rows: bool) -> None:
    made, read = attention(4, rows)
    repetition = Repetition(dim=2, width=3, times=4, for_rows=for_rows)
    assert (made.kind, made.results[0].repetition) == ("reshape", repetition)
    assert repetition in [operand.repetition for operand in read.operands]


def test_a_number_that_is_reshaped_repeats_nothing() -> None:
    inner = jax.jit(lambda number, x: number.reshape(1, 1) + x)
    ops = program_of(lambda x: inner(2.0, x) @ x, (8, 8)).ops
    assert not any(array.repetition for op in ops for array in op.arrays)


def test_a_weight_whose_columns_repeat_has_no_parts_of_some_width() -> None:
    ops = program_of(lambda x, w: x @ jnp.repeat(w, 4, axis=1), (8, 16), (16, 32)).ops
    assert not any(array.repetition for op in ops for array in op.arrays)


def test_what_is_joined_or_repeated_as_a_whole_repeats_no_heads() -> None:
    def joined(query: Any, keys: Any) -> Any:
        return query @ keys.reshape(64, 512)

    def tiled(query: Any, keys: Any) -> Any:
        return query @ jnp.tile(keys, (1, 4))

    for function in (joined, tiled):
        shapes = ((8, 64), (64, 8, 64)) if function is joined else ((8, 64), (64, 128))
        ops = program_of(function, *shapes).ops
        assert not any(array.repetition for op in ops for array in op.arrays)


# Nanoseconds that the TPU compiler for v5e estimates for each position and head of the keys.
@pytest.mark.parametrize(
    ("times", "rows", "width", "nanoseconds"),
    [
        (4, 1, 128, 15.0),
        (2, 1, 128, 15.0),
        (7, 1, 128, 13.8),
        (8, 1, 128, 0.0),
        (16, 1, 128, 30.1),
        (4, 1, 64, 3.76),
        (2, 512, 128, 3.8),
        (4, 512, 128, 7.5),
        (8, 512, 128, 15.0),
    ],
)
def test_writing_takes_what_the_compiler_says(
    times: int, rows: int, width: int, nanoseconds: float
) -> None:
    seconds = writing(times, rows, WHOLE_HEADS, width)
    assert seconds / (BATCH * LENGTH * HEADS) * 1e9 == pytest.approx(nanoseconds, rel=0.08)


def test_narrow_heads_take_a_tile_like_wide_ones() -> None:
    # By the same compiler for Qwen 2.5, an eighth of whose heads' width is 16.
    seconds = writing(7, 1, WHOLE_HEADS, 16)
    assert seconds / (BATCH * LENGTH * HEADS) * 1e9 == pytest.approx(1.79, rel=0.09)


def test_a_device_with_a_single_head_writes_nothing() -> None:
    assert writing(4, 1, SPLIT_HEADS) == 0.0


def test_gpus_are_not_charged_for_it() -> None:
    machine = Machine.of(parse_mesh("1x8"), parse_target("gpu:h100-sxm:8"))
    op = attention(4, LENGTH)[0]
    assert price_op(op, (WHOLE_HEADS, WHOLE_HEADS), machine).compute_seconds == 0.0


def test_what_repeats_is_read_once() -> None:
    op = attention(4, 8)[-1]
    repeated, plain = (
        price_op(one, ((WHOLE,),) * 3, MACHINE).compute_seconds
        for one in (op, replace(op, operands=tuple(map(unrepeated, op.operands))))
    )
    n_bytes = BATCH * LENGTH * HEADS * WIDTH * 2
    assert plain - repeated == pytest.approx(memory_seconds(MACHINE.chip, 3 * n_bytes, 0), rel=0.2)


def test_single_rows_go_to_the_matrix_unit_where_their_products_are_of_another_size() -> None:
    # 2.8 us by the TPU compiler's cycles for v5e, 19.7 us were each row multiplied on its own.
    seconds = []
    for dtype in (jnp.float32, jnp.bfloat16):
        op = attention(4, 1, dtype=dtype)[-1]
        heads = max(op.operands, key=lambda array: array.n_bytes).factors[2]
        layouts = [layout_of(array, (heads,)) for array in op.arrays]
        seconds.append(price_op(op, layouts, MACHINE).compute_seconds)
    assert seconds[0] < seconds[1] / 2


def unrepeated(array: Array) -> Array:
    return replace(array, repetition=None)
