"""Search over assignments of specs to families, each scored as the program that propagation gives.

Exhaustive where the assignments are few; otherwise descent, which takes any better move until there
is none:

1. from several starts, the relaxed problem's answer first, by moves of one sibling group or of one
   family; once weights move before the outputs of layers and once after them;
2. from the best of these, by moves of two sibling groups at once too, and of the outputs of a layer
   with its weights;
3. from the best with two sibling groups of weights and two of outputs shaken, several times.

Large programs end pairs and shakes early, and descend only from starts that are better than what
was found. The outputs of layers move alone, or two that stand beside each other; one start lays out
any two groups of them.
"""

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from autoshard.cost.step import StepPricer
from autoshard.cost.values import StepCost
from autoshard.graph.program import Layout
from autoshard.graph.propagation import Apart, Propagator
from autoshard.mesh import Mesh, Spec
from autoshard.search.candidates import (
    NO_RULE,
    Choices,
    asked_layouts,
    first_specs,
    fixed_layouts,
    smallest_shards,
    split_by_hand,
)
from autoshard.search.moves import Move, lay, make_moves, sibling_groups
from autoshard.search.rule_count import RuleCount

__all__ = [
    "Scored",
    "Scorer",
    "descend",
    "exhaust",
    "n_assignments",
    "outputs_alone",
    "starting_points",
]

Key = tuple[tuple[str, Spec], ...]

# What a rule that `RuleCount` counts has to win, of the step, to be worth its line.
_RULE_SHARE = 2.5e-3

# What a second of collectives behind compute counts in the ranking: a judgement, not a measurement.
_HIDDEN_SHARE = 0.05

# Memory counts as this power of its bytes: with half the peak a step may take 0.7% longer. A
# judgement too, so that no table stays whole for a microsecond.
_MEMORY_POWER = 0.01

# So many looks at ops, of all layouts together, after which no more pairs are tried and no shakes.
_MOST_LOOKS = 2_500_000

# So often the best is shaken and descended from again.
_SHAKES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One assignment and the cost of its propagated program.

    Attributes:
        assignment: family, or template of a layer output -> spec, as sorted pairs.
        cost: the step.
        excess_bytes: bytes a device above the memory limit; 0 where it fits.
        n_outputs: how many layer outputs it lays out.
        n_rules: how many rules have to pay for their lines, as `RuleCount` counts them.
    """

    assignment: Key
    cost: StepCost
    excess_bytes: int
    n_outputs: int = 0
    n_rules: int = 0

    @property
    def rank(self) -> tuple[int, float, int]:
        """Bytes too much; then the step and what is added to it; then the peak.

        Added are 5% of what it hides, for that takes memory bandwidth from compute, 0.25% a rule
        that has to pay for its line, and 0.7% for twice the memory.
        """
        seconds = self.weigh(self._counted_seconds)
        return self.excess_bytes, seconds, self.cost.memory.peak_bytes

    @property
    def _counted_seconds(self) -> float:
        seconds = self.cost.step_seconds * (1 + _RULE_SHARE * self.n_rules)
        return seconds + _HIDDEN_SHARE * self.cost.overlapped_seconds

    def counted_beside(self, other: "Scored") -> float:
        """Seconds that the ranking counts for the step where memory is as much as the other's."""
        return self.weigh(self._counted_seconds) / other.weigh(1.0)

    def weigh(self, seconds: float) -> float:
        """The time of a step of this layout as the ranking compares it: with its memory in it."""
        return seconds * float(self.cost.memory.peak_bytes**_MEMORY_POWER)


@dataclass(slots=True)
class Scorer:
    """Scores assignments, each once.

    Attributes:
        pricer: prices of the program on the machine.
        mesh: the mesh.
        memory_limit: bytes a device, or None.
        n_rules: counts the rules of an assignment that have to pay for their lines.
        seen: every assignment scored so far.
    """

    pricer: StepPricer
    mesh: Mesh
    memory_limit: int | None
    n_rules: Callable[[Mapping[str, Spec]], int] = RuleCount.of(())
    seen: dict[Key, Scored] = field(default_factory=dict)
    _costs: dict[object, StepCost] = field(init=False, default_factory=dict)
    _propagator: Propagator = field(init=False)
    _outputs: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        self._outputs = frozenset(o.template for o in self.pricer.program.layer_outputs)
        self._propagator = Propagator(self.pricer.program, self.pricer.machine.axis_sizes)

    @property
    def is_spent(self) -> bool:
        """Whether more was looked at than a search for the last percent is worth."""
        return len(self.seen) * len(self.pricer.program.ops) > _MOST_LOOKS

    def lay_out(self, assignment: Mapping[str, Spec]) -> tuple[Layout, ...]:
        """The layout of each group of the program under an assignment, by the pricer's parts."""
        given = (self.pricer.program, assignment, self.mesh, self.pricer.machine.parts)
        return self._propagator.propagate(fixed_layouts(*given), asked_layouts(*given))

    def _price(self, layouts: tuple[Layout, ...], apart: Apart) -> StepCost:
        """The step of a program, once: of many assignments XLA makes the same."""
        program = layouts, apart.told()
        cost = self._costs.get(program)
        if cost is None:
            cost = self._costs[program] = self.pricer.price(layouts, apart)
        return cost

    def score(self, assignment: Mapping[str, Spec]) -> Scored:
        """Propagate an assignment through the program and price what comes out."""
        key = tuple(sorted(item for item in assignment.items() if item[1] != NO_RULE))
        found = self.seen.get(key)
        if found is None:
            cost = self._price(self.lay_out(assignment), self._propagator.apart)
            limit = math.inf if self.memory_limit is None else self.memory_limit
            excess = max(0.0, cost.memory.peak_bytes - limit)
            found = Scored(
                assignment=key,
                cost=cost,
                excess_bytes=int(excess),
                n_outputs=sum(name in self._outputs for name, _ in key),
                n_rules=self.n_rules(assignment),
            )
            self.seen[key] = found
        return found


