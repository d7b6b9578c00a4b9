"""The variable table, as text, JSON, CSV or Markdown."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence

from tabulate import tabulate

from autoshard.codec import dump
from autoshard.model.variables import ModelTable, Variable
from autoshard.units import format_bytes, spell_count

__all__ = ["INSPECT_FORMATS", "layer_text"]

_COLUMNS = ("path", "shape", "dtype", "parameters", "bytes", "trainable", "family")


def _row(variable: Variable) -> tuple[str, str, str, int, int, str, str]:
    return (
        variable.path,
        "x".join(map(str, variable.shape)) or "scalar",
        variable.dtype,
        variable.n_parameters,
        variable.n_bytes,
        "yes" if variable.trainable else "no",
        variable.family,
    )


def _text(table: ModelTable) -> str:
    rows = [
        (path, shape, dtype, f"{parameters:,}", format_bytes(n_bytes), trainable, family)
        for path, shape, dtype, parameters, n_bytes, trainable, family in map(_row, table.variables)
    ]
    align = ("left", "left", "left", "right", "right", "left", "left")
    body = tabulate(rows, headers=_COLUMNS, colalign=align, disable_numparse=True)
    return f"{body}\n\n{_totals(table)}"


def _totals(table: ModelTable) -> str:
    return (
        f"{table.name}: {len(table.variables)} variables in {len(table.families())} families, "
        f"{spell_count(table.n_parameters, 'parameters', format_bytes(table.n_bytes))}, "
        f"of which {spell_count(table.n_trainable, 'trainable')}"
    )


def _markdown(table: ModelTable) -> str:
    rows = [_row(variable) for variable in table.variables]
    body = tabulate(rows, headers=_COLUMNS, tablefmt="github", disable_numparse=True)
    return f"{body}\n\n{_totals(table)}"


def _csv(table: ModelTable) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(_row(variable) for variable in table.variables)
    return out.getvalue().rstrip("\n")


def _json(table: ModelTable) -> str:
    return dump(
        {
            "model": table.name,
            "parameters": table.n_parameters,
            "trainable_parameters": table.n_trainable,
            "bytes": table.n_bytes,
            "variables": [
                {
                    "path": variable.path,
                    "shape": list(variable.shape),
                    "dtype": variable.dtype,
                    "parameters": variable.n_parameters,
                    "bytes": variable.n_bytes,
                    "trainable": variable.trainable,
                    "family": variable.family,
                }
                for variable in table.variables
            ],
        }
    )


INSPECT_FORMATS: Mapping[str, Callable[[ModelTable], str]] = {
    "text": _text,
    "json": _json,
    "csv": _csv,
    "markdown": _markdown,
}


def layer_text(variables: Sequence[Variable]) -> str:
    """The variables of one layer, a line each: path and shape.

    Args:
        variables: the variables to list.
    """
    width = max(len(variable.path) for variable in variables)
    return "\n".join(f"{variable.path:<{width}}  {variable.shape}" for variable in variables)
