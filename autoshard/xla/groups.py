"""Which devices talk to each other in a collective, and along which axes of the mesh.

XLA writes the groups of a collective in one of these forms, all of positions in the mesh in
row-major order (8 devices here):

    {{0,1,2,3},{4,5,6,7}}                              listed
    [2,4]<=[8]                                         2 groups of 4, counting up
    [4,2]<=[2,4]T(1,0)                                 count up over 2x4, transpose, 4 groups of 2
    mesh['a'=2,'b'=4] {'b'}                            one group for each place along the other axes
    mesh['a'=2,'b'=4] {'b':(1)2}                       a part of an axis: (places before) size
    mesh['a'=4,'b'=2], device_ids=([4,2]<=[2,4]T(1,0)) {'a'}      the mesh's devices in that order

and those of a permute as `source_target_pairs={{0,1},{1,0}}`.
"""

import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from autoshard.errors import XlaError
from autoshard.mesh import Mesh

__all__ = ["Groups", "axes_of", "parse_groups", "parse_pairs", "parse_tiles"]

Groups = tuple[tuple[int, ...], ...]

_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\(([^)]*(?:\([\d,]*\))?)\))? \{([^}]*)\}")
_AXIS = re.compile(r"'?([\w.\-]+)'?=(\d+)")
_PART = re.compile(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?")
_LIST = re.compile(r"replica_groups=\{((?:\{[\d,\s]*\},?\s*)*)\}")
_TILES = re.compile(
    r"sharding=\{devices=\[([\d,]+)\](?:(<=[\[\]\dT(),]+)|([\d,]+))(?: ([\w={}, ]+))?\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?\s*)*)\}")


def parse_groups(attributes: str, n_devices: int) -> Groups:
    """Read `replica_groups=` from the attributes of a collective.

    Args:
        attributes: the text after the operands.
        n_devices: all devices; no groups, or an empty list of them, means one group of all.

    Raises:
        XlaError: the groups are written in a form that is not known.
    """
    if "replica_groups=" not in attributes or "replica_groups={}" in attributes:
        return (tuple(range(n_devices)),)
    text = attributes[attributes.index("replica_groups=") :]
    if listed := _LIST.match(text):
        return tuple(_numbers(group) for group in re.findall(r"\{([^}]*)\}", listed[1]))
    text = text.removeprefix("replica_groups=")
    if mesh := _MESH.match(text):
        return _mesh_groups(mesh[1], mesh[2], mesh[3])
    if iota := _IOTA.match(text):
        return _as_groups(_iota(iota))
    raise XlaError(f"the compiler writes the groups of a collective in a new form: {text[:80]}")


def parse_pairs(attributes: str) -> Groups:
    """Read `source_target_pairs=` from the attributes of a permute."""
    match = _PAIRS.search(attributes)
    return tuple(_numbers(pair) for pair in re.findall(r"\{([^}]*)\}", match[1])) if match else ()


def parse_tiles(attributes: str, n_devices: int) -> tuple[int, ...] | None:
    """Read `sharding=` from the attributes of an argument.

    Args:
        attributes: the text after the operands.
        n_devices: all devices.

    Returns:
        For each device which shard it holds, or None if it does not say.

    >>> parse_tiles("sharding={devices=[2,1,2]<=[4] last_tile_dim_replicate}", 4)
    (0, 0, 1, 1)
    """
    if "sharding={replicated}" in attributes:
        return (0,) * n_devices
    match = _TILES.search(attributes)
    if match is None or (match[4] or "") not in ("", "last_tile_dim_replicate"):
        return None
    dims = _numbers(match[1])
    iota = _IOTA.match(f"[{match[1]}]{match[2]}") if match[2] else None
    devices = _iota(iota).reshape(-1) if iota else np.array(_numbers(match[3] or ""))
    if sorted(devices) != list(range(n_devices)):
        return None
    n_copies = dims[-1] if match[4] else 1
    shards = np.empty(n_devices, dtype=int)
    shards[devices] = np.arange(n_devices) // n_copies
    return tuple(int(shard) for shard in shards)


def axes_of(groups: Iterable[Sequence[int]], mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which members of a group differ, in the order of the mesh.

    >>> from autoshard.mesh import parse_mesh
    >>> axes_of(((0, 1, 2, 3), (4, 5, 6, 7)), parse_mesh("2x4"))
    ('model',)
    """
    places = np.array(np.unravel_index(np.arange(mesh.n_devices), mesh.shape))
    differs = np.zeros(len(mesh.shape), dtype=bool)
    for group in groups:
        members = places[:, list(group)]
        differs |= (members != members[:, :1]).any(axis=1)
    return tuple(name for name, moves in zip(mesh.axis_names, differs, strict=True) if moves)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def _iota(match: re.Match[str]) -> np.ndarray:
    """`[dims]<=[counted]T(order)`: count up over `counted`, transpose, reshape to `dims`."""
    dims = _numbers(match[1])
    counted = _numbers(match[2]) if match[2] else dims
    array = np.arange(math.prod(counted)).reshape(counted)
    return array.transpose(_numbers(match[3] or "") or range(len(counted))).reshape(dims)


def _as_groups(array: np.ndarray) -> Groups:
    return tuple(tuple(int(device) for device in group) for group in array)


def _mesh_groups(axes: str, device_ids: str | None, grouped: str) -> Groups:
    """The groups of a named mesh: split partial axes, move the grouped axes last, flatten."""
    sizes = {name: int(size) for name, size in _AXIS.findall(axes)}
    count = math.prod(sizes.values())
    if not device_ids:
        devices = np.arange(count)
    elif iota := _IOTA.match(device_ids):
        devices = _iota(iota).reshape(-1)
    else:
        devices = np.array(_numbers(device_ids))
    parts = [(name, before, size) for name, before, size in _PART.findall(grouped) if name]
    shape: list[int] = []
    position: dict[tuple[str, int], int] = {}
    for name, size in sizes.items():
        taken = 1
        for before, part in sorted((int(b), int(p)) for n, b, p in parts if n == name and b):
            if before > taken:
                shape.append(before // taken)
            position[name, before] = len(shape)
            shape.append(part)
            taken = before * part
        if (name, "", "") in parts:
            position[name, 0] = len(shape)
        shape.append(size // taken)
    last = [position[name, int(before or 0)] for name, before, _ in parts]
    first = [index for index in range(len(shape)) if index not in last]
    n_members = math.prod(shape[index] for index in last)
    return _as_groups(devices.reshape(shape).transpose(first + last).reshape(-1, n_members))
