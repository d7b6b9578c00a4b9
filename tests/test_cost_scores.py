"""The scores of attention that a TPU writes beside their exponentials."""

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from test_cost_step import MACHINE, cost_of
from test_graph_rules import program_of
from test_graph_softmaxes import attention as attention_alone

from autoshard.cost.scores import AttentionScores
from autoshard.cost.step import StepPricer
from autoshard.cost.strategies import price_op
from autoshard.graph.program import WHOLE, Program
from autoshard.graph.propagation import propagate
from autoshard.hardware.efficiency import memory_seconds

LENGTH, HEADS, WIDTH = 1024, 16, 128
SCORES = 4 * HEADS * LENGTH * LENGTH * 4  # batch 4, in float32


def attention(x: Any, query: Any, key: Any, n_shared: int, order: str = "query first") -> Any:
    """Heads of the query, so many of which share one of the key and value."""
    if query.ndim == 2:
        heads = (x @ query).reshape(*x.shape[:2], HEADS, WIDTH)
    else:
        heads = jnp.einsum("btd,dhk->bthk", x, query)
    keys = jnp.repeat(jnp.einsum("btd,dhk->bthk", x, key), n_shared, axis=2)
    if order == "query first":
        scores = jnp.einsum("bthk,bshk->bhts", heads, keys)
    else:
        scores = jnp.swapaxes(jnp.einsum("bshk,bthk->bhst", keys, heads), 2, 3)
    shares = jax.nn.softmax(scores.astype("float32")).astype(keys.dtype)
    return jnp.einsum("bhts,bshk->bthk", shares, keys)


