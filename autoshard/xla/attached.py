"""The target `attached`: the accelerators of this machine, as JAX sees them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from autoshard.errors import UsageError, XlaError
from autoshard.hardware.chips import known_chips
from autoshard.hardware.targets import Target
from autoshard.processes.child import Child

__all__ = ["Seen", "attached_target", "devices_seen", "target_seen"]

_SECONDS = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One device.

    Attributes:
        kind: what `device.device_kind` prints.
        platform: `cpu`, `gpu` or `tpu`.
        coordinates: of its chip in the torus; empty where there is none.
        node: the slice of a TPU, or the process that a GPU belongs to.
    """

    kind: str
    platform: str
    coordinates: tuple[int, ...]
    node: int


def attached_target() -> Target:
    """The target that the attached devices make.

    A child asks JAX, so that the devices are free again afterwards.

    Raises:
        UsageError: the chip table does not know them.
        XlaError: JAX cannot start.
    """
    with Child({"JAX_PLATFORMS": "", "TF_CPP_MIN_LOG_LEVEL": "3"}) as child:
        seen = child.call("autoshard.xla.attached:devices_seen", None, timeout_seconds=_SECONDS)
    return target_seen(seen)


def devices_seen(request: None, progress: Callable[[str], None]) -> tuple[Seen, ...]:
    """The devices that JAX shows in this process."""
    import jax

    progress("start JAX")
    return tuple(_seen(device) for device in jax.devices())


def _seen(device: Any) -> Seen:
    node = getattr(device, "slice_index", None)
    return Seen(
        kind=device.device_kind,
        platform=device.platform,
        coordinates=tuple(getattr(device, "coords", None) or ()),
        node=device.process_index if node is None else node,
    )


def target_seen(devices: Sequence[Seen]) -> Target:
    """The target that devices make.

    Args:
        devices: what JAX shows, at least one.

    Raises:
        UsageError: the chip table does not know them.
        XlaError: their coordinates are no box, or their nodes have not equally many.
    """
    if devices[0].platform == "cpu":
        chip = next(chip for chip in known_chips() if chip.kind == "cpu")
        return Target(chip=chip, topology=(len(devices),))
    kinds = {device.kind for device in devices}
    found = [chip for chip in known_chips() if kinds <= set(chip.jax_device_kinds)]
    if not found:
        raise UsageError(
            f"the attached devices are {', '.join(sorted(kinds))}, which the chip table does not "
            "know; name a target (autoshard chips lists the chips)"
        )
    chip, n_nodes = found[0], len({device.node for device in devices})
    topology: tuple[int, ...] = (len(devices) // n_nodes,)
    if chip.kind == "tpu":
        axes = range(chip.torus_dimensions)
        topology = tuple(len({device.coordinates[axis] for device in devices}) for axis in axes)
    target = Target(chip=chip, topology=topology, n_slices=n_nodes)
    if target.n_devices != len(devices):
        raise XlaError(
            f"JAX shows {len(devices)} devices of {chip.name}, which make no {target}: name the "
            "target that is meant"
        )
    return target
