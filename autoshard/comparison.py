"""Prices layouts side by side: maps that people wrote, those that ship with KerasHub, and plans."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from autoshard.cost.values import StepCost, Traffic
from autoshard.errors import LayoutError, PlanFileError, UsageError
from autoshard.layout.causes import DATA_SPLIT, Causes
from autoshard.layout.outputs import idle_rules
from autoshard.layout.reading import LayoutLike, check_there, is_json, is_text, read_map
from autoshard.layout.resolve import resolve
from autoshard.layout.rules import LayoutRules
from autoshard.mesh import MeshLike
from autoshard.model.paths import layer_template, layer_templates
from autoshard.model.variables import ModelTable
from autoshard.planner.planning import run_planner
from autoshard.planner.pricing import Candidate, Refused, make_scorer, score_rules
from autoshard.planner.setup import Setup, check_options, make_setup
from autoshard.planner.stopwatch import Stopwatch
from autoshard.planner.tracing import TracedModel, trace_model
from autoshard.records.comparison import ComparedLayout, Comparison, CostlyCollective
from autoshard.records.parts import Prediction, Versions
from autoshard.search.descent import Scorer
from autoshard.sharding_plan import GENERATE_GIVEN_UP, Plan, plan_or_map

__all__ = ["compare"]

# The word for the layout that `autoshard.plan` finds.
_PLANNED = "autoshard"

# The cause of what takes more than one rule, or would be there for each of several.
_SEVERAL = "several rules"


def compare(
    model: Any,
    layouts: Sequence[LayoutLike | Plan],
    mesh: MeshLike,
    *,
    on_progress: Callable[[str], None] = lambda stage: None,
    **options: Any,
) -> Comparison:
    """Price several layouts of one model for the same step on the same mesh.

    Args:
        model: as for `autoshard.inspect`.
        layouts: each as for `autoshard.check`, or `autoshard` for the one that `autoshard.plan`
            finds.
        mesh: as for `autoshard.plan`.
        on_progress: called with the name of each stage.
        **options: `axes`, `target`, `slices`, `workload`, `batch`, `seq_len`, `lora_rank`, `dtype`,
            `optimizer`, `memory_limit` and `generate`, as for `autoshard.plan`.

    Returns:
        The layouts, best first. What cannot be read and what Keras refuses are among them, with
        the reason.

    Raises:
        UsageError: there is no such file, or a value is wrong.
    """
    check_options("compare", options)
    if isinstance(layouts, str) or not isinstance(layouts, Sequence):
        raise UsageError(f"layouts is a {type(layouts).__name__}; give a list, also of one")
    if not layouts:
        raise UsageError("name at least one layout to compare")
    for layout in layouts:
        if not isinstance(layout, Plan) and layout != _PLANNED:
            check_there(layout)
    setup = make_setup(mesh, **options)
    traced = trace_model(model, setup.workload, setup.target.chip, Stopwatch(progress=on_progress))
    setup = replace(setup, workload=traced.workload)
    table = traced.table
    read = [
        (name, *_read(layout, traced, setup, on_progress))
        for name, layout in zip(_names(layouts), layouts, strict=True)
    ]
    scorer = make_scorer(traced.program, setup)
    compared = [_compared(*one, table, scorer) for one in read]
    return Comparison(
        model=table.name,
        mesh=setup.mesh,
        workload=setup.workload,
        target=str(setup.target),
        memory_limit=setup.memory_limit,
        layouts=tuple(sorted(compared, key=lambda layout: layout.rank)),
        versions=Versions.installed(),
    )


def _names(layouts: Sequence[LayoutLike | Plan]) -> list[str]:
    """What each layout is called, numbered where several would be called the same."""
    names = [_name(layout) for layout in layouts]
    return [
        f"{name} {names[: place + 1].count(name)}" if names.count(name) > 1 else name
        for place, name in enumerate(names)
    ]


def _name(layout: LayoutLike | Plan) -> str:
    if isinstance(layout, Mapping):
        return "map"
    if isinstance(layout, str | os.PathLike) and not is_text(layout):
        return os.fspath(layout)
    return "plan" if isinstance(layout, Plan) or is_json(layout) else "source"


def _read(
    layout: LayoutLike | Plan,
    traced: TracedModel,
    setup: Setup,
    on_progress: Callable[[str], None],
) -> tuple[LayoutRules | str, tuple[str, ...]]:
    """The rules of a layout, or why there are none, and what to say of where they come from."""
    if layout == _PLANNED:
        watch = Stopwatch(progress=on_progress)
        return run_planner(traced, setup, top=1, watch=watch).candidates[0].rules, ()
    try:
        given = plan_or_map(layout)
        if not isinstance(given, Plan):
            return read_map(given, traced.whole.backbone, setup.mesh).accepted(), ()
        notes = [told] if (told := given.other_model(traced.table)) else []
        if _purpose(given) != _purpose(setup):
            notes.append(f"made for {_purpose(given)}")
        return given.rules, (*notes, *([] if given.generate else [GENERATE_GIVEN_UP]))
    except (LayoutError, PlanFileError) as error:
        # What an error says of a file begins with its name, which is told beside it.
        return str(error).removeprefix(_name(layout)).lstrip(", "), ()


def _purpose(of: Plan | Setup) -> str:
    """The mesh, the chips and the step, in one line."""
    return f"mesh {of.mesh.named}, {of.target}, {of.workload}"


def _compared(
    name: str,
    rules: LayoutRules | str,
    warnings: tuple[str, ...],
    table: ModelTable,
    scorer: Scorer,
) -> ComparedLayout:
    if isinstance(rules, str):
        return ComparedLayout(name=name, rules=(), failure=rules)
    priced = score_rules(name, rules, table, scorer)
    if isinstance(priced, Refused):
        return ComparedLayout(name=name, rules=rules, failure=priced.failure, warnings=warnings)
    resolution = resolve(rules, table, scorer.mesh)
    whole = resolution.whole(table, scorer.mesh)
    shapes = scorer.pricer.program.output_shapes()
    causes = Causes(rules=rules, mesh=scorer.mesh, paths=tuple(table.templates))
    costly = _costly(priced.scored.cost, causes, table)
    return ComparedLayout(
        name=name,
        rules=rules,
        predicted=Prediction.of(priced.scored.cost),
        excess_bytes=priced.scored.excess_bytes,
        whole_bytes=sum(family.n_bytes for family in whole),
        collectives=tuple(_explained(costly, rules, table, scorer)),
        warnings=(
            *warnings,
            *(finding.message for finding in resolution.findings),
            *idle_rules(rules, resolution.outputs, table, shapes).values(),
        ),
    )


def _costly(cost: StepCost, causes: Causes, table: ModelTable) -> list[CostlyCollective]:
    """Equal collectives of one layer of all blocks as one, the costliest first."""
    layers = layer_templates(table.templates)
    groups: dict[tuple[object, ...], list[Traffic]] = {}
    for item in cost.traffic:
        layer = layer_template(item.layer, layers)
        key = (item.kind, item.axis, item.n_bytes, item.overlapped, layer)
        groups.setdefault(key, []).append(item)
    found = []
    for items in groups.values():
        first = items[0]
        layer = layer_template(first.layer, layers)
        found.append(
            CostlyCollective(
                kind=first.kind,
                axis=first.axis,
                n_bytes=first.n_bytes,
                count=sum(item.count for item in items),
                seconds=sum(item.seconds * item.count for item in items),
                overlapped=first.overlapped,
                layer=layer,
                cause=causes.of(layer, first.axis),
            )
        )
    return sorted(found, key=lambda item: -item.seconds)


def _explained(
    collectives: Sequence[CostlyCollective],
    rules: LayoutRules,
    table: ModelTable,
    scorer: Scorer,
) -> list[CostlyCollective]:
    """With the one rule as cause, where the layer tells none, without which they are not there.

    Layouts pass from layer to layer: a rule for position embeddings splits the sequence, over
    which the gradient of the token embedding, that no rule splits, is summed.
    """
    if all(item.cause for item in collectives):
        return list(collectives)
    layers = layer_templates(table.templates)
    maps = [tuple(other for other in rules if other is not rule) for rule in rules]
    priced = [score_rules("", some, table, scorer) for some in (*maps, ())]
    if any(isinstance(one, Refused) for one in priced):
        return list(collectives)  # a rule stands before one that is wrong for what it takes
    costs = [one.scored.cost for one in priced if isinstance(one, Candidate)]
    *without, bare = [
        {(t.kind, t.axis, t.n_bytes, layer_template(t.layer, layers)) for t in cost.traffic}
        for cost in costs
    ]

    def cause(item: CostlyCollective) -> str:
        key = (item.kind, item.axis, item.n_bytes, item.layer)
        needed = [rule for rule, left in zip(rules, without, strict=True) if key not in left]
        if len(needed) == 1:
            return needed[0].pattern
        return DATA_SPLIT if key in bare else _SEVERAL

    return [item if item.cause else replace(item, cause=cause(item)) for item in collectives]
