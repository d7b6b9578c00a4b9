"""Targets: the machine a plan is for, written one way everywhere.

cpu:8               eight virtual devices of this host
tpu:v3:2x2          a slice of 2x2 chips (v2, v3 and v7x show two devices a chip: 8 devices)
tpu:v5e:4x4:2       two slices of 4x4 chips, joined by the data centre's network
gpu:h100-sxm:8      one node of eight GPUs
gpu:h100-sxm:2x8    two nodes of eight
"""

import math
import re
from dataclasses import dataclass, replace

from autoshard.errors import MeshError, UsageError
from autoshard.hardware.chips import Chip, get_chip
from autoshard.mesh import Mesh

__all__ = ["Target", "check_devices", "default_target", "parse_target", "target_of"]

_DEFAULT_CHIP = "tpu:v5e"
# Chips of one host on each of the first two torus axes, unless the compiler is told.
_HOST_EDGE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A number of chips and how they are joined.

    Attributes:
        chip: the chip.
        topology: chips along each torus axis of one slice; for GPUs and the CPU, one number: the
            devices of one node.
        n_slices: slices of a TPU, or nodes of a GPU machine.
    """

    chip: Chip
    topology: tuple[int, ...]
    n_slices: int = 1

    def __post_init__(self) -> None:
        if min((self.n_slices, *self.topology)) < 1:
            raise UsageError(f"target '{self}' has no devices: every number must be at least 1")
        if self.chip.kind == "cpu" and self.n_slices > 1:
            raise UsageError(
                f"target '{self}' is one host: give it its devices, like cpu:{self.n_devices}, "
                "and no slices"
            )
        axes = self.chip.torus_dimensions or 1
        if len(self.topology) != axes:
            raise UsageError(
                f"target '{self}' has {len(self.topology)} torus axes; {self.chip.name} has {axes}"
            )
        limit = self.chip.devices_per_node
        if limit and self.topology[0] > limit:
            raise UsageError(
                f"target '{self}' has more than the {limit} devices that a {self.chip.name} node "
                f"holds; write nodes x devices, like {self.chip.name}:2x{limit}"
            )

    def __str__(self) -> str:
        sizes = "x".join(str(size) for size in self.topology)
        if self.n_slices == 1:
            return f"{self.chip.name}:{sizes}"
        if self.chip.kind == "tpu":
            return f"{self.chip.name}:{sizes}:{self.n_slices}"
        return f"{self.chip.name}:{self.n_slices}x{sizes}"

    @property
    def n_devices(self) -> int:
        """Devices as JAX counts them."""
        return self.devices_per_slice * self.n_slices

    @property
    def devices_per_slice(self) -> int:
        """Devices of one slice or node."""
        return math.prod(self.topology) * self.chip.devices_per_chip

    @property
    def has_square_hosts(self) -> bool:
        """Whether hosts of 2x2 chips tile a slice; else each chip has a host of its own."""
        return len(self.topology) > 1 and not any(size % _HOST_EDGE for size in self.topology[:2])

    def host_of(self, spot: tuple[int, ...]) -> tuple[int, ...]:
        """Where the host of a chip sits among the hosts, by the chip's torus coordinates."""
        edge = _HOST_EDGE if self.has_square_hosts else 1
        return (*(place // edge for place in spot[:2]), *spot[2:])


def parse_target(text: str, n_devices: int | None = None) -> Target:
    """Read a target such as `tpu:v5e:2x4`.

    A TPU topology with fewer numbers than the chip's torus has axes is completed with ones; a
    single number is that of the chips, in the slice that is on offer (see `default_target`).

    Args:
        text: the target.
        n_devices: of the target that the name of a chip alone stands for; None for none.

    Raises:
        UnknownNameError: no such chip.
        UsageError: the sizes are missing, malformed, zero, or no machine of that chip has them.

    >>> str(parse_target("gpu:h100-sxm:2x8")), parse_target("tpu:v3:2x2").n_devices
    ('gpu:h100-sxm:2x8', 8)
    >>> str(parse_target("tpu:v5e:8")), str(parse_target("tpu:v5e:512"))
    ('tpu:v5e:2x4', 'tpu:v5e:16x16:2')
    >>> str(parse_target("gpu:h100-sxm", n_devices=16))
    'gpu:h100-sxm:2x8'
    """
    parts = text.strip().lower().split(":")
    n_names = 2 if parts[0] in ("tpu", "gpu") else 1
    chip = get_chip(":".join(parts[:n_names]))
    example = {"tpu": "tpu:v5e:2x4", "gpu": "gpu:h100-sxm:8", "cpu": "cpu:8"}[chip.kind]
    if len(parts) == n_names and n_devices is not None:
        return target_of(chip, n_devices)
    sizes, slices = [*parts[n_names:], "", ""][:2]
    most = 2 if chip.kind == "tpu" else 1
    if len(parts) > n_names + most or not re.fullmatch(r"\d+(x\d+)*", sizes):
        raise UsageError(f"'{text}' is not a target; write one like {example}")
    if slices and not slices.isdecimal():
        raise UsageError(
            f"'{text}': the number of slices must be a whole number, as in {example}:2"
        )
    numbers = tuple(int(size) for size in sizes.split("x"))
    if chip.kind == "tpu" and len(numbers) == 1 and numbers[0]:
        machine = _smallest_slices(chip, *numbers)
        return replace(machine, n_slices=machine.n_slices * int(slices or 1))
    if chip.kind == "tpu":
        ones = (1,) * (chip.torus_dimensions - len(numbers))
        return Target(chip=chip, topology=numbers + ones, n_slices=int(slices or 1))
    if len(numbers) > (2 if chip.kind == "gpu" else 1):
        raise UsageError(f"'{text}' is not a target; write one like {example}")
    return Target(chip=chip, topology=numbers[-1:], n_slices=math.prod(numbers[:-1]))


def check_devices(mesh: Mesh, target: Target) -> None:
    """Refuse a mesh that is not as large as its target.

    Raises:
        MeshError: they have different numbers of devices.
    """
    per_chip = target.chip.devices_per_chip
    if mesh.n_devices % per_chip:
        below = mesh.n_devices - mesh.n_devices % per_chip
        counts = " or ".join(str(count) for count in (below, below + per_chip) if count)
        raise MeshError(
            f"mesh {mesh} has {mesh.n_devices} devices, and each chip of {target.chip.name} is "
            f"{per_chip}: take a mesh of {counts}"
        )
    if mesh.n_devices != target.n_devices:
        raise MeshError(
            f"mesh {mesh} has {mesh.n_devices} devices and target {target} has "
            f"{target.n_devices}: name a target of {mesh.n_devices} devices, or another mesh"
        )


def default_target(n_devices: int) -> Target:
    """The target of so many devices where none was named: the smallest slice of TPU v5e.

    Where no slice on offer has as many, more than the largest become several
    slices, and fewer (2, 3, 6, 12, ...) the most nearly square slice: nobody rents it out, but
    costs are defined and its compiler compiles for it.

    >>> [str(default_target(n_devices)) for n_devices in (1, 8, 6, 512)]
    ['tpu:v5e:1x1', 'tpu:v5e:2x4', 'tpu:v5e:2x3', 'tpu:v5e:16x16:2']
    """
    return target_of(get_chip(_DEFAULT_CHIP), n_devices)


def target_of(chip: Chip, n_devices: int) -> Target:
    """The smallest machine of a chip with so many devices; see `default_target`.

    >>> str(target_of(get_chip("gpu:h100-sxm"), 16))
    'gpu:h100-sxm:2x8'
    """
    if chip.kind == "cpu":
        return Target(chip=chip, topology=(n_devices,))
    if chip.kind == "gpu":
        per_node = _largest_divisor(n_devices, chip.devices_per_node)
        return Target(chip=chip, topology=(per_node,), n_slices=n_devices // per_node)
    return _smallest_slices(chip, -(-n_devices // chip.devices_per_chip))


def _smallest_slices(chip: Chip, n_chips: int) -> Target:
    sizes = {math.prod(topology): topology for topology in reversed(chip.slices)}
    if n_chips in sizes:
        return Target(chip=chip, topology=sizes[n_chips])
    if n_chips > max(sizes):
        per_slice = max(size for size in (1, *sizes) if n_chips % size == 0)
        topology = sizes.get(per_slice, (1,) * chip.torus_dimensions)
        return Target(chip=chip, topology=topology, n_slices=n_chips // per_slice)
    edge = _largest_divisor(n_chips, math.isqrt(n_chips))
    ones = (1,) * (chip.torus_dimensions - 2)
    return Target(chip=chip, topology=(edge, n_chips // edge, *ones))


def _largest_divisor(number: int, limit: int) -> int:
    return max(size for size in range(1, limit + 1) if number % size == 0)
