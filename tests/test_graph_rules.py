"""The factor rules: dimensions that must move together share a factor."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from autoshard.graph.build import StepInput, build_program
from autoshard.graph.jaxpr import read_jaxpr
from autoshard.graph.program import Program
from autoshard.graph.rules import link_of


def program_of(
    function, *shapes: tuple[int, ...], dtype: str = "float32", for_tpu: bool = False
) -> Program:
    """A program whose arguments are one weight family each."""
    structs = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes]
    closed = jax.make_jaxpr(function)(*structs)
    inputs = [StepInput(role="weight", family=f"w{i}") for i in range(len(shapes))]
    replaces = [None] * len(closed.jaxpr.outvars)
    return build_program(read_jaxpr(closed), inputs, replaces, for_tpu=for_tpu)


def test_a_matmul_reduces_the_contracting_dimension_and_passes_the_others() -> None:
    numbers = {"dimension_numbers": (((1,), (0,)), ((), ()))}
    link = link_of("dot_general", [(4, 8), (8, 6)], [(4, 6)], numbers)
    assert link is not None
    (i, k), (k_too, j) = link.operands
    assert k == k_too
    assert link.results == ((i, j),)
    assert link.reduced == {k}


def test_pooling_keeps_the_dimensions_that_its_window_covers_whole() -> None:
    window = {"window_dimensions": (1, 2, 2, 1)}
    link = link_of("reduce_window_max", [(8, 16, 16, 4)], [(8, 8, 8, 4)], window)
    assert link is not None
    assert link.operands == link.results == ((0, None, None, 3),)
    gradient = link_of(
        "select_and_scatter_add", [(8, 8, 8, 4), (8, 16, 16, 4)], [(8, 16, 16, 4)], window
    )
    assert gradient is not None
    assert gradient.operands == ((0, None, None, 3), (0, None, None, 3))


def test_a_fourier_transform_passes_its_batch_and_keeps_the_rest_whole() -> None:
    lengths = {"fft_lengths": (512, 1024)}
    link = link_of("fft", [(8, 512, 1024)], [(8, 512, 1024)], lengths)
    assert link is not None
    assert link.operands == link.results == ((0, None, None),)


def test_a_batched_matmul_shares_its_batch_dimension_among_all_three() -> None:
    numbers = {"dimension_numbers": (((2,), (1,)), ((0,), (0,)))}
    link = link_of("dot_general", [(3, 4, 8), (3, 8, 6)], [(3, 4, 6)], numbers)
    assert link is not None
    assert link.operands[0][0] == link.operands[1][0] == link.results[0][0]


@pytest.mark.parametrize(
    ("before", "after", "linked"),
    [
        # heads and head size merge: only the heads, the major part, stay splittable
        ((8, 16, 256), (8, 4096), {(0, 0), (1, 1)}),
        # and the other way round
        ((8, 4096), (8, 16, 256), {(0, 0), (1, 1)}),
        # dimensions of size 1 come and go
        ((8, 1, 16), (8, 16), {(0, 0), (2, 1)}),
    ],
)
def test_a_reshape_links_the_major_parts(
    before: tuple[int, ...], after: tuple[int, ...], linked: set[tuple[int, int]]
) -> None:
    link = link_of("reshape", [before], [after], {})
    assert link is not None
    found = {
        (i, j)
        for i, a in enumerate(link.operands[0])
        for j, b in enumerate(link.results[0])
        if a is not None and a == b
    }
    assert found == linked


def test_a_lookup_reduces_the_dimension_that_is_looked_up() -> None:
    program = program_of(lambda table, rows: table[rows.astype(int)], (32, 8), (4, 6))
    (gather,) = [op for op in program.ops if op.kind == "gather"]
    vocabulary, features = gather.operands[0].factors
    assert vocabulary in gather.reduced
    assert features in gather.results[0].factors


def test_the_gradient_of_a_lookup_reduces_what_the_indices_run_over() -> None:
    def gradient(table, rows):
        return jax.grad(lambda t: (t[rows.astype(int)] ** 2).sum())(table)

    program = program_of(gradient, (32, 8), (4, 6))
    (scatter,) = [op for op in program.ops if op.kind == "scatter"]
    assert {scatter.factor_sizes[factor] for factor in scatter.reduced} == {4, 6}


def test_elementwise_ops_and_transpositions_leave_no_op_behind() -> None:
    program = program_of(lambda x, y: jnp.tanh(x).T + y * 2, (4, 8), (8, 4))
    # x and y are arguments with specs of their own: what is made of them is laid out apart, and all
    # of that together.
    assert [op.kind for op in program.ops] == ["elementwise", "elementwise"]
    assert len({op.results[0].group for op in program.ops}) == 1


def test_a_primitive_without_a_rule_is_named_and_needs_everything_whole() -> None:
    program = program_of(lambda x: jnp.linalg.cholesky(x) @ x, (8, 8))
    assert program.layers_with("unknown") == {"cholesky": ("",)}
    (cholesky,) = [op for op in program.ops if op.kind == "unknown" and op.primitive == "cholesky"]
    assert cholesky.operands[0].factors == (None, None)


def test_what_no_result_depends_on_and_what_has_no_elements_leaves_the_program() -> None:
    def function(x, w, nothing):
        jnp.tanh(x) @ w.T @ w  # dead
        none = nothing @ w
        return jnp.concatenate([x @ w, none]) * 2

    program = program_of(function, (8, 4), (4, 4), (0, 4))
    assert [op.primitive for op in program.ops] == ["dot_general", "concatenate"]


def test_where_equal_equations_are_one_what_a_mask_is_laid_over_is_laid_out_alike() -> None:
    def masked(mask, k, v, w):
        def over(x):
            return jnp.where(jnp.broadcast_to(mask[:, None] > 0, x.shape), x, 0.0)

        return over(k @ w), over(v @ w)

    def groups(for_tpu: bool) -> set[int]:
        program = program_of(masked, (8,), *[(8, 16)] * 2, (16, 32), for_tpu=for_tpu)
        return {output.group for output in program.outputs}

    assert len(groups(for_tpu=False)) == 2
    assert len(groups(for_tpu=True)) == 1


@pytest.mark.parametrize(
    ("n_groups", "multiplier", "channels", "gathers"),
    [(1, 1, False, False), (2, 1, False, True), (16, 1, True, False), (16, 2, False, True)],
)
def test_channels_pass_through_a_convolution_in_groups_of_one(
    n_groups: int, multiplier: int, channels: bool, gathers: bool
) -> None:
    kernel = (3, 3, 16 // n_groups, 16 * multiplier)
    convolve = partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=n_groups,
    )
    op = program_of(convolve, (8, 4, 4, 16), kernel).ops[0]
    x, w, y = (array.factors for array in op.arrays)
    assert x[0] == y[0]
    assert w[-1] == y[-1]
    assert (x[-1] == y[-1]) is channels
    assert op.gathered == ({y[-1]} if gathers else set())
    assert op.reduced == ({x[-1]} if n_groups == 1 else set())
    assert op.window == (9 if n_groups == 1 else 9 * 16 // n_groups)

    # Its gradient sums over the batch, and has the channels where the convolution had them.
    gradient = jax.grad(lambda x, w: (convolve(x, w) ** 2).sum(), argnums=1)
    _, back = (op for op in program_of(gradient, (8, 4, 4, 16), kernel).ops if op.is_convolution)
    assert {back.factor_sizes[factor] for factor in back.reduced} == {8}
    if channels:
        assert len({array.factors[-1] for array in back.arrays}) == 1
