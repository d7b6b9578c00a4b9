"""Loops: what passes through, what each turn reads, and what is summed after the last."""

import jax
import jax.numpy as jnp
import pytest
from test_graph_rules import program_of

import autoshard
from autoshard.graph.link import ONCE, Reads
from autoshard.graph.program import Op
from autoshard.model.keras_import import import_keras

TURNS, BATCH, UNITS = 5, 4, 8


def loop_in(function, *shapes: tuple[int, ...]) -> Op:
    """The only loop or condition of a function."""
    (loop,) = [op for op in program_of(function, *shapes).ops if op.kind == "loop"]
    return loop


def recur(weight, state, inputs):
    """A recurrence that leaves each of its states."""

    def turn(before, new):
        after = jnp.tanh(before @ weight + new)
        return after, after

    return jax.lax.scan(turn, state, inputs)


def test_the_batch_of_a_recurrence_passes_through_and_its_weight_is_read_in_each_turn() -> None:
    loop = loop_in(recur, (UNITS, UNITS), (BATCH, UNITS), (TURNS, BATCH, UNITS))
    weight, state, inputs = loop.operands
    last, states = loop.results
    # A state is what the next turn contracts: its units stay whole, and so does what is added.
    assert weight.factors == (None, None)
    batch = state.factors[0]
    assert (state.factors, last.factors) == ((batch, None), (batch, None))
    assert (inputs.factors, states.factors) == ((None, batch, None), (None, batch, None))
    assert batch is not None
    assert not loop.reduced
    every_turn = Reads(times=TURNS)
    assert (weight.reads, state.reads) == (every_turn, ONCE)
    assert inputs.reads == Reads(times=TURNS, is_sliced=True)
    # One matmul a turn; what is added and squashed is fused into it.
    assert loop.n_kernels == TURNS


def test_the_gradient_of_a_recurrence_is_summed_over_the_batch_after_the_last_turn() -> None:
    def gradient(weight, state, inputs):
        return jax.grad(lambda w: recur(w, state, inputs)[0].sum())(weight)

    program = program_of(gradient, (UNITS, UNITS), (BATCH, UNITS), (TURNS, BATCH, UNITS))
    _, backward = [op for op in program.ops if op.kind == "loop"]
    (batch,) = {factor for factor in backward.reduced if backward.factor_sizes[factor] == BATCH}
    made = next(array for array in backward.results if array.n_bytes == 4 * UNITS * UNITS)
    assert batch not in made.factors
    assert any(batch in array.factors for array in backward.operands)


def test_a_sum_that_the_turn_itself_reads_keeps_what_it_is_over_whole() -> None:
    def normalise(values):
        def turn(_, before):
            return before / before.sum(axis=1, keepdims=True)

        return jax.lax.fori_loop(0, TURNS, turn, values)

    loop = loop_in(normalise, (BATCH, UNITS))
    (array,) = loop.operands
    assert array.factors[0] is not None
    assert array.factors[1] is None


def test_of_what_a_turn_reads_one_slice_it_reads_all_once() -> None:
    def accumulate(sequence, state):
        def turn(at, before):
            return before * 2 + jax.lax.dynamic_index_in_dim(sequence, at, 1, keepdims=False)

        return jax.lax.fori_loop(0, TURNS, turn, state)

    loop = loop_in(accumulate, (BATCH, TURNS, UNITS), (BATCH, UNITS))
    sequence, state = loop.operands
    assert sequence.reads == Reads(times=TURNS, is_sliced=True)
    assert sequence.factors[1] is None
    assert (sequence.factors[0], sequence.factors[2]) == state.factors


def test_what_one_branch_of_a_condition_needs_whole_the_condition_does() -> None:
    def either(values):
        by_row, by_column = (lambda x, a=axis: jnp.cumsum(x, axis=a) for axis in (1, 2))
        return jax.lax.cond(values[0, 0, 0] > 0, by_row, by_column, values)

    loop = loop_in(either, (BATCH, 6, UNITS))
    (values,) = loop.operands[-1:]
    assert [factor is None for factor in values.factors] == [False, True, True]
    assert loop.n_kernels == 1


def test_a_loop_of_unknown_length_counts_one_turn() -> None:
    def double(values, limit):
        return jax.lax.while_loop(lambda x: x.sum() < limit[0], lambda x: jnp.sort(x * 2), values)

    loop = loop_in(double, (BATCH, UNITS), (UNITS,))
    assert loop.n_kernels == 1
    # The limit is read by the condition alone.
    assert [array.reads for array in loop.operands] == [ONCE] * len(loop.operands)


def test_a_loop_that_runs_what_has_no_rule_has_none_either() -> None:
    def factorise(matrix):
        return jax.lax.fori_loop(0, TURNS, lambda _, x: jnp.linalg.cholesky(x @ x.T), matrix)

    program = program_of(factorise, (UNITS, UNITS))
    assert program.layers_with("unknown") == {"scan": ("",)}


def reader():
    """Two layers that read a sequence, word by word."""
    keras = import_keras()
    words = keras.Input((16,), dtype="int32", name="words")
    found = keras.layers.Embedding(64, 32, name="table")(words)
    found = keras.layers.LSTM(32, return_sequences=True, name="first")(found)
    return keras.Model(words, keras.layers.GRU(32, name="second")(found))


@pytest.mark.tpu
def test_training_a_recurrent_network_sums_each_gradient_once() -> None:
    pytest.importorskip("libtpu")
    predicted, moved = wire_bytes({}, "8x1")
    assert predicted == pytest.approx(moved, rel=0.01)
    # By a ring, in float32, and none in each of 16 turns.
    weights = 64 * 32 + (32 + 32 + 1) * 4 * 32 + (32 + 32 + 2) * 3 * 32
    assert moved == pytest.approx(2 * 7 / 8 * 4 * weights, rel=0.01)


@pytest.mark.tpu
def test_the_split_weight_of_a_loop_costs_a_collective_in_each_of_its_turns() -> None:
    pytest.importorskip("libtpu")
    predicted, moved = wire_bytes({"first/lstm_cell/kernel": ("model", None)}, "1x8")
    # XLA sums what it makes of its part of the kernel, which here is less than the kernel.
    assert moved > 16 * 2 * 7 / 8 * 4 * 8 * 4 * 32
    assert predicted == pytest.approx(16 * 2 * 7 / 8 * 4 * 32 * 4 * 32, rel=0.1)


def wire_bytes(layout: dict[str, tuple[str | None, ...]], mesh: str) -> tuple[int, int]:
    """Predicted, and of the program compiled for TPUs."""
    model = f"{__name__}:reader"
    found = autoshard.verify(layout, model=model, mesh=mesh, target="tpu:v5e:2x4", dtype="float32")
    assert found.predicted is not None
    return found.predicted.collective_bytes, sum(one.wire_bytes for one in found.collectives)
