"""The search as a whole: the best layouts of a program, and what comes next to each choice."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from autoshard.cost.step import StepPricer
from autoshard.mesh import Mesh, Spec
from autoshard.model.outputs import OutputShapes
from autoshard.search.candidates import (
    NO_RULE,
    Choices,
    family_choices,
    first_specs,
    output_choices,
)
from autoshard.search.descent import (
    Scored,
    Scorer,
    descend,
    exhaust,
    n_assignments,
    outputs_alone,
    starting_points,
)
from autoshard.search.lower_bound import relax
from autoshard.search.moves import sibling_groups
from autoshard.search.rule_count import RuleCount

__all__ = ["SearchResult", "search"]

# Of so many assignments and fewer every one is scored.
_EXHAUSTIVE = 64
# Times, bytes on the wire and bytes of memory that differ by less are taken to be equal.
_SAME = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What the search found.

    Attributes:
        ranked: layouts from best to worst, distinct in cost.
        bound_seconds: no layout has a faster step, by the cost model; None where not even the
            weights and slots of any fit, or where the bound does not hold.
        n_scored: how many assignments were propagated and priced.
        scorer: what priced them, and remembers.
        choices: what was to be decided for each family and layer output.
        front: the layouts that no other beats in both time and memory, the fastest first; those
            that exceed the limit among them.
        unbound: a layout that is better than all of these, but breaks the bounds on layer outputs;
            None where there is none.
        plain: the best without rules for layer outputs.
        tied: groups of families that a map can give only one spec.
    """

    ranked: tuple[Scored, ...]
    bound_seconds: float | None
    n_scored: int
    scorer: Scorer
    choices: tuple[Choices, ...]
    front: tuple[Scored, ...] = ()
    unbound: Scored | None = None
    plain: Scored | None = None
    tied: Sequence[Collection[str]] = ()

    def next_best(self, scored: Scored, choices: Choices) -> tuple[Scored, Spec] | None:
        """The best layout with another spec of one family, all else equal, and that spec.

        None where no other spec is legal, or a map can tell none.
        """
        others = [
            pair
            for pair in _neighbours(self.scorer, scored, choices)
            if _can_be_told(pair[0], self.tied)
        ]
        return min(others, key=lambda pair: pair[0].rank, default=None)

    def gap(self, scored: Scored) -> float:
        """How far a layout may be from the best possible: `(step - bound) / step`."""
        step, bound = scored.cost.step_seconds, self.bound_seconds
        return max(0.0, (step - bound) / step) if bound is not None and step else 0.0


def search(
    pricer: StepPricer,
    mesh: Mesh,
    memory_limit: int | None,
    *,
    top: int = 5,
    starts: Sequence[Mapping[str, Spec]] = (),
    outputs: OutputShapes | None = None,
    unbound_outputs: OutputShapes | None = None,
    tied: Sequence[Collection[str]] = (),
) -> SearchResult:
    """Find the layouts with the fastest step within the memory limit.

    Args:
        pricer: prices of the program on the machine.
        mesh: the mesh.
        memory_limit: bytes a device, or None.
        top: how many layouts to return.
        starts: assignments to start from beside the search's own.
        outputs: layer outputs that may be laid out, with the shapes that bound their specs.
        unbound_outputs: the same with fewer bounds, to look for what these cost.
        tied: groups of families that a map can give only one spec.

    Returns:
        The ranked layouts. Where nothing fits, the one nearest to fitting comes first.
    """
    program = pricer.program
    families = _moved_together(family_choices(program, mesh), tied)
    bound = output_choices(program, mesh, outputs or {})
    everything = (*families, *bound)
    free = output_choices(program, mesh, unbound_outputs or {})
    rules = RuleCount.of({one.name: one for one in (*everything, *free)}.values())
    scorer = Scorer(pricer=pricer, mesh=mesh, memory_limit=memory_limit, n_rules=rules)
    relaxed = relax(pricer, families, mesh, memory_limit)
    own = starting_points(families, relaxed.assignment, mesh)
    smallest = own[1]
    points = [*own, *({**smallest, **start} for start in starts)]
    best = _best(scorer, everything, points)
    names = {choices.name for choices in families}
    origins = [dict(best.assignment), _only(best, names), smallest]
    beyond = descend(scorer, [*families, *free], origins, n_shakes=0) if free else None
    # Whole weights, but for those that no op reads, are among what is chosen from.
    scorer.score(first_specs(everything))
    first = min(_worthy(scorer, everything, tied), key=lambda scored: scored.rank)
    _walk(scorer, everything, first)
    worthy = _worthy(scorer, everything, tied)
    ranked = sorted(worthy, key=lambda scored: scored.rank)
    return SearchResult(
        ranked=_distinct(ranked, top),
        bound_seconds=_bound(relaxed.bound_seconds, ranked[0]),
        n_scored=len(scorer.seen),
        scorer=scorer,
        choices=everything,
        front=_front(worthy),
        unbound=beyond if beyond and _is_told(beyond, ranked[0], [*bound, *free], mesh) else None,
        plain=next((scored for scored in ranked if not scored.n_outputs), None),
        tied=tied,
    )


