"""Which links carry a mesh axis, and what a collective over them costs."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoshard.errors import MeshError, UnknownNameError
from autoshard.hardware.chips import get_chip
from autoshard.hardware.collectives import KINDS, seconds, wire_bytes
from autoshard.hardware.links import AxisLink, device_coordinates, group_link, ring_link
from autoshard.hardware.targets import default_target, parse_target
from autoshard.mesh import Mesh, parse_mesh

GB = 1e9


def link(mesh: str, target: str, axis: str = "model") -> AxisLink:
    return group_link((axis,), parse_mesh(mesh), parse_target(target))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("all-reduce", 1400.0),  # 2 x 800 x 7/8
        ("all-gather", 700.0),  # 800 x 7/8: what the others hold
        ("reduce-scatter", 700.0),  # a result of 100 bytes, sent 7 times
        ("all-to-all", 700.0),  # all but one's own eighth
        ("collective-permute", 800.0),
    ],
)
def test_wire_bytes_of_800_bytes_over_8_devices(kind: str, expected: float) -> None:
    assert wire_bytes(kind, 800, 8) == expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # 90 GB/s is 45 both ways round the ring of 8, and 8 us are 1 us a device.
        ("all-reduce", 140e6 / 90e9 + 8e-6),
        ("all-gather", 70e6 / 90e9 + 8e-6),
        ("reduce-scatter", 70e6 / 90e9 + 8e-6),
        ("collective-permute", 80e6 / 90e9 + 8e-6),
    ],
)
def test_80_megabytes_over_a_v5e_8_take_what_the_ring_model_says(
    kind: str, expected: float
) -> None:
    assert seconds(kind, 80e6, link("1x8", "tpu:v5e:2x4")) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("target", "one_way"),
    [
        ("tpu:v5e:2x4", 45 * GB),
        ("tpu:v6e:2x4", 90 * GB),
        ("tpu:v3:2x2", 70 * GB),  # four chips: both devices of a chip share its links
    ],
)
def test_one_axis_over_a_whole_small_slice_is_the_plain_ring(target: str, one_way: float) -> None:
    found = link("1x8", target)
    plain = ring_link(parse_target(target).chip, 8, "model")
    assert found == plain
    assert found.bytes_per_second == 2 * one_way
    assert found.kind == "torus-ring"


@pytest.mark.parametrize(
    ("mesh", "target", "axis", "kind", "gigabytes_per_second"),
    [
        # v5e:2x4 lists devices along its axis of 2 first: neighbours, then a column of 4.
        ("4x2", "tpu:v5e:2x4", "model", "torus-line", 45),
        ("4x2", "tpu:v5e:2x4", "batch", "torus-line", 45),
        # Four in a row of the list are a square; the two squares interleave along the axis of 4.
        ("2x4", "tpu:v5e:2x4", "model", "torus-ring", 90),
        ("2x4", "tpu:v5e:2x4", "batch", "torus-line", 22.5),
        # A host is a square: 2x2 of them on a 4x4 slice, at stride 2 along both axes.
        ("4x4", "tpu:v5e:4x4", "model", "torus-ring", 90),
        ("4x4", "tpu:v5e:4x4", "batch", "torus-ring", 45),
        # Both axes of 16 close: four links a chip.
        ("1x256", "tpu:v5e:16x16", "model", "torus-ring", 180),
        # Only the axis of 16 closes: two links and one.
        ("1x128", "tpu:v5e:8x16", "model", "torus-ring", 135),
        # Three axes: one link each on 2x2x2, two each on 4x4x4, where all close.
        ("1x8", "tpu:v5p:2x2x2", "model", "torus-ring", 270),
        ("1x64", "tpu:v4:4x4x4", "model", "torus-ring", 270),
        # Two devices a chip: between them; one of each chip, sharing links; two chips and a link.
        ("4x2", "tpu:v3:2x2", "model", "on-chip", 225),
        ("4x2", "tpu:v3:2x2", "batch", "torus-ring", 70),
        ("2x4", "tpu:v3:2x2", "model", "torus-line", 70),
        # Three in a row of a 2x3 slice turn a corner: a path.
        ("2x3", "tpu:v5e:2x3", "model", "torus-line", 45),
        ("1x3", "tpu:v5e:1x3", "model", "torus-line", 45),
        # A switch: any group gets 0.8 of NVLink's 450.
        ("1x8", "gpu:h100-sxm:8", "model", "nvlink", 360),
        ("4x2", "gpu:h100-sxm:8", "batch", "nvlink", 360),
        # Between nodes a GPU has 0.87 of 50: one lane, four, or eight, which NVLink outruns.
        ("2x8", "gpu:h100-sxm:2x8", "batch", "network", 43.5),
        ("4x4", "gpu:h100-sxm:2x8", "batch", "network", 87),
        ("1x16", "gpu:h100-sxm:2x8", "model", "network", 348),
        # Between slices a v5e has 0.33 of 3.1.
        ("2x8", "tpu:v5e:2x4:2", "batch", "network", 1.03),
        ("1x4", "gpu:l4:4", "model", "host", 23.25),
        ("1x8", "cpu:8", "model", "host", 5),
    ],
)
def test_a_mesh_axis_knows_its_links(
    mesh: str, target: str, axis: str, kind: str, gigabytes_per_second: float
) -> None:
    found = link(mesh, target, axis)
    assert (found.kind, found.size) == (kind, parse_mesh(mesh).sizes[axis])
    assert found.bytes_per_second / GB == pytest.approx(gigabytes_per_second)


def test_interleaved_groups_share_the_rings_that_they_close() -> None:
    # 64 chips as 16 squares of 2x2, one host each, and one chip of each square: at stride 2 along
    # x and y, which both close (2/2 each), and all four along z (2).
    mesh = Mesh(shape=(16, 4), axis_names=("batch", "model"))
    found = group_link(("batch",), mesh, parse_target("tpu:v4:4x4x4"))
    assert found.bytes_per_second == pytest.approx((1 + 1 + 2) * 45 * GB)


def test_a_group_over_all_axes_is_the_group_over_the_machine() -> None:
    both = group_link(("batch", "model"), parse_mesh("4x2"), parse_target("tpu:v5e:2x4"))
    whole = link("1x8", "tpu:v5e:2x4")
    assert (both.axis, whole.axis) == ("batch,model", "model")
    assert both.bytes_per_second == whole.bytes_per_second
    assert both.size == 8


def test_network_hops_are_paid_once_a_node() -> None:
    # 2 us to launch and 14 us for each of two nodes.
    assert link("2x8", "gpu:h100-sxm:2x8", "batch").launch_seconds == pytest.approx(30e-6)
    assert link("2x8", "gpu:h100-sxm:2x8").launch_seconds == pytest.approx(2e-6)


def test_an_axis_of_one_device_costs_nothing() -> None:
    alone = link("1x8", "tpu:v5e:2x4", "batch")
    assert (alone.kind, alone.size) == ("local", 1)
    assert {seconds(kind, 1e9, alone) for kind in KINDS} == {0.0}
    assert {wire_bytes(kind, 1e9, 1) for kind in KINDS} == {0.0}


def test_an_all_to_all_on_a_ring_passes_through_others() -> None:
    # 8 devices: 800 bytes x 16 / 8 = 1,600 over the links, against 700 sent. With V = 6,400 bytes
    # in the whole array and W = 90 GB/s that is the scaling book's V / (4 W).
    ring = link("1x8", "tpu:v5e:2x4")
    assert seconds("all-to-all", 800, ring) == pytest.approx(6400 / (4 * 90e9) + 8e-6)
    switch = link("1x8", "gpu:h100-sxm:8")
    assert seconds("all-to-all", 8e8, switch) == pytest.approx(7e8 / 360e9 + 30e-6)


def test_small_gpu_collectives_take_what_autoparallel_measured() -> None:
    # An H100 table: 8 to 10 us over 2 GPUs, 15 to 17 over 4, 30 or 31 over 8.
    h100 = get_chip("gpu:h100-sxm")
    latencies = [seconds("all-reduce", 0, ring_link(h100, size)) for size in (2, 4, 8)]
    assert latencies == pytest.approx([9e-6, 16e-6, 30e-6])


def test_an_unknown_collective_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown collective 'allreduce'.*all-reduce"):
        wire_bytes("allreduce", 8, 8)


def test_a_target_of_another_size_is_refused() -> None:
    with pytest.raises(MeshError, match="mesh 1x4 has 4 devices and target tpu:v5e:2x4 has 8"):
        group_link(("model",), parse_mesh("1x4"), parse_target("tpu:v5e:2x4"))


@given(
    kind=st.sampled_from(KINDS),
    n_bytes=st.integers(0, 10**12),
    more=st.integers(0, 10**12),
    size=st.integers(1, 512),
)
def test_cost_never_falls_with_bytes(kind: str, n_bytes: int, more: int, size: int) -> None:
    assert wire_bytes(kind, n_bytes, size) <= wire_bytes(kind, n_bytes + more, size)
    ring = ring_link(get_chip("tpu:v5e"), size)
    assert 0 <= seconds(kind, n_bytes, ring) <= seconds(kind, n_bytes + more, ring)


@given(n_bytes=st.integers(0, 10**12), size=st.integers(1, 512))
def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather(n_bytes: int, size: int) -> None:
    two = wire_bytes("reduce-scatter", n_bytes, size) + wire_bytes("all-gather", n_bytes, size)
    assert wire_bytes("all-reduce", n_bytes, size) == pytest.approx(two)


@given(shape=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple))
def test_every_mesh_has_links_no_faster_than_all_links_of_a_chip(shape: tuple[int, ...]) -> None:
    mesh = Mesh(shape=shape, axis_names=("a", "b", "c")[: len(shape)])
    target = default_target(mesh.n_devices)
    for name in mesh.axis_names:
        found = group_link((name,), mesh, target)
        assert found.size == mesh.sizes[name]
        assert found.kind == "local" or found.bytes_per_second <= 4 * 45 * GB
        assert math.isfinite(found.bytes_per_second) and found.bytes_per_second > 0


def test_devices_are_listed_host_by_host() -> None:
    # Ids 0, 1, 4, 5 are the first host's square on a 4x4 slice.
    spots = [spot for _, spot, _ in device_coordinates(parse_target("tpu:v5e:4x4"))]
    assert spots[:6] == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (3, 0)]
    cores = [(spot, core) for _, spot, core in device_coordinates(parse_target("tpu:v3:2x2"))]
    assert cores[:3] == [((0, 0), 0), ((0, 0), 1), ((1, 0), 0)]


def test_of_groups_that_are_not_laid_out_alike_the_worst_counts() -> None:
    uneven = parse_target("gpu:h100-sxm:3x4")
    link = group_link(("model",), parse_mesh("4x3"), uneven)
    assert link.kind == "network"  # the second group has two members on one node, one on the next
    assert link.bytes_per_second == uneven.chip.network_bytes_per_second
    assert group_link(("model",), parse_mesh("3x4"), uneven).kind == "nvlink"


def test_a_mesh_axis_is_as_fast_as_its_slowest_group() -> None:
    # Hosts of 2x2 chips, three in a row: the first group of eight is two hosts side by side, a
    # ring; the second is the end of one row and the start of the next, a path.
    assert link("6x8", "tpu:v5e:6x8").bytes_per_second == 45 * GB
