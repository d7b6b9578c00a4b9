"""The moves by which a search changes an assignment of specs to families."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from autoshard.mesh import Mesh, Spec
from autoshard.search.candidates import NO_RULE, Choices

__all__ = ["Move", "lay", "make_moves", "sibling_groups"]

# So many sibling groups, the largest, are moved in pairs.
_PAIRED = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A change of an assignment.

    Attributes:
        change: from an assignment to the entries that change.
        of: what it moves: `weights` of one sibling group; a `pair` of such groups at once, which
            are the most moves; `outputs` of layers; or weights and the outputs of their layers
            in a `joint` move.
    """

    change: Callable[[Mapping[str, Spec]], dict[str, Spec]]
    of: Literal["weights", "pair", "outputs", "joint"] = "weights"


def sibling_groups(families: Iterable[Choices]) -> dict[str, list[Choices]]:
    """The families that have a choice of their own, by the name that siblings share.

    Args:
        families: what there is to choose.
    """
    groups: dict[str, list[Choices]] = {}
    for choices in families:
        if len(choices.specs) > 1 and not choices.follows:
            groups.setdefault(choices.siblings, []).append(choices)
    return groups


def make_moves(families: Sequence[Choices], mesh: Mesh) -> Iterator[Move]:
    """Moves from small to large, each along one mesh axis: where a family's other axes lie stays.

    Axis by axis: whole sibling groups first, then single families, then two of the largest sibling
    groups at once. The outputs of one group are laid out together, each spec in turn, and before
    that those of all layers that one number tells apart; of groups that stand beside each other, as
    keys and values, any two and no other too. So are those of a layer with its weights, also in
    place of those of the layers beside it.

    A bias that is split goes where its weight goes. In the end those of a sibling group are laid as
    their weights are, or whole.

    Args:
        families: what there is to choose.
        mesh: the mesh.
    """
    biases: dict[str, list[Choices]] = {}
    groups: dict[str, list[Choices]] = {}
    for choices in families:
        if choices.follows and len(choices.specs) > 1:
            biases.setdefault(choices.follows, []).append(choices)
            groups.setdefault(choices.siblings, []).append(choices)
    for move in _moves_of_weights_and_outputs(families, mesh):
        yield replace(move, change=partial(_with_biases, biases, move.change)) if biases else move
    for members in groups.values():
        yield Move(change=partial(_follow, members))
        yield Move(change=partial(lay, members, (None,) * len(members[0].shape)))


def _with_biases(
    biases: Mapping[str, Sequence[Choices]],
    change: Callable[[Mapping[str, Spec]], dict[str, Spec]],
    now: Mapping[str, Spec],
) -> dict[str, Spec]:
    """A change of weights, with their biases where these are split."""
    changed = change(now)
    split = (
        bias
        for weight in changed
        for bias in biases.get(weight, ())
        if any(now.get(bias.name, NO_RULE))
    )
    return changed | _follow(split, {**now, **changed})


def _follow(biases: Iterable[Choices], now: Mapping[str, Spec]) -> dict[str, Spec]:
    """Lay biases as the last dimensions of the weights of their layers."""
    return {bias.name: now[bias.follows][-len(bias.shape) :] for bias in biases}


def _moves_of_weights_and_outputs(families: Sequence[Choices], mesh: Mesh) -> Iterator[Move]:
    """See `make_moves`."""
    weights = sibling_groups(choices for choices in families if not choices.is_output)
    outputs = sibling_groups(choices for choices in families if choices.is_output)
    singles = [[choices] for members in weights.values() for choices in members]
    for axis in mesh.parallel_axes:
        for members in [*weights.values(), *singles]:
            for dim in range(-1, len(members[0].shape)):
                yield Move(change=partial(_put, ((members, dim),), axis))
        for first, second in itertools.combinations(list(weights.values())[:_PAIRED], 2):
            for dims in itertools.product(
                range(-1, len(first[0].shape)), range(-1, len(second[0].shape))
            ):
                places = ((first, dims[0]), (second, dims[1]))
                yield Move(change=partial(_put, places, axis), of="pair")
    alike: dict[tuple[str, tuple[int, ...]], list[Choices]] = {}
    for members in outputs.values():
        alike.setdefault((members[0].unnumbered, members[0].shape), []).extend(members)
    several = [m for m in alike.values() if len({choices.siblings for choices in m}) > 1]
    for members in [*several, *outputs.values()]:
        for spec in members[0].specs:
            yield Move(change=partial(lay, members, spec), of="outputs")
    beside: dict[tuple[str, tuple[int, ...]], list[Sequence[Choices]]] = {}
    for members in outputs.values():
        beside.setdefault((members[0].parent, members[0].shape), []).append(members)
    for groups in beside.values():
        own = [_own_weights(members, families) for members in groups]
        for axis, at in itertools.product(mesh.parallel_axes, range(len(groups))):
            yield from _joint_moves(groups, own, at, axis)
        for pair in itertools.combinations(groups, 2):
            for spec in pair[0][0].specs[1:]:
                yield Move(change=partial(_lay_alone, pair, groups, spec), of="outputs")


def _joint_moves(
    groups: Sequence[Sequence[Choices]], own: Sequence[Sequence[Choices]], at: int, axis: str
) -> Iterator[Move]:
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
            yield Move(change=beside, of="joint")
            if others:
                alone = partial(_lay_with, groups[at], spec, groups, (place, *others), axis)
                yield Move(change=alone, of="joint")


def lay(members: Sequence[Choices], spec: Spec, now: Mapping[str, Spec]) -> dict[str, Spec]:
    """Lay out the members of one group that a spec is legal for, whatever the assignment now.

    Args:
        members: of the group.
        spec: for all of them.
        now: the assignment, which makes no difference.
    """
    return {choices.name: spec for choices in members if spec in choices.specs}


def _own_weights(outputs: Sequence[Choices], families: Iterable[Choices]) -> list[Choices]:
    """The weights of the layers that make some outputs."""
    layers = {choices.layer for choices in outputs}
    return [
        choices
        for choices in families
        if not choices.is_output
        and len(choices.specs) > 1
        and not choices.follows
        and choices.layer in layers
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
        change |= lay(members, spec, now)
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
