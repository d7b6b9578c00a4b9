"""Layer paths as templates: which numbers count repeated blocks, and which are Keras' own counters.

A path such as `transformer_layer_3/sparse_moe_block_3/experts/kernel` holds two kinds of numbers.
The first counts repeated blocks, and the template has `*` for it. The second is a counter that
Keras keeps over the whole process for layers without a name: another block, or another model built
before, changes it, so the template leaves it out. A third kind, as in `dense_1` and `dense_2` of
every block, tells two layers apart and stays.

Told apart from the paths alone:

- a block: siblings of one name and different numbers with layers inside them (at least one path
  goes two levels deeper);
- a block written out in one model: three names or more of layers with variables (`attention_0`,
  `up_0`, `down_0`, ...) that stand there with the same numbers, at their end or inside them
  (`conformer_0_attention`, `conformer_0_up`, `conformer_0_down`, ...);
- a counter: inside a block, a number that no two blocks share.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

__all__ = [
    "block_pattern",
    "in_any_block",
    "layer_template",
    "layer_templates",
    "number_of",
    "path_templates",
    "ranked",
    "tails",
    "unnumbered",
]

_NUMBERED = re.compile(r"(.+?)_(\d+)")
_NUMBERED_INSIDE = re.compile(r"(.+?)_(\d+)_(.+)")
# The last number in the names of a path.
_LAST_NUMBER = re.compile(r"_\d+(?=[_/])(?!.*_\d+[_/])")
# Fewer may be any layers: of a chain of two kinds, such as `dense_0` and `norm_0`, each may want a
# layout of its own.
_LEAST_IN_BLOCK = 3


def _split(segment: str) -> tuple[str, int | None]:
    """`dense_1` -> (`dense`, 1); the first layer of a counter has no number."""
    match = _NUMBERED.fullmatch(segment)
    return (match[1], int(match[2])) if match else (segment, None)


@dataclass(slots=True)
class _Siblings:
    """Layers of one name under one template: under each concrete path, the numbers in use."""

    in_block: bool
    numbers: dict[str, dict[int | None, None]] = field(default_factory=dict)
    has_variables: bool = False
    is_block: bool = False

    def renaming(self) -> str | None:
        """What stands behind the name in the template; None for the number as it is."""
        used = [number for numbers in self.numbers.values() for number in numbers]
        if self.in_block and len(self.numbers) > 1 and len(set(used)) == len(used):
            return ""
        return "_*" if self.is_block and len(set(used)) > 1 else None

    def written_out(self) -> tuple[int, ...] | None:
        """The numbers, where a person may have given them: all are there, under one path."""
        (numbers, *others) = self.numbers.values()
        found = [number for number in numbers if number is not None]
        return None if others or len(found) < len(numbers) else tuple(sorted(found))


def path_templates(paths: Iterable[str]) -> dict[str, str]:
    """Path -> template, read off the paths of all variables and layer outputs of one model.

    >>> path_templates(["block_0/mlp/kernel", "block_1/mlp_1/kernel", "norm/scale"])
    {'block_0/mlp/kernel': 'block_*/mlp/kernel', 'block_1/mlp_1/kernel': 'block_*/mlp/kernel', \
'norm/scale': 'norm/scale'}
    """
    split = {path: path.split("/") for path in paths}
    templates = dict.fromkeys(split, "")
    # One level of the tree at a time: what a segment is depends on the templates above it.
    for level in range(max(map(len, split.values()), default=0)):
        reaching = {path: parts for path, parts in split.items() if len(parts) > level}
        segments = {path: parts[level] for path, parts in reaching.items()}
        segments |= _written_inside(reaching, templates, level)
        names = _names(reaching, segments, templates, level)
        for path, parts in reaching.items():
            above, segment = templates[path], segments[path]
            if level < len(parts) - 1:
                base = _split(segment)[0]
                suffix = names[above, base]
                segment = segment if suffix is None else base + suffix
            templates[path] = f"{above}/{segment}" if level else segment
    return templates


def _written_inside(
    paths: Mapping[str, list[str]], templates: Mapping[str, str], level: int
) -> dict[str, str]:
    """Path -> its segment at a level, of those with the number of a block inside the name.

    A layer in such a layer has it too, where its name begins with the same words and number.
    """
    found: dict[str, tuple[str, str, str]] = {}
    numbers: dict[tuple[str, str], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    weighty: set[str] = set()
    for path, parts in paths.items():
        match = _NUMBERED_INSIDE.fullmatch(parts[level])
        if match and level < len(parts) - 1:
            base, number, rest = found[path] = match[1], match[2], match[3]
            numbers["/".join(parts[:level]), base][rest].add(number)
            if parts[-1] != "output":
                weighty.add(rest)
    inside = {}
    for path, (base, number, rest) in found.items():
        siblings = numbers["/".join(paths[path][:level]), base]
        own = siblings[rest]
        n_alike = sum(other == own and name in weighty for name, other in siblings.items())
        is_block = len(own) > 1 and n_alike >= _LEAST_IN_BLOCK
        above = (templates[path].rpartition("/")[2], paths[path][level - 1]) if level else ("", "")
        is_in_one = above[0].startswith(f"{base}_*_") and above[1].startswith(f"{base}_{number}_")
        if is_block or is_in_one:
            inside[path] = f"{base}_*_{rest}"
    return inside


def _names(
    paths: Mapping[str, list[str]],
    segments: Mapping[str, str],
    templates: Mapping[str, str],
    level: int,
) -> dict[tuple[str, str], str | None]:
    """For each template above and each name: what the template has behind the name."""
    groups: dict[tuple[str, str], _Siblings] = {}
    for path, parts in paths.items():
        above, (base, number) = templates[path], _split(segments[path])
        group = groups.setdefault((above, base), _Siblings(in_block="*" in above))
        group.numbers.setdefault("/".join(parts[:level]), {})[number] = None
        group.is_block |= len(parts) > level + 2
        group.has_variables |= parts[-1] != "output"
    _join_written_out(groups)
    return {key: group.renaming() for key, group in groups.items()}


def _join_written_out(groups: Mapping[tuple[str, str], _Siblings]) -> None:
    """Mark what stands at the same numbers as enough other layers as parts of one block."""
    alike: dict[tuple[str, tuple[int, ...]], list[_Siblings]] = defaultdict(list)
    for (above, _), group in groups.items():
        numbers = group.written_out()
        if numbers is not None:
            alike[above, numbers].append(group)
    for members in alike.values():
        if sum(group.has_variables for group in members) >= _LEAST_IN_BLOCK:
            for group in members:
                group.is_block = True


def layer_templates(templates: Mapping[str, str]) -> dict[str, str]:
    """Path of each layer that holds something, at any depth -> its template.

    Args:
        templates: path of each variable or output -> its template.

    >>> layer_templates({"block_0/mlp_1/kernel": "block_*/mlp/kernel"})
    {'block_0': 'block_*', 'block_0/mlp_1': 'block_*/mlp'}
    """
    found: dict[str, str] = {}
    for path, template in templates.items():
        parts, names = path.split("/"), template.split("/")
        for n in range(1, len(parts)):
            found["/".join(parts[:n])] = "/".join(names[:n])
    return found


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


def tails(path: str) -> Iterator[str]:
    """A path, and what is left of it without its first layers, one after the other.

    A traced op names its layer from the outermost model down; blocks and variables start further
    in.

    >>> list(tails("net/block_0/mlp"))
    ['net/block_0/mlp', 'block_0/mlp', 'mlp']
    """
    parts = path.split("/")
    return ("/".join(parts[start:]) for start in range(len(parts)))


def layer_template(layer: str, templates: Mapping[str, str]) -> str:
    """The template of the layer of a traced op; the layer itself where it is none of the model's.

    Args:
        layer: as a traced op names it.
        templates: as `layer_templates` returns them.

    >>> layer_template("net/block_0/mlp_1", {"block_0/mlp_1": "block_*/mlp"})
    'block_*/mlp'
    """
    return next((templates[path] for path in tails(layer) if path in templates), layer)


def in_any_block(layer: str, templates: Mapping[str, str]) -> str:
    """The path of the layer of a traced op, the same for each block that has one.

    Args:
        layer: as a traced op names it, from the outermost model down.
        templates: as `layer_templates` returns them.

    >>> templates = {"block_1/mlp_1": "block_*/mlp"}
    >>> [in_any_block(layer, templates) for layer in ("net/block_1/mlp_1", "block_1/mlp_1/sum")]
    ['net/block_*/mlp', 'block_*/mlp/sum']
    """
    parts = layer.split("/")
    for end in range(len(parts), 0, -1):
        for start in range(end):
            template = templates.get("/".join(parts[start:end]))
            if template is not None:
                return "/".join([*parts[:start], template, *parts[end:]])
    return layer


def block_pattern(template: str) -> str:
    """A regex for what a template stands for, with the number in a group: the first has none.

    >>> [re.fullmatch(block_pattern("block_*"), path)[1] for path in ("block_3", "block")]
    ['3', None]
    """
    return re.escape(template).replace(r"_\*", r"(?:_(\d+))?")


def unnumbered(path: str) -> str:
    """A path with `*` for its last number, which alone tells some layers of a model apart.

    >>> unnumbered("up_1/kernel"), unnumbered("head/kernel")
    ('up_*/kernel', 'head/kernel')
    """
    return _LAST_NUMBER.sub("_*", path)


def number_of(path: str) -> int:
    """The number of a path's last layer; 0 for the first layer of a counter, which has none.

    >>> number_of("decoder_block_3"), number_of("residual")
    (3, 0)
    """
    return _split(path.rpartition("/")[2])[1] or 0
