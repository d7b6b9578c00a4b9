"""The table of accelerators: one row a chip, each field with its source (`chips.json`).

Amounts are those of one device as `jax.devices()` counts them: TPU v2, v3 and v7x show two devices
a chip, which share its links. A field whose source is `memory` was recalled and one whose source is
`assumed` has nothing behind it; `fitted_...` sources are fits and say to what.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from importlib.resources import files
from typing import Any

from autoshard.errors import UnknownNameError

__all__ = ["Chip", "chip_names", "get_chip", "known_chips", "source_texts"]

# Cloud's and people's other names for a row of the table.
_ALIASES = {"tpu:v7x": "tpu:tpu7x", "tpu:v5litepod": "tpu:v5e"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """One accelerator; bandwidths are one way and in bytes a second.

    Attributes:
        name: `tpu:v5e`, `gpu:h100-sxm` or `cpu`.
        kind: `tpu`, `gpu` or `cpu`.
        link_kind: what joins devices of one slice or node: `torus`, `nvlink` or `host`.
        jax_device_kinds: what `device.device_kind` prints for it.
        devices_per_chip: devices that share a chip and its links.
        peak_flops_per_second: dtype -> peak of one device; see `flops_per_second`.
        hbm_bytes: memory of a device that a program may use.
        hbm_bytes_per_second: nominal memory bandwidth of a device.
        hbm_read_efficiency: what of it reading reaches.
        hbm_write_efficiency: what of it writing reaches.
        link_bytes_per_second: of one torus link of a chip, or of all of a GPU's links.
        network_bytes_per_second: between slices or nodes, for one device.
        latency_seconds: of a collective, for each device of its group.
        launch_seconds: of a collective, once.
        network_latency_seconds: of a collective, for each slice or node of its group.
        overlapped_collectives: kinds that the compiler hides behind compute; others block.
        mxu_size: edge of the matrix unit's tile, in elements.
        matmul_efficiency_max: what of the peak a large matrix multiplication reaches.
        matmul_overhead_seconds: of one matrix multiplication, before and after the peak.
        sources: field -> keys of `source_texts()`.
        notes: field -> how the source was read, where that needs saying.
        vmem_bytes: on-chip memory of a TPU's core, where small arrays may live; else 0.
        clock_hz: clock of a TPU, which turns its compiler's cycles into seconds.
        torus_dimensions: axes of a TPU's torus.
        wrap_axis_size: the one size of a torus axis that closes into a ring, if size decides.
        wrap_multiple: all torus axes close where each is a multiple of this, if that decides.
        slices: topologies that are offered, smallest first.
        on_chip_bytes_per_second: between the two devices of one chip.
        devices_per_node: devices of a GPU node at most; 0 for TPUs and the CPU.
        topology_options: what the compiler needs beside the slice's name.
        device_info: what the CUDA compiler asks a GPU's driver, under the names of its proto.
    """

    name: str
    kind: str
    link_kind: str
    jax_device_kinds: tuple[str, ...]
    devices_per_chip: int
    peak_flops_per_second: Mapping[str, float] = field(hash=False)
    hbm_bytes: int
    hbm_bytes_per_second: float
    hbm_read_efficiency: float
    hbm_write_efficiency: float
    link_bytes_per_second: float
    network_bytes_per_second: float
    latency_seconds: float
    launch_seconds: float
    network_latency_seconds: float
    overlapped_collectives: tuple[str, ...]
    mxu_size: int
    matmul_efficiency_max: float
    matmul_overhead_seconds: float
    sources: Mapping[str, tuple[str, ...]] = field(hash=False, repr=False)
    notes: Mapping[str, str] = field(hash=False, repr=False)
    vmem_bytes: int = 0
    clock_hz: float | None = None
    torus_dimensions: int = 0
    wrap_axis_size: int | None = None
    wrap_multiple: int | None = None
    slices: tuple[tuple[int, ...], ...] = ()
    on_chip_bytes_per_second: float | None = None
    devices_per_node: int = 0
    topology_options: Mapping[str, str] = field(hash=False, default_factory=dict)
    device_info: Mapping[str, float] = field(hash=False, repr=False, default_factory=dict)

    def flops_per_second(self, dtype: str) -> float:
        """Peak of one device in `dtype`; a dtype without a row computes as bfloat16.

        >>> get_chip("tpu:v5e").flops_per_second("bfloat16") / 1e12
        197.0
        """
        name = "float8" if dtype.startswith("float8") else dtype
        return self.peak_flops_per_second.get(name, self.peak_flops_per_second["bfloat16"])

    def wraps(self, topology: tuple[int, ...]) -> tuple[bool, ...]:
        """Which axes of a slice close into rings.

        >>> get_chip("tpu:v5e").wraps((8, 16)), get_chip("tpu:v4").wraps((4, 4, 8))
        ((False, True), (True, True, True))
        """
        if self.wrap_multiple is not None:
            return (all(size % self.wrap_multiple == 0 for size in topology),) * len(topology)
        return tuple(size == self.wrap_axis_size for size in topology)


def get_chip(name: str) -> Chip:
    """Look a chip up by its name, such as `tpu:v5e`.

    Raises:
        UnknownNameError: no such chip; the text offers the nearest names.

    >>> get_chip("tpu:v7x").name
    'tpu:tpu7x'
    """
    wanted = name.strip().lower()
    for chip in known_chips():
        if chip.name == _ALIASES.get(wanted, wanted):
            return chip
    raise UnknownNameError("chip", name, chip_names(), "(autoshard chips lists them)")


def chip_names() -> tuple[str, ...]:
    """The names of all chips, in the table's order."""
    return tuple(chip.name for chip in known_chips())


@cache
def known_chips() -> tuple[Chip, ...]:
    """Every chip of the table, in its order."""
    return tuple(_chip(name, row) for name, row in _table()["chips"].items())


def source_texts() -> dict[str, str]:
    """Key -> the document, fit or assumption that a field's number comes from."""
    return dict(_table()["sources"])


@cache
def _table() -> dict[str, Any]:
    text = files("autoshard.hardware").joinpath("chips.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


def _chip(name: str, row: Mapping[str, Any]) -> Chip:
    cells = row["fields"]
    values = {key: _frozen(cell["value"]) for key, cell in cells.items()}
    missing = {
        entry.name
        for entry in fields(Chip)
        if entry.default is MISSING and entry.default_factory is MISSING
    } - {*values, "name", "kind", "link_kind", "sources", "notes"}
    assert not missing, f"{name} lacks {missing}"
    return Chip(
        name=name,
        kind=row["kind"],
        link_kind=row["link_kind"],
        sources={key: tuple(cell["source"]) for key, cell in cells.items()},
        notes={key: cell["note"] for key, cell in cells.items() if "note" in cell},
        **values,
    )


def _frozen(value: Any) -> Any:
    return tuple(_frozen(entry) for entry in value) if isinstance(value, list) else value
