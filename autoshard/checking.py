"""Says what is wrong with a map that somebody wrote, without pricing it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from autoshard.errors import UsageError
from autoshard.hardware.targets import default_target, parse_target
from autoshard.layout.outputs import idle_rules, refused_outputs
from autoshard.layout.reading import read_map
from autoshard.layout.resolve import Finding, FindingKind, Resolution, resolve
from autoshard.layout.rules import LayoutRules, WrittenMap, matching_rules
from autoshard.mesh import Mesh, MeshLike, Spec, as_mesh, round_up
from autoshard.model.build import build_for
from autoshard.model.fold import PLANNED_PERIODS, fold
from autoshard.model.outputs import OutputShapes, joined_shapes
from autoshard.model.recipe import AbstractModel
from autoshard.model.step import check_length
from autoshard.model.variables import ModelTable
from autoshard.model.workload import Workload
from autoshard.planner.tracing import make_program, shapes_in_generate
from autoshard.sharding_plan import Plan, plan_or_map
from autoshard.units import format_bytes, whole_number

__all__ = ["check"]

# The share of the weights that a map may leave whole without a word.
_MUCH = 0.1


def check(
    model: Any,
    layout: Any,
    *,
    mesh: MeshLike | None = None,
    axes: Sequence[str] | None = None,
    seq_len: int | None = None,
) -> tuple[Finding, ...]:
    """What is wrong with a map for a model, errors first.

    The model has the low-rank factors that a plan file's workload trains.

    Args:
        model: as for `inspect`.
        layout: a `Plan`, a plan file, Python source with `layout_map[...] = ...` lines, `kerashub`
            for the map that KerasHub ships, a `keras.distribution.LayoutMap`, or a mapping of
            patterns to specs, such as `{"ffw_linear/kernel": ("model", None)}`.
        mesh: where given, axis names and divisibility are checked too, those of layer outputs for
            a training step of 8 x 512 tokens on TPUs and, unless a plan gave it up, for `generate`
            with one prompt; a plan file has its own mesh, chips and step.
        axes: names of the mesh axes.
        seq_len: tokens a sequence of that step, where not 512 or the plan's.

    Raises:
        UsageError: there is no such layout, or axes without a mesh.
        LayoutError: the layout holds no map.
        ModelError: the model takes no sequence of that length.
    """
    if mesh is None and axes is not None:
        raise UsageError("axes name those of a mesh: give the mesh too, such as 1x8")
    given = plan_or_map(layout)
    made = given if isinstance(given, Plan) else None
    grid = as_mesh(mesh, axes) if mesh is not None else None
    grid = made.mesh if made and grid is None else grid
    workload = made.workload if made else Workload(dtype=None)
    if seq_len is not None:
        workload = replace(workload, seq_len=whole_number("seq_len", seq_len))
    abstract = build_for(model, workload)
    if seq_len is not None:
        check_length(abstract, abstract.adapted(workload).seq_len)
    table = abstract.table()
    if isinstance(given, Plan):
        written = WrittenMap(rules=given.rules)
    else:
        written = read_map(given, abstract.backbone, grid)
    rules, unreadable = written.rules, written.unreadable
    found = resolve(rules, table, grid)
    findings = [*_reading_findings(unreadable), *_origin_findings(made, table), *found.findings]
    knows_axes = all(finding.kind != "unknown-axis" for finding in findings)
    if grid is not None and made is None and knows_axes and not unreadable:
        findings += _whole_findings(found, table, grid)
    if grid is not None and found.outputs and knows_axes:
        batch = round_up(workload.batch, grid.sizes[grid.data_axis])
        workload = replace(abstract.adapted(workload), batch=batch)
        findings += _output_findings(rules, found.outputs, abstract, grid, workload, made)
    return tuple(sorted(findings, key=lambda finding: finding.severity == "warning"))


def _reading_findings(unreadable: Sequence[str]) -> Iterator[Finding]:
    for message in unreadable:
        yield Finding(kind="unreadable", rule=None, message=message)


def _whole_findings(found: Resolution, table: ModelTable, mesh: Mesh) -> Iterator[Finding]:
    """Weights that a map written by hand leaves whole on each device, if they are many."""
    whole = [family for family in found.whole(table, mesh) if family.name in found.assignment]
    n_bytes = sum(family.n_bytes for family in whole)
    if n_bytes < _MUCH * table.n_bytes or mesh.n_devices == 1:
        return
    message = (
        f"{format_bytes(n_bytes)} of {format_bytes(table.n_bytes)} of weights lie whole on every "
        f"device, the largest '{whole[0].name}' ({format_bytes(whole[0].n_bytes)}): give it a "
        "rule that splits one of its dimensions"
    )
    yield Finding(kind="lies-whole", rule=None, message=message)


def _origin_findings(plan: Plan | None, table: ModelTable) -> Iterator[Finding]:
    """What is wrong with where a plan comes from: it was made for another model."""
    if plan and (told := plan.other_model(table)):
        yield Finding(kind="other-model", rule=None, message=told)


def _output_findings(
    rules: LayoutRules,
    outputs: Mapping[str, Spec],
    abstract: AbstractModel,
    mesh: Mesh,
    workload: Workload,
    made: Plan | None,
) -> Iterator[Finding]:
    """What is wrong with a map's rules for layer outputs, in the step or in `generate`."""
    # A plan that gave `generate` up is not told so.
    generates = abstract.generates and (made is None or made.generate)
    target = parse_target(made.target) if made else default_target(mesh.n_devices)
    traced = fold(abstract, periods=PLANNED_PERIODS), workload, target.chip
    by_step = make_program(*traced).output_shapes()
    by_generate = (shapes_in_generate(*traced) if generates else None) or OutputShapes()
    table = abstract.table()
    refused = _refused(outputs, table, mesh, workload, by_step, by_generate)
    for path, (kind, reason) in refused.items():
        (rule,) = {rule.pattern for rule in matching_rules(rules, path)}
        yield Finding(kind=kind, rule=rule, message=f"rule '{rule}', {reason}")
    for rule, message in idle_rules(
        rules, outputs, table, joined_shapes(by_step, by_generate)
    ).items():
        yield Finding(kind="never-asked", rule=rule, message=message)


def _refused(
    outputs: Mapping[str, Spec],
    table: ModelTable,
    mesh: Mesh,
    workload: Workload,
    by_step: OutputShapes,
    by_generate: OutputShapes,
) -> dict[str, tuple[FindingKind, str]]:
    """The layer outputs that cannot be laid out as a map says, in the step or in `generate`."""
    found: dict[str, tuple[FindingKind, str]] = {}
    for path, (kind, reason) in refused_outputs(outputs, table, mesh, by_step).items():
        found[path] = kind, f"with {workload.size}: {reason}"
    for path, (_, reason) in refused_outputs(outputs, table, mesh, by_generate).items():
        found.setdefault(path, ("breaks-generate", f"while generate answers one prompt: {reason}"))
    return found
