"""Which links carry a mesh axis, and how fast a ring runs over them.

Keras gives the mesh its devices in the order of `jax.devices()`: slice by slice, host by host (a
host drives 2x2 chips of a TPU slice), the first torus axis fastest, the devices of a chip next to
each other. A mesh axis therefore falls on a set of chips that can be told from the mesh's shape,
and with it the links that its collectives may use.

On a torus, a collective is no faster than the links of the worst-placed device of its group. With
`w` bytes a second one way a link,

    bytes_per_second = w * sum over torus axes that the group extends along of
                           (2 if the group closes the axis into a ring, else 1) / stride

- A group of one torus axis without wraparound is a line: `w`, half of the ring.
- One with wraparound is a ring used both ways: `2 w`.
- A group that extends along two axes, 2x4 say, is a ring by snaking: `2 w`; with wraparound on
  both, `4 w`.
- `stride` groups interleave on the same links, and share them; so do the devices of a chip that
  belong to different groups (half each).

This equals the ring model by which compiled programs are timed (`ring_link`: `2 w` whatever the
shape) on one mesh axis over all of v5e:2x4, v6e:2x4, v3:2x2 and the like. It departs from it on
meshes of two axes, whose groups are mostly lines; on three torus axes and on wrapped planes, which
are faster; between the devices of one chip; and over a network. GPUs of one node have a switch: any
group gets the whole NVLink. Over nodes or slices a ring has as many lanes as members on each, and
is as fast as the slower of lanes and links.

Source: jax-ml/scaling-book (sharding, several torus axes, lines); NVIDIA/nccl (ring lanes).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from autoshard.hardware.chips import Chip
from autoshard.hardware.targets import Target, check_devices
from autoshard.mesh import Mesh

__all__ = ["AxisLink", "device_coordinates", "group_link", "ring_link"]

_Place = tuple[int, tuple[int, ...], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisLink:
    """What a collective over one group of devices runs on.

    Attributes:
        axis: the mesh axis, or several joined by commas.
        size: devices of the group.
        bytes_per_second: wire bytes a second through one device of a ring over the group.
        latency_seconds: for each device of the group.
        launch_seconds: once a collective, network hops included.
        kind: `torus-ring`, `torus-line`, `on-chip`, `nvlink`, `network`, `host`, or `local` for a
            group of one.
    """

    axis: str
    size: int
    bytes_per_second: float
    latency_seconds: float
    launch_seconds: float = 0.0
    kind: str


def group_link(axes: Sequence[str], mesh: Mesh, target: Target) -> AxisLink:
    """The links of a collective over the product of some mesh axes: those of the slowest group.

    Args:
        axes: names of axes of the mesh.
        mesh: the mesh.
        target: a target with as many devices.

    Raises:
        MeshError: the mesh and the target have different numbers of devices.
    """
    check_devices(mesh, target)
    links = (_link(places, ",".join(axes), target) for places in _groups(axes, mesh, target))
    return min(links, key=lambda link: (link.bytes_per_second, -link.launch_seconds))


def _link(places: Sequence[_Place], name: str, target: Target) -> AxisLink:
    """The links of one group."""
    chip = target.chip
    if len(places) == 1:
        return AxisLink(
            axis=name,
            size=1,
            bytes_per_second=chip.hbm_bytes_per_second,
            latency_seconds=0.0,
            kind="local",
        )
    by_slice: dict[int, list[_Place]] = {}
    for place in places:
        by_slice.setdefault(place[0], []).append(place)
    fewest = min(by_slice.values(), key=len)
    kind, speed = _inside(fewest, target)
    launch = chip.launch_seconds
    if len(by_slice) > 1:
        lanes = len(fewest) * chip.network_bytes_per_second
        kind, speed = "network", min(lanes, speed)
        launch += len(by_slice) * chip.network_latency_seconds
    return AxisLink(
        axis=name,
        size=len(places),
        bytes_per_second=speed,
        latency_seconds=chip.latency_seconds,
        launch_seconds=launch,
        kind=kind,
    )


def ring_link(chip: Chip, size: int, axis: str = "") -> AxisLink:
    """The plain ring by which a compiled program's collectives are timed.

    Args:
        chip: the chip.
        size: devices of the group.
        axis: a name for the group.

    >>> from autoshard.hardware.chips import get_chip
    >>> ring_link(get_chip("tpu:v5e"), 8).bytes_per_second
    90000000000.0
    """
    both_ways = 2 if chip.link_kind == "torus" else 1
    return AxisLink(
        axis=axis,
        size=size,
        bytes_per_second=both_ways * chip.link_bytes_per_second,
        latency_seconds=chip.latency_seconds,
        launch_seconds=chip.launch_seconds,
        kind={"torus": "torus-ring"}.get(chip.link_kind, chip.link_kind),
    )


def device_coordinates(target: Target) -> tuple[_Place, ...]:
    """Where each device sits, in the order of `jax.devices()`.

    Returns:
        For each device its slice or node, its chip's torus coordinates, and its index on the chip.
    """
    chips = sorted(
        itertools.product(*(range(size) for size in target.topology)),
        key=lambda spot: (target.host_of(spot)[::-1], spot[::-1]),
    )
    return tuple(
        (index, spot, core)
        for index in range(target.n_slices)
        for spot in chips
        for core in range(target.chip.devices_per_chip)
    )


def _groups(axes: Sequence[str], mesh: Mesh, target: Target) -> list[list[_Place]]:
    """The places of each group, that of the first device first."""
    groups: dict[tuple[int, ...], list[_Place]] = {}
    indices = itertools.product(*map(range, mesh.shape))
    for index, place in zip(indices, device_coordinates(target), strict=True):
        outside = tuple(at for at, name in zip(index, mesh.sizes, strict=True) if name not in axes)
        groups.setdefault(outside, []).append(place)
    return list(groups.values())


def _inside(places: Sequence[_Place], target: Target) -> tuple[str, float]:
    """Kind and speed of the links between the members of a group on one slice or node."""
    chip = target.chip
    if chip.link_kind != "torus":
        return chip.link_kind, chip.link_bytes_per_second
    spots = sorted({place[1] for place in places})
    if len(spots) == 1:
        on_chip = chip.on_chip_bytes_per_second or chip.hbm_bytes_per_second
        return "on-chip", on_chip
    # Devices of a chip that are not in this group run the same collective over the same links.
    share = len(places) / len(spots) / chip.devices_per_chip
    extents = [sorted({spot[axis] for spot in spots}) for axis in range(len(target.topology))]
    if math.prod(len(values) for values in extents) != len(spots):
        # Not a box: a path through the chips, one link at its ends.
        return "torus-line", chip.link_bytes_per_second * share
    links, wrapped = 0.0, chip.wraps(target.topology)
    for values, size, closes in zip(extents, target.topology, wrapped, strict=True):
        if len(values) > 1:
            stride = values[1] - values[0]
            links += (2 if closes and stride * len(values) == size else 1) / stride
    long = [values for values in extents if len(values) > 1]
    is_ring = len(long) > 1 or links * (long[0][1] - long[0][0]) == 2
    return "torus-ring" if is_ring else "torus-line", chip.link_bytes_per_second * share * links
