"""From specs of families to the few regular expressions that a person would write.

A family becomes the pattern of its template: a component that carries a layer index becomes
`decoder_block_\\d+`, one that Keras numbers for the whole process `moe_block(_\\d+)?`. Two patterns
of one spec that differ in one component merge, so query, key and value become
`decoder_block_\\d+/attention/(query|key|value)/kernel`, which takes exactly what the three took.

Every pattern is tried on every path of the model, shortest form first, and kept only if it takes
its own paths and no other, under `re.fullmatch` (Keras 3.14 and later) and under `re.search`
(before). `$` and `^` are added only where a path demands them; where wildcards take too much, the
indices are listed, or those left out where that is shorter: `decoder_block_(?!(5|11|17)/)\\d+`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from autoshard.errors import LayoutError, UnknownNameError
from autoshard.layout.rules import MatchMode, Rule, hits, match
from autoshard.mesh import Spec, format_spec
from autoshard.model.variables import ModelTable

__all__ = ["synthesise", "tied_families"]

# What Keras appends to a layer's automatic name from the second in the process on.
_COUNTER = r"(_\d+)?"
# A component with more alternatives than fit here is harder to read than two rules.
_ALTERNATION_CHARACTERS = 48
# So many layers that differ in one number get a pattern for any number.
_LEAST_NUMBERED = 3
_MODES: tuple[MatchMode, ...] = ("fullmatch", "search")
_ANCHORS = (("", ""), ("", "$"), ("^", ""), ("^", "$"))
_TOKENS = re.compile(r"\(_\\d\+\)\?|_|(?:(?!\(_\\d\+\)\?)[^_])+")

# What one path component may be: alternatives, each a regular expression.
_Component = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """Paths that shall get `spec`, and the pattern proposed for them, component by component."""

    spec: Spec
    paths: frozenset[str]
    components: tuple[_Component, ...]
    pattern: str = ""


def synthesise(
    table: ModelTable,
    assignment: Mapping[str, Spec],
    outputs: Mapping[str, Spec] | None = None,
) -> tuple[Rule, ...]:
    """The rules under which Keras lays every family out as assigned, and nothing else.

    Args:
        table: the model's variables and layer output paths.
        assignment: family name -> spec. A family that is absent, or whose spec names no axis, is
            replicated and gets no rule.
        outputs: template of a layer output (`decoder_block_*/output`) -> spec.

    Returns:
        Rules in the order of the model's variables, then those for outputs; none share a path.

    Raises:
        UnknownNameError: a name is no family of the model, or no template of its outputs.
        LayoutError: two families with different specs share a path, so no rule can part them.
    """
    expected = _expected_specs(table, assignment)
    expected_outputs = _expected_output_specs(table, outputs or {})
    others = (*table.state_paths, *_later_paths(table, expected))
    universe = tuple(dict.fromkeys((*expected, *expected_outputs, *others)))
    found = _variable_drafts(table, assignment), _output_drafts(table, expected_outputs)
    drafts = ([_verified(draft, universe) for draft in group] for group in found)
    rules = tuple(
        Rule(pattern=draft.pattern, spec=draft.spec)
        for group in drafts
        for draft in _merged(_numbered(group, universe), universe)
    )
    chosen = expected | expected_outputs
    for how in _MODES:
        wrong = [path for path in universe if match(rules, path, how) != chosen.get(path)]
        assert not wrong, f"{wrong[0]} is laid out wrongly under re.{how}"
    return rules


def tied_families(table: ModelTable) -> tuple[tuple[str, ...], ...]:
    """Groups of families that share a path: a LayoutMap can give each group only one spec.

    Returns:
        Names of two families or more a group, in the order of the model.
    """
    groups: list[tuple[list[str], set[str]]] = []
    for family in table.families():
        names, paths = [family.name], set(family.paths)
        apart = []
        for other_names, other_paths in groups:
            if other_paths.isdisjoint(paths):
                apart.append((other_names, other_paths))
            else:
                names, paths = other_names + names, other_paths | paths
        groups = [*apart, (names, paths)]
    return tuple(tuple(names) for names, _ in groups if len(names) > 1)


def _shards(spec: Spec | None) -> bool:
    return spec is not None and any(axis is not None for axis in spec)


def _expected_specs(table: ModelTable, assignment: Mapping[str, Spec]) -> dict[str, Spec | None]:
    """Variable path -> the spec that Keras has to find for it, None for a replicated one."""
    families = table.families()
    names = [family.name for family in families]
    for name in assignment:
        if name not in names:
            raise UnknownNameError("family", name, names)
    expected: dict[str, Spec | None] = {}
    owner: dict[str, str] = {}
    for family in families:
        spec = assignment.get(family.name)
        wanted = spec if _shards(spec) else None
        for path in family.paths:
            if path in expected and expected[path] != wanted:
                was, now = (
                    "replicated" if one is None else format_spec(one)
                    for one in (expected[path], wanted)
                )
                raise LayoutError(
                    f"families '{owner[path]}' ({was}) and '{family.name}' ({now}) share the path "
                    f"'{path}', so no rule can tell them apart; give both the same spec"
                )
            expected[path] = wanted
            owner[path] = family.name
    return expected


def _expected_output_specs(
    table: ModelTable, outputs: Mapping[str, Spec]
) -> dict[str, Spec | None]:
    templates = {path: table.templates[path] for path in table.output_paths}
    for template in outputs:
        if template not in templates.values():
            raise UnknownNameError("layer output", template, templates.values())
    specs = {path: outputs.get(template) for path, template in templates.items()}
    return {path: spec if _shards(spec) else None for path, spec in specs.items()}


def _later_paths(table: ModelTable, expected: Mapping[str, Spec | None]) -> Iterator[str]:
    """Paths that a sharded weight's rule must miss although they come later.

    `enable_lora` adds its factors beside the weight; Adafactor's factors are looked up in the map
    by a path of their own, while the slots of other optimizers follow their weight.
    """
    for variable in table.variables:
        if expected[variable.path] is not None:
            head, _, name = variable.path.rpartition("/")
            for factor in (f"lora_{name}_a", f"lora_{name}_b"):
                yield f"{head}/{factor}" if head else factor
            yield f"adafactor/{name}"


def _variable_drafts(table: ModelTable, assignment: Mapping[str, Spec]) -> list[_Draft]:
    drafts: dict[tuple[object, ...], _Draft] = {}
    for family in table.families():
        spec = assignment.get(family.name, ())
        if _shards(spec):
            _add(drafts, spec, family.template, family.paths)
    return list(drafts.values())


def _output_drafts(table: ModelTable, expected: Mapping[str, Spec | None]) -> list[_Draft]:
    paths_of: dict[tuple[str, Spec], list[str]] = {}
    for path, spec in expected.items():
        if spec is not None:
            paths_of.setdefault((table.templates[path], spec), []).append(path)
    drafts: dict[tuple[object, ...], _Draft] = {}
    for (template, spec), paths in paths_of.items():
        _add(drafts, spec, template, paths)
    return list(drafts.values())


def _add(
    drafts: dict[tuple[object, ...], _Draft], spec: Spec, template: str, paths: Iterable[str]
) -> None:
    """Add a family; one whose pattern another family of that spec has joins it.

    So do layers of different shapes under one template (a Gemma 3 whose blocks alternate).
    """
    paths = tuple(dict.fromkeys(paths))
    draft = _Draft(spec=spec, paths=frozenset(paths), components=_components(template, paths))
    key = (spec, draft.components)
    if key in drafts:
        draft = replace(draft, paths=drafts[key].paths | draft.paths)
    drafts[key] = draft


def _components(template: str, paths: Sequence[str]) -> tuple[_Component, ...]:
    """The pattern of a template, component by component, checked against its paths."""
    rows = [path.split("/") for path in paths]
    parts = template.split("/")
    if any(len(row) != len(parts) for row in rows):
        return (tuple(_escaped(path) for path in paths),)
    columns = [tuple(dict.fromkeys(values)) for values in zip(*rows, strict=True)]
    components = [_component(*column) for column in zip(parts, columns, strict=True)]
    for k in range(1, len(parts)):
        # A layer named after the numbered one that it is in: its number is said there.
        if re.search(r"_\*_", parts[k]) and all(
            row[k].startswith(f"{row[k - 1]}_") for row in rows
        ):
            rests = (row[k].removeprefix(row[k - 1]) for row in rows)
            components[k] = tuple(dict.fromkeys(r"\w+" + _escaped(rest) for rest in rests))
    return tuple(components)


def _component(part: str, values: Sequence[str]) -> _Component:
    indexed = r"\d+".join(_escaped(text) for text in part.split("*"))
    for pattern in (indexed, indexed + _COUNTER):
        if all(re.fullmatch(pattern, value) for value in values):
            return (pattern,)
    return tuple(_escaped(value) for value in values)


def _forms(draft: _Draft, universe: Sequence[str]) -> Iterator[tuple[_Component, ...]]:
    """Patterns for a draft: wildcards, then more and more components listed, then whole paths.

    The component with the fewest values is listed first (`mlp_dense_1` before 27 blocks), one that
    Keras numbers for the whole process last.
    """
    yield draft.components
    paths = sorted(draft.paths, key=_natural)
    rows = [path.split("/") for path in paths]
    if len({len(row) for row in rows} | {len(draft.components)}) == 1:
        listed = [
            tuple(_escaped(value) for value in dict.fromkeys(values))
            for values in zip(*rows, strict=True)
        ]
        components = list(draft.components)
        body = "/".join(map(_alternation, components))
        taken = [path.split("/") for path in universe if hits(body, path)]
        counted = [any(one.endswith(_COUNTER) for one in component) for component in components]
        for k in sorted(range(len(listed)), key=lambda k: (counted[k], len(listed[k]))):
            if listed[k] != components[k]:
                values = {row[k] for row in rows}
                others = dict.fromkeys(row[k] for row in taken if row[k] not in values)
                components[k] = _all_but(components[k], list(others), listed[k])
                yield tuple(components)
    yield (tuple(_escaped(path) for path in paths),)


def _all_but(numbered: _Component, others: Sequence[str], listed: _Component) -> _Component:
    """What takes every number but those of others, where a list is too long and that is shorter."""
    base = numbered[0].removesuffix(r"\d+")
    patterns = sorted(map(_escaped, others), key=_natural)
    inside = len(numbered) == 1 and base != numbered[0]
    if inside and patterns and all(re.fullmatch(rf"{base}\d+", other) for other in others):
        numbers = "|".join(pattern.removeprefix(base) for pattern in patterns)
        left = rf"{base}(?!({numbers})/)\d+"
        if len(left) < len(_alternation(listed)) > _ALTERNATION_CHARACTERS:
            return (left,)
    return listed


def _natural(path: str) -> list[tuple[str, int]]:
    """Sort key that puts block_2 before block_10."""
    return [(word, int(text or 0)) for word, text in re.findall(r"(\D*)(\d*)", path)]


def _escaped(text: str) -> str:
    """Escape the signs of regular expressions (`re.escape` also escapes the harmless -)."""
    return re.sub(r"([.^$*+?{}\[\]\\|()])", r"\\\1", text)


def _verified(draft: _Draft, universe: Sequence[str]) -> _Draft:
    """The draft with the first form that takes its paths alone: wildcards, lists, whole paths."""
    for components in _forms(draft, universe):
        pattern = _accepted(components, draft.paths, universe)
        if pattern is not None:
            return replace(draft, components=components, pattern=pattern)
    raise AssertionError(f"no pattern for {sorted(draft.paths)[0]}")


def _accepted(
    components: Sequence[_Component], paths: frozenset[str], universe: Sequence[str]
) -> str | None:
    """The pattern with as few anchors as make it take `paths` and nothing else, or None."""
    body = "/".join(_alternation(alternatives) for alternatives in components)
    if {path for path in universe if hits(body, path)} != paths:
        return None
    for before, after in _ANCHORS:
        pattern = f"{before}{body}{after}"
        if {path for path in universe if hits(pattern, path, "search")} == paths:
            return pattern
    return None


def _numbered(drafts: Sequence[_Draft], universe: Sequence[str]) -> list[_Draft]:
    """Join what differs in one number to a pattern for any, where that takes no other path.

    So a model's own `moe_0/w`, `moe_1/w`, ..., each a family of its own, get one short rule.
    """
    alike: dict[tuple[Spec, tuple[_Component, ...]], list[_Draft]] = {}
    for draft in drafts:
        for components in _with_any_number(draft.components):
            alike.setdefault((draft.spec, components), []).append(draft)
    kept = list(drafts)
    for (_, components), members in alike.items():
        members = [draft for draft in members if draft in kept]
        if len(members) < _LEAST_NUMBERED:
            continue
        paths = frozenset[str]().union(*(draft.paths for draft in members))
        pattern = _accepted(components, paths, universe)
        if pattern is not None:
            joined = replace(members[0], paths=paths, components=components, pattern=pattern)
            kept[kept.index(members[0])] = joined
            kept = [draft for draft in kept if draft not in members[1:]]
    return kept


def _with_any_number(components: tuple[_Component, ...]) -> Iterator[tuple[_Component, ...]]:
    """Patterns for any number in place of each that a layer's name ends with or has inside."""
    for k, component in enumerate(components[:-1]):
        if len(component) == 1 and "(" not in component[0]:
            for number in re.finditer(r"(?<=_)\d+(?=_|$)", component[0]):
                text = component[0][: number.start()] + r"\d+" + component[0][number.end() :]
                yield (*components[:k], (text,), *components[k + 1 :])


