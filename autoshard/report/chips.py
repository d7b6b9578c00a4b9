"""The table of `autoshard chips`: what each chip can do, and where the numbers come from."""

from collections.abc import Sequence
from dataclasses import asdict

from tabulate import tabulate

from autoshard.codec import dump
from autoshard.hardware.chips import Chip, source_texts
from autoshard.units import format_bytes

__all__ = ["chips_json", "chips_text"]

_HEADERS = (
    "chip",
    "bf16 TFLOP/s a device",
    "usable memory",
    "HBM GB/s",
    "link GB/s",
    "link",
    "devices a chip",
    "sources",
)
# The fields that the columns show; a chip's footnotes are the sources of these.
_SHOWN = (
    "peak_flops_per_second",
    "hbm_bytes",
    "hbm_bytes_per_second",
    "link_bytes_per_second",
    "devices_per_chip",
)


def chips_text(chips: Sequence[Chip]) -> str:
    """Print chips as a table, with the sources of its numbers as footnotes.

    Args:
        chips: the chips to show.
    """
    used = {key for chip in chips for name in _SHOWN for key in chip.sources[name]}
    texts = {key: text for key, text in source_texts().items() if key in used}
    marks = {key: str(number) for number, key in enumerate(texts, start=1)}
    rows = [_row(chip, marks) for chip in chips]
    table = tabulate(rows, headers=_HEADERS, stralign="left", disable_numparse=True)
    notes = "\n".join(f"[{marks[key]}] {key}: {text}" for key, text in texts.items())
    return (
        f"{table}\n\n"
        "Amounts are a device's, as jax.devices() counts them. Link: one way, of one torus link "
        "(a chip's), or of all links of a GPU.\n"
        "Every number is from a document, a fit or an assumption, as its sources say; none was "
        f"measured here. All fields, each with its source: --format json.\n\n{notes}"
    )


def chips_json(chips: Sequence[Chip]) -> str:
    """Print chips as JSON: every field, with its sources and notes, and the table of sources.

    Args:
        chips: the chips to show.
    """
    rows = {chip.name: asdict(chip) for chip in chips}
    return dump({"chips": rows, "sources": source_texts()})


def _row(chip: Chip, marks: dict[str, str]) -> tuple[str, ...]:
    keys = {key for name in _SHOWN for key in chip.sources[name]}
    numbers = sorted((marks[key] for key in keys), key=int)
    return (
        chip.name,
        f"{chip.flops_per_second('bfloat16') / 1e12:.4g}",
        format_bytes(chip.hbm_bytes),
        f"{chip.hbm_bytes_per_second / 1e9:.4g}",
        f"{chip.link_bytes_per_second / 1e9:.4g}",
        chip.link_kind,
        str(chip.devices_per_chip),
        "".join(f"[{number}]" for number in numbers),
    )
