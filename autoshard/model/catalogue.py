"""The catalogue: KerasHub presets by name, with the configuration their backbone is built from.

`presets.json` holds one preset a line: the KerasHub class, its constructor's configuration and the
number of parameters of the model so built. Where KerasHub's own registry states another number,
that one stands beside it with a note that says why.
"""

import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from typing import Any

from autoshard.errors import UnknownNameError

__all__ = ["Preset", "find", "get", "names"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A KerasHub preset.

    Attributes:
        name: the name that `from_preset` takes.
        class_name: the backbone's class in `keras_hub.models`.
        config_json: what the class is built from, as JSON text.
        n_parameters: parameters of the backbone so built.
        n_registry_parameters: parameters as KerasHub's registry states them.
        note: what is assumed, or why the two numbers differ; empty where there is nothing to say.
    """

    name: str
    class_name: str
    config_json: str
    n_parameters: int
    n_registry_parameters: int
    note: str

    def config(self) -> dict[str, Any]:
        """A new copy of the configuration: `from_config` changes what it is given."""
        return dict(json.loads(self.config_json))


@cache
def _rows() -> dict[str, dict[str, Any]]:
    text = files("autoshard.model").joinpath("presets.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def names(pattern: str | None = None) -> tuple[str, ...]:
    """Preset names in the catalogue's order.

    Args:
        pattern: a shell pattern (`gemma*7b*`) or a part of the name, in any case; all by default.

    >>> names("gemma_7b_e*")
    ('gemma_7b_en',)
    """
    if pattern is None:
        return tuple(_rows())
    if not any(character in pattern for character in "*?["):
        pattern = f"*{pattern}*"
    return tuple(name for name in _rows() if fnmatchcase(name.lower(), pattern.lower()))


def find(pattern: str | None = None) -> tuple[Preset, ...]:
    """The presets that `names` gives.

    Raises:
        UnknownNameError: there is none; the text offers the nearest names.
    """
    found = names(pattern)
    if not found:
        raise UnknownNameError("preset", pattern or "", names(), "(part of a name finds it)")
    return tuple(get(name) for name in found)


def get(name: str) -> Preset:
    """Look a preset up.

    Raises:
        UnknownNameError: there is no such preset; the text offers the nearest names.

    >>> get("gemma_7b_en").n_parameters
    8537680896
    """
    rows = _rows()
    if name not in rows:
        raise UnknownNameError("model", name, rows, "(autoshard models lists them)")
    row = rows[name]
    return Preset(
        name=name,
        class_name=row["class"],
        config_json=json.dumps(row["config"]),
        n_parameters=row["params"],
        n_registry_parameters=row.get("registry_params", row["params"]),
        note=row.get("note", ""),
    )
