"""What was found, as the value that a plan file holds."""

from collections.abc import Iterator
from dataclasses import replace

from autoshard.layout.causes import Causes
from autoshard.planner.doubts import doubts
from autoshard.planner.planning import Planning
from autoshard.planner.pricing import Candidate
from autoshard.planner.settling import Verdict
from autoshard.records.parts import (
    Alternative,
    Compiled,
    CompiledCollective,
    PlannedModel,
    Prediction,
    Reason,
    Versions,
)
from autoshard.search.candidates import NO_RULE
from autoshard.search.descent import Scored
from autoshard.search.ranking import SearchResult
from autoshard.sharding_plan import Plan
from autoshard.xla.compiled import CompiledStep

__all__ = ["plan_value"]


def plan_value(
    planning: Planning, winner: Candidate, verdicts: tuple[Verdict, ...], *, is_best_shape: bool
) -> Plan:
    """The winner as a plan, the others as alternatives, those compiled first.

    Args:
        planning: the search.
        winner: the candidate that is chosen.
        verdicts: what a compiler said of some candidates, best first.
        is_best_shape: whether it comes before the plans for every other shape of the mesh.
    """
    said = {verdict.candidate.name: _compiled(verdict, planning) for verdict in verdicts}
    judged = [verdict.candidate for verdict in verdicts]
    fits = verdicts[0].fits if verdicts else None
    others = [candidate for candidate in planning.candidates if candidate not in judged]
    return Plan(
        model=PlannedModel.of(planning.traced.table),
        mesh=planning.setup.mesh,
        rules=winner.rules,
        workload=planning.setup.workload,
        target=str(planning.setup.target),
        generate=planning.setup.generate or not winner.scored.n_outputs,
        fits=winner.fits if fits is None else fits,
        warnings=tuple(
            doubts(planning, winner.rules, is_compiled=bool(verdicts), is_best_shape=is_best_shape)
        ),
        predicted=Prediction.of(winner.scored.cost),
        compiled=said.get(winner.name),
        reasons=tuple(_reasons(planning.result, winner.scored)),
        alternatives=tuple(
            Alternative(
                rules=candidate.rules,
                predicted=Prediction.of(candidate.scored.cost),
                compiled=said.get(candidate.name),
            )
            for candidate in (*judged, *others)
            if candidate is not winner
        ),
        versions=Versions.installed(),
    )


def _reasons(result: SearchResult, scored: Scored) -> Iterator[Reason]:
    """Why each family and laid out output has its spec."""
    specs = dict(scored.assignment)
    for choices in result.choices:
        spec = specs.get(choices.name, NO_RULE)
        if spec == NO_RULE:
            continue
        reason = Reason(family=choices.name, spec=spec)
        found = result.next_best(scored, choices)
        if found is not None:
            other, next_best = found
            reason = replace(
                reason,
                next_best=next_best,
                cost_seconds=other.cost.step_seconds - scored.cost.step_seconds,
                cost_bytes=other.cost.memory.peak_bytes - scored.cost.memory.peak_bytes,
                fits=other.excess_bytes == 0,
            )
        yield reason


def _compiled(verdict: Verdict, planning: Planning) -> Compiled | None:
    """A compiler's answer as a plan file holds it."""
    step = verdict.compiled
    if step is None:
        return None
    causes = Causes(
        rules=verdict.candidate.rules,
        mesh=planning.setup.mesh,
        paths=tuple(planning.traced.table.templates),
    )
    return Compiled(
        target=step.target,
        blocks=step.n_blocks,
        fits=verdict.fits,
        peak_bytes_per_device=None if step.on_cpu else step.peak_bytes,
        collectives=_collectives(step, causes),
        step_seconds=verdict.step_seconds,
    )


def _collectives(step: CompiledStep, causes: Causes) -> tuple[CompiledCollective, ...]:
    return tuple(
        CompiledCollective(
            kind=item.kind,
            axis=item.axis or None,
            wire_bytes=round(item.wire_bytes),
            count=item.count,
            layer=item.layer or None,
            rule=causes.of(item.layer, item.axis),
        )
        for item in step.merged_collectives()
    )
