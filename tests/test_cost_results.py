"""Copies of logits that a TPU returns in another order; the cycles are the compiler's for v5e."""

import jax.numpy as jnp
import pytest
from test_graph_rules import program_of

from autoshard.cost.machine import Machine
from autoshard.cost.results import ResultCopies, copied_tiles
from autoshard.graph.program import WHOLE
from autoshard.hardware.targets import parse_target
from autoshard.mesh import parse_mesh

HIDDEN, VOCABULARY = 64, 50_257


def copies(target: str, batch: int = 8, seq_len: int = 512, vocabulary: int = VOCABULARY):
    """Of logits over eight devices, with the matmul that makes them."""
    program = program_of(
        lambda x, w: jnp.einsum("bsd,vd->bsv", x, w),
        (batch, seq_len, HIDDEN),
        (vocabulary, HIDDEN),
    )
    (op,) = program.ops
    return op, ResultCopies(program, Machine.of(parse_mesh("1x8"), parse_target(target)))


@pytest.mark.parametrize(
    ("shape", "cycles"),
    [
        ((8, 512, 50_257), 3_720_541),
        ((4, 512, 50_257), 2_879_509),
        ((2, 512, 50_257), 2_457_800),
        ((16, 512, 6_284), 939_048),
        ((8, 256, 50_257), 1_862_253),
        ((4, 128, 50_257), 721_003),
        ((24, 128, 30_001), 1_667_710),
    ],
)
def test_a_tile_takes_ten_cycles_and_one_a_row(shape: tuple[int, ...], cycles: int) -> None:
    tiles = copied_tiles(shape)
    assert tiles is not None
    n_tiles, rows = tiles
    assert n_tiles * (10 + rows) == pytest.approx(cycles, rel=0.04)


@pytest.mark.parametrize(
    "shape",
    [
        (8, 512, 50_304),  # fills tiles of 128
        (8, 512, 50_368),  # fills tiles of 8, turned round
        (8, 64, 50_257),  # 64 would fill half of 128
        (3, 512, 50_257),  # 3 would fill three quarters of 4
        (512, 50_257),  # no batch
        (2, 64, 112, 112),  # more dimensions
    ],
)
def test_what_needs_no_less_padding_otherwise_is_returned_as_it_is(shape: tuple[int, ...]) -> None:
    assert copied_tiles(shape) is None


def test_the_copy_is_of_one_device_s_share() -> None:
    op, found = copies("tpu:v5e:2x4")
    assert found.n_bytes(op, (WHOLE,)) == 4 * 8 * 512 * VOCABULARY
    assert found.n_bytes(op, (0,)) == 0  # a batch of one
    assert found.n_bytes(op, (1,)) == 0  # 64 tokens
    assert found.seconds(op, (WHOLE,)) > 0.0
    op, found = copies("tpu:v5e:2x4", vocabulary=8 * 6_284)
    assert found.n_bytes(op, (2,)) == 4 * 8 * 512 * 6_284


def test_other_chips_and_what_only_the_step_reads_copy_nothing() -> None:
    op, on_gpu = copies("gpu:h100-sxm:8")
    assert (on_gpu.n_bytes(op, (WHOLE,)), on_gpu.seconds(op, (WHOLE,))) == (0, 0.0)
    program = program_of(
        lambda x, w: jnp.einsum("bsd,vd->bsv", x, w).max(),
        (8, 512, HIDDEN),
        (VOCABULARY, HIDDEN),
    )
    on_tpu = ResultCopies(program, Machine.of(parse_mesh("1x8"), parse_target("tpu:v5e:2x4")))
    assert not any(on_tpu.n_bytes(each, (WHOLE,)) for each in program.ops)
