"""What a decoding step carries from token to token, and how it grows with the blocks."""

import math

import pytest

from autoshard.graph.program import Argument
from autoshard.model.build import build
from autoshard.model.fold import fold
from autoshard.model.step import make_step
from autoshard.model.workload import Workload
from autoshard.planning import make_program

DECODE = Workload(kind="decode", batch=2, seq_len=64)


def caches(preset: str) -> list[Argument]:
    program = make_program(fold(build(preset), periods=2), DECODE)
    return [argument for argument in program.arguments if argument.role == "cache"]


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
