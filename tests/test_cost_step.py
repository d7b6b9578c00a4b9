"""What a step costs under a layout, with bytes worked out by hand."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from test_graph_propagation import asked_whole, output_of
from test_graph_rules import program_of

from autoshard.cost.lifetimes import read_at_turn
from autoshard.cost.machine import Machine
from autoshard.cost.single_rows import matrix_seconds
from autoshard.cost.step import StepPricer
from autoshard.cost.strategies import price_op
from autoshard.cost.values import Memory, StepCost
from autoshard.graph.build import StepInput, build_program
from autoshard.graph.jaxpr import read_jaxpr
from autoshard.graph.program import WHOLE, Program
from autoshard.graph.propagation import Propagator, propagate
from autoshard.hardware.efficiency import memory_seconds
from autoshard.hardware.targets import parse_target
from autoshard.mesh import parse_mesh

TARGET = parse_target("tpu:v5e:2x4")
MESH = parse_mesh("1x8")
MACHINE = Machine.of(MESH, TARGET)


def cost_of(program: Program, *arguments: int) -> StepCost:
    """Price a program whose arguments split these dimensions over eight chips."""
    fixed = {
        argument.group: (dim,)
        for argument, dim in zip(program.arguments, arguments, strict=True)
        if argument.group is not None
    }
    layouts = propagate(program, fixed, (8,))
    return StepPricer(program, MACHINE).price(layouts)


def collectives(cost: StepCost) -> list[tuple[str, int]]:
    return [(traffic.kind, traffic.n_bytes) for traffic in cost.traffic]


def mlp(x, up, down):
    return jnp.tanh(x @ up) @ down


def test_a_megatron_mlp_pays_one_all_reduce_of_its_result() -> None:
    program = program_of(mlp, (64, 256), (256, 1024), (1024, 256))
    cost = cost_of(program, WHOLE, 1, 0)
    # the result is [64, 256] in float32: 65,536 bytes; an all-reduce passes 2 x 7/8 of them
    assert collectives(cost) == [("all-reduce", 65_536)]
    assert cost.collective_bytes == 2 * 7 * 65_536 // 8
    assert cost.blocking_seconds > 0
    assert cost.overlapped_seconds == 0


def test_the_same_mlp_split_on_the_contracting_dimensions_moves_the_hidden_array() -> None:
    program = program_of(mlp, (64, 256), (256, 1024), (1024, 256))
    cost = cost_of(program, WHOLE, 0, 1)
    # hidden [64, 1024] float32 = 262,144 bytes are partial sums; the result comes out split
    assert ("all-reduce", 262_144) in collectives(cost)


def test_a_whole_weight_is_cut_where_that_sums_less_than_would_be_gathered() -> None:
    # hidden [64, h] comes out split, the result [64, 256] is whole, 32,768 bytes
    for hidden, expected in ((1024, ("all-reduce", 32_768)), (256, ("all-gather", 32_768))):
        program = program_of(mlp, (64, 256), (256, hidden), (hidden, 256), dtype="bfloat16")
        assert collectives(cost_of(program, WHOLE, 1, WHOLE)) == [expected]


def test_an_array_that_two_matmuls_read_is_gathered_once() -> None:
    program = program_of(
        lambda x, a, b: (jnp.tanh(x) @ a) * (jnp.tanh(x) @ b), (64, 256), (256, 1024), (256, 1024)
    )
    gathers = [t for t in cost_of(program, 1, 1, 1).traffic if t.kind == "all-gather"]
    assert len(gathers) == 2  # tanh(x) is traced twice, so it is two arrays, each gathered once
    program = program_of(lambda x, a, b: (x @ a) * (x @ b), (64, 256), (256, 1024), (256, 1024))
    gathers = [t for t in cost_of(program, 1, 1, 1).traffic if t.kind == "all-gather"]
    assert [t.n_bytes for t in gathers] == [64 * 256 * 2]  # float32, rounded before it is moved


def test_a_gather_runs_beside_a_matmul_that_multiplies_the_shards() -> None:
    def both(x, w, a, b):
        hidden = jnp.tanh(x @ w)
        return hidden @ a, hidden @ b

    program = program_of(both, (4096, 1024), (1024, 2048), (2048, 1024), (2048, 1024))
    # rows of `a` are split: its matmul takes the hidden array as it lies; that of `b` gathers it
    beside = cost_of(program, WHOLE, 1, 0, 1)
    waiting = cost_of(program, WHOLE, 1, 1, 1)
    gathers = [[t for t in c.traffic if t.kind == "all-gather"] for c in (beside, waiting)]
    assert [[t.overlapped for t in found] for found in gathers] == [[True], [False]]
    assert beside.overlapped_seconds == gathers[0][0].seconds == gathers[1][0].seconds


def several(program: Program, count: int) -> Program:
    """Each op as often as many blocks run it."""
    return replace(program, ops=tuple(replace(op, count=count) for op in program.ops))


@pytest.mark.parametrize(
    ("width", "is_passed_on", "n_hidden"), [(1024, False, 20), (1024, True, 0), (8, False, 0)]
)
def test_gathers_run_beside_a_matmul_whose_sums_are_reduced(
    width: int, is_passed_on: bool, n_hidden: int
) -> None:
    def both(x, w, a, b):
        hidden = jnp.tanh(x @ w)
        made = hidden @ b
        halves = (made[:, 512:], made[:, :512])
        return hidden @ a, jnp.concatenate(halves, axis=1) if is_passed_on else made

    program = program_of(both, (4096, 1024), (1024, 2048), (2048, width), (2048, 1024))
    cost = cost_of(several(program, 20), WHOLE, 1, 0, 1)
    (reduced,) = [t for t in cost.traffic if t.kind == "all-reduce"]
    assert reduced.n_bytes == 4096 * width * 4
    gathers = [(t.overlapped, t.count) for t in cost.traffic if t.kind == "all-gather"]
    # Not where what waits is passed on along its columns, nor beside what is short as a router.
    assert gathers == [(n_hidden > 0, 20)]
    whole = sum(t.seconds * t.count for t in cost.traffic)
    assert cost.blocking_seconds + cost.overlapped_seconds == pytest.approx(whole)


def test_what_a_batch_of_matmuls_reads_is_gathered_early() -> None:
    def scores(x, keys, b):
        return jnp.einsum("bqd,bkd->bqk", x, jnp.tanh(keys)), x @ b

    program = program_of(scores, (8, 512, 64), (8, 512, 64), (64, 64), dtype="bfloat16")
    # the rows of the queries are split, as those of the keys are: those are gathered
    (gather,) = cost_of(program, 1, 1, WHOLE).traffic
    assert (gather.kind, gather.n_bytes) == ("all-gather", 8 * 512 * 64 * 2)
    assert gather.overlapped


def test_what_a_batch_of_matmuls_makes_is_waited_for() -> None:
    program = program_of(lambda x, y: jnp.einsum("bqd,bkd->bqk", x, y), (8, 1, 64), (8, 512, 64))
    (gather,) = price_op(program.ops[0], ((0,), (0,), (WHOLE,)), MACHINE).transfers
    assert (gather.kind, gather.operand, gather.overlapped) == ("all-gather", None, False)


@pytest.mark.parametrize("is_shifted", [False, True])
def test_no_gather_runs_beside_sums_that_are_scattered_along_what_is_shifted(
    is_shifted: bool,
) -> None:
    def both(x, w, a, b, bias):
        hidden = jnp.tanh(x @ w)
        made = hidden @ a + bias  # laid out as the bias
        halves = (made[:, 512:], made[:, :512])
        return jnp.concatenate(halves, axis=1) if is_shifted else made, hidden @ b

    shapes = ((4096, 1024), (1024, 2048), (2048, 1024), (2048, 1024), (4096, 1024))
    cost = cost_of(program_of(both, *shapes), WHOLE, 1, 0, 1, 1)
    (scattered,) = [t for t in cost.traffic if t.kind == "reduce-scatter"]
    (gather,) = [t for t in cost.traffic if t.kind == "all-gather"]
    assert scattered.n_bytes == 4096 * 1024 * 4
    assert gather.overlapped == (not is_shifted)


def test_partial_sums_that_are_added_are_reduced_once() -> None:
    program = program_of(
        lambda x, y, a, b: x @ a + y @ b, (64, 256), (64, 256), (256, 128), (256, 128)
    )
    cost = cost_of(program, 1, 1, 0, 0)
    assert collectives(cost) == [("all-reduce", 64 * 128 * 4)]


def test_nothing_split_moves_nothing_and_costs_eight_times_the_compute() -> None:
    program = program_of(mlp, (4096, 4096), (4096, 16384), (16384, 4096))
    whole = cost_of(program, WHOLE, WHOLE, WHOLE)
    split = cost_of(program, WHOLE, 1, 0)
    assert whole.traffic == ()
    assert 4 < whole.compute_seconds / split.compute_seconds <= 8.5


@pytest.mark.parametrize(
    ("target", "n", "of_rows", "of_contracted"),
    [
        ("tpu:v5e:1x2", 2, "plain", "plain"),
        ("tpu:v5e:2x2", 4, "plain", "rewritten"),
        ("tpu:v5e:2x4", 8, "rewritten", "looping"),
    ],
)
def test_a_large_matmul_takes_its_gathered_operand_apart(
    target: str, n: int, of_rows: str, of_contracted: str
) -> None:
    # the result is [8192, 65536] in bfloat16: 1 GiB, of which a device makes a part
    shapes = (8192, 1024), (1024, 65_536)
    program = program_of(lambda x, w: jnp.tanh(x) @ w, *shapes, dtype="bfloat16")
    machine = Machine.of(parse_mesh(f"1x{n}"), parse_target(target))
    pricer = StepPricer(program, machine)
    groups = [argument.group or 0 for argument in program.arguments]
    whole, rows, contracted = (
        pricer.price(propagate(program, dict(zip(groups, layouts, strict=True)), (n,)))
        for layouts in (((WHOLE,), (1,)), ((0,), (1,)), ((1,), (1,)))
    )
    chip, part = machine.chip, 2**30 / n
    steps = n // 2 + 1
    expected = {
        "plain": 0.0,  # the operand arrives in the vector memory
        "rewritten": (n - 1) * 2 * part / chip.hbm_bytes_per_second,
        "looping": steps * memory_seconds(chip, part, part) - whole.compute_seconds,
    }
    for cost, kind in ((rows, of_rows), (contracted, of_contracted)):
        assert [(t.kind, t.overlapped) for t in cost.traffic] == [("all-gather", n > 2)]
        more = cost.compute_seconds - whole.compute_seconds
        assert more == pytest.approx(expected[kind], rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(("n_rows", "is_written"), [(8192, False), (65_536, True)])
def test_what_is_gathered_is_written_unless_the_vector_memory_holds_it(
    n_rows: int, is_written: bool
) -> None:
    program = program_of(lambda x, w: x @ w, (n_rows, 1024), (1024, 64), dtype="bfloat16")
    (gather,) = (one for one in price_op(program.ops[0], ((1,), (1,), (1,)), MACHINE).transfers)
    assert gather.n_bytes == n_rows * 1024 * 2
    written = gather.n_bytes / MACHINE.chip.hbm_bytes_per_second
    assert gather.memory_seconds == (written if is_written else 0.0)


@pytest.mark.parametrize(("rows", "in_memory"), [(256, False), (65_536, True)])
def test_a_donated_weight_and_its_gradient_are_counted_as_shards(
    rows: int, in_memory: bool
) -> None:
    def step(w, x):
        return w - jax.grad(lambda v: (jnp.tanh(x @ v) ** 2).sum())(w)

    structs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, 8192), (64, rows))]
    closed = jax.make_jaxpr(step)(*structs)
    inputs = [
        StepInput(role="weight", family="w", trainable=True),
        StepInput(role="data", family=None),
    ]
    program = build_program(read_jaxpr(closed), inputs, [0])
    cost = cost_of(program, 1, WHOLE)
    assert cost.memory.weights == rows * 8192 * 4 / 8
    assert cost.memory.activations >= 0
    # 1 MiB finds place in the vector memory, 256 MiB do not.
    assert cost.memory.gradients == (cost.memory.weights if in_memory else 0)
    assert cost.memory.optimizer == 0


def test_step_time_hides_collectives_behind_compute() -> None:
    cost = StepCost(
        compute_seconds=3.0,
        blocking_seconds=2.0,
        overlapped_seconds=4.0,
        traffic=(),
        memory=Memory(),
    )
    assert cost.step_seconds == pytest.approx(3.0 + 2.0 + (4.0 - 3.0))


@pytest.mark.parametrize(("spec", "kinds"), [(WHOLE, []), (1, ["all-gather"])])
def test_what_a_rule_asks_of_a_result_is_moved_once(spec: int, kinds: list[str]) -> None:
    # Asked to be whole behind a bias, and added to what is split by columns.
    program, layouts, apart = asked_whole(spec, as_made=False)
    machine = replace(MACHINE, as_partitioned=True)
    moved = StepPricer(program, machine).price(layouts, apart).traffic
    assert [traffic.kind for traffic in moved if traffic.n_bytes == 8 * 32 * 4] == kinds


def test_maxima_of_what_is_summed_across_devices_are_found_afterwards() -> None:
    # Logits [1024, 4096] of the vocabulary, a device's eighth of the contracted dimension each.
    shapes = (1024, 256), (256, 4096)
    largest = program_of(lambda x, w: jnp.max(x @ w, axis=-1), *shapes, dtype="bfloat16")
    added = program_of(lambda x, w: x @ w, *shapes, dtype="bfloat16")
    read = {"is_returned": False, "is_brief": True}  # as in the other
    added = replace(added, ops=tuple(replace(op, **read) for op in added.ops))
    summed, alone = (cost_of(program, 1, 0) for program in (largest, added))
    found = matrix_seconds(2 * 1024 * 4096, MACHINE)
    assert summed.compute_seconds - alone.compute_seconds == pytest.approx(found, rel=1e-4)
    assert cost_of(largest, WHOLE, 1).compute_seconds < found


@pytest.mark.parametrize("splits_hidden", [True, False])
def test_the_last_weight_is_gathered_once_and_early_only_beside_no_other_axis(
    splits_hidden: bool,
) -> None:
    def loss(x, up, down, last):
        return ((x @ up @ down @ last) ** 2).sum()

    shapes = (512, 256), (256, 1024), (1024, 256), (256, 2048)
    program = program_of(jax.grad(loss, argnums=(1, 2, 3)), *shapes, dtype="bfloat16")
    machine = Machine.of(parse_mesh("4x2"), parse_target("tpu:v5e:2x4"))
    x, up, down, last = (argument.group for argument in program.arguments)
    fixed = {x: (0, WHOLE), up: (WHOLE, WHOLE), down: (WHOLE, WHOLE), last: (0, WHOLE)}
    if splits_hidden:
        fixed |= {up: (WHOLE, 1), down: (WHOLE, 0)}
    traffic = StepPricer(program, machine).price(propagate(program, fixed, (4, 2))).traffic
    n_bytes = 256 * 2048 * 2
    gathers = [one for one in traffic if (one.kind, one.n_bytes) == ("all-gather", n_bytes)]
    assert [(one.axis, one.overlapped) for one in gathers] == [("batch", not splits_hidden)]


def test_what_is_torn_and_reads_what_a_rule_asks_for_pays_once() -> None:
    def gated(x, w, y, u, a, b, t):
        first = x @ w
        return first + y @ u, (a @ b) * (first @ t)

    program = program_of(gated, (8, 16), (16, 32), (8, 16), (16, 32), (8, 16), (16, 32), (32, 32))
    x, w, y, u, a, b, t = (argument.group for argument in program.arguments)
    fixed = {**dict.fromkeys((x, w, y, b), (WHOLE,)), u: (1,), a: (0,), t: (1,)}
    propagator = Propagator(program, (8,))
    layouts = propagator.propagate(fixed, [(output_of(program, 0), (WHOLE,))])
    apart = propagator.apart
    ((torn, own),) = apart.torn.items()
    assert own == apart.around[torn][-1] == (1,)
    moved = StepPricer(program, MACHINE).price(layouts, apart).traffic
    assert [(one.kind, one.n_bytes) for one in moved] == [("all-to-all", 8 * 32 * 4 // 8)]


@pytest.mark.parametrize("trained", [0, 1])
def test_nothing_runs_beside_the_first_gather_of_the_backward_half_but_a_gradient(
    trained: int,
) -> None:
    def step(x, w):
        gradients = jax.grad(lambda x, w: (jnp.tanh(x @ w) ** 2).sum(), argnums=(0, 1))(x, w)
        return gradients[: trained + 1]

    ops = program_of(step, (64, 2048, 256), (256, 1024)).ops
    (first, *_) = [op for op in ops if op.kind == "contraction" and op.backward]
    made = {array.identity for array in first.operands if not array.is_held}
    assert made
    assert read_at_turn(ops) == (set() if trained else made)
