"""Propagation: what XLA's partitioner would do with the layouts of the arguments."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from test_graph_rules import program_of

from autoshard.graph.program import WHOLE, LayerOutput, Layout, Program
from autoshard.graph.propagation import Apart, Propagator, propagate
from autoshard.graph.splits import splits_evenly


def layouts_of(program, *arguments: int, axis: int = 4) -> list[int]:
    """Propagate on one mesh axis; arguments give the dimension it splits, or WHOLE."""
    fixed = {
        argument.group: (dim,)
        for argument, dim in zip(program.arguments, arguments, strict=True)
        if argument.group is not None
    }
    return [layout[0] for layout in propagate(program, fixed, (axis,))]


def output(program, layouts: list[int]) -> int:
    (place,) = program.outputs
    assert place.group is not None
    return layouts[place.group]


def test_columns_of_a_weight_become_columns_of_the_result() -> None:
    program = program_of(lambda x, w: x @ w, (8, 16), (16, 32))
    assert output(program, layouts_of(program, WHOLE, 1)) == 1


def test_a_contracted_dimension_does_not_reach_the_result() -> None:
    program = program_of(lambda x, w: x @ w, (8, 16), (16, 32))
    assert output(program, layouts_of(program, WHOLE, 0)) == WHOLE


def test_two_matmuls_in_a_row_keep_the_inner_dimension_split() -> None:
    # x[8, 16] up[16, 32] down[32, 16], both split on 32: the hidden array [8, 32] is split, the
    # result is not.
    program = program_of(lambda x, up, down: jnp.tanh(x @ up) @ down, (8, 16), (16, 32), (32, 16))
    layouts = layouts_of(program, WHOLE, 1, 0)
    assert output(program, layouts) == WHOLE
    hidden = [group for group in range(len(layouts)) if program.groups[group].sizes == (8, 32)]
    assert [layouts[group] for group in hidden] == [1]


def test_where_two_operands_want_the_axis_the_larger_wins() -> None:
    # x[8, 512] is split on 8, w[512, 4096] on 4096: the result can be split on one of them, and w
    # is the larger.
    program = program_of(lambda x, w: x @ w, (8, 512), (512, 4096))
    assert output(program, layouts_of(program, 0, 1)) == 1


def test_what_is_broadcast_is_not_split_further_than_its_own_axis_does() -> None:
    # On one dimension the first axis splits what is broadcast, the second what it is added to.
    program = program_of(lambda x, w: jnp.tanh(x @ x)[:, None] + w @ w, (16, 16), (16, 16, 16))
    x, w = (argument.group for argument in program.arguments)
    layouts = propagate(program, {x: (0, WHOLE), w: (WHOLE, 0)}, (2, 4))
    addition = program.ops[-1]
    assert (addition.primitive, addition.kind) == ("add", "broadcast")
    assert [layouts[group] for group in addition.groups] == [(0, WHOLE), (WHOLE, 0)]


def test_small_operands_do_not_lay_out_what_they_are_broadcast_to() -> None:
    # The labels[8] are split as x is, and w, the larger, on its columns.
    def function(x, w, labels):
        return (x @ w) * ((2 * labels)[:, None] == jnp.arange(4096.0))

    program = program_of(function, (8, 512), (512, 4096), (8,))
    assert output(program, layouts_of(program, 0, 1, 0)) == 1


def test_a_dimension_that_the_axis_does_not_divide_stays_whole() -> None:
    program = program_of(lambda x, w: x @ w, (8, 16), (16, 6))
    assert output(program, layouts_of(program, 0, WHOLE, axis=3)) == WHOLE


def test_splits_evenly_counts_every_axis_on_a_dimension() -> None:
    assert splits_evenly((8,), (0, 0), (2, 4))
    assert not splits_evenly((8,), (0, 0), (4, 4))  # 8 / 4 = 2, which 4 does not divide


def test_every_op_of_a_gradient_is_laid_out() -> None:
    def step(w, x):
        return jax.grad(lambda v: (jnp.tanh(x @ v) ** 2).sum())(w)

    program = program_of(step, (16, 32), (8, 16))
    # w split on its columns; so is its gradient, with no help from the caller.
    assert output(program, layouts_of(program, 1, WHOLE)) == 1


@pytest.mark.parametrize(("for_tpu", "dim"), [(True, 0), (False, 2)])
def test_vectors_that_are_broadcast_spread_after_the_rest(for_tpu: bool, dim: int) -> None:
    # One token's weights p[b, n, s] of the values v[b, s, n, h]. The axis splits heads of p and the
    # batch of what the result is added to; p is the larger, but broadcast it is the small side.
    def attended(p, v, z):
        return jnp.einsum("bns,bsnh->bnh", p, v) + z

    program = program_of(attended, (8, 8, 512), (8, 512, 8, 64), (8, 8, 64), for_tpu=for_tpu)
    p, v, z = (argument.group for argument in program.arguments)
    assert propagate(program, {p: (1,), z: (0,)}, (8,))[v] == (dim,)


def output_of(program: Program, index: int, **changes: Any) -> LayerOutput:
    """The result of a contraction as the output of a layer."""
    (made,) = program.ops[index].results
    given = {
        "template": f"layer_{index}/output",
        "identity": made.identity,
        "group": made.group,
        "dims": (0, 1),
        "shape": (8, 32),
        "n_bytes": made.n_bytes,
        "backward": False,
        "made_by": index,
        "as_made": True,
    }
    return LayerOutput(**{**given, **changes})


def asked_whole(
    spec: int, *, reads: bool = False, as_made: bool = True
) -> tuple[Program, tuple[Layout, ...], Apart]:
    """`x @ w` asked to be whole and added to `y @ u`, which is split by columns; `w` split so."""

    def added(x, w, y, u, t):
        first = x @ w
        return first + y @ u, (first @ t if reads else t)

    program = program_of(added, (8, 16), (16, 32), (8, 16), (16, 32), (32, 8))
    x, w, y, u, t = (argument.group for argument in program.arguments)
    fixed = {x: (WHOLE,), w: (spec,), y: (WHOLE,), u: (1,), t: (WHOLE,)}
    propagator = Propagator(program, (8,))
    output = output_of(program, 0, as_made=as_made)
    layouts = propagator.propagate(fixed, [(output, (WHOLE,))])
    assert layouts[output.group] == (1,)
    return program, layouts, propagator.apart


@pytest.mark.parametrize(
    ("spec", "as_made", "made", "moved"),
    [
        (WHOLE, True, WHOLE, {}),  # made whole, and sliced for the sum
        (1, True, WHOLE, {}),  # `w` is gathered
        (1, False, 1, {0: ((1,), (WHOLE,))}),  # made by columns, gathered as asked, sliced again
        (0, True, 1, {}),  # partial sums, whole only to be sliced: scattered
    ],
)
def test_what_is_asked_of_a_result_holds_for_it_alone(
    spec: int, as_made: bool, made: int, moved: dict
) -> None:
    program, layouts, apart = asked_whole(spec, as_made=as_made)
    around = apart.around.get(0) or [layouts[group] for group in program.ops[0].groups]
    assert around[-1] == (made,)
    assert apart.moved == moved


@pytest.mark.parametrize("spec", [WHOLE, 0, 1])
def test_what_reads_a_result_itself_sees_it_as_was_asked(spec: int) -> None:
    program, _, apart = asked_whole(spec, reads=True)
    (reader,) = (i for i, op in enumerate(program.ops) if op.factor_sizes == (8, 32, 8))
    assert apart.around[reader][0] == (WHOLE,)
    # Nobody scatters what is read whole.
    assert apart.around[0][-1] == (WHOLE,)


def test_rules_for_outputs_of_one_group_begin_it_together() -> None:
    program = program_of(lambda x, w, u: x @ w + x @ u, (8, 16), (16, 32), (16, 32))
    whole, split = (output_of(program, index) for index in (0, 1))
    fixed = {argument.group: (WHOLE,) for argument in program.arguments}
    propagator = Propagator(program, (8,))
    for asked in ([(whole, (WHOLE,)), (split, (1,))], [(split, (1,)), (whole, (WHOLE,))]):
        assert propagator.propagate(fixed, asked)[split.group] == (1,)
        assert propagator.apart.around == {0: ((WHOLE,), (WHOLE,), (WHOLE,))}


def test_a_rule_for_what_is_reshaped_does_not_lay_out_the_result_itself() -> None:
    def folded(x, w, z):
        return (x.reshape(64, 16) @ w).reshape(8, 8, 32) + z @ w

    program = program_of(folded, (8, 8, 16), (16, 32), (8, 8, 16))
    x, w, z = (argument.group for argument in program.arguments)
    matmul = next(i for i, op in enumerate(program.ops) if op.kind == "contraction")
    (output,) = program.outputs
    asked = output_of(program, matmul, group=output.group, dims=(0, 1, 2), shape=(8, 8, 32))
    propagator = Propagator(program, (8,))
    fixed = {x: (WHOLE,), w: (1,), z: (WHOLE,)}
    # Its dimensions are not those of the result: there is no third one.
    for layout in ((WHOLE,), (2,)):
        assert propagator.propagate(fixed, [(asked, layout)])[output.group] == (2,)
        assert not propagator.apart.around


def test_a_result_does_not_spread_past_a_rule_for_it() -> None:
    # What is made of `x @ w` may be split, but not by the columns of `w`: the rule is between.
    def scaled(x, w):
        return jnp.tanh(x @ w) * 2.0

    program = program_of(scaled, (8, 16), (16, 32))
    x, w = (argument.group for argument in program.arguments)
    fixed, output = {x: (WHOLE,), w: (1,)}, output_of(program, 0)
    assert propagate(program, fixed, (8,))[output.group] == (1,)
    assert propagate(program, fixed, (8,), [(output, (WHOLE,))])[output.group] == (WHOLE,)
