"""A plan and how it came about, as text."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from tabulate import tabulate

from autoshard.cost.values import Traffic
from autoshard.hardware.links import group_link
from autoshard.hardware.targets import Target
from autoshard.layout.resolve import resolve
from autoshard.layout.rules import LayoutRules, format_rules, rules_text
from autoshard.mesh import Mesh, format_spec
from autoshard.pipeline import PlanOutcome
from autoshard.planner.mesh_shapes import tradeoffs
from autoshard.planner.pricing import Candidate, Refused
from autoshard.planner.remedies import as_options
from autoshard.planner.settling import Verdict
from autoshard.report.explanation import RANKING, reasons_text
from autoshard.search.candidates import legal_specs
from autoshard.sharding_plan import Plan
from autoshard.units import format_bytes, format_seconds, option_bytes, spell_count
from autoshard.xla.collectives import Collective
from autoshard.xla.compiled import CompiledStep
from autoshard.xla.partitioned import target_collectives

__all__ = ["notes", "plan_text"]

# Whole weights of less than this share of the model are not worth a line.
_TRIFLE = 0.01

# If no axis divides more than this share, the mesh has hardly the right shape.
_MUCH = 0.1

# What carries a mesh axis, by `AxisLink.kind`.
_LINKS = {
    "torus-ring": "rings of the torus",
    "torus-line": "lines of the torus",
    "on-chip": "the chip itself",
    "nvlink": "NVLink",
    "network": "the network",
    "host": "the host's memory",
}

# The dimensions of a cache as KerasHub's models make it.
_CACHE = ("batch", "block", "key or value", "token", "head", "width")

# What a ranking says of a layout, as `_ranking_row` gives it.
_COLUMNS = ("step", "compute", "collectives", "wire", "memory", "compiled", "note")

# Collectives that the TPU compiler makes others of.
_REFINED = ("reduce-scatter", "all-gather")


def plan_text(outcome: PlanOutcome, *, timings: bool = False) -> str:
    """Everything a person wants to know of a plan.

    Args:
        outcome: what `autoshard.pipeline.make_plan` found.
        timings: whether to add the seconds of each stage.
    """
    parts = [
        _head(outcome),
        _map(outcome.plan),
        _cost(outcome),
        *_whole(outcome),
        *_shapes(outcome),
        _ranking(outcome),
        *_verification(outcome),
        reasons_text(outcome.plan),
    ]
    if timings:
        parts.append(_timings(outcome))
    return "\n\n".join(parts)


def _map(plan: Plan) -> str:
    head = "layout_map = keras.distribution.LayoutMap(device_mesh)\n" if plan.rules else ""
    return head + rules_text(plan.rules)


def _head(outcome: PlanOutcome) -> str:
    setup, table = outcome.planning.setup, outcome.planning.traced.table
    stored = f"{format_bytes(table.n_bytes)} as {' and '.join(table.dtypes)}"
    lines = [
        f"{table.name}: {spell_count(table.n_parameters, 'parameters', stored)}, "
        f"{outcome.planning.traced.folded.task}",
        f"mesh {setup.mesh.named} on {setup.target}, {format_bytes(setup.memory_limit)} a device",
        *_links(setup.mesh, setup.target),
        f"workload {setup.workload}",
    ]
    lines += notes(outcome)
    if not outcome.plan.fits:
        lines.append(_misfit(outcome))
    if outcome.failure:
        lines.append(f"UNVERIFIED: {outcome.failure}")
    return "\n".join(lines)


def _links(mesh: Mesh, target: Target) -> Iterator[str]:
    """What carries each axis, where there are several, or a network."""
    if len(mesh.parallel_axes) < 2 and target.n_slices == 1:
        return
    links = (group_link((axis,), mesh, target) for axis in mesh.parallel_axes)
    told = (
        f"{link.axis} over {_LINKS[link.kind]}, {link.bytes_per_second / 1e9:.3g} GB/s"
        for link in links
    )
    yield f"links {'; '.join(told)} a device"


def notes(outcome: PlanOutcome) -> list[str]:
    """What a user should know of the plan before it is used, a line each."""
    said = [f"note: {outcome.plan.stillness}"] if outcome.plan.stillness else []
    return said + [f"warning: {doubt}" for doubt in outcome.doubts]


def _misfit(outcome: PlanOutcome) -> str:
    peak = outcome.winner.scored.cost.memory.peak_bytes
    limit = format_bytes(outcome.planning.setup.memory_limit)
    said = (
        f": this is the nearest plan; it needs {format_bytes(peak)}, "
        f"{format_bytes(peak - outcome.planning.setup.memory_limit)} more "
        f"(planned for as if a chip had them by --memory-limit {option_bytes(peak)})"
    )
    if outcome.verdicts and outcome.verdicts[0].misfit:
        said = f", by the target's compiler: {outcome.verdicts[0].misfit}"
    lines = [f"DOES NOT FIT {limit} a device{said}"]
    lines += [
        f"  fits with {as_options(remedy.change)}: step {format_seconds(remedy.step_seconds)}, "
        f"{format_bytes(remedy.peak_bytes)} a device, predicted"
        for remedy in outcome.advice.remedies
    ]
    if refusal := outcome.advice.refusal(as_options):
        lines.append(f"  {refusal}")
    return "\n".join(lines)


def _cost(outcome: PlanOutcome) -> str:
    scored, planning = outcome.winner.scored, outcome.planning
    cost, memory, result = scored.cost, scored.cost.memory, planning.result
    parts = (
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("activations", memory.activations),
        ("KV cache", memory.kv_cache),
    )
    shown = ", ".join(f"{name} {format_bytes(n)}" for name, n in parts if n)
    specs = planning.cache_specs(scored)
    caches = dict.fromkeys(map(format_spec, specs))
    laid = [f"KV cache, laid out by XLA: {', '.join(caches)}"] if caches else []
    if any(len(spec) == len(_CACHE) for spec in specs):
        laid[0] += f" of {', '.join(_CACHE)}"
    if any(entry and ":" in entry for spec in specs for entry in spec):
        laid.append(
            "  axis:(m)n is the part of size n of an axis, behind parts of size m (as in Shardy)"
        )
    if result.bound_seconds is not None:
        bound = (
            f"by the same formulas none is faster than {format_seconds(result.bound_seconds)}, "
            f"the relaxed problem's bound (gap {result.gap(scored):.0%})"
        )
    elif scored.excess_bytes:
        bound = "no layout keeps the memory limit, by the same formulas"
    else:
        bound = "the relaxed problem, where numbered layers are alike, gives no bound"
    return "\n".join(
        (
            f"predicted step {format_seconds(cost.step_seconds)}: compute "
            f"{format_seconds(cost.compute_seconds)}, blocking collectives "
            f"{format_seconds(cost.blocking_seconds)}, collectives behind compute "
            f"{format_seconds(cost.overlapped_seconds)}; "
            f"{format_bytes(cost.collective_bytes)} on the wire a device",
            f"predicted memory {format_bytes(memory.peak_bytes)} a device at the peak: {shown}",
            *laid,
            f"searched {result.n_scored} layouts; {bound}",
            *_passed_over(outcome),
        )
    )


def _passed_over(outcome: PlanOutcome) -> Iterator[str]:
    """Why the fastest that fits was not taken, where the ranking has the plan before it."""
    winner, compiled = outcome.winner.scored, [one.candidate.scored for one in outcome.verdicts]
    fitting = [
        (scored.cost.step_seconds, planning.setup.mesh, scored)
        for planning in outcome.shapes or (outcome.planning,)
        for scored in planning.result.front
        if scored.excess_bytes == 0 and scored.rank > winner.rank
    ]
    seconds, mesh, fastest = min(fitting, key=lambda one: one[0], default=(math.inf, None, winner))
    if seconds >= winner.cost.step_seconds or fastest in compiled:
        return
    counted, own = (format_seconds(one.counted_beside(winner)) for one in (fastest, winner))
    if counted == own:  # they are as good as equal
        return
    yield (
        f"a step of {format_seconds(seconds)} on {mesh} was passed over: with what the ranking "
        f"adds (told below) it counts {counted}, this plan {own}"
    )


def _whole(outcome: PlanOutcome) -> Iterator[str]:
    """The weights that every device holds whole, and why, where they are more than a trifle."""
    table, mesh = outcome.planning.traced.table, outcome.planning.setup.mesh
    families = resolve(outcome.plan.rules, table, mesh).whole(table, mesh)
    total = sum(family.n_bytes for family in families)
    if mesh.n_devices == 1 or total < _TRIFLE * table.n_bytes:
        return
    named, undivided = [], 0
    large = [one for one in families if one.n_bytes >= _TRIFLE * table.n_bytes] or families[:1]
    for family in large:
        legal = len(list(legal_specs(family.shape, mesh))) > 1
        why = "by choice" if legal else f"no axis divides {family.shape}"
        undivided += 0 if legal else family.n_bytes
        named.append(f"  {family.name} {format_bytes(family.n_bytes)}: {why}")
    if len(large) < len(families):
        rest = total - sum(family.n_bytes for family in large)
        named.append(f"  and {len(families) - len(large)} more, {format_bytes(rest)}")
    if undivided > _MUCH * table.n_bytes and not outcome.shapes:
        named.append(f"  (--devices {mesh.n_devices} tries every shape of the mesh)")
    yield "\n".join([f"whole on every device: {format_bytes(total)} of weights", *named])


def _shapes(outcome: PlanOutcome) -> Iterator[str]:
    """The shapes of the mesh, and what memory costs in time over all of them."""
    if not outcome.shapes:
        return
    rows, batch = [], outcome.plan.workload.batch
    for planning in outcome.shapes:
        mark = "-> " if planning is outcome.planning else "   "
        row = _ranking_row(planning.candidates[0], None)
        rows.append((mark + str(planning.setup.mesh), *row))
    yield f"{_table(('mesh', *_COLUMNS), rows)}\n(the best layout of each shape, batch {batch})"
    lines = []
    for one in tradeoffs(outcome.shapes):
        seconds, peak = one.scored.cost.step_seconds, one.scored.cost.memory.peak_bytes
        options = f"--mesh {one.mesh} --batch {batch} --memory-limit {option_bytes(peak)}"
        lines.append((str(one.mesh), format_seconds(seconds), format_bytes(peak), options))
    yield tabulate(lines, headers=("mesh", "step", "memory", "asked for with")) + (
        "\n(no layout found is both faster and smaller than one of these; of those that save less "
        "than a twentieth of the memory the fastest is shown)"
    )


def _ranking(outcome: PlanOutcome) -> str:
    said = {verdict.candidate.name: verdict for verdict in outcome.verdicts}
    rows = []
    planning = outcome.planning
    beyond = [planning.without_generate] if planning.without_generate else []
    shown: list[Candidate | Refused] = [*_candidates(outcome), *beyond, *planning.rivals]
    for candidate in shown:
        name = ("-> " if candidate is outcome.winner else "   ") + candidate.name
        rows.append((name, *_ranking_row(candidate, said.get(candidate.name))))
    table = _table(("layout", *_COLUMNS), rows)
    note = f"all predicted by formulas;\n{RANKING}"
    by = next((v.compiled for v in outcome.verdicts if v.compiled), None)
    if by is not None:
        note += f";\ncompiled: {_source(by)}"
    refused = "".join(
        f"\n{rival.name}: {rival.failure}"
        for rival in planning.rivals
        if isinstance(rival, Refused)
    )
    return "\n\n".join([f"{table}\n({note}){refused}", *_differences(outcome)])


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table without the columns, after the first, that have nothing in them."""
    first, *others = zip(headers, *rows, strict=True)
    head, *body = zip(first, *(column for column in others if any(column[1:])), strict=True)
    return tabulate(body, headers=head, disable_numparse=True, preserve_whitespace=True)


