"""Reading partitioned programs. The texts are cut from compiles of tiny functions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoshard.codec import from_record, to_record
from autoshard.errors import XlaError
from autoshard.mesh import Mesh, parse_mesh
from autoshard.xla.collectives import (
    Collective,
    estimated_cycles,
    merge_collectives,
    read_collectives,
)
from autoshard.xla.groups import axes_of, parse_groups, parse_pairs
from autoshard.xla.hlo import Shape, itemsize, parse_hlo
from autoshard.xla.loops import execution_counts
from autoshard.xla.names import layer_of, layer_paths, phase_of, template
from autoshard.xla.normalise import cpu_normaliser

LAYERS = layer_paths(
    ["block_0/query/kernel", "block_0/key/kernel", "block_0/ffw/kernel", "block_1/ffw/kernel"]
)
EIGHT = parse_mesh("1x8")


def program(entry, others=""):
    head = "HloModule jit_step, is_scheduled=true\n\n"
    return f"{head}{others}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{entry}\n}}\n"


def read(entry, others="", mesh=EIGHT):
    return read_collectives(parse_hlo(program(entry, others)), mesh, LAYERS)


def test_an_instruction_is_read_with_tiled_layouts_comments_and_attributes():
    text = program(
        "  %p.1 = (bf16[8,512]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/u32[]{:S(2)}) parameter(0)\n"
        "  ROOT %fusion.2 = bf16[8,512]{1,0:T(8,128)(2,1)} fusion(%p.1, /*index=1*/%p.1), "
        'kind=kLoop, calls=%inner.3, metadata={op_name="jit(f)/a" stack_frame_id=1}, '
        'backend_config={"window_config":{},"estimated_cycles":"120"}'
    )
    module = parse_hlo(text)
    parameter, fusion = module.entry.instructions
    assert parameter.shapes == (
        Shape(dtype="bf16", dimensions=(8, 512)),
        Shape(dtype="u32", dimensions=()),
    )
    assert fusion.operands == ("p.1", "p.1")
    assert fusion.called == ("inner.3",)
    assert (fusion.op_name, fusion.estimated_cycles) == ("jit(f)/a", 120)
    assert module.entry.root is fusion
    assert fusion.shapes[0].n_bytes == 8 * 512 * 2


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(XlaError, match="no entry computation"):
        parse_hlo("HloModule empty\n")


def test_item_sizes_of_unusual_types():
    assert [itemsize(t) for t in ("c64", "f8e5m2", "u4", "token", "opaque")] == [8, 1, 0.5, 0, 0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,1},{2,3}}, use_global_device_ids=true", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[4], dimensions={0}", ((0, 1), (2, 3))),
        # Count 0 1 / 2 3, transpose to 0 2 / 1 3, two groups of two.
        ("replica_groups=[2,2]<=[2,2]T(1,0), x=1", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x=1", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x=1", ((0, 2), (1, 3))),
        # Axes named in another order than the mesh's give that order within the group.
        ("replica_groups=mesh['a'=2,'b'=2] {'b','a'}, x=1", ((0, 2, 1, 3),)),
        # The halves of one axis: places before it, then its size.
        ("replica_groups=mesh['a'=4] {'a':(1)2}, x=1", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, x=1", ((0, 1), (2, 3))),
        # Devices stand in the mesh as 0 2 / 1 3: the groups along 'b' are its rows.
        (
            "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]<=[2,2]T(1,0)) {'b'}",
            ((0, 2), (1, 3)),
        ),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", ((0, 2), (1, 3))),
        ("channel_id=1, replica_groups={}, x=1", ((0, 1, 2, 3),)),
    ],
)
def test_groups_are_read_in_every_form(text, expected):
    assert parse_groups(text, 4) == expected


def test_groups_in_an_unknown_form_are_refused():
    with pytest.raises(XlaError, match="groups of a collective in a new form: <2x2>"):
        parse_groups("replica_groups=<2x2>", 4)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_the_groups_along_some_axes_name_those_axes(shape, data):
    mesh = Mesh(shape=tuple(shape), axis_names=tuple("abcd"[: len(shape)]))
    axes = data.draw(st.lists(st.sampled_from(mesh.axis_names), unique=True))
    named = ",".join(f"'{name}'={size}" for name, size in mesh.sizes.items())
    grouped = ",".join(f"'{axis}'" for axis in axes)
    groups = parse_groups(f"replica_groups=mesh[{named}] {{{grouped}}}", mesh.n_devices)
    assert sorted(np.concatenate(groups)) == list(range(mesh.n_devices))
    assert {len(group) for group in groups} == {math.prod(mesh.sizes[axis] for axis in axes)}
    assert axes_of(groups, mesh) == tuple(
        axis for axis in mesh.axis_names if axis in axes and mesh.sizes[axis] > 1
    )


def test_pairs_of_a_permute_name_the_axis_that_they_cross():
    pairs = parse_pairs("channel_id=2, source_target_pairs={{0,4},{4,0},{1,5},{5,1}}, x=1")
    assert pairs == ((0, 4), (4, 0), (1, 5), (5, 1))
    assert axes_of(pairs, parse_mesh("2x4")) == ("batch",)


def test_a_plain_all_reduce_blocks_and_belongs_to_its_layer():
    (found,) = read(
        "  %all-reduce.1 = bf16[8,512,64]{2,1,0} all-reduce(%x), channel_id=2, "
        "replica_groups=[2,4]<=[8], use_global_device_ids=true, to_apply=%add, "
        'metadata={op_name="jit(step)/net/block_0/ffw/btf,fd->btd/dot_general"}',
        mesh=parse_mesh("2x4"),
    )
    assert found == Collective(
        kind="all-reduce",
        n_bytes=8 * 512 * 64 * 2,
        dtype="bf16",
        group_size=4,
        axis="model",
        layer="block_0/ffw",
        phase="forward",
        overlapped=False,
    )


def test_a_combined_all_reduce_is_one_launch_of_arrays_with_their_own_layers():
    name = "jit(step)/transpose(jvp(net))/block_0"
    found = read(
        f'  %q = f32[64]{{0}} negate(), metadata={{op_name="{name}/query/dot_general"}}\n'
        f'  %k = f32[32]{{0}} negate(), metadata={{op_name="{name}/key/dot_general"}}\n'
        "  %c = f32[32]{0} bitcast(%k)\n"
        "  %all-reduce.1 = (f32[64]{0}, f32[32]{0}) all-reduce(%q, %c), channel_id=2, "
        "replica_groups=[1,8]<=[8], to_apply=%add, "
        f'metadata={{op_name="{name}/(query/dot_general:key/dot_general)"}}'
    )
    assert [(c.layer, c.n_bytes, c.launches, c.phase) for c in found] == [
        ("block_0/query", 256, 1, "backward"),
        ("block_0/key", 128, 0, "backward"),
    ]


def test_full_bytes_of_every_kind():
    groups = "replica_groups=[1,8]<=[8]"
    found = read(
        f"  %a = f32[64]{{0}} all-gather(%x), channel_id=1, {groups}, dimensions={{0}}\n"
        f"  %b = f32[8]{{0}} reduce-scatter(%x), channel_id=2, {groups}, dimensions={{0}}\n"
        f"  %c = f32[64]{{0}} all-to-all(%x), channel_id=3, {groups}, dimensions={{0}}\n"
        f"  %d = ({', '.join(['f32[8]{0}'] * 8)}) all-to-all(%x), channel_id=4, {groups}\n"
        "  %e = f32[64]{0} collective-permute(%x), channel_id=5, "
        "source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}\n"
        # The whole array stands in the result of a gather, and in the input of a scatter.
    )
    assert {(c.kind, c.n_bytes, c.count) for c in found} == {
        ("all-gather", 256, 1),
        ("reduce-scatter", 8 * 8 * 4, 1),
        ("all-to-all", 256, 2),
        ("collective-permute", 256, 1),
    }
    assert {c.group_size for c in found} == {8}


def test_a_collective_of_single_devices_moves_nothing():
    assert read("  %a = f32[8]{0} all-reduce(%x), replica_groups=[8,1]<=[8], to_apply=%add") == ()


def started(between: str, attributes: str = "") -> str:
    """A gather of 256 bytes, and what stands between its start and its end."""
    return (
        "  %s = (f32[8]{0}, f32[64]{0}) all-gather-start(%x), replica_groups=[1,8]<=[8]"
        f"{attributes}\n  {between}\n  %d = f32[64]{{0}} all-gather-done(%s)"
    )


def test_started_collectives_run_beside_the_computation_unless_synchronous():
    work = "%w = f32[128]{0} negate(%z)"
    (found,) = read(started(work))
    assert (found.n_bytes, found.overlapped, found.count) == (256, True, 1)
    (found,) = read(started(work, ', backend_config={"is_sync":true}'))
    assert not found.overlapped


@pytest.mark.parametrize(
    "trifle", ["", "%t = f32[32]{0} negate(%c)", "%t = f32[8,8]{1,0} bitcast(%s)"]
)
def test_a_started_collective_with_nothing_to_run_beside_it_blocks(trifle: str):
    (found,) = read(started(trifle))
    assert not found.overlapped


def test_a_started_reduce_scatter_of_two_arrays_moves_each_once():
    # As GPU programs have them: the operands come first in the result.
    shapes = "(f32[64]{0}, bf16[32]{0}, f32[8]{0}, bf16[4]{0})"
    found = read(
        f"  %s = {shapes} reduce-scatter-start(%x, %y), replica_groups=[1,8]<=[8], "
        'dimensions={0}, to_apply=%add, backend_config={"is_sync":false}\n'
        "  %w = f32[128]{0} negate(%z)"
    )
    assert [(c.kind, c.n_bytes, c.overlapped) for c in found] == [
        ("reduce-scatter", 256, True),
        ("reduce-scatter", 64, True),
    ]


def test_clones_of_one_asynchronous_collective_count_once():
    # The TPU compiler splits one all-gather over three fusions; two more have another channel.
    gather = "bf16[64]{0} all-gather(%p), channel_id=12, replica_groups=[1,8]<=[8], dimensions={0}"
    fused = "".join(
        f"%async_collective_fusion.{i} (p: bf16[8]) -> bf16[64] {{\n"
        f"  %p = bf16[8]{{0}} parameter(0)\n"
        f"  ROOT %g.{i} = {gather.replace('12', str(12 + i // 3))}\n}}\n\n"
        for i in range(5)
    )
    entry = "\n".join(
        f"  %f.{i} = bf16[64]{{0}} fusion(%x), kind=kCustom, calls=%async_collective_fusion.{i}"
        for i in range(5)
    )
    (found,) = read(entry, fused)
    assert (found.count, found.n_bytes, found.overlapped) == (2, 128, True)


def test_an_all_reduce_scatter_fusion_is_a_blocking_reduce_scatter_of_the_whole():
    fused = (
        "%all-reduce-scatter.1 (input: bf16[8,64]) -> bf16[8,8] {\n"
        "  %input = bf16[8,64]{1,0} parameter(0)\n"
        "  %all-reduce.2 = bf16[8,64]{1,0} all-reduce(%input), channel_id=5, "
        "replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add\n"
        "  ROOT %slice = bf16[8,8]{1,0} dynamic-slice(%all-reduce.2, %o), "
        "dynamic_slice_sizes={8,8}\n}\n"
    )
    (found,) = read(
        "  %f = bf16[8,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1, "
        'metadata={op_name="jit(step)/net/block_1/ffw/dot_general"}',
        fused,
    )
    assert (found.kind, found.n_bytes, found.overlapped) == ("reduce-scatter", 1024, False)
    assert found.layer == "block_1/ffw"


def test_sums_of_several_arrays_that_share_a_channel_all_count():
    def result(k: int) -> str:
        return f"(f32[1,64]{{1,0}}, f32[{8 * k},8]{{1,0}})"

    fused = "".join(
        f"%all-reduce-scatter.{k} (i: f32[8,64], j: f32[{64 * k},8]) -> {result(k)} {{\n"
        f"  %i = f32[8,64]{{1,0}} parameter(0)\n  %j = f32[{64 * k},8]{{1,0}} parameter(1)\n"
        f"  %all-reduce.{k} = (f32[8,64]{{1,0}}, f32[{64 * k},8]{{1,0}}) all-reduce(%i, %j), "
        "channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add\n"
        f"  ROOT %sliced = {result(k)} custom-call(%all-reduce.{k})\n}}\n\n"
        for k in (1, 2)
    )
    entry = "\n".join(
        f"  %f.{k} = {result(k)} fusion(%x, %y), kind=kCustom, calls=%all-reduce-scatter.{k}"
        for k in (1, 2)
    )
    found = read(entry, fused)
    assert {one.kind for one in found} == {"reduce-scatter"}
    assert sorted((one.n_bytes, one.count, one.launches) for one in found) == [
        (2048, 3, 2),
        (4096, 1, 0),
    ]


LOOP = """%body (p: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {
  %p = (s32[], s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %step = s32[] get-tuple-element(%p), index=1
  %x = f32[8]{0} get-tuple-element(%p), index=2
  %next = s32[] add(%i, %step)
  %y = f32[8]{0} all-reduce(%x), channel_id=3, replica_groups=[1,8]<=[8], to_apply=%add
  %z = f32[8]{0} negate(%y), backend_config={"estimated_cycles":"10"}
  ROOT %t = (s32[], s32[], f32[8]{0}) tuple(%next, %step, %z)
}

%cond (q: (s32[], s32[], f32[8])) -> pred[] {
  %q = (s32[], s32[], f32[8]{0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant(9)
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}
"""
LOOP_ENTRY = """  %zero = s32[] constant(1)
  %copied = s32[] copy(%zero)
  %two = s32[] constant(2)
  %x0 = f32[8]{0} parameter(0)
  %fused = f32[8]{0} negate(%x0), backend_config={"estimated_cycles":"5"}
  %init = (s32[], s32[], f32[8]{0}) tuple(%copied, %two, %fused)
  %while = (s32[], s32[], f32[8]{0}) while(%init), condition=%cond, body=%body"""


def test_a_step_of_which_one_instruction_has_no_estimate_has_none():
    unknown = LOOP_ENTRY.replace('"estimated_cycles":"5"', f'"estimated_cycles":"{2**63 - 1}"')
    assert estimated_cycles(parse_hlo(program(unknown, LOOP))) is None


def test_a_loop_with_a_counter_runs_as_often_as_it_counts():
    # From 1 in steps of 2 while less than 9: 1 3 5 7, four times.
    module = parse_hlo(program(LOOP_ENTRY, LOOP))
    assert execution_counts(module)["body"] == 4
    (found,) = read_collectives(module, EIGHT)
    assert (found.count, found.launches) == (4, 4)
    assert estimated_cycles(module) == 5 + 4 * 10


def test_a_loop_whose_trips_xla_notes_runs_so_often():
    noted = LOOP_ENTRY + ', backend_config={"known_trip_count":{"n":"7"}}'
    assert execution_counts(parse_hlo(program(noted, LOOP)))["body"] == 7


def test_a_loop_that_cannot_be_counted_counts_once():
    module = parse_hlo(program(LOOP_ENTRY.replace("constant(1)", "parameter(1)"), LOOP))
    assert execution_counts(module)["body"] == 1


def test_a_program_without_estimates_has_no_cycles():
    assert estimated_cycles(parse_hlo(program("  %x = f32[8]{0} parameter(0)"))) is None


@pytest.mark.parametrize(
    ("name", "layer", "phase"),
    [
        ("jit(step)/jvp(net)/block_0/query/btd,ndh->btnh/dot_general", "block_0/query", "forward"),
        ("jit(step)/transpose(jvp(net))/block_0/softmax/mul", "block_0", "backward"),
        ("jit(step)/transpose(jvp(block_1))/ffw/dot_general", "block_1/ffw", "backward"),
        ("jit(step)/jvp(net)/block_1/ffw/jit(_take)/gather", "block_1/ffw", "forward"),
        ("jit(step)/net/(block_0/and:block_1/and)", "block_0", "forward"),
        ("jit(step)/adam/sqrt", "", "update"),
        ("", "", "forward"),
    ],
)
def test_a_name_stack_names_layer_and_phase(name, layer, phase):
    differentiated = "jvp" in name or "adam" in name
    assert layer_of(name, LAYERS) == layer
    assert phase_of(name, differentiated=differentiated) == phase


def test_templates_replace_the_index_of_the_block_only():
    blocks = ("decoder/layer_*",)
    assert template("decoder/layer_11/ffw_2", blocks) == "decoder/layer_*/ffw_2"
    assert template("decoder/layer_norm_1", blocks) == "decoder/layer_norm_1"


def test_equal_collectives_are_merged_over_blocks():
    first, second = (
        Collective(
            kind="all-reduce",
            n_bytes=8,
            dtype="f32",
            group_size=8,
            axis="model",
            layer=f"block_{index}/ffw",
            phase="forward",
            overlapped=False,
            count=2,
        )
        for index in range(2)
    )
    assert len(merge_collectives([first, second])) == 2
    (merged,) = merge_collectives([first, second], ["block_*"])
    assert (merged.count, merged.launches, merged.layer) == (4, 2, "block_*/ffw")
    assert from_record(Collective, to_record(merged)) == merged


# The CPU compiler's forms.

CONVERTED = """%convert_fusion (p: bf16[8,8]) -> f32[64] {
  %p = bf16[8,8]{1,0} parameter(0)
  %convert.1 = f32[8,8]{1,0} convert(%p)
  ROOT %bitcast.1 = f32[64]{0} bitcast(%convert.1)
}

%slices (q: f32[64], o: s32[]) -> bf16[8] {
  %q = f32[64]{0} parameter(0)
  %o = s32[] parameter(1)
  %convert.2 = bf16[64]{0} convert(%q)
  ROOT %slice = bf16[8]{0} dynamic-slice(%convert.2, %o), dynamic_slice_sizes={8}
}
"""
PROMOTED = (
    "  %x = bf16[8,8]{1,0} parameter(0)\n"
    "  %o = s32[] parameter(1)\n"
    "  %wide = f32[64]{0} fusion(%x), kind=kLoop, calls=%convert_fusion\n"
    "  %sum = f32[64]{0} all-reduce(%wide), replica_groups=[1,8]<=[8], to_apply=%add_promoted\n"
)
SLICED = "  %part = bf16[8]{0} fusion(%sum, %o), kind=kLoop, calls=%slices\n"


def on_target(entry):
    module = parse_hlo(program(entry, CONVERTED))
    return read_collectives(module, EIGHT, {}, cpu_normaliser(module, 8))


def test_a_promoted_all_reduce_counts_as_bfloat16():
    (found,) = on_target(PROMOTED + "  ROOT %y = f32[64]{0} negate(%sum)")
    assert (found.kind, found.dtype, found.n_bytes) == ("all-reduce", "bf16", 128)


def test_an_all_reduce_that_only_slices_read_is_a_reduce_scatter():
    (found,) = on_target(PROMOTED + SLICED)
    assert (found.kind, found.n_bytes) == ("reduce-scatter", 128)
    (found,) = on_target(PROMOTED + SLICED + "  ROOT %y = f32[64]{0} negate(%sum)")
    assert found.kind == "all-reduce"


def test_a_gather_of_the_compilers_own_conversion_counts_as_bfloat16():
    gather = "  %g = f32[512]{0} all-gather(%wide), replica_groups=[1,8]<=[8], dimensions={0}"
    (found,) = on_target(
        PROMOTED.replace("  %sum", "  %unused").replace("all-reduce(", "sin(") + gather
    )
    assert (found.kind, found.dtype, found.n_bytes) == ("all-gather", "bf16", 1024)


def test_a_gather_of_the_programs_own_conversion_stays_float32():
    entry = (
        "  %x = bf16[64]{0} parameter(0)\n"
        "  %wide = f32[64]{0} convert(%x), "
        'metadata={op_name="jit(step)/net/convert_element_type"}\n'
        "  %g = f32[512]{0} all-gather(%wide), replica_groups=[1,8]<=[8], dimensions={0}"
    )
    (found,) = on_target(entry)
    assert found.dtype == "f32"
