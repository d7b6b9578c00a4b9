"""What looking rows up in a split table costs: turning it round, and bringing the rows home."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import pytest

from autoshard.cost.arguments import ArgumentPricer
from autoshard.cost.machine import Machine
from autoshard.cost.step import StepPricer
from autoshard.cost.strategies import price_op
from autoshard.cost.values import StepCost
from autoshard.graph.build import StepInput, build_program
from autoshard.graph.jaxpr import read_jaxpr
from autoshard.graph.program import WHOLE, Layout
from autoshard.graph.propagation import propagate
from autoshard.hardware.targets import parse_target
from autoshard.mesh import parse_mesh

ROWS = 65_536
IDS = (8, 512)


def looked_up(
    columns: int,
    table: Layout,
    ids: Layout,
    result: Layout,
    *,
    mesh: str = "1x8",
    target: str = "tpu:v5e:2x4",
    train: bool = False,
) -> StepCost:
    """A lookup of float32 rows; with `train` the step returns a table of the same layout."""

    def step(rows: jax.Array, where: jax.Array) -> tuple[jax.Array, ...]:
        found = jnp.take(rows, where, axis=0)
        return (rows * 2, found) if train else (found,)

    shapes = (
        jax.ShapeDtypeStruct((ROWS, columns), jnp.float32),
        jax.ShapeDtypeStruct(IDS, jnp.int32),
    )
    inputs = [
        StepInput(role="weight", family="table", trainable=train),
        StepInput(role="data", family=None),
    ]
    replaces: Sequence[int | None] = [0, None] if train else [None]
    program = build_program(read_jaxpr(jax.make_jaxpr(step)(*shapes)), inputs, replaces)
    machine = Machine.of(parse_mesh(mesh), parse_target(target))
    fixed = {program.arguments[0].group: table, program.arguments[1].group: ids}
    fixed |= {out.group: result for out in program.outputs}
    known = {group: layout for group, layout in fixed.items() if group is not None}
    layouts = propagate(program, known, machine.axis_sizes)
    return StepPricer(program, machine).price(layouts)


def updated(mesh: str, layouts: Sequence[Layout]) -> list[tuple[str, int]]:
    """What adding rows `[512, 256]` to a table moves: kind and bytes.

    Args:
        mesh: of 16 devices.
        layouts: of the table, the indices, the rows, the new table.
    """

    def step(table: jax.Array, where: jax.Array, new: jax.Array) -> jax.Array:
        return table.at[where].add(new)

    shapes = (
        jax.ShapeDtypeStruct((ROWS, 256), jnp.float32),
        jax.ShapeDtypeStruct((512,), jnp.int32),
        jax.ShapeDtypeStruct((512, 256), jnp.float32),
    )
    inputs = [StepInput(role="data", family=None) for _ in shapes]
    program = build_program(read_jaxpr(jax.make_jaxpr(step)(*shapes)), inputs, [None])
    axes = ("a", "b", "c")[: mesh.count("x") + 1]
    machine = Machine.of(parse_mesh(mesh, axes), parse_target("tpu:v5e:4x4"))
    (op,) = (op for op in program.ops if op.kind == "scatter")
    transfers = price_op(op, layouts, machine).transfers
    return [(f"{one.kind} {machine.links[one.axis].axis}", one.n_bytes) for one in transfers]


def compute_seconds(columns: int, target: str = "tpu:v5e:2x4", train: bool = False) -> float:
    cost = looked_up(columns, (1,), (WHOLE,), (2,), target=target, train=train)
    return cost.compute_seconds


def test_a_table_whose_shards_fill_no_lanes_is_turned_round() -> None:
    # 8 x 128 columns make shards of whole lanes; of 8 x 96 a TPU pads a quarter, and copies
    assert compute_seconds(8 * 96) > 2 * compute_seconds(8 * 128)


def test_a_table_that_is_trained_is_turned_back_too() -> None:
    once = compute_seconds(8 * 96) - compute_seconds(8 * 128) * 96 / 128
    extra = compute_seconds(8 * 96, train=True) - compute_seconds(8 * 128, train=True) * 96 / 128
    assert extra == pytest.approx(2 * once, rel=0.01)


def test_gpus_turn_no_table_round() -> None:
    narrow, wide = (compute_seconds(8 * n, target="gpu:h100-sxm:8") for n in (96, 128))
    assert narrow < wide


def moved(cost: StepCost) -> list[tuple[str, str, int]]:
    return [(traffic.kind, traffic.axis, traffic.n_bytes) for traffic in cost.traffic]


def test_a_sum_of_rows_split_on_the_columns_takes_a_detour_beside_split_data() -> None:
    cost = looked_up(3072, (WHOLE, 0), (0, WHOLE), (0, 2), mesh="2x4", target="gpu:h100-sxm:8")
    n_bytes = 8 * 512 * 3072 * 4
    assert moved(cost) == [
        ("reduce-scatter", "model", n_bytes // 2),
        ("all-to-all", "batch", n_bytes // 2),
        ("collective-permute", "batch", n_bytes // 8),
    ]


def test_a_sum_of_rows_split_on_the_sequence_is_only_permuted() -> None:
    cost = looked_up(3072, (WHOLE, 0), (0, WHOLE), (0, 1), mesh="2x4")
    # the indices are split along the sequence first, by propagation, and gathered again
    assert [kind for kind, *_ in moved(cost)] == [
        "all-gather",
        "reduce-scatter",
        "collective-permute",
    ]


def test_without_split_data_there_is_no_detour() -> None:
    cost = looked_up(3072, (0,), (WHOLE,), (2,))
    assert [kind for kind, *_ in moved(cost)] == ["reduce-scatter"]


@pytest.mark.parametrize(
    ("mesh", "target", "n_slices"),
    [("4x2", "tpu:v5e:2x4", 2), ("2x4", "tpu:v5e:2x4", 2), ("4x3", "cpu:12", 1)],
)
def test_idle_devices_take_a_slice_each_of_the_sums_of_a_table_split_like_the_data(
    mesh: str, target: str, n_slices: int
) -> None:
    split = (0, WHOLE)
    made = moved(looked_up(3072, split, split, split, mesh=mesh, target=target))
    n_bytes, n = 8 * 512 * 3072 * 4, int(mesh[0])
    sizes = {kind: size for kind, _, size in made}
    if n_slices == 1:
        assert sizes["reduce-scatter"] == n_bytes
    else:
        assert sizes["all-reduce"] == n_bytes // n_slices
        assert sizes["collective-permute"] == n_bytes // n


def test_a_row_of_one_number_is_looked_up() -> None:
    def step(rows: jax.Array, where: jax.Array) -> jax.Array:
        return jnp.take(rows, where, axis=0)

    shapes = jax.ShapeDtypeStruct((ROWS, 1), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    inputs = [StepInput(role="weight", family="table"), StepInput(role="data", family=None)]
    program = build_program(read_jaxpr(jax.make_jaxpr(step)(*shapes)), inputs, [None])
    machine = Machine.of(parse_mesh("1x8"), parse_target("tpu:v5e:2x4"))
    layouts = propagate(program, {program.arguments[0].group: (0,)}, machine.axis_sizes)
    assert StepPricer(program, machine).price(layouts).traffic == ()


TABLE = ROWS * 256 * 4
INDICES, NEW = 512 * 4, 512 * 256 * 4


@pytest.mark.parametrize("mesh", ["4x4", "4x2x2"])
def test_updates_in_slices_are_summed_over_every_axis_that_slices_them(mesh: str) -> None:
    split = (0, *[WHOLE] * mesh.count("x"))
    made = updated(mesh, [split] * 4)
    assert [n_bytes for _, n_bytes in made[:2]] == [INDICES // 4, NEW // 4]
    slicing = ("b", "c")[: mesh.count("x")]
    assert made[2:] == [(f"all-reduce {','.join(slicing)}", TABLE // 4)]


def test_a_table_is_summed_over_no_more_devices_than_have_slices() -> None:
    *_, (kind, n_bytes) = updated("2x8", [(0, WHOLE)] * 4)
    # pairs on an axis of eight: half of the table is moved a device, where all would move 7/8
    assert (kind, n_bytes) == ("all-reduce b", pytest.approx(TABLE / 2 * (1 / 2) / (7 / 8)))


@pytest.mark.parametrize(
    ("mesh", "gathered"), [("4x4", []), ("8x2", [("all-gather a", INDICES // 2)])]
)
def test_indices_alone_are_sliced_where_columns_lie_where_the_data_do(
    mesh: str, gathered: list[tuple[str, int]]
) -> None:
    columns, n = (1, WHOLE), int(mesh[0])
    assert updated(mesh, [columns, (0, WHOLE), columns, columns]) == [
        ("collective-permute a,b", INDICES // n),
        *gathered,
        ("all-reduce b", TABLE // n),
    ]


@pytest.mark.parametrize(("n_rows", "cycles"), [(2**16, 11), (2**20, 25)])
def test_a_tile_is_turned_round_faster_in_the_vector_memory(n_rows: int, cycles: int) -> None:
    def step(rows: jax.Array, where: jax.Array) -> jax.Array:
        return jnp.take(rows, where, axis=0)

    shapes = (
        jax.ShapeDtypeStruct((n_rows, 8 * 96), jnp.float32),
        jax.ShapeDtypeStruct(IDS, jnp.int32),
    )
    inputs = [StepInput(role="weight", family="table"), StepInput(role="data", family=None)]
    program = build_program(read_jaxpr(jax.make_jaxpr(step)(*shapes)), inputs, [None])
    machine = Machine.of(parse_mesh("1x8"), parse_target("tpu:v5e:2x4"))
    clock = machine.chip.clock_hz
    assert clock is not None
    # 96 columns fill one tile of 128 lanes, eight rows of it
    seconds = ArgumentPricer(program, machine).seconds(program.arguments[0], (1,), is_fused=False)
    assert seconds == pytest.approx(n_rows / 8 * cycles / clock)
