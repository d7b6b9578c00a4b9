"""What it takes a TPU to join the halves of heads, beside what its compiler says of it."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from test_cost_step import MACHINE
from test_graph_rules import program_of

from autoshard.cost.joining import CopiedHalves
from autoshard.cost.strategies import price_op
from autoshard.graph.program import WHOLE, Program

FEATURES, TOKENS = 256, 512


def interleaved(heads: jax.Array) -> jax.Array:
    return jnp.stack(jnp.split(heads, 2, axis=-1), axis=-1).reshape(heads.shape)


def rotated(heads: jax.Array) -> jax.Array:
    first, second = jnp.split(heads, 2, axis=-1)
    return jnp.stack((-second, first), axis=-2).reshape(heads.shape)


def step(join: Any, n_sequences: int, n_heads: int, n_keys: int, *, width: int = 256) -> Program:
    """Scores of a query whose halves are joined; with one key its heads are no dimension."""

    def scores(x: Any, query: Any, key: Any) -> Any:
        heads = join(jnp.einsum("btd,dhw->bthw", x, query))
        keys = jnp.einsum("bsd,dkw->bskw", x, key)
        if n_keys == n_heads:
            made = jnp.einsum("bthw,bshw->bhts", heads, keys)
        elif n_keys == 1:
            made = jnp.einsum("bthw,bsw->bhts", heads, keys[:, :, 0])
        else:
            grouped = heads.reshape(*heads.shape[:2], n_keys, -1, width)
            made = jnp.einsum("btkgw,bskw->bkgts", grouped, keys)
        return jax.nn.softmax(made)

    shapes = ((FEATURES, n_heads, width), (FEATURES, n_keys, width))
    return program_of(scores, (n_sequences, TOKENS, FEATURES), *shapes, dtype="bfloat16")


def microseconds(program: Program, *, is_summed: bool = False) -> float:
    """Of all that is stacked, on one device."""
    layouts = [(WHOLE,)] * len(program.groups)
    stacks = [op for op in program.ops if op.primitive == "stack"]
    prices = (price_op(op, ((WHOLE,),) * len(op.arrays), MACHINE) for op in stacks)
    copies = CopiedHalves(program.ops, MACHINE).seconds(layouts, lambda index: is_summed)
    return 1e6 * (sum(price.compute_seconds for price in prices) + copies)


# By the TPU compiler for v5e, of Gemma 2B, Gemma 7B and Gemma 2 2B on 1x8, 2x4, 4x2 and 8x1.
@pytest.mark.parametrize(
    ("shares", "compiled"),
    [
        ((8, 1, 1), 8.6 + 11.1 + 7.7 + 14.5),
        ((8, 2, 2), 31.0 + 20.8 + 14.6 + 20.1),
        ((4, 4, 4), 61.6 + 20.8 + 14.6 + 20.1),
        ((4, 2, 1), 61.6 + 11.1 + 7.7 + 14.5),
        ((2, 4, 1), 14.6 + 11.1 + 7.7 + 14.5),
        ((2, 4, 2), 61.6 + 11.1 + 7.7 + 14.5),
        ((2, 2, 2), 13.9 + 6.2 + 4.5 + 7.7),
        ((1, 8, 1), 8.6 + 11.1 + 7.7 + 14.5),
        ((1, 8, 4), 61.6 + 11.1 + 7.7 + 14.5),
    ],
)
def test_halves_that_are_interleaved(shares: tuple[int, int, int], compiled: float) -> None:
    assert microseconds(step(interleaved, *shares)) == pytest.approx(compiled, rel=0.2)


# The same of halves that change places, of Gemma and Llama 3 8B, and of all heads of Qwen 2.5 7B.
@pytest.mark.parametrize(
    ("shares", "compiled"),
    [
        ((4, 4, 4), 30.8 + 20.8 + 14.6),
        ((4, 2, 1), 7.2 + 11.1 + 7.7),
        ((2, 2, 2), 4.2 + 6.2 + 4.5),
        ((8, 14, 14), 412),
    ],
)
def test_halves_that_change_places(shares: tuple[int, int, int], compiled: float) -> None:
    assert microseconds(step(rotated, *shares)) == pytest.approx(compiled, rel=0.2)


# By the TPU compiler for v5e, of keys and of queries of Llama 3 8B on 1x8.
@pytest.mark.parametrize(
    ("n_heads", "compiled"),
    [(8, 7.7 + 4.5 + 5.9 + 5.7 + 9.4), (32, 28.4 + 14.6 + 20.3 + 20.0 + 34.4)],
)
def test_halves_of_a_width_that_devices_share(n_heads: int, compiled: float) -> None:
    program = step(rotated, 8, n_heads, n_heads, width=128)
    (cut,) = (op for op in program.ops if op.primitive == "split")
    (joined,) = (op for op in program.ops if op.primitive == "stack")
    layouts = [(WHOLE,)] * len(program.groups)
    seconds = 0.0
    for op in (cut, joined):
        width = op.operands[0].factors[-1]
        around = tuple((array.factors.index(width),) for array in op.arrays)
        seconds += price_op(op, around, MACHINE).compute_seconds
        for array, layout in zip(op.arrays, around, strict=True):
            layouts[array.group] = layout
    assert 1e6 * seconds == pytest.approx(compiled, rel=0.1)
    assert CopiedHalves(program.ops, MACHINE).seconds(layouts, lambda index: False) == 0


def test_what_an_all_reduce_summed_is_not_copied() -> None:
    for join, compiled in ((interleaved, 20.8 + 14.6 + 21.3), (rotated, 20.8 + 14.6)):
        program = step(join, 2, 8, 4)
        found = microseconds(program, is_summed=True)
        assert found == pytest.approx(compiled, rel=0.2)
        assert found < microseconds(program)


def test_interleaving_is_told_from_halves_that_change_places() -> None:
    for join, shares, sharing in (
        (rotated, (4, 4, 2), 0),
        (interleaved, (4, 4, 4), 1),
        (interleaved, (4, 4, 2), 2),
        (interleaved, (4, 4, 1), 4),
    ):
        (stack,) = (op for op in step(join, *shares).ops if op.primitive == "stack")
        assert stack.interleaves == sharing
