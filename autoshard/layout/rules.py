"""Rules of a LayoutMap, and Keras' way of matching a path against them.

`keras.distribution.LayoutMap[path]`: a key equal to the path wins; otherwise every key is tried as
a regular expression, with `re.fullmatch` since Keras 3.14 and with `re.search` before. No hit means
replicated, two hits are an error. Keras asks with the paths of variables
(`decoder_block_0/ffw_linear/kernel`) and, after every layer call, with the layer's path and
`/output`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from autoshard.errors import LayoutError
from autoshard.mesh import Spec, format_spec

__all__ = [
    "LayoutRules",
    "MatchMode",
    "Rule",
    "WrittenMap",
    "format_pattern",
    "format_rules",
    "hits",
    "match",
    "matching_rules",
    "rules_text",
]

MatchMode = Literal["fullmatch", "search"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One line of a LayoutMap.

    Attributes:
        pattern: a path, or a regular expression for paths.
        spec: the mesh axis of each dimension, or None; may be shorter than the array's rank.
    """

    pattern: str
    spec: Spec

    def __post_init__(self) -> None:
        try:
            _compiled(self.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise LayoutError(
                f"rule '{self.pattern}' is not a regular expression: {error}; "
                "escape the character with a backslash if it is part of the path"
            ) from None

    def __str__(self) -> str:
        return f"layout_map[{format_pattern(self.pattern)}] = {format_spec(self.spec)}"

    def to_record(self) -> list[object]:
        """The rule as a plan file holds it: `[pattern, [axis or null, ...]]`."""
        return [self.pattern, list(self.spec)]

    @classmethod
    def from_record(cls, value: object) -> "Rule":
        """Read what `to_record` wrote.

        Raises:
            LayoutError: the value is no such pair.
        """
        match value:
            case [str(pattern), [*entries]]:
                spec = tuple(axis for axis in entries if axis is None or isinstance(axis, str))
                if len(spec) == len(entries):
                    return cls(pattern=pattern, spec=spec)
        raise LayoutError(
            f"{json.dumps(value)[:80]} is not a rule; expected [pattern, [axis or null, ...]]"
        )


LayoutRules = tuple[Rule, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenMap:
    """A map as somebody wrote it.

    Attributes:
        rules: those that can be read.
        unreadable: why others cannot, a line each.
    """

    rules: LayoutRules
    unreadable: tuple[str, ...] = ()

    def accepted(self) -> LayoutRules:
        """The rules, if all can be read.

        Raises:
            LayoutError: one cannot; the text is that of the first.
        """
        if self.unreadable:
            raise LayoutError.of(self.unreadable)
        return self.rules


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def hits(pattern: str, path: str, how: MatchMode = "fullmatch") -> bool:
    """Whether the regular expression takes the path.

    >>> hits("ffw_linear/kernel", "decoder_block_0/ffw_linear/kernel")
    False
    >>> hits("ffw_linear/kernel", "decoder_block_0/ffw_linear/kernel", "search")
    True
    """
    expression = _compiled(pattern)
    found = expression.fullmatch(path) if how == "fullmatch" else expression.search(path)
    return found is not None


def matching_rules(rules: Sequence[Rule], path: str, how: MatchMode = "fullmatch") -> LayoutRules:
    """Every rule that Keras counts for `path`: the equal key alone, otherwise each regex that hits.

    Args:
        rules: the map, in any order.
        path: a variable path, or a layer path and `/output`.
        how: `fullmatch` as Keras 3.14 and later do, `search` as older ones did.
    """

    equal = tuple(rule for rule in rules if rule.pattern == path)
    return equal or tuple(rule for rule in rules if hits(rule.pattern, path, how))


def match(rules: Sequence[Rule], path: str, how: MatchMode = "fullmatch") -> Spec | None:
    """The spec that Keras gives a path; None where no rule takes it, which means replicated.

    Args:
        rules: the map, in any order.
        path: a variable path, or a layer path and `/output`.
        how: `fullmatch` as Keras 3.14 and later do, `search` as older ones did.

    Raises:
        LayoutError: two rules or more take the path, as Keras refuses.

    >>> match((Rule(pattern=r"block_\\d+/kernel", spec=(None, "model")),), "block_7/kernel")
    (None, 'model')
    """
    found = matching_rules(rules, path, how)
    if len(found) > 1:
        patterns = " and ".join(f"'{rule.pattern}'" for rule in found)
        raise LayoutError(
            f"path '{path}' is taken by {len(found)} rules, {patterns}; Keras allows one: "
            "narrow all but one of them"
        )
    return found[0].spec if found else None


def format_pattern(pattern: str) -> str:
    """Print a pattern as a Python string literal, raw where that reads better.

    >>> print(format_pattern("a/kernel"), format_pattern(r"block_\\d+/kernel"))
    "a/kernel" r"block_\\d+/kernel"
    """
    printable = pattern.isprintable() and '"' not in pattern
    if printable and "\\" not in pattern:
        return f'"{pattern}"'
    if printable and not pattern.endswith("\\"):
        return f'r"{pattern}"'
    return repr(pattern)


def format_rules(rules: Sequence[Rule]) -> str:
    """Print a map as the lines of Python that a person would write, one rule a line."""
    return "\n".join(str(rule) for rule in rules)


def rules_text(rules: Sequence[Rule]) -> str:
    """The same for people to read, with words where there is no rule."""
    return format_rules(rules) or "no rule: every variable is whole on every device"
