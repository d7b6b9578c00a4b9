"""How layouts pass through a loop: the factors of what it runs in each turn.

A dimension of what a loop reads or makes may be split if every equation of its body lets it pass.
Dimensions that move together in the body, and those of what one turn leaves for the next, share a
factor. Along all others the loop needs its operands whole, and XLA gathers them in each turn: of
what has one part a turn that part, of the rest, as of weights, all. (Where it sums what it makes of
a shard it moves less.)

What a turn only adds to what it carries, as the gradient of a weight, is summed over devices once,
after the last turn (XLA's `while_loop_all_reduce_code_motion.cc`): its factor is reduced. Devices
would have to wait for any other sum in each turn, so that what it is taken over stays whole.

The branches of a condition are bodies too, which run once at most.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import networkx as nx

from autoshard.graph.equations import Equation, FlatJaxpr
from autoshard.graph.link import ADDING, ONCE, PASSING, Label, Labels, Link, Reads, Shape

__all__ = ["Loop", "loop_link"]

_LINEAR = (*ADDING, "convert_element_type", "copy", "neg", "reduce_sum", "reshape", "transpose")
"""Primitives that make of partial sums partial sums."""

_SLICES = ("dynamic_slice", "gather", "slice")

_Array = tuple[int, int]
"""A body, and an array of it."""

_Place = tuple[_Array, int]
"""An array, and one of its dimensions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """A loop or a condition of a jaxpr.

    Attributes:
        bodies: what a turn runs, or the branches.
        n_skipped: the first operands, which the bodies do not read.
        n_constants: the next ones, which stay the same in every turn.
        n_carried: the next ones, and the first results: what a turn leaves for the next.
        turns: how often it runs; 1 where that is not known.
        is_stacked: whether the operands and results that are left have the turns as a dimension
            before the others.
    """

    bodies: tuple[FlatJaxpr, ...]
    n_skipped: int = 0
    n_constants: int = 0
    n_carried: int = 0
    turns: int = 1
    is_stacked: bool = False

    @property
    def is_known(self) -> bool:
        """Whether every primitive that it runs has a rule."""
        equations = (equation for body in self.bodies for equation in body.equations)
        return all(equation.link.kind != "unknown" for equation in equations)

    @property
    def n_kernels(self) -> int:
        """The kernels of all turns, of the branches the most: what is not fused into others."""
        return self.turns * max(sum(map(_n_kernels, body.equations)) for body in self.bodies)


def _n_kernels(equation: Equation) -> int:
    return 0 if equation.link.kind in (*PASSING, "broadcast", "source") else equation.n_kernels


def loop_link(loop: Loop, operands: Sequence[Shape]) -> Link:
    """The factors of a loop or condition.

    Args:
        loop: it.
        operands: the shape of each operand.
    """
    factors, (first, *_) = _Factors(loop), loop.bodies
    labels, turn = factors.labels(), (None,) if loop.is_stacked else ()
    read = [labels[0, identity] for identity in first.inputs]
    left = [() if identity is None else labels[0, identity] for identity in first.outputs]
    skipped = [(None,) * len(shape) for shape in operands[: loop.n_skipped]]
    n_kept = loop.n_constants + loop.n_carried
    return Link(
        kind="loop",
        operands=(*skipped, *read[:n_kept], *((*turn, *one) for one in read[n_kept:])),
        results=(
            *left[: loop.n_carried],
            *((*turn, *one) for one in left[loop.n_carried :]),
        ),
        reduced=factors.reduced(),
        reads=(*(ONCE for _ in skipped), *_reads(loop)),
    )


def _reads(loop: Loop) -> Iterator[Reads]:
    """How it reads each operand that its bodies have."""
    in_slices, body = Reads(times=loop.turns, is_sliced=True), loop.bodies[0]
    for place, identity in enumerate(body.inputs):
        if place < loop.n_constants and _is_read_whole(body, identity):
            yield Reads(times=loop.turns)
        else:
            is_carried = 0 <= place - loop.n_constants < loop.n_carried
            yield ONCE if is_carried else in_slices