def _merged(drafts: Sequence[_Draft], universe: Sequence[str]) -> list[_Draft]:
    """Merge patterns of one spec that differ in one component, the variable's own name last.

    Names last, because `(query|key|value)/kernel` reads better than `query/(kernel|lora_kernel_a)`.
    """
    merged = list(drafts)
    deepest = max((len(draft.components) for draft in drafts), default=0)
    for position in (*range(-2, -deepest - 1, -1), -1):
        k = 0
        while k < len(merged):
            for other in merged[k + 1 :]:
                both = _merge(merged[k], other, position, universe)
                if both is not None:
                    merged[k] = both
                    merged.remove(other)
            k += 1
    return merged


def _merge(left: _Draft, right: _Draft, position: int, universe: Sequence[str]) -> _Draft | None:
    length = len(left.components)
    if left.spec != right.spec or length != len(right.components) or length < -position:
        return None
    pairs = list(zip(left.components, right.components, strict=True))
    differing = [k - length for k, (one, two) in enumerate(pairs) if set(one) != set(two)]
    if differing != [position]:
        return None
    union = tuple(dict.fromkeys((*left.components[position], *right.components[position])))
    if len(_alternation(union)) > _ALTERNATION_CHARACTERS:
        return None
    components = (
        *left.components[: length + position],
        union,
        *left.components[length + position + 1 :],
    )
    paths = left.paths | right.paths
    pattern = _accepted(components, paths, universe)
    if pattern is None:
        return None
    return replace(left, paths=paths, components=components, pattern=pattern)


def _alternation(alternatives: Sequence[str]) -> str:
    """Alternatives as a person writes them, what they share once.

    >>> _alternation(["query", "key", "value"]), _alternation(["ffw_gating", "ffw_gating_2"])
    ('(query|key|value)', 'ffw_gating(_2)?')
    >>> _alternation(["feedforward_gate_dense", "feedforward_intermediate_dense"])
    'feedforward_(gate|intermediate)_dense'
    """
    rows = [_TOKENS.findall(text) for text in alternatives]
    shortest = min(len(row) for row in rows)
    head = 0
    while head < shortest and len({row[head] for row in rows}) == 1:
        head += 1
    tail = 0
    while tail < shortest - head and len({row[-1 - tail] for row in rows}) == 1:
        tail += 1
    before = "".join(rows[0][:head])
    after = "".join(rows[0][len(rows[0]) - tail :])
    middles = ["".join(row[head : len(row) - tail]) for row in rows]
    if middles == [""]:
        return before + after
    filled = "|".join(middle for middle in middles if middle)
    return f"{before}({filled}){'' if all(middles) else '?'}{after}"