def _is_told(beyond: Scored, best: Scored, outputs: Iterable[Choices], mesh: Mesh) -> bool:
    """Whether a layout is worth giving `generate` up for: not for a few bytes where none fits."""
    is_faster = beyond.cost.step_seconds < best.cost.step_seconds
    is_gain = beyond.rank < best.rank and (is_faster or not beyond.excess_bytes)
    return is_gain and _holds(beyond, _output_groups(outputs), mesh.parallel_axes)


def _best(
    scorer: Scorer, families: Sequence[Choices], points: Sequence[Mapping[str, Spec]]
) -> Scored:
    """The best of all assignments, or what descents from some points and one more come to."""
    if n_assignments(families) <= _EXHAUSTIVE:
        return exhaust(scorer, families)
    alone = outputs_alone(scorer, families)
    return descend(scorer, families, [*points, alone] if alone else points)


def _moved_together(
    families: Sequence[Choices], tied: Sequence[Collection[str]]
) -> tuple[Choices, ...]:
    """The families, those that need one spec as siblings: whole, or as is legal for all of them."""
    named = {choices.name: choices for choices in families}
    for place, group in enumerate(tied):
        members = [named[name] for name in group if name in named]
        for choices in members:
            common = (s for s in choices.specs if any(s) and all(s in m.specs for m in members))
            named[choices.name] = replace(
                choices,
                specs=((None,) * len(choices.shape), *common),
                siblings=f"tied {place} {len(choices.shape)}",
            )
    return tuple(named.values())


def _walk(scorer: Scorer, families: Sequence[Choices], best: Scored) -> None:
    """Score all layouts that differ in one family, and so on from the best as long as it gains."""
    while True:
        near = [found for choices in families for found, _ in _neighbours(scorer, best, choices)]
        nearest = min(near, key=lambda scored: scored.rank, default=best)
        if nearest.rank >= best.rank:
            return
        best = nearest


def _worthy(
    scorer: Scorer, families: Sequence[Choices], tied: Sequence[Collection[str]]
) -> list[Scored]:
    """Of all that was scored what may be chosen, and gains by its rules for outputs."""
    names = {choices.name for choices in families if not choices.is_output}
    specs = {choices.name: choices.specs for choices in families}
    groups, axis_names = _output_groups(families), scorer.mesh.parallel_axes
    kept = [scored for scored in scorer.seen.values() if _keeps(scored, specs, tied)]
    for scored in kept:
        scorer.score(_only(scored, names))  # what its rules for outputs have to beat
    return [
        scored
        for scored in scorer.seen.values()
        if _keeps(scored, specs, tied)
        and _holds(scored, groups, axis_names)
        and _gains(scored, names, scorer)
    ]


def _output_groups(families: Iterable[Choices]) -> list[list[Choices]]:
    """The layer outputs that are laid out together."""
    return list(sibling_groups(choices for choices in families if choices.is_output).values())


