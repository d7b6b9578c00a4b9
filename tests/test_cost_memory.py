"""The peak of a step's memory, with bytes worked out by hand."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from test_cost_step import MACHINE, cost_of
from test_graph_rules import program_of

from autoshard.cost.lifetimes import alive, lifetimes
from autoshard.cost.machine import Machine
from autoshard.cost.memory import OpBytes
from autoshard.cost.step import StepPricer
from autoshard.graph.build import StepInput, build_program
from autoshard.graph.jaxpr import read_jaxpr
from autoshard.graph.program import WHOLE, Program
from autoshard.graph.propagation import propagate
from autoshard.hardware.efficiency import memory_seconds
from autoshard.hardware.targets import parse_target
from autoshard.mesh import parse_mesh

KIB = 1024


def chain(x: Any, a: Any, b: Any) -> Any:
    hidden = x @ a
    return jnp.tanh(hidden * jax.nn.sigmoid(hidden)) @ b


def test_a_fused_chain_keeps_what_it_is_made_of_until_it_is_read() -> None:
    program = program_of(chain, (64, 256), (256, 1024), (1024, 256))
    assert [op.kind for op in program.ops] == ["contraction", "contraction"]
    assert program.last_readers == (1, 1)


def test_a_sum_that_several_read_takes_the_place_of_the_last_addend() -> None:
    def stream(x: Any, a: Any, b: Any) -> Any:
        first = x @ a
        total = first + jnp.tanh(first) @ b
        return jnp.tanh(total @ a) + total @ b

    program = program_of(stream, (64, 64), (64, 64), (64, 64))
    # the first matmul's result dies in the sum, the second's lives on as the sum
    assert [op.kind for op in program.ops] == ["contraction"] * 4
    assert program.last_readers[:2] == (1, 3)


def test_alive_counts_both_ends() -> None:
    times = lifetimes(program_of(chain, (64, 256), (256, 1024), (1024, 256)))
    held = jnp.asarray([5.0, 7.0])
    assert alive(2, held, times.own, times.last_read).tolist() == [5.0, 12.0]


def test_small_arrays_live_on_the_chip_and_large_ones_do_not() -> None:
    small = program_of(chain, (64, 256), (256, 1024), (1024, 256))
    arguments = 4 * (64 * 256 + 2 * 256 * 1024)
    assert cost_of(small, WHOLE, WHOLE, WHOLE).memory.peak_bytes == arguments + 64 * KIB
    large = program_of(chain, (65_536, 256), (256, 1024), (1024, 256))
    hidden = 65_536 * 1024 * 4
    assert cost_of(large, WHOLE, WHOLE, WHOLE).memory.activations > hidden


def test_what_the_forward_half_leaves_to_the_backward_one_is_in_main_memory() -> None:
    def loss(x: Any, up: Any, down: Any) -> Any:
        return jnp.sum((jnp.tanh(x @ up) @ down) ** 2)

    weights = 4 * 2 * 256 * 1024
    shapes = (64, 256), (256, 1024), (1024, 256)
    forward, step = (program_of(f, *shapes) for f in (loss, jax.grad(loss, argnums=(1, 2))))
    for program, returned, crossing in ((forward, 4, 0), (step, weights, 4 * 64 * 1024)):
        assert lifetimes(program).may_be_on_chip.all() == (crossing == 0)
        there = 4 * 64 * 256 + weights + returned
        peak = cost_of(program, WHOLE, WHOLE, WHOLE).memory.peak_bytes
        assert there + crossing <= peak < there + 2 * crossing + 4 * 64 * 256


def test_a_weight_is_gathered_while_the_matmul_before_runs() -> None:
    def two(x: Any, a: Any, b: Any) -> Any:
        return jnp.tanh(x @ a) @ b

    program = program_of(two, (16_384, 4096), (4096, 8192), (8192, 4096))
    times = lifetimes(program)
    assert times.start.tolist() == [0, 1, 0, 1, 0, 0]
    # data split over the devices, both weights too: each is gathered, and both are there at once
    cost = cost_of(program, 0, 0, 0)
    assert [traffic.kind for traffic in cost.traffic] == ["all-gather"] * 2
    assert cost.memory.activations >= 2 * 4096 * 8192 * 2  # float32, rounded before they are moved


def test_what_fused_ops_make_for_a_matmul_is_written_on_a_gpu_and_kept_for_its_gradient() -> None:
    def loss(x: Any, a: Any, b: Any) -> Any:
        return jnp.sum(jnp.tanh(x @ a) @ b)

    program = program_of(jax.grad(loss, argnums=(1, 2)), (64, 256), (256, 1024), (1024, 256))
    second = [index for index, op in enumerate(program.ops) if op.kind == "contraction"][1]
    assert list(program.chained_operands)[0] == second
    ((hidden, chain),) = program.chained_operands[second].items()
    assert hidden in {array.identity for array in program.ops[second].operands}
    assert chain.follows_matmul
    assert chain.readers[0] == second
    assert all(program.ops[later].backward for later in chain.readers[1:])


def test_what_fused_ops_make_is_written_on_a_tpu_where_sums_go_round_in_a_ring() -> None:
    def loss(x: Any, a: Any, b: Any, c: Any, bias: Any) -> Any:
        return jnp.sum(((jnp.tanh(x @ a) * (x @ b)) @ c + bias) ** 2)

    program = program_of(
        jax.grad(loss, argnums=(1, 2, 3)),
        *((65_536, 512), (512, 8192), (512, 8192), (8192, 512), (65_536, 512)),
        dtype="bfloat16",
    )
    third = [index for index, op in enumerate(program.ops) if op.kind == "contraction"][2]
    ((_, made),) = program.chained_operands[third].items()
    assert made.follows_matmul and not made.takes_place
    ring, whole = (cost_of(program, WHOLE, 1, 1, 0, dim) for dim in (1, WHOLE))
    assert ("reduce-scatter", True) in {(one.kind, one.overlapped) for one in ring.traffic}
    assert "reduce-scatter" not in {one.kind for one in whole.traffic}
    # of [65,536, 8,192] in bfloat16 a device has an eighth
    n_bytes = 65_536 * 1024 * 2
    assert ring.memory.activations - whole.memory.activations > n_bytes / 2
    written = memory_seconds(MACHINE.chip, n_bytes, n_bytes)
    assert ring.compute_seconds - whole.compute_seconds > written * 0.99


def test_a_chain_takes_the_place_of_what_one_equation_reads() -> None:
    program = program_of(chain, (64, 256), (256, 1024), (1024, 256))
    ((_, made),) = program.chained_operands[1].items()
    assert made.readers == (1,)
    assert not made.takes_place  # two equations read its matmul
    plain = program_of(lambda x, a, b: jnp.tanh(x @ a) @ b, (64, 256), (256, 1024), (1024, 256))
    ((_, made),) = plain.chained_operands[1].items()
    assert made.takes_place


def test_a_cache_that_is_joined_from_parts_is_there_twice() -> None:
    def step(cache: Any, new: Any) -> Any:
        return jnp.stack([cache[:, block] + new for block in range(2)], axis=1)

    shape = (64, 2, 1024, 1024)
    structs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, (64, 1024, 1024))]
    inputs = [StepInput(role="cache", family=None), StepInput(role="data", family=None)]
    program = build_program(read_jaxpr(jax.make_jaxpr(step)(*structs)), inputs, [0])
    assert [argument.is_rebuilt for argument in program.arguments] == [True, False]
    memory = cost_of(program, WHOLE, WHOLE).memory
    assert memory.kv_cache == 4 * 64 * 2 * KIB**2
    assert memory.activations >= memory.kv_cache + 4 * 64 * KIB**2


def test_what_fused_ops_make_for_a_convolution_is_written() -> None:
    def convolutions(x: Any, a: Any, b: Any) -> Any:
        first = jax.lax.conv(x, a, (1, 1), "SAME")
        return jax.lax.conv(jnp.tanh(first), b, (1, 1), "SAME")

    def matmuls(x: Any, a: Any, b: Any) -> Any:
        first = jnp.einsum("bihw,oi->bohw", x, a)
        return jnp.einsum("bihw,oi->bohw", jnp.tanh(first), b)

    image, n_bytes = (64, 128, 112, 112), 4 * 64 * 128 * 112 * 112
    convolved, multiplied = (
        cost_of(program_of(function, image, *kernels), WHOLE, WHOLE, WHOLE).memory.activations
        for function, kernels in (
            (convolutions, [(128, 128, 1, 1)] * 2),
            (matmuls, [(128, 128)] * 2),
        )
    )
    assert convolved - multiplied == n_bytes


@pytest.mark.parametrize("count", [1, 3])
def test_what_is_updated_in_shards_and_gathered_is_held_to_the_end(count: int) -> None:
    def step(weight: Any, slot: Any, x: Any, y: Any) -> Any:
        slot = 0.9 * slot + x.T @ y
        return weight - slot, slot

    matrix, rows = (8192, 8192), (64, 8192)
    structs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (matrix, matrix, rows, rows)]
    roles = ("weight", "slot", "data", "data")
    inputs = [StepInput(role=role, family=None, count=count) for role in roles]
    closed = jax.make_jaxpr(step)(*structs)
    cost = cost_of(
        build_program(read_jaxpr(closed), inputs, [0, 1], lambda layer: count),
        WHOLE,
        WHOLE,
        1,
        WHOLE,
    )
    n_bytes = 4 * 8192**2
    assert [(one.kind, one.n_bytes) for one in cost.traffic] == [("all-gather", n_bytes)] * 2
    assert cost.memory.activations >= 2 * count * n_bytes


def updated(count: int) -> Program:
    """A step of two layers that stand for `count` each."""

    def loss(a: Any, b: Any, x: Any) -> Any:
        return jnp.sum(jnp.tanh(x @ a) @ b)

    def step(a: Any, b: Any, x: Any) -> Any:
        of_a, of_b = jax.grad(loss, argnums=(0, 1))(a, b, x)
        return a - of_a, b - of_b

    shapes = (4096, 16_384), (16_384, 4096), (512, 4096)
    structs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    inputs = [
        *(StepInput(role="weight", family=name, count=count, trainable=True) for name in "ab"),
        StepInput(role="data", family=None),
    ]
    closed = jax.make_jaxpr(step)(*structs)
    return build_program(read_jaxpr(closed), inputs, [0, 1], lambda layer: count, for_tpu=True)


def test_partial_sums_that_are_scattered_wait_for_the_end_of_the_backward_half() -> None:
    matrix = 2 * 4096 * 16_384
    # of the two layers the last one's gradient, the first to be made, is kept in any case
    for weight, waiting in ((0, 7 * matrix), (WHOLE, 0)):
        few, many = (cost_of(updated(count), weight, weight, 0).memory for count in (2, 9))
        assert many.gradients - few.gradients == waiting
    # no more of them than there is room for
    peak_bytes = cost_of(updated(200), 0, 0, 0).memory.peak_bytes
    assert 0 <= MACHINE.chip.hbm_bytes - peak_bytes <= 2  # what rounding loses


def test_only_the_tpu_compiler_puts_sums_off() -> None:
    program = updated(9)
    layouts = propagate(program, {a.group: (0,) for a in program.arguments}, (8,))
    machines = (MACHINE, replace(MACHINE, as_partitioned=True))
    tpu, other = (StepPricer(program, one).price(layouts).memory for one in machines)
    assert tpu.gradients - other.gradients > 7 * 2 * 4096 * 16_384


def test_a_weight_that_is_kept_from_the_forward_half_is_gathered_once() -> None:
    def loss(a: Any, b: Any, x: Any) -> Any:
        return jnp.sum(jnp.tanh(jnp.tanh(x @ a) @ b))

    shapes = (64, 16_384), (16_384, 4096), (65_536, 64)
    structs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    inputs = [StepInput(role=role, family=None) for role in ("weight", "weight", "data")]
    closed = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*structs)
    program = build_program(read_jaxpr(closed), inputs, [None] * 3, lambda layer: 1, for_tpu=True)
    ((first, again),) = lifetimes(program).gathered_again
    assert not program.ops[first].backward and program.ops[again].backward
    layouts = propagate(program, {0: (WHOLE,), 1: (0,), 2: (0,)}, (8,))
    pricer = StepPricer(program, MACHINE)
    gathers = [one for one in pricer.price(layouts).traffic if one.kind == "all-gather"]
    assert [one.n_bytes for one in gathers] == [2 * 16_384 * 4096]
    once = pricer._peak.peak(layouts, pricer._n_bytes).activations
    pricer._peak._lifetimes = replace(pricer._peak._lifetimes, gathered_again=())
    twice = pricer._peak.peak(layouts, pricer._n_bytes).activations
    assert twice - once == pytest.approx(1.06 * gathers[0].n_bytes, rel=1e-3)


def test_idle_room_is_added_to_training_on_tpus_alone() -> None:
    program = updated(1)
    layouts = propagate(program, {a.group: (WHOLE,) for a in program.arguments}, (8,))
    machines = (MACHINE, replace(MACHINE, as_partitioned=True))
    tpu, other = (StepPricer(program, one).price(layouts).memory for one in machines)
    held = sum(argument.n_bytes for argument in program.arguments)
    assert tpu.peak_bytes - held == pytest.approx(1.06 * (other.peak_bytes - held), rel=1e-3)


def working(program: Program, dims: list[tuple[int, ...]], mesh: str = "1x8") -> list[float]:
    """What each op needs beside operands and results: arguments and one matmul's result laid out.

    Dimensions are for each axis of a mesh.
    """
    machine = Machine.of(parse_mesh(mesh), parse_target("tpu:v5e:2x4"))
    matmul = next(op for op in program.ops if op.kind == "contraction")
    fixed = {matmul.results[0].group: dims[-1]}
    for argument, layout in zip(program.arguments, dims[:-1], strict=True):
        places = {WHOLE: WHOLE, **dict(enumerate(argument.dims))}
        fixed[argument.group] = tuple(places[dim] for dim in layout)
    pricer = StepPricer(program, machine)
    pricer.price(propagate(program, fixed, machine.axis_sizes))
    return pricer._n_bytes[:, OpBytes._fields.index("working")].tolist()


def test_sums_of_what_is_returned_are_there_before_they_are_scattered() -> None:
    # [65,536, 4,096] in bfloat16, summed over eight devices, each of which returns an eighth
    program = program_of(lambda x, w: x @ w, (65_536, 1024), (1024, 4096), dtype="bfloat16")
    assert working(program, [(1,), (0,), (0,)]) == [65_536 * 4096 * 2]


@pytest.mark.parametrize(("width", "is_turned"), [(8 * 320, True), (8 * 256, False)])
def test_a_ring_that_cuts_tiles_of_a_transposed_table_apart_copies_it(
    width: int, is_turned: bool
) -> None:
    def logits(x: Any, table: Any) -> Any:
        return (x * jnp.sum(x, axis=-1, keepdims=True)) @ table.T

    shapes = (8, 512, width), (262_144, width)
    program = program_of(logits, *shapes, dtype="bfloat16", for_tpu=True)
    # The ring makes its result in one place and writes it to another.
    result, shard = 8 * 512 * 262_144 * 2 // 8, 262_144 * width * 2 // 8
    assert working(program, [(2,), (0,), (2,)])[-1] == result + is_turned * shard
    assert working(program, [(WHOLE,), (0,), (2,)])[-1] == 0
    # Four pieces need no loop.
    few = working(program, [(WHOLE, 2), (WHOLE, 0), (WHOLE, 2)], mesh="2x4")
    assert few[-1] == 0


def test_a_transposed_table_that_is_gathered_itself_is_no_ring_s_weight() -> None:
    program = program_of(lambda x, t: x @ t.T, (8, 512, 2560), (262_144, 2560), dtype="bfloat16")
    assert working(program, [(0,), (1,), (0,)])[-1] < 262_144 * 2560 * 2


def test_a_matmul_beside_which_its_operand_is_gathered_again_leaves_what_it_sums() -> None:
    def loss(x: Any, w: Any) -> Any:
        return jnp.sum(jnp.tanh(jnp.tanh(x) @ w) ** 2)

    shapes = (32_768, 2048), (2048, 32_768)
    program = program_of(jax.grad(loss, argnums=1), *shapes, dtype="bfloat16")
    matmul = next(i for i, op in enumerate(program.ops) if op.kind == "contraction")
    # Rows of the data lie over the first axis, so do columns of the result, and the second is
    # summed over; or the rows stay where they are.
    columns = working(program, [(0, 1), (1, 0), (1, WHOLE)], mesh="2x4")
    rows = working(program, [(0, 1), (WHOLE, 0), (0, WHOLE)], mesh="2x4")
    assert (columns[matmul], rows[matmul]) == (32_768 * 16_384 * 2, 0)
    forward = program_of(lambda x, w: jnp.sum(jnp.tanh(x) @ w), *shapes, dtype="bfloat16")
    assert set(working(forward, [(0, 1), (1, 0), (1, WHOLE)], mesh="2x4")) == {0}
