"""Sums of convolutions that count copies: as read in a program, and as the program comes out."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import autoshard
from autoshard.hardware.targets import parse_target
from autoshard.processes.child import Child
from autoshard.xla.copies import complaint, sums_of_copies
from autoshard.xla.environment import child_environment
from autoshard.xla.groups import parse_tiles
from autoshard.xla.hlo import parse_hlo
from autoshard.xla.names import layer_paths

LAYERS = layer_paths(["net/conv/kernel"])
OP_NAME = 'metadata={op_name="jit(step)/transpose(jvp(net))/conv/conv_general_dilated"}'
ADD = "%add (a: f32[], b: f32[]) -> f32[] {\n  ROOT %sum = f32[] add(%a, %b)\n}\n"


def factors(entry: str, others: str = "") -> list[float]:
    head = f"HloModule jit_step\n\n{ADD}\n{others}\nENTRY %main (p: f32[8]) -> f32[8] {{\n"
    text = f"{head}{entry}\n}}\n"
    return [each.times for each in sums_of_copies(parse_hlo(text), 8, LAYERS)]


def summed(groups: str, sharding: str = "devices=[2,4]<=[8] last_tile_dim_replicate") -> str:
    return (
        f"  %p = f32[8] parameter(0), sharding={{{sharding}}}\n"
        f"  %c = f32[8] convolution(%p, %p), {OP_NAME}\n"
        f"  ROOT %r = f32[8] all-reduce(%c), replica_groups={groups}, to_apply=%add, {OP_NAME}"
    )


def test_a_sum_over_devices_that_hold_copies_is_too_large_by_their_number() -> None:
    assert factors(summed("{{0,1,2,3,4,5,6,7}}")) == [4.0]
    assert factors(summed("{{0,4},{1,5},{2,6},{3,7}}")) == []
    assert factors(summed("{{0,1,2,3,4,5,6,7}}", "devices=[8]<=[8]")) == []
    assert factors(summed("{{0,1,2,3,4,5,6,7}}", "replicated")) == [8.0]
    # not of a convolution: a sum of what each device made up may be meant
    assert factors(summed("{{0,1,2,3,4,5,6,7}}").replace("conv_general_dilated", "mul")) == []


def test_what_is_not_understood_raises_no_alarm() -> None:
    whole = "{{0,1,2,3,4,5,6,7}}"
    assert factors(summed(whole, "devices=[2,2,2]<=[8] last_tile_dims={manual, replicated}")) == []
    assert factors(summed(whole).replace("convolution(%p, %p)", "rng(%p)")) == []


@pytest.mark.parametrize(("table", "expected"), [("0, 7, 14, 21", [2.0]), ("0, 7, 0, 7", [4.0])])
def test_devices_that_cut_the_same_slice_hold_copies(table: str, expected: list[float]) -> None:
    sliced = (
        "%cut (a: f32[28], places: s32[8], id: u32[]) -> f32[7] {\n"
        "  %a = f32[28] parameter(0)\n"
        "  %places = s32[8] parameter(1)\n"
        "  %id = u32[] parameter(2)\n"
        "  %taken = s32[1] dynamic-slice(%places, %id), dynamic_slice_sizes={1}\n"
        "  %place = s32[] reshape(%taken)\n"
        "  ROOT %slice = f32[7] dynamic-slice(%a, %place), dynamic_slice_sizes={7}\n"
        "}\n"
    )
    entry = (
        "  %p = f32[28] parameter(0), sharding={replicated}\n"
        "  %id = u32[] partition-id()\n"
        f"  %places = s32[8] constant({{{table}, {table}}})\n"
        "  %mine = f32[7] fusion(%p, %places, %id), kind=kLoop, calls=%cut\n"
        f"  %c = f32[7] convolution(%mine, %p), {OP_NAME}\n"
        "  %n = f32[] multiply(%p, %p)\n"
        "  %several = (f32[7], f32[]) all-reduce(%c, %n), replica_groups={{0,1,2,3,4,5,6,7}}\n"
        f"  ROOT %r = f32[7] get-tuple-element(%several), index=0, {OP_NAME}"
    )
    assert factors(entry, sliced) == expected


def test_a_loop_is_followed_until_no_more_differs() -> None:
    body = (
        "%turn (s: (f32[8], f32[8])) -> (f32[8], f32[8]) {\n"
        "  %s = (f32[8], f32[8]) parameter(0)\n"
        "  %x = f32[8] get-tuple-element(%s), index=0\n"
        "  %y = f32[8] get-tuple-element(%s), index=1\n"
        f"  %c = f32[8] convolution(%x, %x), {OP_NAME}\n"
        f"  %all = f32[8] all-reduce(%c), replica_groups={{{{0,1,2,3,4,5,6,7}}}}, {OP_NAME}\n"
        "  ROOT %next = (f32[8], f32[8]) tuple(%y, %all)\n"
        "}\n"
    )
    entry = (
        "  %p = f32[8] parameter(0), sharding={devices=[2,4]<=[8] last_tile_dim_replicate}\n"
        "  %q = f32[8] parameter(1), sharding={devices=[4,2]<=[8] last_tile_dim_replicate}\n"
        "  %s = (f32[8], f32[8]) tuple(%p, %q)\n"
        "  ROOT %w = (f32[8], f32[8]) while(%s), condition=%add, body=%turn"
    )
    # the first of the two is the second's in the next turn: two devices hold copies, not four
    assert factors(entry, body) == [2.0]


def test_tiles_are_read_in_every_form() -> None:
    assert parse_tiles("sharding={devices=[2,2]<=[4]}", 4) == (0, 1, 2, 3)
    assert parse_tiles("sharding={devices=[4]<=[2,2]T(1,0)}", 4) == (0, 2, 1, 3)
    assert parse_tiles("sharding={devices=[2,2]0,2,1,3 last_tile_dim_replicate}", 4) == (0, 1, 0, 1)
    assert parse_tiles("sharding={maximal device=0}", 4) is None


# What the child runs: the gradient of a convolution's kernel, the pictures split over two of the
# eight devices along one dimension, over what the other holds when it is computed again.
def gradient(grouped: bool, progress: Callable[[str], None]) -> tuple[float, list[float]]:
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((2, 4), ("batch", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("batch",)))

    def loss(kernel: Any, pictures: Any) -> Any:
        found = jax.lax.conv_general_dilated(
            pictures,
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=8 if grouped else 1,
        )
        return (found**2).mean()

    random = np.random.default_rng(0)
    kernel = random.standard_normal((3, 3, 1 if grouped else 8, 8)).astype("float32")
    pictures = random.standard_normal((16, 16, 16, 8)).astype("float32")
    function = jax.jit(jax.grad(loss), in_shardings=(whole, split), out_shardings=whole)
    right = np.asarray(jax.grad(loss)(kernel, pictures))
    made = np.asarray(function(kernel, pictures))
    module = parse_hlo(function.lower(kernel, pictures).compile().as_text())
    found = sums_of_copies(module, 8, LAYERS)
    return float(np.vdot(made, right) / np.vdot(right, right)), [each.times for each in found]


@pytest.mark.parametrize("grouped", [True, False])
def test_a_gradient_is_too_large_where_its_program_adds_copies(grouped: bool) -> None:
    with Child(child_environment(parse_target("cpu:8"))) as child:
        times, found = child.call(f"{__name__}:gradient", grouped, timeout_seconds=300)
    assert found == ([pytest.approx(times)] if grouped else [])
    assert times == pytest.approx(4.0 if grouped else 1.0)


def test_a_verification_says_what_is_wrong() -> None:
    model, rules = "small_models:depthwise", 'layout_map["last/kernel"] = (None, "model")'
    two, data = (
        autoshard.verify(rules, model=model, mesh=mesh, target="cpu:8", workload="train", batch=8)
        for mesh in ("2x4", "8x1")
    )
    assert "the gradient of middle comes out 4 times too large;" in two.wrong
    assert data.wrong == ""


def test_the_complaint_names_the_worst() -> None:
    module = parse_hlo(f"HloModule m\n\nENTRY %main (p: f32[8]) -> f32[8] {{\n{summed('{}')}\n}}\n")
    (found,) = sums_of_copies(module, 8, LAYERS)
    assert found.layer == "net/conv"
    assert "the gradient of net/conv comes out 4 times too large" in complaint([found])
    assert "net/conv (and 1 more) comes" in complaint([found, found])
