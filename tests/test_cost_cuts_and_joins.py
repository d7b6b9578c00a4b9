"""What it takes a TPU to cut and join the halves of heads, beside what its compiler says of it."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from test_cost_step import MACHINE
from test_graph_rules import program_of

from autoshard.cost.cuts_and_joins import JoinedCopies
from autoshard.cost.step import StepPricer
from autoshard.cost.strategies import price_op
from autoshard.graph.producers import made_by
from autoshard.graph.program import WHOLE, Layout, Op, Program

FEATURES, TOKENS = 256, 512
SEQUENCES, HEADS, WIDTH = 0, 2, 3


def interleaved(heads: jax.Array) -> jax.Array:
    return jnp.stack(jnp.split(heads, 2, axis=-1), axis=-1).reshape(heads.shape)


def rotated(heads: jax.Array) -> jax.Array:
    first, second = jnp.split(heads, 2, axis=-1)
    return jnp.stack((-second, first), axis=-2).reshape(heads.shape)


def concatenated(heads: jax.Array) -> jax.Array:
    first, second = jnp.split(heads, 2, axis=-1)
    return jnp.concatenate((-second, first), axis=-1)


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


def the(program: Program, primitive: str) -> Op:
    (found,) = (op for op in program.ops if op.primitive == primitive)
    return found


def laid(op: Op, dim: int) -> tuple[Layout, ...]:
    """The layouts around what cuts or joins, a dimension of its first operand split over all."""
    factor = None if dim == WHOLE else op.operands[0].factors[dim]
    if factor is None:
        return ((WHOLE,),) * len(op.arrays)
    return tuple((array.factors.index(factor),) for array in op.arrays)


def microseconds(op: Op, dim: int = WHOLE) -> float:
    return 1e6 * price_op(op, laid(op, dim), MACHINE).compute_seconds


def copies(program: Program, dim: int = WHOLE, summed: frozenset[int] = frozenset()) -> float:
    """Microseconds that the copies of all that is stacked take."""
    layouts = [(WHOLE,)] * len(program.groups)
    for op in program.ops:
        if op.primitive in ("stack", "concatenate"):
            layouts[op.results[0].group] = laid(op, dim)[-1]
    return 1e6 * JoinedCopies(program.ops, MACHINE).seconds(layouts, summed.__contains__)


# By the TPU compiler for v5e, of Gemma 2B, Gemma 7B and Gemma 2 2B on 1x8, 2x4, 4x2 and 8x1: the
# same shares of eight devices.
@pytest.mark.parametrize(
    ("whole", "split", "copied", "others"),
    [
        ((8, 8, 1), HEADS, 8.6, 11.1 + 7.7 + 14.5),
        ((8, 16, 16), HEADS, 31.0, 20.8 + 14.6 + 20.1),
        ((4, 32, 32), HEADS, 61.6, 20.8 + 14.6 + 20.1),
        ((4, 16, 1), HEADS, 61.6, 11.1 + 7.7 + 14.5),
        ((2, 32, 1), HEADS, 14.6, 11.1 + 7.7 + 14.5),
        ((16, 4, 2), SEQUENCES, 61.6, 11.1 + 7.7 + 14.5),
        ((16, 2, 2), SEQUENCES, 13.9, 6.2 + 4.5 + 7.7),
        ((8, 8, 1), SEQUENCES, 8.6, 11.1 + 7.7 + 14.5),
        ((8, 8, 4), SEQUENCES, 61.6, 11.1 + 7.7 + 14.5),
    ],
)
def test_halves_that_are_interleaved(
    whole: tuple[int, int, int], split: int, copied: float, others: float
) -> None:
    program = step(interleaved, *whole)
    assert copies(program, split) == pytest.approx(copied, rel=0.15)
    assert microseconds(the(program, "stack"), split) == pytest.approx(others, rel=0.15)


# The same of halves that change places, of Gemma and Llama 3 8B.
@pytest.mark.parametrize("join", [rotated, concatenated])
@pytest.mark.parametrize(
    ("whole", "copied", "others"),
    [
        ((4, 32, 32), 30.8, 20.8 + 14.6),
        ((4, 16, 1), 7.2, 11.1 + 7.7),
        ((16, 2, 2), 4.2, 6.2 + 4.5),
    ],
)
def test_halves_that_change_places(
    join: Any, whole: tuple[int, int, int], copied: float, others: float
) -> None:
    program = step(join, *whole)
    split = SEQUENCES if whole == (16, 2, 2) else HEADS
    assert copies(program, split) == pytest.approx(copied, rel=0.15)
    joined = the(program, "stack" if join is rotated else "concatenate")
    assert microseconds(joined, split) == pytest.approx(others, rel=0.2)


# Cut, joined and turned, by the TPU compiler for v5e: all heads of Qwen 2.5 7B, an eighth of those
# of Gemma 7B.
@pytest.mark.parametrize(("heads", "width", "compiled"), [(28, 128, 412), (2, 256, 66)])
def test_halves_that_change_places_take_what_their_elements_take(
    heads: int, width: int, compiled: float
) -> None:
    program = step(concatenated, 8, heads, heads, width=width)
    found = microseconds(the(program, "concatenate")) + copies(program)
    assert found == pytest.approx(compiled, rel=0.15)


# By the TPU compiler for v5e, of keys and of queries of Llama 3 8B on 1x8.
@pytest.mark.parametrize(
    ("n_heads", "cut", "joined"),
    [(8, 7.7 + 4.5, 5.9 + 5.7 + 9.4), (32, 28.4 + 14.6, 20.3 + 20.0 + 34.4)],
)
def test_halves_of_a_width_that_devices_share(n_heads: int, cut: float, joined: float) -> None:
    program = step(rotated, 8, n_heads, n_heads, width=128)
    assert microseconds(the(program, "split"), WIDTH) == pytest.approx(cut, rel=0.15)
    assert microseconds(the(program, "stack"), WIDTH) == pytest.approx(joined, rel=0.1)
    assert copies(program, WIDTH) == 0
    # Cut along what no device shares, the parts are read where they lie.
    assert microseconds(the(program, "split"), HEADS) == 0


def test_what_is_cut_along_another_dimension_than_devices_share_is_read_where_it_lies() -> None:
    program = program_of(
        lambda x, w: jnp.tanh(jnp.tanh(x)[:, 1:]) @ w, (8, 512, 1024), (1024, 8), dtype="bfloat16"
    )
    assert microseconds(the(program, "slice"), 2) == 0


def test_what_an_all_reduce_summed_is_not_copied() -> None:
    program = step(rotated, 4, 4, 2)
    query, key, scores = (i for i, op in enumerate(program.ops) if op.kind == "contraction")
    assert made_by(program.ops, the(program, "stack").operands[0].group, before=scores) == query
    assert made_by(program.ops, program.ops[key].results[0].group, before=scores) == key
    assert made_by(program.ops, program.ops[query].operands[0].group, before=scores) is None
    assert copies(program, summed=frozenset({query})) == 0
    assert copies(program, summed=frozenset({key, scores})) == copies(program) > 0


def test_a_step_takes_what_its_copies_take() -> None:
    program = step(rotated, 4, 4, 2)
    layouts = [(WHOLE,)] * len(program.groups)
    pricer = StepPricer(program, MACHINE)
    whole = pricer.price(layouts).compute_seconds
    pricer._joined = JoinedCopies((), MACHINE)
    assert 1e6 * (whole - pricer.price(layouts).compute_seconds) == pytest.approx(copies(program))


@pytest.mark.parametrize(
    ("join", "shares", "tokens", "sharing"),
    [
        (interleaved, (4, 4, 4), 1, 1),
        (interleaved, (4, 4, 2), 1, 2),
        (interleaved, (4, 4, 1), 1, 4),
        # A batch of one sequence is no dimension.
        (interleaved, (1, 4, 2), 0, 2),
    ],
)
def test_interleaving_is_told_with_the_heads_that_share_a_key(
    join: Any, shares: tuple[int, int, int], tokens: int, sharing: int
) -> None:
    told = the(step(join, *shares), "stack").interleaving
    assert told is not None and (told.tokens, told.sharing) == (tokens, sharing)


def test_heads_may_come_before_tokens() -> None:
    def scores(query: Any, key: Any) -> Any:
        grouped = interleaved(jnp.tanh(query)).reshape(4, 2, 3, TOKENS, 256)
        return jax.nn.softmax(jnp.einsum("bkgtw,bksw->bkgts", grouped, key))

    told = the(program_of(scores, (4, 6, TOKENS, 256), (4, 2, TOKENS, 256)), "stack").interleaving
    assert told is not None and (told.tokens, told.sharing) == (2, 3)


def test_what_changes_places_or_meets_no_matmul_is_not_interleaved() -> None:
    assert the(step(rotated, 4, 4, 2), "stack").interleaving is None
    pair = program_of(lambda x: jnp.stack([jnp.sin(x), jnp.cos(x)], axis=-1) * 2, (64, 128))
    assert the(pair, "stack").interleaving is None