def _candidates(outcome: PlanOutcome) -> tuple[Candidate, ...]:
    """The candidates, the split by hand, and what else was compiled, each once."""
    planning = outcome.planning
    compiled = (verdict.candidate for verdict in outcome.verdicts)
    shown = filter(None, (*planning.candidates, planning.by_hand, *compiled))
    return tuple({candidate.name: candidate for candidate in shown}.values())


def _source(step: CompiledStep) -> str:
    """Whose compute and collectives a compiled time has."""
    compiler = f"of the compiler of {step.target}"
    if step.estimated_cycles is not None:
        return f"the cycles and the collectives {compiler}"
    by = "that XLA's partitioner put in" if step.on_cpu else compiler
    return f"the predicted compute with the collectives {by}"


def _ranking_row(candidate: Candidate | Refused, verdict: Verdict | None) -> tuple[str, ...]:
    if isinstance(candidate, Refused):
        return ("", "", "", "", "", "", "not priced")
    cost = candidate.scored.cost
    compiled, note = "", ""
    if verdict is not None:
        compiled = format_seconds(verdict.step_seconds) if verdict.compiled else "fails"
        note = verdict.error or ("" if verdict.fits is not False else "too much when compiled")
    if candidate.scored.excess_bytes and not note:
        note = f"{format_bytes(candidate.scored.excess_bytes)} too much"
    return (
        format_seconds(cost.step_seconds),
        format_seconds(cost.compute_seconds),
        format_seconds(cost.blocking_seconds + cost.overlapped_seconds),
        format_bytes(cost.collective_bytes),
        format_bytes(cost.memory.peak_bytes),
        compiled,
        note,
    )


