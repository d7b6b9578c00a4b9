"""What the compiler adds to a matmul: rings, sums of a stream, experts summed as they are made."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from test_cost_step import MACHINE, TARGET
from test_graph_rules import program_of

from autoshard.cost.collective_matmul import _RING_PASSES
from autoshard.cost.machine import Machine
from autoshard.cost.single_rows import matrix_seconds
from autoshard.cost.step import StepPricer
from autoshard.cost.strategies import _SUMMED_BATCH, OpCost, price_op
from autoshard.graph.program import WHOLE, Op, Program
from autoshard.hardware.efficiency import KERNEL_SECONDS
from autoshard.hardware.targets import parse_target
from autoshard.mesh import parse_mesh, round_up

CHIP = MACHINE.chip
ARRAY = 4096 * 4096 * 4


def matmul() -> Op:
    return program_of(lambda x, w: x @ w, (4096, 65_536), (65_536, 4096)).ops[0]


def over(machine: Machine, *dims: tuple[int, ...]) -> OpCost:
    """Price the matmul with these dimensions of its operands and its result split, axis by axis."""
    return price_op(matmul(), dims, machine)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_ring_of_sums_passes_over_the_whole_result(dtype: str) -> None:
    shapes = ((4096, 65_536), (65_536, 4096))
    op = program_of(lambda x, w: x @ w, *shapes, dtype=dtype).ops[0]
    (transfer,) = price_op(op, ((1,), (0,), (1,)), MACHINE).transfers
    assert (transfer.kind, transfer.overlapped) == ("reduce-scatter", True)
    # 4,096 x 4,096 elements, as if of two bytes whatever the dtype
    passes = _RING_PASSES * 4096 * 4096 * 2 / CHIP.hbm_bytes_per_second
    assert transfer.memory_seconds == pytest.approx(passes)
    (plain,) = over(MACHINE, (1,), (0,), (WHOLE,)).transfers
    assert (plain.kind, plain.overlapped, plain.memory_seconds) == ("all-reduce", False, 0.0)


@pytest.mark.parametrize(
    ("columns", "dtype", "kind"),
    [
        (1024, "bfloat16", "all-reduce"),
        (2048, "bfloat16", "reduce-scatter"),
        (3072, "bfloat16", "all-reduce"),
        (3072, "float32", "reduce-scatter"),
    ],
)
def test_shards_of_an_odd_number_of_tiles_are_summed_whole(
    columns: int, dtype: str, kind: str
) -> None:
    op = program_of(lambda x, w: x @ w, (4096, 1024), (1024, columns), dtype=dtype).ops[0]
    (transfer,) = price_op(op, ((1,), (0,), (1,)), MACHINE).transfers
    assert (transfer.kind, transfer.overlapped) == (kind, False)


# Rows of tiles of a device's quarter: of Qwen's vocabulary 2 x 1187, of Llama's 4 x 3 x 167. A row
# is 4,096 x 32 bytes, 128 KiB, of which two are too few in a piece, and 1,187 too many.
@pytest.mark.parametrize(
    ("vocabulary", "kind"), [(151_936, "all-reduce"), (128_256, "reduce-scatter")]
)
def test_a_gradient_is_scattered_in_even_pieces(vocabulary: int, kind: str) -> None:
    machine = Machine.of(parse_mesh("2x4"), TARGET)
    shapes = ((4096, 512), (512, vocabulary))
    op = program_of(lambda x, y: x @ y, *shapes, dtype="bfloat16").ops[0]
    (transfer,) = price_op(op, ((1, WHOLE), (0, 1), (0, 1)), machine).transfers
    assert transfer.kind == kind


def test_there_is_no_ring_where_devices_along_another_axis_do_the_same() -> None:
    machine = Machine.of(parse_mesh("2x4"), TARGET)
    same = over(machine, (WHOLE, 1), (WHOLE, 0), (WHOLE, 1))
    own = over(machine, (0, 1), (WHOLE, 0), (0, 1))
    (idle,), (busy,) = (
        [one for one in cost.transfers if one.kind == "reduce-scatter"] for cost in (same, own)
    )
    assert busy.overlapped
    assert not idle.overlapped


def multiplied(function: Any, *shapes: tuple[int, ...], machine: Machine = MACHINE) -> float:
    (op,) = program_of(function, *shapes, dtype="bfloat16").ops
    return price_op(op, ((WHOLE,),) * 3, machine).compute_seconds


# Microseconds by the TPU compiler for v5e.
@pytest.mark.parametrize(
    ("function", "shapes", "microseconds"),
    [
        (jnp.matmul, ((1, 4096), (4096, 14_336)), 546),
        (partial(jnp.einsum, "bnh,bsnh->bns"), ((8, 20, 64), (8, 512, 20, 64)), 50.7),
        (partial(jnp.einsum, "bns,bsnh->bnh"), ((8, 8, 2048), (8, 2048, 8, 128)), 162),
    ],
)
def test_single_rows_do_without_the_matrix_unit(
    function: Any, shapes: tuple[tuple[int, ...], ...], microseconds: float
) -> None:
    assert multiplied(function, *shapes) == pytest.approx(microseconds * 1e-6, rel=0.05)
    gpu = Machine.of(parse_mesh("1x8"), parse_target("gpu:h100-sxm:8"))
    assert multiplied(function, *shapes, machine=gpu) < microseconds * 1e-6 / 2


# Microseconds by the TPU compiler's cycles for v5e: the norms of Llama 3 8B, Gemma 2B and Phi 3,
# and the loss over an eighth of Gemma's vocabulary.
@pytest.mark.parametrize(
    ("shape", "microseconds"),
    [
        ((8, 512, 4096), 157),
        ((8, 512, 2048), 79.6),
        ((4, 512, 3072), 60.7),
        ((8, 512, 32000), 1221),
    ],
)
def test_sums_along_rows_take_what_the_compiler_says(
    shape: tuple[int, ...], microseconds: float
) -> None:
    program = program_of(lambda x: jnp.sum(x, axis=-1), shape, dtype="bfloat16")
    (op,) = (op for op in program.ops if op.kind == "reduction")
    seconds = price_op(op, ((WHOLE,), (WHOLE,)), MACHINE).compute_seconds
    assert seconds * 1e6 == pytest.approx(microseconds, rel=0.03)


def test_maxima_of_what_a_matmul_makes_are_found_as_it_writes() -> None:
    program = program_of(lambda x, w: jnp.max(x @ w, axis=-1), (512, 256), (256, 4096))
    (op,) = (op for op in program.ops if op.kind == "reduction")
    assert price_op(op, ((WHOLE,), (WHOLE,)), MACHINE).compute_seconds == 0.0


def test_a_device_with_one_row_of_several_does_without_the_matrix_unit() -> None:
    (op,) = program_of(jnp.matmul, (8, 4096), (4096, 14_336), dtype="bfloat16").ops
    one, all_rows = (
        price_op(op, ((dim,), (WHOLE,), (dim,)), MACHINE).compute_seconds for dim in (0, WHOLE)
    )
    assert one > 2 * all_rows


def stream(x: Any, a: Any, b: Any) -> Any:
    first = x @ a
    total = first + first @ b
    return total @ a + total @ b


@pytest.mark.parametrize(("parts", "dim"), [(1, WHOLE), (8, 0)])
def test_the_sum_of_a_stream_takes_a_third_of_its_norm(parts: int, dim: int) -> None:
    program = program_of(stream, *[(4096, 4096)] * 3)
    assert [op.addends for op in program.ops] == [(), (2,), (), ()]
    second = program.ops[1]
    with_sum, without = (
        price_op(op, ((dim,), (WHOLE,), (dim,)), MACHINE).compute_seconds
        for op in (second, replace(second, addends=()))
    )
    norm = matrix_seconds(4096 * 4096 / parts, MACHINE)
    assert with_sum - without == pytest.approx(norm / 3)
    three = price_op(replace(second, addends=(3,)), ((dim,), (WHOLE,), (dim,)), MACHINE)
    assert three.compute_seconds - without == pytest.approx(norm / 2)


def test_ops_that_look_alike_are_charged_their_own_sums() -> None:
    program = program_of(stream, *[(4096, 4096)] * 3)
    cost = StepPricer(program, MACHINE).price(((WHOLE,),) * len(program.groups))
    alone = [price_op(op, ((WHOLE,),) * 3, MACHINE).compute_seconds for op in program.ops]
    assert alone[1] > alone[0] == alone[2] == alone[3]
    assert cost.compute_seconds == pytest.approx(sum(alone), rel=0.01)


def no_stream(function: Any) -> bool:
    program: Program = program_of(function, *[(64, 64)] * 3)
    return all(op.addends == () for op in program.ops)


def test_a_sum_that_is_read_once_is_fused_into_its_reader() -> None:
    assert no_stream(lambda x, a, b: (x @ a + x @ b) @ a)


def test_experts_of_which_something_else_reads_are_not_summed_as_they_are_made() -> None:
    def both(x: Any, w: Any, v: Any) -> Any:
        made = jnp.einsum("eti,eih->eth", x, w)
        return jnp.einsum("eth,ehm->etm", made, v), made.sum(0)

    def largest(x: Any, w: Any, v: Any) -> Any:
        return jnp.einsum("eti,eih->eth", x, w).max(0) @ v[0]

    for function in (both, largest):
        program = program_of(function, *[(8, 64, 64)] * 3)
        assert all(op.summed_batch is None for op in program.ops)


def test_terms_that_are_made_of_the_same_are_no_sum_of_a_stream() -> None:
    def gated(x: Any, a: Any, b: Any) -> Any:
        first, second = x @ a, x @ b
        mixed = first * second + jnp.tanh(first) * second
        return mixed @ a + mixed @ b

    assert no_stream(gated)


@pytest.mark.parametrize(("dtype", "itemsize"), [("bfloat16", 2), ("float32", 4)])
def test_what_a_matmul_of_float32_reads_is_rounded_before_it_is_moved(
    dtype: str, itemsize: int
) -> None:
    op = program_of(lambda x, w: x @ w, (512, 1024), (1024, 256), dtype=dtype).ops[0]
    as_partitioned = replace(MACHINE, as_partitioned=True)
    for machine, moved in ((MACHINE, 2), (as_partitioned, itemsize)):
        (gathered,) = price_op(op, ((0,), (1,), (0,)), machine).transfers
        assert (gathered.kind, gathered.n_bytes) == ("all-gather", 1024 * 256 * moved)
    summed = price_op(op, ((1,), (0,), (WHOLE,)), MACHINE).transfers
    assert [one.n_bytes for one in summed] == [512 * 256 * itemsize]


def convolve(x: Any, kernel: Any) -> Any:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize(("channels", "slowdown"), [(2048, 1), (1024, 1), (256, 4), (64, 8)])
def test_a_convolution_whose_kernel_goes_round_takes_slices_of_its_channels(
    channels: int, slowdown: int
) -> None:
    """Slices of an eighth, on a matrix unit of 128 x 128."""
    op = program_of(convolve, (64, 14, 14, channels), (3, 3, channels, channels)).ops[0]
    assert op.is_convolution and op.window == 9
    image, rows, columns = (0,), (2,), (3,)
    whole, *split = (
        price_op(op, (image, kernel, image), MACHINE).compute_seconds
        for kernel in ((WHOLE,), rows, columns)
    )
    assert split == pytest.approx([slowdown * whole] * 2)


@pytest.mark.parametrize("n_groups", [2, 4])
def test_a_convolution_in_groups_takes_its_share_of_the_plain_one(n_groups: int) -> None:
    def grouped(x: Any, kernel: Any) -> Any:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=n_groups,
        )

    kernel = (3, 3, 512 // n_groups, 512)
    op = program_of(grouped, (64, 32, 32, 512), kernel).ops[0]
    plain = program_of(convolve, (64, 32, 32, 512), (3, 3, 512, 512)).ops[0]
    around = ((0,), (WHOLE,), (0,))
    share, whole = (price_op(one, around, MACHINE).compute_seconds for one in (op, plain))
    assert share == pytest.approx(whole / n_groups, rel=0.1)
    assert price_op(op, around, MACHINE).transfers == ()


def test_what_is_permuted_first_is_gathered_from_where_it_lies_then() -> None:
    machine = Machine.of(parse_mesh("4x4"), parse_target("tpu:v5e:4x4"))
    op = program_of(lambda x, w: x @ w, (16_384, 4096), (4096, 16_384), dtype="bfloat16").ops[0]
    made = replace(op, operands=(replace(op.operands[0], is_held=False), op.operands[1]))
    cost = price_op(made, ((0, WHOLE), (1, WHOLE), (1, WHOLE)), machine)
    kinds = [(one.kind, one.alone_seconds) for one in cost.transfers]
    assert ("collective-permute", 0.0) in kinds
    # Rows are gathered, of which the product is written piece by piece where it belongs.
    assert ("all-gather", 0.0) in kinds


def test_experts_that_are_summed_as_they_are_made_take_longer() -> None:
    def experts(x: Any, w: Any, weights: Any) -> Any:
        return (jnp.einsum("eti,eih->eth", x, w) * weights[:, :, None]).sum(0)

    op = program_of(experts, (8, 4096, 1024), (8, 1024, 4096), (8, 4096)).ops[0]
    assert op.summed_batch is not None and op.factor_sizes[op.summed_batch] == 8
    expert, token, inner = (
        result_dims(op, operand, dim) for operand, dim in ((0, 0), (0, 1), (0, 2))
    )
    for layouts, slowdown in (
        (token, _SUMMED_BATCH),
        (expert, 1),  # of one expert there is nothing to sum but over devices
        (inner, 1),  # and what is summed over devices first is not summed as it is made
    ):
        with_sum, without = (
            price_op(one, layouts, MACHINE).compute_seconds
            for one in (op, replace(op, summed_batch=None))
        )
        assert with_sum == pytest.approx(slowdown * without)


def result_dims(op: Op, operand: int, dim: int) -> tuple[tuple[int], ...]:
    """The layouts that split the factor of this dimension wherever it occurs."""
    factor = op.operands[operand].factors[dim]
    return tuple(
        (array.factors.index(factor),) if factor in array.factors else (WHOLE,)
        for array in op.arrays
    )


def test_sums_over_one_axis_after_the_other_are_one_over_both() -> None:
    gradient = program_of(lambda x, y: jnp.einsum("bsd,bsv->dv", x, y), (8, 512, 256), (8, 512, 64))
    split, whole = (0, 1), (WHOLE, WHOLE)
    machine = Machine.of(parse_mesh("2x4"), TARGET)
    (folded,) = price_op(gradient.ops[0], (split, split, whole), machine).transfers
    assert (folded.kind, folded.axis) == ("all-reduce", machine.all_axes)
    as_partitioned = replace(machine, as_partitioned=True)
    first, second = price_op(gradient.ops[0], (split, split, whole), as_partitioned).transfers
    assert {first.axis, second.axis} == {0, 1}
    assert first.n_bytes == second.n_bytes == folded.n_bytes == 256 * 64 * 4
    assert folded.seconds < first.seconds + second.seconds


@pytest.mark.parametrize(("rows", "kind"), [(1, "all-to-all"), (2, "reduce-scatter")])
def test_of_a_single_row_the_matrix_is_dealt_out_again(rows: int, kind: str) -> None:
    (op,) = program_of(jnp.matmul, (rows, 4096), (4096, 8192), dtype="bfloat16").ops
    # of one row there is no dimension; the contracting one is split, and the columns are wanted so
    contracting, columns = (0, 0) if rows == 1 else (1, 1)
    (transfer,) = price_op(op, ((contracting,), (0,), (columns,)), MACHINE).transfers
    matrix, sums = 4096 * 8192 * 2 // 8, rows * 8192 * 2
    assert (transfer.kind, transfer.n_bytes) == (kind, matrix if rows == 1 else sums)


def test_sums_over_two_of_three_axes_are_one_over_these() -> None:
    gradient = program_of(lambda x, y: jnp.einsum("bsd,bsv->dv", x, y), (8, 512, 256), (8, 512, 64))
    split, whole = (0, WHOLE, 1), (WHOLE, WHOLE, WHOLE)
    machine = Machine.of(parse_mesh("2x2x2", ["data", "seq", "model"]), TARGET)
    (folded,) = price_op(gradient.ops[0], (split, split, whole), machine).transfers
    assert machine.groups[folded.axis] == (0, 2)
    assert machine.links[folded.axis].size == 4


def test_a_dimension_is_gathered_while_those_before_are_still_split() -> None:
    # XLA's partitioner on a 2x4 mesh: f32[128, 512] by groups of 4, then f32[256, 512] by pairs.
    product = program_of(lambda x, w: x @ w, (8, 16, 256), (256, 512))
    machine = Machine.of(parse_mesh("2x4"), TARGET)
    rows = (0, 1)
    moved = price_op(product.ops[0], (rows, (0, 1), rows), machine).transfers
    assert [(one.kind, one.axis, one.n_bytes) for one in moved] == [
        ("all-gather", 1, 128 * 512 * 2),  # float32 is rounded to bfloat16 before
        ("all-gather", 0, 256 * 512 * 2),
    ]


@pytest.mark.parametrize(("dtype", "peak"), [("bfloat16", 989e12), ("float32", 494e12)])
def test_a_gpu_multiplies_float32_as_such_in_a_model_of_another_dtype(
    dtype: str, peak: float
) -> None:
    product = program_of(lambda x, w: x @ w, (8192, 8192), (8192, 8192), dtype=dtype)
    machine = Machine.of(parse_mesh("1x8"), parse_target("gpu:h100-sxm:8"))
    seconds = price_op(product.ops[0], ((0,), (WHOLE,), (0,)), machine).compute_seconds
    assert seconds == pytest.approx(2 * 8192**3 / 8 / peak, rel=0.5)
    assert seconds > 2 * 8192**3 / 8 / peak


@pytest.mark.parametrize(("split", "pieces"), [(True, 8), (False, 1)])
def test_a_matmul_is_done_piece_by_piece_where_its_other_operand_is_split(
    split: bool, pieces: int
) -> None:
    # 1 GiB of logits; the hidden states come split on what is contracted.
    shapes = (8, 512, 2048), (131_072, 2048)
    program = program_of(lambda x, w: jnp.tanh(x) @ w.T, *shapes, dtype="bfloat16", for_tpu=True)
    (matmul,) = [op for op in program.ops if op.kind == "contraction"]
    machine = Machine.of(parse_mesh("1x8"), TARGET)
    vocabulary = program.arguments[1].dims[0] if split else WHOLE
    layouts = ((2,), (vocabulary,), (2,))
    (gather,) = price_op(matmul, layouts, machine).transfers
    assert (gather.kind, gather.operand, gather.pieces) == ("all-gather", 0, pieces)


@pytest.mark.parametrize(
    ("columns", "split", "pieces"),
    [
        (10_240, 1, 8),  # more than the 2,560 that are gathered
        (2_560, 1, 1),  # no more
        (10_240, 0, 1),  # of rows only large matmuls are done so
    ],
)
def test_a_small_matmul_is_done_piece_by_piece_along_what_is_contracted(
    columns: int, split: int, pieces: int
) -> None:
    shapes = (4096, 2560), (2560, columns)
    program = program_of(lambda x, w: jnp.tanh(x) @ w, *shapes, dtype="bfloat16")
    (gather,) = price_op(program.ops[-1], ((split,), (1,), (1,)), MACHINE).transfers
    assert (gather.kind, gather.pieces) == ("all-gather", pieces)
    # four kernels, for the result stays in the vector memory
    assert gather.alone_seconds == pytest.approx(4 * KERNEL_SECONDS if pieces > 1 else 0.0)
    for target in ("tpu:v3:2x2", "gpu:h100-sxm:8"):
        plain = Machine.of(parse_mesh("1x8"), parse_target(target))
        assert price_op(program.ops[-1], ((split,), (1,), (1,)), plain).transfers[0].pieces == 1


@pytest.mark.parametrize(
    ("hidden", "columns", "turned"),
    [
        (3584, 18_944, True),  # lies as [2368, 3584], of which slices of 448 cut tiles
        (4096, 18_944, False),  # slices of 512
        (3584, 16_384, False),  # lies as it is, for 2048 fills tiles
    ],
)
def test_a_weight_is_turned_round_where_a_ring_cuts_its_tiles(
    hidden: int, columns: int, turned: bool
) -> None:
    shapes = (8, hidden), (hidden, columns)
    program = program_of(lambda x, w: jnp.tanh(x) @ w, *shapes, dtype="bfloat16")
    (gather,) = price_op(program.ops[-1], ((1,), (1,), (1,)), MACHINE).transfers
    n_tiles = hidden * round_up(columns // 8, 128) / 1024
    seconds = n_tiles * 11 / CHIP.clock_hz if turned else 0.0
    assert gather.alone_seconds == pytest.approx(4 * KERNEL_SECONDS + seconds)


# Compiled for each, with 8 to 4,096 rows: neither these nor the columns make a difference.
@pytest.mark.parametrize(
    ("target", "n", "longest", "shortest"),
    [
        ("tpu:v5e:2x4", 8, 4096, 4224),
        ("tpu:v5e:2x2", 4, 4160, 4224),
        ("tpu:v5e:1x2", 2, 65_536, None),
        ("tpu:v6e:2x4", 8, 9728, 9856),
        ("tpu:v6e:2x2", 4, 9792, 9856),
        ("tpu:v5p:2x2x2", 8, 65_536, None),
    ],
)
@pytest.mark.parametrize("rows", [8, 4096])
def test_sums_of_long_contractions_go_round_in_a_ring(
    target: str, n: int, longest: int, shortest: int | None, rows: int
) -> None:
    machine = Machine.of(parse_mesh(f"1x{n}"), parse_target(target))

    def is_ring(contracted: int) -> bool:
        shapes = (rows, contracted), (contracted, 4096)
        (op,) = program_of(lambda x, w: x @ w, *shapes, dtype="bfloat16").ops
        (sums,) = price_op(op, ((1,), (0,), (1,)), machine).transfers
        return sums.in_ring

    assert not is_ring(longest)
    assert shortest is None or is_ring(shortest)


def test_a_small_ring_takes_its_kernels() -> None:
    program = program_of(lambda x, w: jnp.tanh(x) @ w, (8, 14_336), (14_336, 4096))
    (scatter,) = price_op(program.ops[-1], ((1,), (0,), (1,)), MACHINE).transfers
    assert (scatter.kind, scatter.in_ring) == ("reduce-scatter", True)
    # 23 us by the compiler where the plain matmul takes 4
    assert scatter.memory_seconds == pytest.approx(12 * KERNEL_SECONDS)


@pytest.mark.parametrize(("hidden", "turned"), [(3584, True), (4096, False)])
def test_a_weight_is_turned_round_where_a_ring_of_sums_cuts_its_tiles(
    hidden: int, turned: bool
) -> None:
    shapes = (8, 37_888), (37_888, hidden)
    program = program_of(lambda x, w: jnp.tanh(x) @ w, *shapes, dtype="bfloat16")
    (scatter,) = price_op(program.ops[-1], ((1,), (0,), (1,)), MACHINE).transfers
    assert scatter.in_ring
    seconds = round_up(37_888 // 8, 128) * hidden / 1024 * 11 / CHIP.clock_hz if turned else 0.0
    assert scatter.memory_seconds == pytest.approx(12 * KERNEL_SECONDS + seconds)


def test_two_contracted_dimensions_are_gathered_at_once() -> None:
    shapes = (8, 16, 64), (16, 64, 8192)
    program = program_of(lambda x, w: jnp.einsum("bnh,nhd->bd", jnp.tanh(x), w), *shapes)
    (gather,) = price_op(program.ops[-1], ((1,), (2,), (1,)), MACHINE).transfers
    assert (gather.kind, gather.pieces) == ("all-gather", 1)
