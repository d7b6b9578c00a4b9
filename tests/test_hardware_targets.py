"""Targets: written one way everywhere, and chosen where none was named."""

import json
import os
import pickle
import subprocess
import sys
from importlib.util import find_spec

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoshard.errors import MeshError, UnknownNameError, UsageError
from autoshard.hardware.chips import get_chip, known_chips
from autoshard.hardware.links import device_coordinates
from autoshard.hardware.targets import (
    Target,
    check_devices,
    default_target,
    parse_target,
    target_of,
)
from autoshard.mesh import parse_mesh
from autoshard.xla.topology import gpu_target_config, topology_options


@pytest.mark.parametrize(
    ("text", "n_devices"),
    [
        ("cpu:8", 8),
        ("tpu:v3:2x2", 8),  # two devices a chip
        ("tpu:v2:2x2", 8),
        ("tpu:tpu7x:2x2x1", 8),
        ("tpu:v4:2x2x1", 4),
        ("tpu:v5e:2x4", 8),
        ("tpu:v5e:4x4:2", 32),
        ("gpu:h100-sxm:8", 8),
        ("gpu:h100-sxm:2x8", 16),
    ],
)
def test_a_target_reads_back_as_it_is_written(text: str, n_devices: int) -> None:
    target = parse_target(text)
    assert str(target) == text
    assert target.n_devices == n_devices
    assert pickle.loads(pickle.dumps(target)) == target


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("tpu:v5e:2x4:1", "tpu:v5e:2x4"),
        ("gpu:h100-sxm:1x8", "gpu:h100-sxm:8"),
        ("TPU:v7x:2x2", "tpu:tpu7x:2x2x1"),
        (" cpu:8 ", "cpu:8"),
    ],
)
def test_other_spellings_become_the_canonical_one(text: str, canonical: str) -> None:
    assert str(parse_target(text)) == canonical


@st.composite
def targets(draw: st.DrawFn) -> Target:
    chip = draw(st.sampled_from(known_chips()))
    largest = chip.devices_per_node or 64
    sizes = st.integers(1, largest)
    axes = chip.torus_dimensions or 1
    topology = draw(st.lists(sizes, min_size=axes, max_size=axes).map(tuple))
    n_slices = 1 if chip.kind == "cpu" else draw(st.integers(1, 9))
    return Target(chip=chip, topology=topology, n_slices=n_slices)


