"""Search over assignments of specs to families, each scored as the program that propagation gives.

Exhaustive where the assignments are few; otherwise descent, which takes any better move until there
is none:

1. from several starts, the relaxed problem's answer first, by moves of one sibling group or of one
   family; once weights move before the outputs of layers and once after them;
2. from the best of these, by moves of two sibling groups at once too;
3. from the best with two sibling groups shaken, several times.

Large programs end pairs and shakes early, and descend only from starts that are better than what
was found: all together take some twenty seconds at most. The outputs of layers move alone, or two
that stand beside each other; one start lays out any two groups of them.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from autoshard.cost.step import StepPricer
from autoshard.cost.values import StepCost
from autoshard.graph.program import Layout
from autoshard.graph.propagation import Propagator
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

__all__ = [
    "Scored",
    "Scorer",
    "descend",
    "exhaust",
    "n_assignments",
    "outputs_alone",
    "sibling_groups",
    "starting_points",
]

Key = tuple[tuple[str, Spec], ...]

# A rule for an output has to win this share of the step, or it is not worth its line.
_RULE_SHARE = 2.5e-3

# What a second of collectives behind compute counts in the ranking: a judgement, not a measurement.
_HIDDEN_SHARE = 0.05

# Memory counts as this power of its bytes: with half the peak a step may take 0.7% longer. A
# judgement too, so that no table stays whole for a microsecond.
_MEMORY_POWER = 0.01

# So many sibling groups, the largest, are moved in pairs.
_PAIRED = 16

# So many looks at ops, of all layouts together, after which no more pairs are tried and no shakes.
_MOST_LOOKS = 2_500_000

# So often the best is shaken and descended from again.
_SHAKES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One assignment and the cost of its propagated program.

    Attributes:
        assignment: family, or template of a layer output -> spec, as sorted pairs.
        cost: the step.
        excess_bytes: bytes a device above the memory limit; 0 where it fits.
        n_outputs: how many layer outputs it lays out.
    """

    assignment: Key
    cost: StepCost
    excess_bytes: int
    n_outputs: int = 0

    @property
    def rank(self) -> tuple[int, float, int]:
        """Bytes too much; then the step and what is added to it; then the peak.

        Added are 5% of what it hides, for that takes memory bandwidth from compute, 0.25% a rule
        for an output, and 0.7% for twice the memory.
        """
        seconds = self.weigh(self._counted_seconds)
        return self.excess_bytes, seconds, self.cost.memory.peak_bytes

    @property
    def _counted_seconds(self) -> float:
        seconds = self.cost.step_seconds * (1 + _RULE_SHARE * self.n_outputs)
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
        seen: every assignment scored so far.
    """

    pricer: StepPricer
    mesh: Mesh
    memory_limit: int | None
    seen: dict[Key, Scored] = field(default_factory=dict)
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

    def score(self, assignment: Mapping[str, Spec]) -> Scored:
        """Propagate an assignment through the program and price what comes out."""
        key = tuple(sorted(item for item in assignment.items() if item[1] != NO_RULE))
        found = self.seen.get(key)
        if found is None:
            cost = self.pricer.price(self.lay_out(assignment), self._propagator.apart)
            limit = math.inf if self.memory_limit is None else self.memory_limit
            excess = max(0.0, cost.memory.peak_bytes - limit)
            found = Scored(
                assignment=key,
                cost=cost,
                excess_bytes=int(excess),
                n_outputs=sum(name in self._outputs for name, _ in key),
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
    moves = list(_moves(families, scorer.mesh))
    simple = [move for move in moves if not (move.is_pair or move.is_joint)]
    outputs_first = sorted(simple, key=lambda move: not move.is_output)
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
    """Two sibling groups of weights with specs drawn for them, the same throughout a group."""
    groups = sibling_groups(choices for choices in families if not choices.is_output)
    drawn = source.sample(sorted(groups), min(2, len(groups)))
    shaken: dict[str, Spec] = {}
    for name in drawn:
        shaken |= _lay(groups[name], source.choice(groups[name][0].specs), {})
    return shaken


def sibling_groups(families: Iterable[Choices]) -> dict[str, list[Choices]]:
    """The families that have a choice, by the name that siblings share."""
    groups: dict[str, list[Choices]] = {}
    for choices in families:
        if len(choices.specs) > 1:
            groups.setdefault(choices.siblings, []).append(choices)
    return groups


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
        A further start; None where there are no two groups, or where whole weights do not fit:
        what a descent makes of the mixture XLA propagates otherwise than we do.
    """
    unlaid = first_specs(families)
    groups = sibling_groups(choices for choices in families if choices.is_output)
    if len(groups) < 2 or scorer.score(unlaid).excess_bytes:
        return None
    largest = sorted(groups.values(), key=lambda members: -sum(one.n_bytes for one in members))
    laid = (
        {**unlaid, **_lay(first, one, unlaid), **_lay(second, other, unlaid)}
        for first, second in itertools.combinations(largest, 2)
        for one, other in itertools.product(first[0].specs[1:], second[0].specs[1:])
        if not scorer.is_spent
    )
    return min(laid, key=lambda assignment: scorer.score(assignment).rank, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Move:
    """A change of an assignment.

    Attributes:
        change: from an assignment to the entries that change.
        is_pair: whether it moves two sibling groups of weights at once: such moves are the most.
        is_output: whether it moves outputs of layers.
        is_joint: whether it moves weights and the outputs of their layers.
    """

    change: Callable[[Mapping[str, Spec]], dict[str, Spec]]
    is_pair: bool = False
    is_output: bool = False
    is_joint: bool = False


def _descend_from(scorer: Scorer, moves: Sequence[_Move], start: Mapping[str, Spec]) -> Scored:
    """Take the first better move found, until each has failed since the last that was taken."""
    best = scorer.score(start)
    n_failed = 0
    for move in itertools.cycle(moves):
        if n_failed == len(moves):
            break
        n_failed += 1
        if move.is_pair and scorer.is_spent:
            continue
        now = dict(best.assignment)
        found = scorer.score({**now, **move.change(now)})
        if found.rank < best.rank:
            best, n_failed = found, 0
    return best


def _moves(families: Sequence[Choices], mesh: Mesh) -> Iterator[_Move]:
    """Moves from small to large, each along one mesh axis: where a family's other axes lie stays.

    First whole sibling groups, then single families, then two of the largest sibling groups at
    once. The outputs of one group are laid out together, each spec in turn; of groups that stand
    beside each other, as keys and values, any two and no other too. So are those of a layer with
    its weights, also in place of those of the layers beside it.
    """
    weights = sibling_groups(choices for choices in families if not choices.is_output)
    outputs = sibling_groups(choices for choices in families if choices.is_output)
    singles = [[choices] for members in weights.values() for choices in members]
    for axis in mesh.parallel_axes:
        for members in [*weights.values(), *singles]:
            for dim in range(-1, len(members[0].shape)):
                yield _Move(change=partial(_put, ((members, dim),), axis))
        for first, second in itertools.combinations(list(weights.values())[:_PAIRED], 2):
            for dims in itertools.product(
                range(-1, len(first[0].shape)), range(-1, len(second[0].shape))
            ):
                places = ((first, dims[0]), (second, dims[1]))
                yield _Move(change=partial(_put, places, axis), is_pair=True)
    for members in outputs.values():
        for spec in members[0].specs:
            yield _Move(change=partial(_lay, members, spec), is_output=True)
    beside: dict[tuple[str, tuple[int, ...]], list[Sequence[Choices]]] = {}
    for members in outputs.values():
        beside.setdefault((members[0].parent, members[0].shape), []).append(members)
    for groups in beside.values():
        own = [_own_weights(members, families) for members in groups]
        for axis, at in itertools.product(mesh.parallel_axes, range(len(groups))):
            yield from _joint_moves(groups, own, at, axis)
        for pair in itertools.combinations(groups, 2):
            for spec in pair[0][0].specs[1:]:
                yield _Move(change=partial(_lay_alone, pair, groups, spec), is_output=True)


def _joint_moves(
    groups: Sequence[Sequence[Choices]], own: Sequence[Sequence[Choices]], at: int, axis: str
) -> Iterator[_Move]:
    """One of several groups of outputs with a weight of its layer, the others as they are or not.

    Args:
        groups: the outputs that stand beside each other.
        own: the weights of their layers.
        at: which of the groups.
        axis: where the weights' shares may lie.
    """
    others = [([weight], -1) for made in own if made is not own[at] for weight in made]
    for weight in own[at]:
        for dim, spec in itertools.product(range(-1, len(weight.shape)), groups[at][0].specs[1:]):
            place = ([weight], dim)
            beside = partial(_lay_with, groups[at], spec, (), (place,), axis)
            yield _Move(change=beside, is_joint=True)
            if others:
                alone = partial(_lay_with, groups[at], spec, groups, (place, *others), axis)
                yield _Move(change=alone, is_joint=True)


def _lay(members: Sequence[Choices], spec: Spec, now: Mapping[str, Spec]) -> dict[str, Spec]:
    """Lay out the members of one group that `spec` is legal for, whatever the assignment now."""
    return {choices.name: spec for choices in members if spec in choices.specs}


def _own_weights(outputs: Sequence[Choices], families: Iterable[Choices]) -> list[Choices]:
    """The weights of the layers that make some outputs."""
    layers = {choices.name.removesuffix("/output") for choices in outputs}
    return [
        choices
        for choices in families
        if not choices.is_output
        and len(choices.specs) > 1
        and choices.name.rpartition("/")[0] in layers
    ]


def _lay_with(
    members: Sequence[Choices],
    spec: Spec,
    groups: Iterable[Sequence[Choices]],
    places: Sequence[tuple[Sequence[Choices], int]],
    axis: str,
    now: Mapping[str, Spec],
) -> dict[str, Spec]:
    """Lay out one of several groups of outputs, and put `axis` on a dimension of each family."""
    return {**_lay_alone([members], groups, spec, now), **_put(places, axis, now)}


def _lay_alone(
    laid: Iterable[Sequence[Choices]],
    groups: Iterable[Sequence[Choices]],
    spec: Spec,
    now: Mapping[str, Spec],
) -> dict[str, Spec]:
    """Lay out some of several groups of outputs, the others by no rule."""
    change = {choices.name: NO_RULE for members in groups for choices in members}
    for members in laid:
        change |= _lay(members, spec, now)
    return change


def _put(
    places: Sequence[tuple[Sequence[Choices], int]], axis: str, now: Mapping[str, Spec]
) -> dict[str, Spec]:
    """Put `axis` on a dimension (or none, -1) of each family, if that spec is legal.

    What splits that dimension already goes to where the axis comes from.
    """
    changed = {}
    for members, dim in places:
        for choices in members:
            old = now[choices.name]
            displaced = old[dim] if dim >= 0 else None
            spec = tuple(displaced if entry == axis else entry for entry in old)
            if dim >= 0:
                spec = (*spec[:dim], axis, *spec[dim + 1 :])
            if spec in choices.specs:
                changed[choices.name] = spec
    return changed
