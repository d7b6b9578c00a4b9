"""Search over assignments of specs to families, each scored as the program that propagation gives.

Exhaustive where the assignments are few; otherwise steepest descent from several starts (the
relaxed problem's answer first), moving one family, the families of one sibling group, or two
sibling groups at a time, until no move is better.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from autoshard.cost.step import StepPricer
from autoshard.cost.values import StepCost
from autoshard.graph.propagation import propagate
from autoshard.mesh import Mesh, Spec
from autoshard.search.candidates import Choices, fixed_layouts

__all__ = ["Scored", "Scorer", "descend", "exhaust", "n_assignments"]

Key = tuple[tuple[str, Spec], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One assignment and the cost of its propagated program.

    Attributes:
        assignment: family -> spec, as sorted pairs.
        cost: the step.
        excess_bytes: bytes a device above the memory limit; 0 where it fits.
    """

    assignment: Key
    cost: StepCost
    excess_bytes: int

    @property
    def rank(self) -> tuple[int, float, int]:
        """What fits before what does not; then the faster; then the smaller."""
        return self.excess_bytes, self.cost.step_seconds, self.cost.memory.peak_bytes


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

    def score(self, assignment: Mapping[str, Spec]) -> Scored:
        """Propagate an assignment through the program and price what comes out."""
        key = tuple(sorted(assignment.items()))
        found = self.seen.get(key)
        if found is None:
            fixed = fixed_layouts(self.pricer.program, assignment, self.mesh)
            layouts = propagate(self.pricer.program, fixed, self.pricer.machine.axis_sizes)
            cost = self.pricer.price(layouts)
            limit = math.inf if self.memory_limit is None else self.memory_limit
            excess = max(0.0, cost.memory.peak_bytes - limit)
            found = Scored(assignment=key, cost=cost, excess_bytes=int(excess))
            self.seen[key] = found
        return found


def n_assignments(families: Sequence[Choices]) -> int:
    """How many assignments there are."""
    return math.prod(len(choices.specs) for choices in families)


def exhaust(scorer: Scorer, families: Sequence[Choices]) -> Scored:
    """The best of all assignments."""
    names = [choices.family for choices in families]
    return min(
        (
            scorer.score(dict(zip(names, specs, strict=True)))
            for specs in itertools.product(*(choices.specs for choices in families))
        ),
        key=lambda scored: scored.rank,
    )


def descend(
    scorer: Scorer, families: Sequence[Choices], starts: Sequence[Mapping[str, Spec]]
) -> Scored:
    """The best of the local optima reached from each start."""
    return min(
        (_descend_from(scorer, families, start) for start in starts),
        key=lambda scored: scored.rank,
    )


def _descend_from(
    scorer: Scorer, families: Sequence[Choices], start: Mapping[str, Spec]
) -> Scored:
    best = scorer.score(start)
    while True:
        for moves in (_group_moves(families, 1), _single_moves(families), _group_moves(families, 2)):
            found = min(
                (scorer.score({**dict(best.assignment), **move}) for move in moves),
                key=lambda scored: scored.rank,
                default=best,
            )
            if found.rank < best.rank:
                best = found
                break
        else:
            return best


def _single_moves(families: Sequence[Choices]) -> Iterator[dict[str, Spec]]:
    for choices in families:
        for spec in choices.specs:
            yield {choices.family: spec}


def _group_moves(families: Sequence[Choices], n_groups: int) -> Iterator[dict[str, Spec]]:
    """Each combination of `n_groups` sibling groups, every family of a group getting one spec."""
    groups: dict[str, list[Choices]] = {}
    for choices in families:
        if len(choices.specs) > 1:
            groups.setdefault(choices.siblings, []).append(choices)
    for chosen in itertools.combinations(groups.values(), n_groups):
        for specs in itertools.product(*(members[0].specs for members in chosen)):
            yield {
                choices.family: spec
                for members, spec in zip(chosen, specs, strict=True)
                for choices in members
            }
