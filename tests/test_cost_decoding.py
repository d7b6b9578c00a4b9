"""A step of one token: weights fetched ahead, short kernels, few heads, halves joined."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import pytest
from test_cost_step import MACHINE
from test_graph_rules import program_of

from autoshard.cost.machine import Machine
from autoshard.cost.roofline import fetch_seconds
from autoshard.cost.step import StepPricer
from autoshard.cost.strategies import price_op
from autoshard.graph.program import WHOLE, Layout, Op
from autoshard.hardware.targets import parse_target
from autoshard.mesh import parse_mesh

CHIP = MACHINE.chip
KERNEL = 1.25e-6


def token(*widths: int) -> Any:
    """Rows of eight tokens through one matmul after the other."""

    def step(x: Any, *weights: Any) -> Any:
        for weight in weights:
            x = jnp.tanh(x @ weight)
        return x

    shapes = ((8, widths[0]), *zip(widths, widths[1:], strict=False))
    return program_of(step, *shapes, dtype="bfloat16")


def compute(program: Any, machine: Machine = MACHINE) -> float:
    layouts: list[Layout] = [(WHOLE,)] * len(program.groups)
    return StepPricer(program, machine).price(layouts).compute_seconds


def test_small_weights_are_fetched_behind_what_runs_before() -> None:
    # 4 MiB each: little to multiply, so that the step takes what fetching takes.
    program = token(*[2048, 1024] * 8)
    n_bytes = (15 * 2048 * 1024 + 8 * 2048) * 2  # the first rows are an argument too
    fetching = n_bytes / CHIP.hbm_bytes_per_second
    ops = sum(price_op(op, ((WHOLE,),) * 3, MACHINE).compute_seconds for op in program.ops)
    assert ops < fetching
    assert compute(program) == pytest.approx(fetching + 0.2 * ops**2 / fetching)
    # A larger one is read by the matmul itself, at what it reaches of the bandwidth; `x` is not.
    (op,) = token(8192, 8192).ops
    choice = (WHOLE,)
    assert fetch_seconds(op, choice, MACHINE) < 8 * 8192 * 4 / CHIP.hbm_bytes_per_second
    seconds = price_op(op, (choice,) * 3, MACHINE).compute_seconds
    assert seconds > 8192 * 8192 * 2 / CHIP.hbm_bytes_per_second


def test_what_runs_longer_hides_the_weights() -> None:
    def step(x: Any, weight: Any) -> Any:
        return jnp.sum(jnp.tanh(x @ weight), axis=-1)

    program = program_of(step, (4096, 1024), (1024, 1024), dtype="bfloat16")
    matmul, *others = (price_op(op, ((WHOLE,),) * len(op.arrays), MACHINE) for op in program.ops)
    assert matmul.fetch_seconds > 0
    alone = matmul.compute_seconds + sum(cost.compute_seconds for cost in others)
    fetching = matmul.fetch_seconds
    assert compute(program) == pytest.approx(alone + 0.2 * fetching**2 / alone)


@pytest.mark.parametrize("axis_size", [8, 4096])
def test_no_kernel_is_shorter_than_a_microsecond(axis_size: int) -> None:
    (op,) = (
        op
        for op in program_of(lambda x: jnp.sum(x, axis=-1), (8, axis_size)).ops
        if op.kind == "reduction"
    )
    seconds = price_op(op, ((WHOLE,),) * 2, MACHINE).compute_seconds
    assert seconds == pytest.approx(3 * KERNEL)
    gpu = Machine.of(parse_mesh("1x8"), parse_target("gpu:h100-sxm:8"))
    assert price_op(op, ((WHOLE,),) * 2, gpu).compute_seconds < KERNEL


def products(heads: int, width: int, n_tokens: int = 512) -> Op:
    """One token's queries with the keys of so many."""

    def scores(query: Any, keys: Any) -> Any:
        return jnp.einsum("bnh,bsnh->bns", query, keys)

    shapes = ((8, heads, width), (8, n_tokens, heads, width))
    (op,) = program_of(scores, *shapes, dtype="bfloat16", for_tpu=True).ops
    return replace(op, is_returned=False)


# Microseconds by the TPU compiler for v5e: an eighth and a quarter of the heads of Gemma 7B, and a
# quarter of those of GPT-2 large, which do not fill the lanes.
@pytest.mark.parametrize(
    ("heads", "width", "microseconds"), [(2, 256, 61.5), (4, 256, 82.5), (5, 64, 15.6)]
)
def test_few_heads_leave_registers_empty(heads: int, width: int, microseconds: float) -> None:
    seconds = price_op(products(heads, width), ((WHOLE,),) * 3, MACHINE).compute_seconds
    assert seconds * 1e6 == pytest.approx(microseconds, rel=0.35)


def test_a_cache_is_padded_where_no_dimension_fills_the_lanes() -> None:
    # By the TPU compiler for v5e 13.6 us: an eighth of the tokens of GPT-2 large.
    seconds = price_op(products(20, 64, 64), ((WHOLE,),) * 3, MACHINE).compute_seconds
    assert seconds * 1e6 == pytest.approx(13.6, rel=0.15)
    as_many = price_op(products(20, 8, 512), ((WHOLE,),) * 3, MACHINE).compute_seconds
    assert seconds == pytest.approx(2 * as_many)


# Devices share the tokens, or the 128 wide heads: in shares of 64, or of 16.
@pytest.mark.parametrize(
    ("mesh", "dims", "times"), [("1x2", (3, 2), 1.5), ("1x8", (3, 2), 1), ("1x2", (0, 0), 1)]
)
def test_shares_of_the_width_of_heads_are_turned(
    mesh: str, dims: tuple[int, int], times: float
) -> None:
    def keys(cache: Any) -> Any:
        return jnp.tanh(cache[:, 0])

    program = program_of(keys, (512, 2, 8, 128), dtype="bfloat16")
    (cut,) = (replace(op, moves_cache=True) for op in program.ops if op.kind == "slice")
    machine = Machine.of(parse_mesh(mesh), parse_target(f"tpu:v5e:{mesh}"))
    whole, split = (
        price_op(cut, [(dim,) for dim in both], machine).compute_seconds
        for both in ((WHOLE, WHOLE), dims)
    )
    assert split == pytest.approx(times * whole / machine.axis_sizes[0])


def turned(x: Any) -> Any:
    """Halves that change places, as in a rotary embedding."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.stack([-second, first], axis=-2).reshape(x.shape)


def test_halves_are_permuted_where_an_axis_splits_both() -> None:
    joins = [op for op in program_of(turned, (8, 256)).ops if op.kind == "reshape"]
    (op,) = (op for op in joins if op.results[0].inner)
    whole, split = (WHOLE,), (1,)
    (moved,) = price_op(op, (whole, split), MACHINE).transfers
    shard = 8 * 256 * 4 // 8
    assert (moved.kind, moved.n_bytes, moved.n_runs) == ("collective-permute", shard, 5)
    # Two places split the two halves alone, and each has its own.
    two = Machine.of(parse_mesh("1x2"), parse_target("tpu:v5e:1x2"))
    assert not price_op(op, (whole, split), two).transfers
