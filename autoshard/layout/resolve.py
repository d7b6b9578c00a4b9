"""What a map does to a model: the spec of every family, and every rule that goes wrong.

An error is what Keras or JAX refuses when a variable is made: two rules on one path, a spec longer
than the array, a dimension that does not divide. A warning is what they accept without a word
although it is hardly meant: a rule that takes nothing, so its weights are replicated; one that also
takes the output of a layer; one that takes some layers of a family and not the others.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from autoshard.errors import LayoutError
from autoshard.layout.rules import LayoutRules, Rule, hits, matching_rules
from autoshard.mesh import Mesh, Spec, format_spec
from autoshard.model.variables import Family, ModelTable

__all__ = ["Finding", "FindingKind", "Resolution", "resolve", "rule_findings"]

FindingKind = Literal[
    "duplicate-rule",
    "two-rules",
    "too-long",
    "indivisible",
    "unknown-axis",
    "repeated-axis",
    "takes-state",
    "takes-nothing",
    "takes-output",
    "split-family",
    "output-shape",
    "uneven-output",
    "breaks-generate",
    "never-asked",
    "unreadable",
    "other-model",
    "lies-whole",
]
_WARNINGS = (
    "other-model",
    "takes-nothing",
    "takes-output",
    "split-family",
    "uneven-output",
    "breaks-generate",
    "never-asked",
    "lies-whole",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong with a map.

    Attributes:
        kind: what is wrong.
        rule: the pattern at fault; where two clash, the later one; None where the finding
            is about no single rule, as of a line that cannot be read.
        message: one line: the value, what was expected, what to do.
    """

    kind: FindingKind
    rule: str | None
    message: str

    @property
    def severity(self) -> Literal["error", "warning"]:
        """`error` where Keras refuses the model or a line cannot be read, else `warning`."""
        return "warning" if self.kind in _WARNINGS else "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """A map applied to a model.

    Attributes:
        assignment: family name -> spec, filled with None to the family's rank, in the order of the
            model. A family that Keras would refuse, or whose layers get different specs, is absent.
        outputs: path of each layer output that one rule takes -> spec.
        findings: errors first, then in the order of the rules.
    """

    assignment: Mapping[str, Spec]
    outputs: Mapping[str, Spec]
    findings: tuple[Finding, ...]

    def accepted(self) -> "Resolution":
        """This resolution, if Keras accepts the map.

        Raises:
            LayoutError: it does not; the text is that of the first finding which says so.
        """
        errors = [one.message for one in self.findings if one.severity == "error"]
        if errors:
            raise LayoutError.of(errors)
        return self

    def checked(self) -> "Resolution":
        """This resolution, if it gives every family one spec that Keras accepts.

        Raises:
            LayoutError: it does not; the text is that of the first finding which says so.
        """
        for finding in self.accepted().findings:
            if finding.kind == "split-family":
                raise LayoutError(finding.message)
        return self

    def whole(self, table: ModelTable, mesh: Mesh) -> tuple[Family, ...]:
        """The families that lie whole on every device, the largest first."""
        parallel = set(mesh.parallel_axes)
        families = [
            family
            for family in table.families()
            if not parallel & set(self.assignment.get(family.name, ()))
        ]
        return tuple(sorted(families, key=lambda family: -family.n_bytes))


def resolve(
    rules: Sequence[Rule],
    table: ModelTable,
    mesh: Mesh | None = None,
) -> Resolution:
    """Apply a map to a model as Keras would, and say what is wrong with it.

    Args:
        rules: the map.
        table: the model's variables and layer output paths.
        mesh: where given, axis names and divisibility are checked against it.
    """
    rules = tuple(rules)
    paths = dict.fromkeys(variable.path for variable in table.variables)
    weights = {path: matching_rules(rules, path) for path in paths}
    outputs = {path: matching_rules(rules, path) for path in table.output_paths}
    states = {path: matching_rules(rules, path) for path in table.state_paths}
    findings = [
        *rule_findings(rules, mesh),
        *_clash_findings(weights | outputs),
        *_state_findings(rules, states),
        *_idle_findings(rules, weights | outputs | states, table),
        *_output_findings(rules, weights, outputs),
    ]
    assignment: dict[str, Spec] = {}
    for family in table.families():
        wrong = list(_family_findings(family, weights, mesh))
        findings += wrong
        if not wrong and all(len(weights[path]) < 2 for path in family.paths):
            assignment[family.name] = _spec(family.paths[0], family, weights)
    order = {rule.pattern: k for k, rule in enumerate(rules)}
    findings.sort(key=lambda one: (one.severity == "warning", order.get(one.rule or "", -1)))
    return Resolution(
        assignment=assignment,
        outputs={path: taken[0].spec for path, taken in outputs.items() if len(taken) == 1},
        findings=tuple(findings),
    )


def _spec(path: str, family: Family, weights: Mapping[str, LayoutRules]) -> Spec:
    """The spec of one path, filled with None to the rank of its family."""
    spec = weights[path][0].spec if weights[path] else ()
    return (*spec, *[None] * (len(family.shape) - len(spec)))


def rule_findings(rules: LayoutRules, mesh: Mesh | None) -> Iterator[Finding]:
    """What is wrong with a map before any model is looked at: all of it errors.

    Args:
        rules: the map.
        mesh: where given, axis names are checked against it.
    """
    seen = set()
    for rule in rules:
        if rule.pattern in seen:
            message = f"rule '{rule.pattern}' stands twice in the map; Keras refuses it: drop one"
            yield Finding(kind="duplicate-rule", rule=rule.pattern, message=message)
        seen.add(rule.pattern)
        axes = [axis for axis in rule.spec if axis is not None]
        for axis in dict.fromkeys(axes):
            if axes.count(axis) > 1:
                message = (
                    f"rule '{rule.pattern}' uses axis '{axis}' for {axes.count(axis)} dimensions "
                    f"of {format_spec(rule.spec)}; an axis can split one: put None for the others"
                )
                yield Finding(kind="repeated-axis", rule=rule.pattern, message=message)
            if mesh is not None and axis not in mesh.axis_names:
                message = (
                    f"rule '{rule.pattern}' names axis '{axis}', which mesh {mesh} does not have; "
                    f"its axes are {', '.join(mesh.axis_names)}"
                )
                yield Finding(kind="unknown-axis", rule=rule.pattern, message=message)


def _clash_findings(taken: Mapping[str, LayoutRules]) -> Iterator[Finding]:
    clashes: dict[LayoutRules, list[str]] = {}
    for path, rules in taken.items():
        if len({rule.pattern for rule in rules}) > 1:
            clashes.setdefault(rules, []).append(path)
    for rules, paths in clashes.items():
        patterns = " and ".join(f"'{rule.pattern}'" for rule in rules)
        verb = "both" if len(rules) == 2 else "all"
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        message = (
            f"rules {patterns} {verb} take '{paths[0]}'{more}; Keras allows one rule a path: "
            "narrow all but one"
        )
        yield Finding(kind="two-rules", rule=rules[-1].pattern, message=message)


def _state_findings(rules: LayoutRules, states: Mapping[str, LayoutRules]) -> Iterator[Finding]:
    for rule in rules:
        path = next((path for path, taken in states.items() if rule in taken), None)
        if path is not None:
            message = (
                f"rule '{rule.pattern}' takes '{path}', the state of a random generator, which "
                "every device needs whole; end the rule with the name of a weight"
            )
            yield Finding(kind="takes-state", rule=rule.pattern, message=message)


def _idle_findings(
    rules: LayoutRules, taken: Mapping[str, LayoutRules], table: ModelTable
) -> Iterator[Finding]:
    used = {rule.pattern for several in taken.values() for rule in several}
    for rule in rules:
        if rule.pattern not in used:
            message = (
                f"rule '{rule.pattern}' takes no variable and no layer output of {table.name}"
                f"{_idle_hint(rule, taken, table)}"
            )
            yield Finding(kind="takes-nothing", rule=rule.pattern, message=message)


def _idle_hint(rule: Rule, taken: Mapping[str, LayoutRules], table: ModelTable) -> str:
    """What comes of it, and what to do."""
    exact = next((path for path in taken if hits(rule.pattern, path)), None)
    if exact is not None:
        return f": '{exact}' has a rule of its own, which alone counts; drop one of the two"
    return f", so what it was meant for is replicated; {_nearest_hint(rule, taken, table)}"


def _nearest_hint(rule: Rule, taken: Mapping[str, LayoutRules], table: ModelTable) -> str:
    partly = next((path for path in taken if hits(rule.pattern, path, "search")), None)
    if partly is not None:
        return f"it takes only a part of '{partly}', and Keras 3.14 and later want the whole path"
    if "_*" in rule.pattern:
        numbered = rule.pattern.replace("_*", r"_\d+")
        return f"a rule is a regex: write '{numbered}' for every block"
    if not rule.pattern.isprintable():
        return f"it holds {rule.pattern!r}: write r before the quotes, or double the backslash"
    if re.search(r"optimizer|momentum|velocity|adam", rule.pattern):
        return "what an optimizer holds lies as its weight does: leave the rule out"
    if not table.variables:
        return "the model has no variables"
    templates = [family.template for family in table.families()]
    near = difflib.get_close_matches(rule.pattern, templates, n=1, cutoff=0.3)
    if near:
        return f"the nearest variable is '{near[0]}'"
    return f"the model's variables have paths like '{table.variables[0].path}'"


def _output_findings(
    rules: LayoutRules, weights: Mapping[str, LayoutRules], outputs: Mapping[str, LayoutRules]
) -> Iterator[Finding]:
    for rule in rules:
        weight = next((path for path, taken in weights.items() if rule in taken), None)
        output = next((path for path, taken in outputs.items() if rule in taken), None)
        if weight is not None and output is not None:
            message = (
                f"rule '{rule.pattern}' takes the variable '{weight}' and also the layer output "
                f"'{output}', which is then laid out as {format_spec(rule.spec)} in every call; "
                "end the rule with the variable's name"
            )
            yield Finding(kind="takes-output", rule=rule.pattern, message=message)


def _family_findings(
    family: Family, weights: Mapping[str, LayoutRules], mesh: Mesh | None
) -> Iterator[Finding]:
    """What is wrong with the layout of a family; a clash is reported by `_clash_findings`."""
    taken = {path: weights[path] for path in family.paths if len(weights[path]) < 2}
    for rule in dict.fromkeys(rules[0] for rules in taken.values() if rules):
        yield from _shape_findings(rule, family, mesh)
    specs: dict[Spec, str] = {}
    for path in taken:
        specs.setdefault(_spec(path, family, weights), path)
    if len(specs) > 1:
        (spec, path), (other_spec, other_path) = list(specs.items())[:2]
        message = (
            f"family '{family.name}' is split: '{path}' gets {format_spec(spec)} and "
            f"'{other_path}' gets {format_spec(other_spec)}; a plan gives its "
            f"{len(family.paths)} variables one spec"
        )
        rules = weights[path] or weights[other_path]
        yield Finding(kind="split-family", rule=rules[0].pattern, message=message)


def _shape_findings(rule: Rule, family: Family, mesh: Mesh | None) -> Iterator[Finding]:
    rank = len(family.shape)
    if len(rule.spec) > rank:
        message = (
            f"rule '{rule.pattern}' has {len(rule.spec)} entries, {format_spec(rule.spec)}, for "
            f"'{family.name}' of shape {family.shape}; give at most {rank}"
        )
        yield Finding(kind="too-long", rule=rule.pattern, message=message)
        return
    sizes = mesh.sizes if mesh is not None else {}
    for k, axis in enumerate(rule.spec):
        n_shards = sizes.get(axis, 1) if axis is not None else 1
        if family.shape[k] % n_shards:
            message = (
                f"rule '{rule.pattern}' splits dimension {k} of '{family.name}', of shape "
                f"{family.shape}, over axis '{axis}': {family.shape[k]} is not a multiple of "
                f"{n_shards}; put None there or another axis"
            )
            yield Finding(kind="indivisible", rule=rule.pattern, message=message)