def _differences(outcome: PlanOutcome) -> Iterator[str]:
    """Each other candidate by the rules that it has not (-) and has (+) beside the plan's."""
    planning, winner = outcome.planning, outcome.winner.rules
    for candidate in _candidates(outcome):
        if candidate is not outcome.winner:
            yield f"{candidate.name}\n{_changes(winner, candidate.rules)}"
    if planning.without_generate:
        yield (
            "without generate (taken with --no-generate: under it generate, which sees one token "
            f"at a time, is slow or fails)\n{_changes(winner, planning.without_generate.rules)}"
        )


def _changes(old: LayoutRules, new: LayoutRules) -> str:
    """From one map to another, as a patch of lines."""
    gone = tuple(rule for rule in old if rule not in new)
    come = tuple(rule for rule in new if rule not in old)
    signed = (("-", format_rules(gone)), ("+", format_rules(come)))
    return "\n".join(f"{sign} {line}" for sign, text in signed for line in text.splitlines())


def _verification(outcome: PlanOutcome) -> Iterator[str]:
    """Prediction beside compiler, collective by collective."""
    if not outcome.verdicts or outcome.verdicts[0].compiled is None:
        return
    verdict = outcome.verdicts[0]
    compiled = verdict.compiled
    assert compiled is not None
    cost = outcome.winner.scored.cost
    predicted = _counts(cost.traffic)
    found = _counts(target_collectives(compiled, outcome.plan.mesh.data_axis, cost))
    arrays = _counts(compiled.collectives)
    keys = sorted(predicted | found, key=lambda key: -key[2] * max(predicted[key], found[key]))
    rows = [
        (key[0], key[1], format_bytes(key[2]), predicted[key], found[key], arrays[key])
        for key in keys
    ]
    head = f"compiled for {compiled.target} at full depth"
    if rows:
        table = tabulate(rows, headers=("kind", "axis", "size", "predicted", "compiled", "arrays"))
        yield f"{head}; collectives of a step\n{table}"
    else:
        yield f"{head}: no collectives in a step, as predicted"
    refined = any(predicted[key] != found[key] for key in keys if key[0] in _REFINED)
    if compiled.on_cpu and refined and outcome.planning.setup.target.chip.kind == "tpu":
        yield (
            "(compiled: what XLA's partitioner does; predicted: what TPU compilers make of it,\n"
            "which sum some reduce-scatters whole and gather again for the backward pass)"
        )
    if not compiled.on_cpu:
        yield (
            f"by the compiler: step {format_seconds(verdict.step_seconds)}, memory "
            f"{format_bytes(compiled.peak_bytes)} a device (arguments "
            f"{format_bytes(compiled.argument_bytes)}, temporaries "
            f"{format_bytes(compiled.temporary_bytes)}, outputs "
            f"{format_bytes(compiled.output_bytes)}, aliased {format_bytes(compiled.alias_bytes)})"
        )


def _counts(collectives: Iterable[Collective | Traffic]) -> Counter[tuple[str, str, int]]:
    counts: Counter[tuple[str, str, int]] = Counter()
    for item in collectives:
        counts[item.kind, item.axis, item.n_bytes] += item.count
    return counts


def _timings(outcome: PlanOutcome) -> str:
    rows = [(stage, f"{seconds:.2f} s") for stage, seconds in outcome.timings.items()]
    return tabulate(rows, headers=("stage", "measured"), disable_numparse=True)