def n_assignments(families: Sequence[Choices]) -> int:
    """How many assignments there are."""
    return math.prod(len(choices.specs) for choices in families)


def exhaust(scorer: Scorer, families: Sequence[Choices]) -> Scored:
    """The best of all assignments."""
    names = [choices.name for choices in families]
    return min(
        (
            scorer.score(dict(zip(names, specs, strict=True)))
            for specs in itertools.product(*(choices.specs for choices in families))
        ),
        key=lambda scored: scored.rank,
    )


def descend(
    scorer: Scorer,
    families: Sequence[Choices],
    starts: Sequence[Mapping[str, Spec]],
    *,
    n_shakes: int = _SHAKES,
) -> Scored:
    """The best of the local optima reached from each start, and from the best one shaken."""
    moves = list(make_moves(families, scorer.mesh))
    simple = [move for move in moves if move.of in ("weights", "outputs")]
    outputs_first = sorted(simple, key=lambda move: move.of != "outputs")
    orders = [simple, outputs_first] if outputs_first != simple else [simple]
    best: Scored | None = None
    for start, order in itertools.product(starts, orders):
        if best and scorer.is_spent and scorer.score(start).rank >= best.rank:
            continue
        found = _descend_from(scorer, order, start)
        best = min(found, best or found, key=lambda scored: scored.rank)
    assert best is not None
    best = _descend_from(scorer, moves, dict(best.assignment))
    source = random.Random(0)
    for _ in range(n_shakes):
        if scorer.is_spent:
            break
        shaken = {**dict(best.assignment), **_shake(families, source)}
        found = _descend_from(scorer, simple, shaken)
        if found.rank < best.rank:
            best = _descend_from(scorer, moves, dict(found.assignment))
    return _without_idle_outputs(scorer, families, best)


def _without_idle_outputs(scorer: Scorer, families: Sequence[Choices], best: Scored) -> Scored:
    """A layout without those rules for outputs, of groups laid out together, that gain nothing."""
    for choices in families:
        now = dict(best.assignment)
        if choices.is_output and choices.name in now:
            found = scorer.score({**now, choices.name: NO_RULE})
            best = min(found, best, key=lambda scored: scored.rank)
    return best


def _shake(families: Sequence[Choices], source: random.Random) -> dict[str, Spec]:
    """Two sibling groups of weights and two of outputs with specs drawn, one for each group.

    Each may be what bars the others' way.
    """
    shaken: dict[str, Spec] = {}
    for is_output in (False, True):
        groups = sibling_groups(one for one in families if one.is_output == is_output)
        for name in source.sample(sorted(groups), min(2, len(groups))):
            shaken |= lay(groups[name], source.choice(groups[name][0].specs), {})
    return shaken


def starting_points(
    families: Sequence[Choices], relaxed: Mapping[str, Spec], mesh: Mesh
) -> tuple[dict[str, Spec], ...]:
    """Where to start: the relaxed problem's answer, the smallest shards, and the split by hand.

    The second fits wherever anything does, or nearly, so that a tight limit leaves a way down. The
    third is what people do by hand.
    """
    return (
        {**first_specs(families), **relaxed},
        smallest_shards(families, mesh),
        split_by_hand(families, mesh),
    )


def outputs_alone(scorer: Scorer, families: Sequence[Choices]) -> dict[str, Spec] | None:
    """Whole weights, and the two groups of layer outputs laid out that are best together.

    One rule alone may lose what two win: a matmul between them gathers one operand or the other.
    Of a large program not all pairs are tried: those of the largest outputs.

    Returns:
        A further start; None where there are no two groups, or where whole weights do not fit: a
        descent would mix in split weights, and XLA propagates such mixtures otherwise than we do.
    """
    unlaid = first_specs(families)
    groups = sibling_groups(choices for choices in families if choices.is_output)
    if len(groups) < 2 or scorer.score(unlaid).excess_bytes:
        return None
    largest = sorted(groups.values(), key=lambda members: -sum(one.n_bytes for one in members))
    laid = (
        {**unlaid, **lay(first, one, unlaid), **lay(second, other, unlaid)}
        for first, second in itertools.combinations(largest, 2)
        for one, other in itertools.product(first[0].specs[1:], second[0].specs[1:])
        if not scorer.is_spent
    )
    return min(laid, key=lambda assignment: scorer.score(assignment).rank, default=None)


def _descend_from(scorer: Scorer, moves: Sequence[Move], start: Mapping[str, Spec]) -> Scored:
    """Take the first better move found, until each has failed since the last that was taken."""
    best = scorer.score(start)
    n_failed = 0
    for move in itertools.cycle(moves):
        if n_failed == len(moves):
            break
        n_failed += 1
        if move.of == "pair" and scorer.is_spent:
            continue
        now = dict(best.assignment)
        found = scorer.score({**now, **move.change(now)})
        if found.rank < best.rank:
            best, n_failed = found, 0
    return best
