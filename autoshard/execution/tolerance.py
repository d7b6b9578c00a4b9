"""How far a sharded run may differ from an unsharded one of the same weights.

Both compute the same sums in another order and round at other places. With u the unit roundoff of
the compute dtype (2^-8 for bfloat16, 2^-11 for float16, 2^-24 for float32), n roundings on the way
to an output, all independent, each passed on without being enlarged, an output is off by a relative
u sqrt(n), root mean square; two runs differ by

    delta = sqrt(2 (n u^2 + k 2^-48))

where k counts the terms of all contractions, which are summed in float32 whatever the dtype.

What counts for n is weighted by its share of the result. In a stack of residual blocks each of the
two additions of a block rounds the whole stream, and the roundings inside a block touch only its
own addition to the stream; those of all blocks together weigh as much as those of one. So

    n = layers outside stacks + sum over stacks (2 blocks + layers of one block)

The bounds (rms: root mean square of the reference):

    root mean square of the differences   delta rms
    largest difference of N               (3 + sqrt(2 ln N)) delta rms + 2 u largest

the second being the expected maximum of N normal values, three deviations added, and the rounding
of the result itself. A token is compared where the two largest logits are further apart than twice
that. A loss may be off by 2 delta of itself: a mean square changes by twice the relative change of
its argument; a cross-entropy of V classes with logits of deviation s is at least s sqrt(2 ln V) and
changes by sqrt(2) delta s.

Where a router sends tokens to experts, a near tie may fall the other way in a low precision, and
the bound is not one.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from autoshard.model.blocks import find_stacks
from autoshard.model.recipe import AbstractModel, layers_by_path

__all__ = ["Tolerance", "tolerance_of"]

_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
_ACCUMULATOR_ROUNDOFF = 2.0**-24


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """The bounds for one model.

    Attributes:
        roundoff: u, of the compute dtype.
        n_roundings: n.
        n_terms: k.
    """

    roundoff: float
    n_roundings: int
    n_terms: int

    @property
    def relative(self) -> float:
        """delta.

        >>> f"{Tolerance(roundoff=2**-8, n_roundings=72, n_terms=0).relative:.4f}"
        '0.0469'
        """
        stored = self.n_roundings * self.roundoff**2
        return math.sqrt(2 * (stored + self.n_terms * _ACCUMULATOR_ROUNDOFF**2))

    def largest_difference(self, n: int, root_mean_square: float, largest: float) -> float:
        """The bound on the largest of `n` differences.

        Args:
            n: values compared.
            root_mean_square: of the reference's values.
            largest: their largest magnitude.
        """
        deviations = 3 + math.sqrt(2 * math.log(max(n, 1)))
        return deviations * self.relative * root_mean_square + 2 * self.roundoff * largest

    def words(self) -> str:
        """How the bounds come about, with the numbers, for a report."""
        return (
            f"delta = sqrt(2 (n u^2 + k 2^-48)) = {self.relative:.2g}, with u = "
            f"2^{math.log2(self.roundoff):.0f}, n = {self.n_roundings} roundings and k = "
            f"{self.n_terms:,} summed terms on the way to an output"
        )


def tolerance_of(model: AbstractModel) -> Tolerance:
    """The bounds for a model, as deep as it is.

    Args:
        model: without values, with the dtype it runs in.
    """
    compute = str(model.backbone.compute_dtype)
    terms = sum(_terms(tuple(weight.shape)) for weight in model.model.weights)
    return Tolerance(
        roundoff=_ROUNDOFF.get(compute, _ROUNDOFF["float32"]),
        n_roundings=_roundings(model),
        n_terms=terms,
    )


def _terms(shape: Sequence[int]) -> int:
    """The most terms that a contraction over a weight sums: its size but for one dimension."""
    return math.prod(shape) // min(shape) if len(shape) > 1 else 0


def _roundings(model: AbstractModel) -> int:
    stacks = find_stacks(model)
    inside = {id(leaf) for stack in stacks for block in stack.layers for leaf in _leaves([block])}
    outside = [
        leaf for leaf in _leaves(layers_by_path(model.model).values()) if id(leaf) not in inside
    ]
    stacked = (2 * len(stack.layers) + len(_leaves(stack.layers[:1])) for stack in stacks)
    return len(outside) + sum(stacked)


def _leaves(layers: Iterable[Any]) -> list[Any]:
    """The innermost of these layers and of those inside them, each once."""
    found: dict[int, Any] = {}
    for layer in layers:
        inner = list(layer._flatten_layers(recursive=False, include_self=False))
        for leaf in _leaves(inner) if inner else [layer]:
            found[id(leaf)] = leaf
    return list(found.values())
