"""Reading a map that somebody wrote: Python source, a LayoutMap, or the one KerasHub ships."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoshard.errors import LayoutError, PlanFileError, UsageError
from autoshard.layout.rules import LayoutRules, Rule, WrittenMap
from autoshard.layout.source import SPEC, parse_map
from autoshard.mesh import Mesh
from autoshard.model.keras_import import import_keras

__all__ = [
    "LayoutLike",
    "LayoutText",
    "check_there",
    "is_json",
    "is_text",
    "kerashub_rules",
    "open_layout",
    "read_map",
]

# The word for the map that KerasHub ships.
_KERASHUB = "kerashub"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutText:
    """Text that holds a layout.

    Attributes:
        name: what an error calls it: the path it was read from, or "the given text".
        text: Python source or JSON.
    """

    name: str
    text: str

    @property
    def is_json(self) -> bool:
        """Whether it is to be read as JSON, by its name or by how it begins."""
        return self.name.endswith(".json") or is_json(self.text)


# What a caller may give for a map: a word, a path, text, a LayoutMap or a dict like one.
LayoutLike = str | os.PathLike[str] | Mapping[str, Any] | LayoutText


def open_layout(layout: LayoutLike) -> Mapping[str, Any] | LayoutText | str:
    """A layout, its file read. A pipe gives what it holds only once.

    Args:
        layout: as for `read_map`, or JSON or its path.

    Returns:
        The mapping, the text, or the word `kerashub`.

    Raises:
        UsageError: it is no layout, or there is no such file.
        PlanFileError: the file cannot be read.
    """
    if isinstance(layout, Mapping | LayoutText) or layout == _KERASHUB:
        return layout
    check_there(layout)
    if is_text(layout):
        return LayoutText(name="the given text", text=str(layout))
    path = os.fspath(layout)
    try:
        return LayoutText(name=path, text=Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise PlanFileError(f"{path} cannot be read: {reason}") from None


def check_there(layout: object) -> None:
    """Make sure that a layout is one, and that there is a file where it is the path of one.

    Raises:
        UsageError: it is none, or there is no such file.
    """
    if isinstance(layout, Mapping | LayoutText) or is_text(layout) or layout == _KERASHUB:
        return
    if not isinstance(layout, str | os.PathLike):
        raise UsageError(
            f"the layout is {layout!r}; give a path, Python source, 'kerashub', a LayoutMap or a "
            "dict of patterns and specs"
        )
    if not os.path.lexists(layout):
        raise UsageError(
            f"there is no layout '{os.fspath(layout)}'; give a plan's JSON file, a Python file "
            "with layout_map[...] = (...) lines, or the word kerashub"
        )


def is_text(layout: object) -> bool:
    """Whether a layout is source or JSON itself, and not a path to some."""
    is_source = isinstance(layout, str) and ("\n" in layout or "layout_map[" in layout)
    return is_source or is_json(layout)


def is_json(layout: object) -> bool:
    """Whether a layout is a text that may be a plan written out."""
    return isinstance(layout, str) and layout.lstrip().startswith("{")


def read_map(layout: LayoutLike, backbone: object = None, mesh: Mesh | None = None) -> WrittenMap:
    """Read a map.

    Args:
        layout: the word `kerashub`, a path to Python source, such source itself, a
            `keras.distribution.LayoutMap`, or a mapping of patterns to specs.
        backbone: the KerasHub backbone, or its class, that `kerashub` asks; else not needed.
        mesh: gives `kerashub` its axis names; `batch` and `model` by default.

    Raises:
        UsageError: it is no layout, there is no such file, or `kerashub` without a backbone.
        PlanFileError: the file cannot be read.
        LayoutError: the source holds no map, or several, or KerasHub ships none.
    """
    opened = open_layout(layout)
    if isinstance(opened, Mapping):
        return _map_of(opened)
    if isinstance(opened, LayoutText):
        return parse_map(opened.text, opened.name)
    return WrittenMap(rules=kerashub_rules(backbone, mesh))


def kerashub_rules(backbone: object, mesh: Mesh | None = None) -> LayoutRules:
    """The map that a KerasHub backbone ships, as data.

    Args:
        backbone: a backbone or its class.
        mesh: gives the axis names: the first is the data axis, the last the model axis. With one
            axis, or without a mesh, they are `batch` and `model`.

    Raises:
        UsageError: there is no backbone to ask.
        LayoutError: the backbone ships no map.
    """
    if backbone is None:
        raise UsageError("'kerashub' is the map of a backbone; give a KerasHub model with it")
    cls = backbone if isinstance(backbone, type) else type(backbone)
    get_layout_map: Any = getattr(backbone, "get_layout_map", None)
    if get_layout_map is None:
        raise LayoutError(f"KerasHub ships no map for {cls.__name__}; let autoshard plan one")
    keras = import_keras()
    names = mesh.axis_names if mesh is not None and len(mesh.axis_names) > 1 else ("batch", "model")
    device_mesh = keras.distribution.DeviceMesh(
        shape=(1,) * len(names),
        axis_names=names,
        devices=keras.distribution.list_devices()[:1],
    )
    layout_map = get_layout_map(
        device_mesh, model_parallel_dim_name=names[-1], data_parallel_dim_name=names[0]
    )
    return _map_of(layout_map).accepted()


def _map_of(layout_map: Mapping[str, Any]) -> WrittenMap:
    """A LayoutMap, or a dict of patterns and specs."""
    rules, unreadable = [], []
    for pattern, layout in layout_map.items():
        axes = getattr(layout, "axes", layout)
        try:
            if not isinstance(pattern, str):
                raise LayoutError(f"cannot read rule {pattern!r}: a pattern is a string")
            if not isinstance(axes, tuple) or any(not isinstance(a, str | None) for a in axes):
                raise LayoutError(f"rule '{pattern}': cannot read {layout!r}: {SPEC}")
            rules.append(Rule(pattern=pattern, spec=axes))
        except LayoutError as error:
            unreadable.append(str(error))
    return WrittenMap(rules=tuple(rules), unreadable=tuple(unreadable))