class _Factors:
    """Joins the dimensions of the arrays in bodies that are split together.

    Args:
        loop: what has the bodies.
    """

    def __init__(self, loop: Loop) -> None:
        self._bodies = loop.bodies
        self._together = nx.utils.UnionFind()
        self._whole: set[_Place] = set()
        self._summed: set[_Place] = set()
        first = loop.bodies[0]
        for number, body in enumerate(loop.bodies):
            partial = self._read(number, body)
            carried = body.inputs[loop.n_constants :][: loop.n_carried]
            for before, after in zip(carried, body.outputs, strict=False):
                self._join((number, before), (number, after))
                if after is not None and not _is_only_added_to(body, before):
                    self._whole |= partial.get(after, set())
            for one, other in zip(_ends(first), _ends(body), strict=True):
                self._join((0, one), (number, other))

    def _read(self, number: int, body: FlatJaxpr) -> dict[int, set[_Place]]:
        """Join what the equations of a body do.

        Returns:
            An array of it -> what it is a partial sum over, if that is split.
        """
        partial: dict[int, set[_Place]] = {}
        for equation in body.equations:
            link, found = equation.link, self._places(number, equation)
            for label, places in found.items():
                self._together.union(*places)
                if label in link.shifted | link.gathered:
                    self._whole.update(places)
            read = set[_Place]().union(*(partial.get(one, ()) for one in equation.operands))
            if equation.primitive not in _LINEAR:
                self._whole |= read
                read = set()
            summed = {found[label][0] for label in link.reduced if label in found}
            self._summed |= summed
            partial |= dict.fromkeys(equation.results, read | summed)
        return partial

    def _places(self, number: int, equation: Equation) -> dict[Label, list[_Place]]:
        """The factors of an equation, each with the dimensions that have it."""
        link, arrays = equation.link, self._bodies[number].arrays
        found: dict[Label, list[_Place]] = {}
        inside = {*link.inner, *link.inner.values()}
        for identity, labels in (
            *zip(equation.operands, link.operands, strict=False),
            *zip(equation.results, link.results, strict=True),
        ):
            for dim, (size, label) in enumerate(zip(arrays[identity].shape, labels, strict=True)):
                if size == 1:
                    continue
                place = (number, identity), dim
                if label is None or label in inside or link.sizes.get(label, size) != size:
                    self._whole.add(place)
                else:
                    found.setdefault(label, []).append(place)
        return found

    def _join(self, one: tuple[int, int | None], other: tuple[int, int | None]) -> None:
        """Put two arrays of one shape together, dimension by dimension; None is a constant."""
        (number, identity), (other_number, other_identity) = one, other
        if identity is None or other_identity is None:
            return
        for dim in range(len(self._bodies[number].arrays[identity].shape)):
            self._together.union(((number, identity), dim), ((other_number, other_identity), dim))

    def labels(self) -> dict[_Array, Labels]:
        """The factor of each dimension of each array, None where it stays whole."""
        factors = {
            (number, identity): tuple(
                None if size == 1 else self._together[(number, identity), dim]
                for dim, size in enumerate(array.shape)
            )
            for number, body in enumerate(self._bodies)
            for identity, array in enumerate(body.arrays)
        }
        whole = {self._together[place] for place in self._whole}
        for found in factors.values():
            times = Counter(factor for factor in found if factor is not None)
            whole.update(factor for factor, n in times.items() if n > 1)
        return {
            array: tuple(None if factor in whole else factor for factor in found)
            for array, found in factors.items()
        }

    def reduced(self) -> frozenset[Label]:
        """The factors that turns sum over, those that stay whole among them."""
        return frozenset(self._together[place] for place in self._summed)


def _ends(body: FlatJaxpr) -> tuple[int | None, ...]:
    return (*body.inputs, *body.outputs)


def _is_read_whole(body: FlatJaxpr, identity: int) -> bool:
    """Whether a turn reads more of an array than a slice."""
    readers = (one for one in body.equations if identity in one.operands)
    return any(one.primitive not in _SLICES for one in readers)


def _is_only_added_to(body: FlatJaxpr, identity: int) -> bool:
    """Whether equations read an array only to add to it."""
    readers = (one for one in body.equations if identity in one.operands)
    return all(one.primitive in ADDING for one in readers)
