"""The layouts that a plan was chosen from, and the shapes of the mesh, as text."""

from collections.abc import Iterator, Sequence

from tabulate import tabulate

from autoshard.layout.rules import LayoutRules, format_rules
from autoshard.pipeline import PlanOutcome
from autoshard.planner.mesh_shapes import tradeoffs
from autoshard.planner.pricing import Candidate, Refused
from autoshard.planner.settling import Verdict
from autoshard.report.explanation import RANKING
from autoshard.units import format_bytes, format_seconds, option_bytes
from autoshard.xla.compiled import CompiledStep

__all__ = ["ranking_text", "shapes_text"]

# What a ranking says of a layout, as `_row` gives it.
_COLUMNS = ("step", "compute", "collectives", "wire", "memory", "compiled", "note")


def ranking_text(outcome: PlanOutcome) -> str:
    """The candidates, what was compiled beside them, and the maps that people use today.

    Args:
        outcome: what `autoshard.pipeline.make_plan` found.
    """
    said = {verdict.candidate.name: verdict for verdict in outcome.verdicts}
    rows = []
    planning = outcome.planning
    beyond = [planning.without_generate] if planning.without_generate else []
    shown: list[Candidate | Refused] = [*_candidates(outcome), *beyond, *planning.rivals]
    for candidate in shown:
        name = ("-> " if candidate is outcome.winner else "   ") + candidate.name
        rows.append((name, *_row(candidate, said.get(candidate.name))))
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


def shapes_text(outcome: PlanOutcome) -> Iterator[str]:
    """The shapes of the mesh, where several were searched, and what memory costs in time.

    Args:
        outcome: as for `ranking_text`.
    """
    if not outcome.shapes:
        return
    rows, batch = [], outcome.plan.workload.batch
    for planning in outcome.shapes:
        mark = "-> " if planning is outcome.planning else "   "
        row = _row(planning.candidates[0], None)
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


def _row(candidate: Candidate | Refused, verdict: Verdict | None) -> tuple[str, ...]:
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
