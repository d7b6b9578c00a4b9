"""Axes in parts: more devices than heads of keys and values, and what follows for layouts."""

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_graph_rules import program_of

from autoshard.cost.machine import Machine
from autoshard.cost.strategies import price_op
from autoshard.graph.axis_parts import AxisParts
from autoshard.graph.program import WHOLE, Op
from autoshard.graph.propagation import propagate
from autoshard.graph.splits import factors_split, is_possible, layout_of
from autoshard.hardware.targets import parse_target
from autoshard.mesh import parse_mesh

HEADS = AxisParts(parts=((4, 2),))


def attention(q, k, v, out):
    """Eight heads of queries, four of keys and values: `[b, t, n, h]`, `[b, s, k, h]`."""
    q = q.reshape(*q.shape[:2], 4, 2, q.shape[-1])
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k)
    mixed = jnp.einsum("bkgts,bskh->btkgh", scores, v)
    return mixed.reshape(*mixed.shape[:2], 8, mixed.shape[-1]) @ out


PROGRAM = program_of(attention, (4, 16, 8, 32), (4, 16, 4, 32), (4, 16, 4, 32), (32, 32))


def test_an_axis_is_cut_where_heads_are_fewer_than_its_devices() -> None:
    assert AxisParts.of(PROGRAM, (8,)).parts == ((4, 2),)
    assert AxisParts.of(PROGRAM, (2, 4)).parts == ((2,), (4,))
    assert AxisParts.of(PROGRAM, (8, 8)).parts == ((8,), (4, 2))
    # Three devices, or sixteen, could not split eight heads.
    assert AxisParts.of(PROGRAM, (3,)).parts == ((3,),)
    assert AxisParts.of(PROGRAM, (16,)).parts == ((16,),)


def test_an_axis_is_not_cut_for_halves_that_are_joined() -> None:
    def rotated(x, w):
        half = jnp.stack([x @ w, x], axis=-2)
        return half.reshape(*x.shape[:-1], 2 * x.shape[-1])

    assert AxisParts.of(program_of(rotated, (4, 64), (64, 64)), (8,)).parts == ((8,),)


def test_heads_of_queries_split_those_of_keys_by_part_of_the_axis() -> None:
    q, k, v, out = (argument.group for argument in PROGRAM.arguments)
    fixed = {q: HEADS.by_part((2,)), out: HEADS.by_part((WHOLE,))}
    layouts = propagate(PROGRAM, fixed, HEADS.sizes)
    assert layouts[k] == layouts[v] == (2, WHOLE)
    assert layouts[PROGRAM.outputs[0].group] == HEADS.by_part((2,))
    by_devices = propagate(PROGRAM, {q: (2,), out: (WHOLE,)}, (8,))
    assert by_devices[k] == by_devices[v] == (WHOLE,)


def test_attention_by_parts_moves_nothing_and_shares_all_work() -> None:
    machine = Machine.of(parse_mesh("1x8"), parse_target("tpu:v5e:2x4"), parts=HEADS)
    q, _, _, out = (argument.group for argument in PROGRAM.arguments)
    fixed = {q: HEADS.by_part((2,)), out: HEADS.by_part((WHOLE,))}
    layouts = propagate(PROGRAM, fixed, HEADS.sizes)
    for op in PROGRAM.ops:
        cost = price_op(op, [layouts[group] for group in op.groups], machine)
        assert cost.transfers == ()
        assert WHOLE not in cost.choice or op.kind != "contraction"


def test_layouts_of_whole_axes_cost_what_they_do_without_parts() -> None:
    mesh, target = parse_mesh("1x8"), parse_target("tpu:v5e:2x4")
    plain, cut = Machine.of(mesh, target), Machine.of(mesh, target, parts=HEADS)
    (op,) = program_of(jnp.matmul, (512, 1024), (1024, 2048), dtype="bfloat16").ops
    for dims in [(1, 0, WHOLE), (0, 1, 1), (WHOLE, 1, 1), (1, 0, 0)]:
        want = price_op(op, [(dim,) for dim in dims], plain)
        have = price_op(op, [HEADS.by_part((dim,)) for dim in dims], cut)
        assert have.compute_seconds == want.compute_seconds
        assert have.choice == HEADS.by_part(want.choice)
        assert [(t.kind, t.n_bytes, t.seconds) for t in have.transfers] == [
            (t.kind, t.n_bytes, t.seconds) for t in want.transfers
        ]


def test_a_part_of_an_axis_is_carried_by_fewer_devices() -> None:
    machine = Machine.of(parse_mesh("1x8"), parse_target("tpu:v5e:2x4"), parts=HEADS)
    (op,) = program_of(jnp.matmul, (512, 1024), (1024, 2048), dtype="bfloat16").ops
    # The second part splits the contracting dimension, the first the columns.
    (sums,) = price_op(op, [(WHOLE, 1), (1, 0), (1, WHOLE)], machine).transfers
    link = machine.links[sums.axis]
    assert (sums.kind, link.size, link.axis) == ("all-reduce", 2, "model")


def test_layouts_are_named_by_axes_and_their_parts() -> None:
    parts = AxisParts(parts=((2,), (4, 2)))
    assert parts.sizes == (2, 4, 2)
    assert parts.by_axis([(0, 1, 1)]) == [(0, 1)]
    assert parts.by_axis([(0, 1, 1), (0, 1, WHOLE)]) is None
    assert parts.names((0, 1, 1), ("batch", "model")) == {0: "batch", 1: "model"}
    assert parts.names((0, 1, WHOLE), ("batch", "model")) == {0: "batch", 1: "model:(1)4"}
    assert parts.names((0, 1, 0), ("batch", "model")) == {0: "batch,model:(4)2", 1: "model:(1)4"}


@pytest.mark.parametrize(
    ("layout", "factors"),
    [
        ((0, 0), (0, 1)),
        ((0, WHOLE), (0, WHOLE)),
        # The part of two alone goes to the major factor.
        ((WHOLE, 0), (WHOLE, 0)),
    ],
)
def test_axes_fill_the_major_factor_first(layout: tuple[int, ...], factors: tuple[int, ...]):
    op = reshape_op()
    assert op.factor_sizes == (4, 2)
    (merged,) = op.results
    assert factors_split(merged, layout, op.factor_sizes, (4, 2)) == factors


def test_what_is_inside_is_not_split_before_the_major_factor() -> None:
    op = reshape_op()
    assert is_possible(op, (0, 1), (4, 2))
    assert not is_possible(op, (WHOLE, 1), (4, 2))
    assert not is_possible(op, (1,), (2,))


@given(st.lists(st.sampled_from([WHOLE, 0, 1]), min_size=2, max_size=2).map(tuple))
def test_what_a_choice_lays_out_is_split_as_it_says(choice: tuple[int, ...]) -> None:
    op = reshape_op()
    if is_possible(op, choice, (4, 2)):
        for array in op.arrays:
            found = factors_split(array, layout_of(array, choice), op.factor_sizes, (4, 2))
            assert found == choice


def reshape_op() -> Op:
    """`[4, 2] -> [8]`."""
    (op,) = program_of(lambda x: x.reshape(8), (4, 2)).ops
    return op