def step(n_shared: int = 2, is_flat: bool = False, order: str = "query first") -> Program:
    return program_of(
        lambda x, query, key: attention(x, query, key, n_shared, order),
        (4, LENGTH, 2048),
        (2048, HEADS * WIDTH) if is_flat else (2048, HEADS, WIDTH),
        (2048, HEADS // n_shared, WIDTH),
        dtype="bfloat16",
    )


def matmuls(program: Program) -> list[int]:
    return [index for index, op in enumerate(program.ops) if op.kind == "contraction"]


def untold(program: Program) -> Program:
    """As part of a step that trains."""
    return replace(program, ops=tuple(replace(op, scores=None) for op in program.ops))


def written(
    program: Program, dims: tuple[int, ...], summed: set[int], moved: Any = MappingProxyType({})
) -> list[Any]:
    fixed = zip((argument.group for argument in program.arguments), dims, strict=True)
    layouts = propagate(program, {group: (dim,) for group, dim in fixed}, (8,))
    return list(AttentionScores(program, MACHINE).written(layouts, moved, summed.__contains__))


@pytest.mark.parametrize(
    "program",
    [step(), step(is_flat=True), step(order="key first")],
    ids=["heads of the weight", "heads of its result", "key first"],
)
@pytest.mark.parametrize(("place", "is_read_again"), [(0, True), (2, False)])
def test_they_are_where_the_query_is_summed_or_they_are(
    program: Program, place: int, is_read_again: bool
) -> None:
    ((sums, n_bytes, seconds),) = written(program, (WHOLE,) * 3, {matmuls(program)[place]})
    assert program.ops[sums].primitive == "reduce_sum"
    assert n_bytes == SCORES
    assert seconds == pytest.approx(2 * SCORES / (0.73 * MACHINE.chip.hbm_bytes_per_second))
    ((_, _, seconds),) = written(untold(program), (WHOLE,) * 3, {matmuls(program)[place]})
    twice = memory_seconds(MACHINE.chip, SCORES, SCORES)
    assert seconds == (twice if is_read_again else 0.0)


@pytest.mark.parametrize(("dim", "is_turned"), [(3, True), (2, False), (0, False)])
def test_they_are_where_a_query_is_gathered_from_small_shares_of_the_width(
    dim: int, is_turned: bool
) -> None:
    # Sixteen heads 64 wide: a device makes eight elements of each, two heads, or half a sequence.
    program = program_of(
        lambda x, query, key: attention(x, query, key, 2),
        *((4, LENGTH, 2048), (2048, HEADS, WIDTH // 2), (2048, HEADS // 2, WIDTH // 2)),
        dtype="bfloat16",
    )
    (query, *_) = matmuls(program)
    found = written(program, (WHOLE,) * 3, set(), {query: ((dim,), (WHOLE,))})
    assert [n_bytes for _, n_bytes, _ in found] == [SCORES] * is_turned


def test_they_are_a_devices_share_and_small_ones_take_no_time() -> None:
    program = step()
    ((_, n_bytes, seconds),) = written(program, (WHOLE, 1, 1), set(matmuls(program)[:1]))
    assert (n_bytes, seconds) == (SCORES // 8, 0.0)


def test_they_are_not_for_another_sum_nor_where_each_head_has_a_key() -> None:
    assert written(step(), (WHOLE,) * 3, set(matmuls(step())[1:2])) == []
    assert written(step(n_shared=1), (WHOLE,) * 3, set(range(100))) == []


def test_only_a_tpus_compiler_writes_them() -> None:
    machine = replace(MACHINE, as_partitioned=True)
    assert not AttentionScores(step(), machine)._scores
    assert len(AttentionScores(step(), MACHINE)._scores) == 1


@pytest.mark.parametrize("shapes", [((1, 64), (64, 1)), ((64, 1), (1, 1)), ((1, 64), (64,))])
def test_matmuls_without_a_dimension_above_one_have_none(shapes: Any) -> None:
    program = program_of(lambda x, w: jax.nn.softmax(jnp.dot(x, w)), *shapes)
    assert not AttentionScores(program, MACHINE)._scores


def test_those_of_a_query_that_is_summed_take_memory_and_time() -> None:
    # data and both weights split along what the projections sum, or whole
    summed, whole = (cost_of(step(), *dims) for dims in ((2, 0, 0), (WHOLE,) * 3))
    assert {one.kind for one in summed.traffic} == {"all-reduce"}
    more = summed.memory.activations - whole.memory.activations
    assert more == pytest.approx(SCORES, rel=0.05)
    # The projections are faster by less than the scores are read and written in.
    assert summed.compute_seconds > whole.compute_seconds


def test_a_step_costs_the_same_the_second_time() -> None:
    program = step()
    pricer = StepPricer(program, MACHINE)
    fixed = {
        argument.group: (dim,) for argument, dim in zip(program.arguments, (2, 0, 0), strict=True)
    }
    layouts = propagate(program, fixed, (8,))
    assert pricer.price(layouts) == pricer.price(layouts)


def test_each_block_that_an_op_stands_for_writes_them() -> None:
    program = step()
    several = replace(program, ops=tuple(replace(op, count=3) for op in program.ops))
    layouts = propagate(program, {a.group: (WHOLE,) for a in program.arguments}, (8,))
    query = set(matmuls(program)[:1]).__contains__
    ((one,), (three,)) = (
        AttentionScores(each, MACHINE).written(layouts, {}, query) for each in (program, several)
    )
    assert three.seconds == 3 * one.seconds and three.n_bytes == one.n_bytes


@pytest.mark.parametrize(("length", "is_written"), [(1024, False), (2048, True)])
def test_those_of_long_rows_are_written_whatever_is_summed(length: int, is_written: bool) -> None:
    def attend(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.softmax(jnp.tanh(q) @ k.T) @ v

    def entropy(x: Any, w: Any) -> Any:
        return jnp.sum(jax.nn.logsumexp(jnp.tanh(x) @ w, axis=-1))

    whole = program_of(attend, (8 * length, 64), (length, 64), (length, 64))
    layouts = [(WHOLE,)] * len(whole.groups)
    found = list(AttentionScores(whole, MACHINE).written(layouts, {}, lambda index: False))
    assert [one.n_bytes for one in found] == [8 * length * length * 4] * is_written
    # Logits are no attention: nothing is multiplied by their exponentials.
    assert not AttentionScores(program_of(entropy, (8, 64), (64, length)), MACHINE)._scores


# Batch, heads, tokens and width on a device; microseconds by the TPU compiler for v5e, of making
# the scores with their sums and of weighing by them: an eighth of Llama 3 8B, all heads of
# Qwen 2.5 7B and GPT-2 large (which has its softmax in bfloat16), one sequence of DINOv2 giant.
@pytest.mark.parametrize(
    ("shape", "is_wide", "summing", "weighing"),
    [
        ((8, 4, 512, 128), True, 23.1, 19.1),
        ((8, 28, 512, 128), True, 389, 333),
        ((8, 20, 512, 64), False, 356, 65),
        ((1, 24, 1370, 64), True, 857, 330),
    ],
)
def test_scores_stay_on_the_chip_where_they_fit(
    shape: tuple[int, ...], is_wide: bool, summing: float, weighing: float
) -> None:
    def attend(query: Any, key: Any, value: Any) -> Any:
        wide = {"preferred_element_type": "float32"} if is_wide else {}
        scores = jnp.einsum("bhtk,bhsk->bhts", jnp.tanh(query), jnp.tanh(key), **wide)
        shares = jax.nn.softmax(scores).astype(value.dtype)
        return jnp.tanh(jnp.einsum("bhts,bhsk->bhtk", shares, jnp.tanh(value)))

    program = program_of(attend, shape, shape, shape, dtype="bfloat16")
    told = [op for op in program.ops if op.scores is not None]
    made, summed, weighed = (
        1e6 * price_op(op, ((WHOLE,),) * len(op.arrays), MACHINE).compute_seconds for op in told
    )
    assert made + summed == pytest.approx(summing, rel=0.2)
    assert weighed == pytest.approx(weighing, rel=0.4)


def test_scores_that_do_not_fit_take_what_writing_and_reading_them_takes() -> None:
    shape = (32, 512, 8, 128)
    program = program_of(attention_alone, shape, shape, shape, dtype="bfloat16")
    told = [op for op in program.ops if op.scores is not None]
    made, summed, weighed = (
        price_op(op, ((WHOLE,),) * len(op.arrays), MACHINE).compute_seconds for op in told
    )
    seconds = 32 * 8 * 512 * 512 * 2 / MACHINE.chip.hbm_bytes_per_second
    assert made == pytest.approx(seconds / 0.73)
    assert summed == 0
    assert weighed == pytest.approx(seconds / MACHINE.chip.hbm_read_efficiency)


# Of scores in float32, by the TPU compiler for v5e: Gemma 2 2B on 1x8, 2x4, 8x1 and 4x2, and Gemma
# 7B on 2x4.
@pytest.mark.parametrize(
    ("sequences", "keys", "sharing", "compiled"),
    [(8, 1, 1, 26.2), (4, 1, 2, 26.2), (1, 4, 2, 26.2), (2, 2, 2, 3.3), (4, 4, 1, 6.0)],
)
@pytest.mark.parametrize("order", ["gbkts", "bkgts"])
def test_sums_are_slow_where_a_device_has_one_sequence_or_one_keys_head(
    sequences: int, keys: int, sharing: int, compiled: float, order: str
) -> None:
    def shares(x: Any, query: Any, key: Any) -> Any:
        heads, keyed = (jnp.einsum("btd,dkhw->btkhw", x, weight) for weight in (query, key))
        made = jnp.einsum(
            f"btkgw,bskw->{order}",
            heads,
            keyed[:, :, :, 0],
            preferred_element_type=jnp.float32,
        )
        weights = jax.nn.softmax(made).astype(x.dtype)
        return jnp.tanh(jnp.einsum(f"{order},bskw->btkgw", weights, keyed[:, :, :, 0])) + 1

    shapes = ((256, keys, sharing, 256), (256, keys, 1, 256))
    program = program_of(shares, (sequences, 512, 256), *shapes, dtype="bfloat16")
    (sums,) = (op for op in program.ops if op.primitive == "reduce_sum")
    seconds = price_op(sums, ((WHOLE,),) * len(sums.arrays), MACHINE).compute_seconds
    assert 1e6 * seconds == pytest.approx(compiled, rel=0.2)


def test_one_query_of_one_head_has_a_price() -> None:
    program = program_of(
        lambda q, k, v: jax.nn.softmax(q @ k) @ v, (1, 64), (64, 512), (512, 64), dtype="bfloat16"
    )
    assert StepPricer(program, MACHINE).price([(WHOLE,)] * len(program.groups)).compute_seconds > 0
