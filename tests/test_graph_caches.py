"""What a decoding step carries from token to token, and how it grows with the blocks."""

import math

import pytest

from autoshard.cost.machine import Machine
from autoshard.cost.step import StepPricer
from autoshard.graph.program import WHOLE, Argument, Op, Program
from autoshard.hardware.targets import parse_target
from autoshard.mesh import parse_mesh
from autoshard.model.build import build
from autoshard.model.fold import fold
from autoshard.model.step import make_step
from autoshard.model.workload import Workload
from autoshard.planner.tracing import make_program

DECODE = Workload(kind="decode", batch=2, seq_len=64)


def decoding(preset: str, periods: int | None = 2) -> Program:
    return make_program(fold(build(preset), periods=periods), DECODE)


def caches(preset: str) -> list[Argument]:
    return [argument for argument in decoding(preset).arguments if argument.role == "cache"]


def moves(program: Program, name: str) -> list[Op]:
    """The ops of a primitive that move caches: queries and keys alone are not as large."""
    found = [op for op in program.ops if op.primitive == name]
    return [op for op in found if max(array.n_bytes for array in op.arrays) > 2**16]


# One array for all blocks; with an encoder, that grows too; an array a block; two kinds of block.
@pytest.mark.parametrize(
    "preset", ["pali_gemma_3b_mix_224", "t5gemma_s_s_ul2", "gemma3_1b", "gemma2_2b_en"]
)
def test_the_caches_of_a_folded_copy_stand_for_those_of_the_whole_model(preset: str) -> None:
    whole = [a for a in make_step(build(preset), DECODE).arguments if a.role == "cache"]
    n_elements = sum(math.prod(argument.shape) for argument in whole)
    assert sum(math.prod(a.shape) * a.count for a in caches(preset)) == n_elements


def test_one_array_for_all_blocks_is_put_together_anew() -> None:
    (cache,) = caches("gemma2_2b_en")
    assert cache.is_rebuilt
    # Gemma 3 has an array for each block, which is written in its place.
    assert not any(cache.is_rebuilt for cache in caches("gemma3_1b"))


# One array for all blocks; beside it an encoder's, whose first block has a weight of its own.
@pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask")
@pytest.mark.parametrize("preset", ["gemma_2b_en", "t5_small_multi"])
def test_a_folded_copy_takes_the_time_of_the_whole_model(preset: str) -> None:
    machine = Machine.of(parse_mesh("1x8"), parse_target("tpu:v5e:2x4"))
    seconds = []
    for periods in (2, None):
        program = decoding(preset, periods)
        pricer = StepPricer(program, machine)
        seconds.append(pricer.price([(WHOLE,)] * len(program.groups)).compute_seconds)
    assert seconds[0] == pytest.approx(seconds[1], rel=1e-3)


def test_each_part_of_a_cache_is_cut_out_and_joined_once() -> None:
    program = decoding("gemma_2b_en")
    # Keys and values of a block: cut from the block's part, which is cut from the cache meanwhile.
    cut = moves(program, "slice")
    assert [op.is_fused for op in cut if not op.layer] == [True] * 2
    assert [op.count for op in cut if not op.is_fused] == [17, 17, 1, 1]
    assert all(op.is_fused for op in moves(program, "dynamic_update_slice"))
    # The block's part is joined as the cache is.
    joined = moves(program, "stack")
    assert [(op.is_fused, op.count) for op in joined if not op.layer] == [(False, 9)]
    assert all(op.is_fused for op in joined if op.layer)