@given(targets())
def test_every_target_survives_being_printed_and_read(target: Target) -> None:
    assert parse_target(str(target)) == target


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tpu:v5e", "'tpu:v5e' is not a target; write one like tpu:v5e:2x4"),
        ("tpu:v5e:2y4", "'tpu:v5e:2y4' is not a target; write one like tpu:v5e:2x4"),
        ("tpu:v5e:2x4:1:1", "'tpu:v5e:2x4:1:1' is not a target; write one like tpu:v5e:2x4"),
        ("cpu:2x4", "'cpu:2x4' is not a target; write one like cpu:8"),
        ("gpu:l4:2x2x2", "'gpu:l4:2x2x2' is not a target; write one like gpu:h100-sxm:8"),
        (
            "tpu:v5e:2x4:two",
            "'tpu:v5e:2x4:two': the number of slices must be a whole number, as in tpu:v5e:2x4:2",
        ),
        (
            "tpu:v5e:0x4",
            "target 'tpu:v5e:0x4' has no devices: every number must be at least 1",
        ),
        (
            "tpu:v5e:2x4:0",
            "target 'tpu:v5e:2x4:0' has no devices: every number must be at least 1",
        ),
        ("tpu:v5e:2x2x2", "target 'tpu:v5e:2x2x2' has 3 torus axes; tpu:v5e has 2"),
        (
            "gpu:h100-sxm:16",
            "target 'gpu:h100-sxm:16' has more than the 8 devices that a gpu:h100-sxm node holds; "
            "write nodes x devices, like gpu:h100-sxm:2x8",
        ),
    ],
)
def test_what_is_no_target_is_refused_with_the_corrected_form(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_target(text)
    assert str(caught.value) == message
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("text", "near"),
    [("tpu:v9e:2x4", "tpu:v5e"), ("v5e:2x4", "tpu:v5e"), ("gpu:h100:8", "gpu:h100-sxm")],
)
def test_an_unknown_chip_in_a_target_gives_the_nearest_names(text: str, near: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        parse_target(text)
    assert near in caught.value.near


def test_names_that_begin_alike_are_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as caught:
        parse_target("gpu:a100:8")
    assert caught.value.near[:2] == ("gpu:a100-40gb-sxm", "gpu:a100-80gb-sxm")


def test_a_mesh_of_another_size_is_refused() -> None:
    with pytest.raises(MeshError) as caught:
        check_devices(parse_mesh("1x8"), parse_target("tpu:v5e:4x4"))
    assert str(caught.value) == (
        "mesh 1x8 has 8 devices and target tpu:v5e:4x4 has 16: name a target of 8 devices, or "
        "another mesh"
    )


def test_a_mesh_of_half_a_chip_is_refused_with_its_neighbours() -> None:
    with pytest.raises(MeshError) as caught:
        check_devices(parse_mesh("1x3"), parse_target("tpu:v3", 3))
    assert str(caught.value) == (
        "mesh 1x3 has 3 devices, and each chip of tpu:v3 is 2: take a mesh of 2 or 4"
    )


@pytest.mark.parametrize(
    ("n_devices", "expected"),
    [
        (1, "tpu:v5e:1x1"),
        (4, "tpu:v5e:2x2"),
        (8, "tpu:v5e:2x4"),
        (128, "tpu:v5e:8x16"),
        (2, "tpu:v5e:1x2"),
        (3, "tpu:v5e:1x3"),
        (6, "tpu:v5e:2x3"),
        (12, "tpu:v5e:3x4"),
        (512, "tpu:v5e:16x16:2"),
        (384, "tpu:v5e:8x16:3"),  # 128 is the largest slice that divides 384
    ],
)
def test_the_default_target_is_the_smallest_v5e_slice(n_devices: int, expected: str) -> None:
    assert str(default_target(n_devices)) == expected


@given(st.integers(1, 3000))
def test_every_mesh_has_a_default_target_of_its_size(n_devices: int) -> None:
    assert default_target(n_devices).n_devices == n_devices


@pytest.mark.parametrize("chip", ["tpu:v3", "gpu:h100-sxm"])
@pytest.mark.parametrize("n_devices", [2, 6, 8, 384])
def test_every_chip_has_a_target_of_each_size(chip: str, n_devices: int) -> None:
    assert target_of(get_chip(chip), n_devices).n_devices == n_devices


def test_more_gpus_than_a_node_holds_become_nodes() -> None:
    chip = get_chip("gpu:h100-sxm")
    assert str(target_of(chip, 16)) == "gpu:h100-sxm:2x8"
    assert str(target_of(chip, 12)) == "gpu:h100-sxm:2x6"


def test_slices_that_hosts_do_not_tile_get_one_chip_a_host() -> None:
    assert topology_options(parse_target("tpu:v5e:2x4")) == {
        "platform": "tpu",
        "topology_name": "v5e:2x4",
    }
    assert topology_options(parse_target("tpu:v5e:1x8:2")) == {
        "platform": "tpu",
        "topology_name": "v5e:1x8",
        "num_slices": 2,
        "chips_per_host_bounds": (1, 1, 1),
    }
    assert topology_options(parse_target("tpu:v4:2x2x1"))["chip_config_name"] == "megacore"


_ASK_THE_COMPILER = """
import json, sys
from jax.experimental.topologies import get_topology_desc
for options in json.loads(sys.argv[1]):
    devices = get_topology_desc(**options).devices
    rows = [[getattr(d, "slice_index", None) or 0, d.coords, d.core_on_chip] for d in devices]
    print(json.dumps([devices[0].device_kind, rows]))
"""


@pytest.mark.tpu
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the tpu extra")
def test_the_compiler_lists_the_devices_of_every_target_as_we_do() -> None:
    texts = (
        "tpu:v2:2x2 tpu:v3:2x2 tpu:v3:4x4 tpu:v4:2x2x2 tpu:v5e:2x4 tpu:v5e:4x4 tpu:v5e:8x16 "
        "tpu:v5e:2x3 tpu:v5e:1x1 tpu:v5e:1x3 tpu:v5e:2x2:2 tpu:v5p:2x2x4 tpu:v6e:4x8 tpu:v7x:2x2x2"
    )
    ours = [parse_target(text) for text in texts.split()]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    asked = json.dumps([topology_options(target) for target in ours])
    result = subprocess.run(
        [sys.executable, "-c", _ASK_THE_COMPILER, asked],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    for target, answer in zip(ours, result.stdout.splitlines(), strict=True):
        kind, rows = json.loads(answer)
        axes = len(target.topology)
        theirs = tuple((index, tuple(spot[:axes]), core) for index, spot, core in rows)
        assert theirs == device_coordinates(target), str(target)
        assert kind in target.chip.jax_device_kinds
        assert len(rows) == target.n_devices


def test_every_gpu_is_described_to_its_compiler() -> None:
    for chip in known_chips():
        if chip.kind == "gpu":
            text = gpu_target_config(chip)
            assert text.count("{") == text.count("}") == 3
            assert f"memory_bandwidth: {chip.hbm_bytes_per_second:.0f}" in text
            # JAX takes three quarters of the card's memory.
            whole = chip.device_info["device_memory_size"]
            assert 0.69 < chip.hbm_bytes / whole < 0.78
