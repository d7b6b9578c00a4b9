"""The catalogue of presets, as text."""

from collections.abc import Sequence

from tabulate import tabulate

from autoshard.model.catalogue import Preset
from autoshard.units import format_count

__all__ = ["models_text"]


def models_text(presets: Sequence[Preset]) -> str:
    """Print presets as a table.

    Args:
        presets: what to list.
    """
    rows = [
        (p.name, p.class_name, f"{p.n_parameters:,}", format_count(p.n_parameters)) for p in presets
    ]
    headers = ("preset", "backbone", "parameters", "rounded")
    table = tabulate(
        rows, headers=headers, colalign=("left", "left", "right", "left"), disable_numparse=True
    )
    return f"{table}\n\n{len(rows)} presets"