def _holds(
    scored: Scored, groups: Iterable[Sequence[Choices]], axis_names: Collection[str]
) -> bool:
    """Whether XLA keeps whole what rules for outputs leave whole along an axis.

    Of arrays that are added up it does where each has such a rule: what one leaves whole another
    splits again, while a split passes on to all.

    Args:
        scored: the layout.
        groups: the outputs that are added up.
        axis_names: the mesh axes of more than one device.
    """
    if not scored.n_outputs:
        return True
    laid = dict(scored.assignment)
    axes = {axis for spec in laid.values() for axis in spec if axis in axis_names}
    for members in groups:
        specs = {laid.get(choices.name, NO_RULE) for choices in members}
        if NO_RULE in specs and not all(spec == NO_RULE or axes <= set(spec) for spec in specs):
            return False
    return True


def _keeps(
    scored: Scored, specs: Mapping[str, Sequence[Spec]], tied: Sequence[Collection[str]]
) -> bool:
    """Whether a layout takes only specs that are to be chosen from, and one where it can only."""
    known = all(spec in specs.get(name, ()) for name, spec in scored.assignment)
    return known and _can_be_told(scored, tied)


def _can_be_told(scored: Scored, tied: Sequence[Collection[str]]) -> bool:
    """Whether families that a map can give only one spec have one."""
    split = {name: spec for name, spec in scored.assignment if any(spec)}
    return all(len({split.get(name) for name in group}) == 1 for group in tied)


def _bound(relaxed_seconds: float, best: Scored) -> float | None:
    """The relaxed problem's bound where there is one, and where it holds for the best layout.

    Layers of one block under names that Keras counts are tied too, and apart may do better.
    """
    found = best.cost.step_seconds
    holds = relaxed_seconds <= found * (1 + _SAME)
    return min(relaxed_seconds, found) if holds and math.isfinite(relaxed_seconds) else None


def _front(layouts: Sequence[Scored]) -> tuple[Scored, ...]:
    """The Pareto set of step time and peak memory."""
    kept: list[Scored] = []
    peak = math.inf
    for scored in sorted(layouts, key=lambda one: (one.cost.step_seconds, one.rank)):
        if scored.cost.memory.peak_bytes < peak:
            peak = scored.cost.memory.peak_bytes
            kept.append(scored)
    return tuple(kept)


def _gains(scored: Scored, families: Collection[str], scorer: Scorer) -> bool:
    """Whether the rules for layer outputs, if any, make the layout better than it is without."""
    if not scored.n_outputs:
        return True
    return scored.rank < scorer.score(_only(scored, families)).rank


def _only(scored: Scored, families: Collection[str]) -> dict[str, Spec]:
    """A layout of these families alone, without its rules for layer outputs."""
    return {name: spec for name, spec in scored.assignment if name in families}


def _distinct(ranked: Sequence[Scored], top: int) -> tuple[Scored, ...]:
    """The first layouts, without those that run a better one's program with no less memory."""
    kept: list[Scored] = []
    for scored in ranked:
        if not any(_idle(scored, other) for other in kept):
            kept.append(scored)
        if len(kept) == top:
            break
    return tuple(kept)


def _idle(scored: Scored, better: Scored) -> bool:
    """Whether a layout takes the time and the wire of a better one and saves no memory."""
    ours, theirs = scored.cost, better.cost
    # The sum over all collectives comes last: most layouts differ before.
    return (
        ours.memory.peak_bytes >= (1 - _SAME) * theirs.memory.peak_bytes
        and _equal(ours.step_seconds, theirs.step_seconds)
        and _equal(ours.collective_bytes, theirs.collective_bytes)
    )


def _equal(a: float, b: float) -> bool:
    return abs(a - b) <= _SAME * max(a, b)


def _neighbours(scorer: Scorer, scored: Scored, choices: Choices) -> list[tuple[Scored, Spec]]:
    """A layout with every other spec of one family, all else equal."""
    assignment = dict(scored.assignment)
    spec = assignment.get(choices.name, NO_RULE)
    return [
        (scorer.score({**assignment, choices.name: other}), other)
        for other in choices.specs
        if other != spec
    ]
