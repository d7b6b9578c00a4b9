"""Layer paths as templates: which numbers count repeated blocks, and which are Keras' own counters.

A path such as `transformer_layer_3/sparse_moe_block_3/experts/kernel` holds two kinds of numbers.
The first counts repeated blocks, and the template has `*` for it. The second is a counter that
Keras keeps over the whole process for layers without a name: another block, or another model built
before, changes it, so the template leaves it out. A third kind, as in `dense_1` and `dense_2` of
every block, tells two layers apart and stays.

Told apart from the paths alone:

- a block: siblings of one name and different numbers with layers inside them (at least one path
  goes two levels deeper);
- a counter: inside a block, a number that no two blocks share.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["PathNames", "number_of", "ranked"]

_NUMBERED = re.compile(r"(.+?)_(\d+)")


def _split(segment: str) -> tuple[str, int | None]:
    """`dense_1` -> (`dense`, 1); the first layer of a counter has no number."""
    match = _NUMBERED.fullmatch(segment)
    return (match[1], int(match[2])) if match else (segment, None)


@dataclass(slots=True)
class _Node:
    """The layers of one template, and under each concrete path of theirs the numbers in use."""

    numbers: dict[str, dict[tuple[str, ...], dict[int | None, None]]] = field(default_factory=dict)
    deep: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True, kw_only=True)
class PathNames:
    """The templates of one model's paths.

    Attributes:
        templates: path -> template, for every path given to `of`.
    """

    templates: dict[str, str]

    @classmethod
    def of(cls, paths: Iterable[str]) -> "PathNames":
        """Read the templates off the paths of all variables and layer outputs of one model.

        >>> PathNames.of(["block_0/mlp/kernel", "block_1/mlp_1/kernel", "norm/scale"]).templates
        {'block_0/mlp/kernel': 'block_*/mlp/kernel', 'block_1/mlp_1/kernel': 'block_*/mlp/kernel', \
'norm/scale': 'norm/scale'}
        """
        given = list(dict.fromkeys(paths))
        # One level of the tree at a time: what a segment is depends on the templates above it.
        prefixes: dict[str, tuple[str, ...]] = dict.fromkeys(given, ())
        split = {path: path.split("/") for path in given}
        for level in range(max(map(len, split.values()), default=0)):
            reaching = {path: parts for path, parts in split.items() if len(parts) > level}
            nodes = _nodes(reaching, prefixes, level)
            for path, parts in reaching.items():
                segment = parts[level]
                if level < len(parts) - 1:
                    segment = _name(segment, nodes[prefixes[path]], "*" in "".join(prefixes[path]))
                prefixes[path] = (*prefixes[path], segment)
        return cls(templates={path: "/".join(prefix) for path, prefix in prefixes.items()})


def _nodes(
    paths: dict[str, list[str]], prefixes: dict[str, tuple[str, ...]], level: int
) -> dict[tuple[str, ...], _Node]:
    nodes: dict[tuple[str, ...], _Node] = {}
    for path, parts in paths.items():
        node = nodes.setdefault(prefixes[path], _Node())
        base, number = _split(parts[level])
        parents = node.numbers.setdefault(base, {})
        parents.setdefault(tuple(parts[:level]), {})[number] = None
        if len(parts) > level + 2:
            node.deep.add(base)
    return nodes


def _name(segment: str, node: _Node, in_block: bool) -> str:
    base, number = _split(segment)
    by_parent = list(node.numbers[base].values())
    used = [n for numbers in by_parent for n in numbers]
    is_counter = in_block and len(by_parent) > 1 and len(set(used)) == len(used)
    if is_counter:
        return base
    if base in node.deep and len(set(used)) > 1:
        return f"{base}_*"
    return segment


def ranked(paths: Iterable[str]) -> tuple[str, ...]:
    """Paths in which each number is replaced by its rank among its siblings, in the order given.

    So two models of a kind agree, whatever Keras had counted before each.

    >>> ranked(["norm_4/scale", "norm_5/scale"]) == ranked(["norm/scale", "norm_1/scale"])
    True
    """
    ranks: dict[tuple[str, str], dict[int | None, int]] = {}
    result = []
    for path in paths:
        *layers, variable = path.split("/")
        parent, parts = "", []
        for segment in layers:
            base, number = _split(segment)
            siblings = ranks.setdefault((parent, base), {})
            parts.append(f"{base}_{siblings.setdefault(number, len(siblings))}")
            parent = f"{parent}/{segment}"
        result.append("/".join([*parts, variable]))
    return tuple(result)


def number_of(path: str) -> int:
    """The number of a path's last layer; 0 for the first layer of a counter, which has none.

    >>> number_of("decoder_block_3"), number_of("residual")
    (3, 0)
    """
    return _split(path.rpartition("/")[2])[1] or 0
