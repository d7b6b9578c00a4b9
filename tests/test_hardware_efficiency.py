"""What of the peak a matrix multiplication reaches, and what memory takes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoshard.hardware.chips import Chip, chip_names, get_chip, known_chips
from autoshard.hardware.efficiency import matmul_efficiency, memory_seconds

sizes = st.integers(1, 8192)


def test_a_large_multiplication_reaches_the_maximum_less_the_overhead() -> None:
    # v5e, 4096^3: 2 x 4096^3 / 197e12 = 697.7 us; / 0.98 + 2.5 us = 714.4 us.
    found = matmul_efficiency(get_chip("tpu:v5e"), 4096, 4096, 4096)
    assert found == pytest.approx(697.66 / 714.39, rel=1e-4)


def test_a_contracting_dimension_under_a_tile_wastes_the_rest_of_it() -> None:
    # 64 of 128 rows of the array hold weights: the same time as 128, for half the work.
    v5e = get_chip("tpu:v5e")
    half = matmul_efficiency(v5e, 4096, 64, 4096)
    assert half == pytest.approx(matmul_efficiency(v5e, 4096, 128, 4096) / 2)


def test_the_shorter_of_rows_and_columns_streams_and_wastes_nothing() -> None:
    # The compiler turns a 3072 x 64 weight around: 10.6 us for 4096 rows where 128 columns take
    # 19.3; the formula says 8.18 / 0.98 + 2.5 = 10.8 and 16.35 / 0.98 + 2.5 = 19.2.
    v5e = get_chip("tpu:v5e")
    taken = {
        n: 2 * 4096 * 3072 * n / 197e12 / matmul_efficiency(v5e, 4096, 3072, n) for n in (64, 128)
    }
    assert taken[64] == pytest.approx(10.6e-6, rel=0.05)
    assert taken[128] == pytest.approx(19.3e-6, rel=0.05)


@pytest.mark.parametrize(
    ("name", "size", "cycles", "tolerance"),
    [
        # What libtpu 0.0.42 estimated for square bf16 multiplications.
        ("tpu:v5e", 4096, 1067337, 0.02),
        ("tpu:v5e", 2048, 140166, 0.05),
        ("tpu:v6e", 4096, 286023, 0.05),
        ("tpu:v3", 4096, 2201438, 0.05),
        ("tpu:v3", 2048, 281952, 0.05),
        ("tpu:v5p", 4096, 544925, 0.1),
        ("tpu:tpu7x", 4096, 316312, 0.02),
    ],
)
def test_large_multiplications_take_the_cycles_that_the_compiler_estimates(
    name: str, size: int, cycles: int, tolerance: float
) -> None:
    chip = get_chip(name)
    assert chip.clock_hz is not None
    ideal = 2 * size**3 / chip.flops_per_second("bfloat16")
    taken = ideal / matmul_efficiency(chip, size, size, size)
    assert taken * chip.clock_hz == pytest.approx(cycles, rel=tolerance)


def test_a_large_elementwise_sum_takes_the_cycles_that_the_compiler_estimates() -> None:
    # Two arrays of 256 MiB read and one written: 2,978,214 cycles on v5e, 1,706,240 on v6e.
    for name, cycles in (("tpu:v5e", 2978214), ("tpu:v6e", 1706240), ("tpu:v3", 2977165)):
        chip = get_chip(name)
        assert chip.clock_hz is not None
        found = memory_seconds(chip, 2 * 2**28, 2**28) * chip.clock_hz
        assert found == pytest.approx(cycles, rel=0.06)


@pytest.mark.parametrize("chip", known_chips(), ids=chip_names())
@given(m=sizes, k=sizes, n=sizes)
def test_efficiency_is_a_fraction_and_rows_and_columns_are_alike(
    chip: Chip, m: int, k: int, n: int
) -> None:
    found = matmul_efficiency(chip, m, k, n)
    assert 0 < found < chip.matmul_efficiency_max
    assert found == matmul_efficiency(chip, n, k, m)


@given(size=st.integers(6, 12))
def test_halving_a_shard_never_makes_it_more_efficient(size: int) -> None:
    for chip in known_chips():
        whole = matmul_efficiency(chip, 4096, 2**size, 4096)
        assert matmul_efficiency(chip, 4096, 2 ** (size - 1), 4096) < whole
