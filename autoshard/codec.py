"""Dataclasses to JSON and back, so that each wrong field is named.

The JSON of a dataclass is an object with its fields in order, under the field's name or the one in
its metadata (`field(metadata={"key": "layout_map"})`); a class that has `to_record` and
`from_record` says itself what it is. Numbers keep the declared type, so equal values give equal
bytes. A field with `metadata={"optional": True}` is written where it is not its default. Numbers
are read that are 0 or more, and others where the field has `metadata={"signed": True}`.
"""

import dataclasses
import json
import math
import operator
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from autoshard.errors import AutoshardError, PlanFileError

__all__ = ["dump", "from_record", "keys", "to_record"]

_LINE_CHARACTERS = 100
_CONVERT: dict[Any, Callable[[Any], Any]] = {int: operator.index, str: str, bool: bool}
_EXPECTED = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


def to_record(value: Any, hint: Any = None, where: str = "") -> Any:
    """What `json.dumps` takes for a value.

    Args:
        value: a dataclass, or what its fields may hold: tuples, numbers, strings, None.
        hint: the declared type; by default that of the value.
        where: the name of the field, for errors.

    Raises:
        PlanFileError: a number is not finite, which JSON cannot hold.
    """
    hint = type(value) if hint is None else hint
    if value is None:
        return None
    hint = _options(hint)[0]
    if hasattr(hint, "to_record"):
        return value.to_record()
    if dataclasses.is_dataclass(hint):
        optional = _marked(hint, "optional")
        return {
            key: to_record(getattr(value, name), field_hint, _join(where, key))
            for key, (name, field_hint) in keys(hint).items()
            if key not in optional or getattr(value, name) != optional[key]
        }
    if get_origin(hint) is tuple:
        return [to_record(entry, get_args(hint)[0], where) for entry in value]
    if hint is float:
        if not math.isfinite(value):
            raise PlanFileError(f"{where} is {value}; a plan holds finite numbers only")
        return float(value)
    return _CONVERT[hint](value)


def from_record(hint: Any, value: Any, where: str = "", *, signed: bool = False) -> Any:
    """The value of type `hint` that `to_record` wrote as `value`.

    Args:
        hint: a dataclass, or what its fields may be declared as.
        value: what `json.loads` gave.
        where: the name of the field, for errors.
        signed: whether a number may be negative.

    Raises:
        PlanFileError: the value is of another type, or negative, or lacks a field, or has one too
            many.
    """
    hint, *others = _options(hint)
    if value is None and others:
        return None
    if hasattr(hint, "from_record"):
        return _made(lambda: hint.from_record(value), where)
    if dataclasses.is_dataclass(hint):
        arguments = _fields(hint, value, where)
        make: Any = hint
        return _made(lambda: make(**arguments), where)
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise _wrong(where, value, "a list")
        item = get_args(hint)[0]
        return tuple(from_record(item, entry, f"{where}[{k}]") for k, entry in enumerate(value))
    if hint is float and type(value) in (int, float):
        if abs(value) > sys.float_info.max or value != value:
            raise _wrong(where, value, "a finite number")
        value = float(value)
    if type(value) is not hint:
        raise _wrong(where, value, _EXPECTED[hint])
    if hint in (int, float) and value < 0 and not signed:
        raise _wrong(where, value, f"{_EXPECTED[hint]}, 0 or more")
    return value


def keys(record: Any) -> dict[str, tuple[str, Any]]:
    """JSON key -> field name and declared type, of a dataclass."""
    hints = get_type_hints(record)
    return {
        field.metadata.get("key", field.name): (field.name, hints[field.name])
        for field in dataclasses.fields(record)
    }


def _marked(record: Any, mark: str) -> dict[str, Any]:
    """JSON key -> default, of the fields with that in their metadata."""
    return {
        field.metadata.get("key", field.name): field.default
        for field in dataclasses.fields(record)
        if field.metadata.get(mark)
    }


def dump(value: Any, indent: int = 0) -> str:
    """JSON with every list and object on one line where it fits, otherwise one entry a line.

    >>> print(dump({"shape": [1, 8], "axis_names": ["batch", "model"]}))
    {"shape": [1, 8], "axis_names": ["batch", "model"]}
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if not isinstance(value, list | dict) or len(text) + indent <= _LINE_CHARACTERS:
        return text
    space = " " * (indent + 2)
    if isinstance(value, dict):
        entries = [f"{json.dumps(key)}: {dump(item, indent + 2)}" for key, item in value.items()]
        return "{\n" + ",\n".join(space + entry for entry in entries) + f"\n{' ' * indent}}}"
    entries = [dump(item, indent + 2) for item in value]
    return "[\n" + ",\n".join(space + entry for entry in entries) + f"\n{' ' * indent}]"


def _options(hint: Any) -> tuple[Any, ...]:
    """The types of a union, None last; those of literals are their own."""
    union = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    options = (
        type(get_args(option)[0]) if get_origin(option) is Literal else option for option in union
    )
    return tuple(sorted(options, key=lambda option: option is types.NoneType))


def _fields(record: Any, value: Any, where: str) -> dict[str, Any]:
    """Arguments for a dataclass from a JSON object that has exactly its keys."""
    known = keys(record)
    if not isinstance(value, Mapping):
        raise _wrong(where, value, f"an object with {', '.join(known)}")
    for key in value:
        if key not in known:
            raise PlanFileError(f"unknown field '{_join(where, key)}'; expected {', '.join(known)}")
    optional, signed = _marked(record, "optional"), _marked(record, "signed")
    for key in known:
        if key not in value and key not in optional:
            raise PlanFileError(f"field '{_join(where, key)}' is missing")
    return {
        name: from_record(hint, value[key], _join(where, key), signed=key in signed)
        for key, (name, hint) in known.items()
        if key in value
    }


def _made(make: Callable[[], Any], where: str) -> Any:
    try:
        return make()
    except PlanFileError:
        raise
    except AutoshardError as error:
        raise PlanFileError(f"field '{where}': {error}" if where else str(error)) from None


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _wrong(where: str, value: Any, expected: str) -> PlanFileError:
    text = json.dumps(value)
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    return PlanFileError(f"field '{where}' is {shown}; expected {expected}")
