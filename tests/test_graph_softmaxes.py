"""Attention and logits among the ops of a step."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from test_graph_rules import program_of

from autoshard.graph.program import Program, Scores
from autoshard.graph.softmaxes import read_softmaxes, with_maxima
from autoshard.model.build import build
from autoshard.model.fold import fold
from autoshard.model.workload import Workload
from autoshard.planner.tracing import make_program

SHAPES = (4, 128, 8, 64), (4, 128, 8, 64), (4, 128, 8, 64)


def attention(query: Any, key: Any, value: Any) -> Any:
    scores = jnp.einsum("bthk,bshk->bhts", jnp.tanh(query), key)
    shares = jax.nn.softmax(scores.astype("float32")).astype(value.dtype)
    return jnp.einsum("bhts,bshk->bthk", shares, value)


def told(program: Program) -> dict[int, Scores]:
    return {at: op.scores for at, op in enumerate(program.ops) if op.scores is not None}


@pytest.mark.parametrize(("dtype", "itemsize"), [("bfloat16", 2), ("float32", 4)])
def test_attention_is_told_where_its_scores_are(dtype: str, itemsize: int) -> None:
    program = program_of(attention, *SHAPES, dtype=dtype)
    (softmax,) = read_softmaxes(program.ops)
    assert softmax.weighing is not None
    assert [program.ops[at].primitive for at in softmax] == [
        *("dot_general", "reduce_sum", "dot_general")
    ]
    found = told(program)
    assert tuple(found) == softmax
    # A matmul makes them, in the dtype of its operands whatever the softmax is computed in.
    assert [one.itemsize for one in found.values()] == [itemsize] * 3
    arrays = [program.ops[at].arrays[one.position] for at, one in found.items()]
    assert {array.group for array in arrays} == {arrays[0].group}
    assert [one.position for one in found.values()][:2] == [2, 0]


def test_logits_have_a_softmax_but_no_attention() -> None:
    def entropy(x: Any, w: Any) -> Any:
        return jnp.sum(jax.nn.logsumexp(jnp.tanh(x) @ w, axis=-1))

    program = program_of(entropy, (8, 64), (64, 256))
    (softmax,) = read_softmaxes(program.ops)
    assert softmax.weighing is None
    assert softmax.scores in with_maxima(program.ops)
    assert not told(program)


def test_a_step_that_trains_is_told_nothing() -> None:
    def loss(*arrays: Any) -> Any:
        return jnp.sum(attention(*arrays) ** 2)

    program = program_of(jax.grad(loss, argnums=(0, 1, 2)), *SHAPES)
    assert len(list(read_softmaxes(program.ops))) == 1
    assert not told(program)
    assert not any(op.is_brief for op in program.ops)


@pytest.mark.parametrize(("kind", "n_told"), [("prefill", 3), ("decode", 0)])
def test_a_step_that_decodes_is_told_nothing(kind: Any, n_told: int) -> None:
    workload = Workload(kind=kind, batch=8, seq_len=128)
    program = make_program(fold(build("llama3.2_1b"), periods=2), workload)
    assert len(told(program)) == 2 * n_told
    logits = [op for op in program.ops if op.is_returned and op.kind == "contraction"]
    assert [op.layer for op in logits] == ["token_embedding"]


def test_a_part_of_logits_is_what_the_step_returns() -> None:
    program = program_of(lambda x, w: (x @ w)[32:], (64, 64), (64, 64))
    assert [(op.primitive, op.is_returned, op.is_brief) for op in program.ops] == [
        *(("dot_general", False, True), ("slice", True, False))
    ]


def test_a_stream_is_not_returned_because_its_norm_is() -> None:
    def backbone(x: Any, w: Any, scale: Any) -> Any:
        stream = x + jnp.tanh(x) @ w
        return stream * jnp.sum(stream, axis=-1, keepdims=True) * scale

    program = program_of(backbone, (64, 64), (64, 64), (64,))
    (matmul,) = [op for op in program.ops if op.kind == "contraction"]
    assert not matmul.is_returned and matmul.is_brief
    biased = program_of(lambda x, w, bias: jnp.tanh(x @ w + bias), (64, 64), (64, 64), (64,))
    assert [op.is_returned for op in biased.ops if op.kind == "contraction"] == [True]


def test_what_the_step_returns_is_read_by_nothing_in_it() -> None:
    program = program_of(lambda x, a, b: ((x @ a) @ b).astype("float32"), *[(64, 64)] * 3)
    assert [(op.is_returned, op.is_brief) for op in program.ops] == [(False, True), (True, False)]
