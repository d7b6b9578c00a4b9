"""How far a sharded run may differ from an unsharded one of the same weights.

Both compute the same sums in another order and round at other places. Rounding to nearest with p
bits behind the point is off by up to half a step, evenly distributed; with the mantissas of the
values spread evenly on a logarithmic scale, that is relatively, root mean square,

    u = 2^-p sqrt(3 / (8 ln 2) / 12) = 0.212 x 2^-p    (p = 7 for bfloat16, 10, 23)

With n roundings on the way to an output, all independent, each passed on without being enlarged, an
output is off by u sqrt(n), and two runs differ by

    delta = sqrt(2 (n u^2 + k v^2))

where k counts the terms of all contractions, which are summed in float32 whatever the dtype, and v
is u of float32.

What counts for n is weighted by its share of the result. In a stack of residual blocks each of the
two additions of a block rounds the whole stream, and the roundings inside a block touch only its
own addition to the stream; those of all blocks together weigh as much as those of one. So

    n = layers outside stacks + sum over stacks (2 blocks + layers of one block)

The bounds (rms: root mean square of the reference):

    root mean square of the differences   delta rms
    largest difference of N               (3 + sqrt(2 ln N)) delta rms + 2^-p largest
    difference of two logits              sqrt(2) of the same

the second being the expected maximum of N normal values, three deviations added, and a step of the
result's own rounding. A greedy token is compared where the two largest logits are further apart
than the third. A loss may be off by 2 delta of itself: a mean square changes by twice the relative
change of its argument, the distance to targets drawn apart from the outputs by no more than these;
a cross-entropy of V classes with logits of deviation s is at least s sqrt(2 ln V) and changes by
sqrt(2) delta s.

Where a router sends tokens to experts, a near tie may fall the other way in a low precision, and
the bound is not one.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from autoshard.model.blocks import blocks_of
from autoshard.model.recipe import AbstractModel, inner_layers, layers_by_path

__all__ = ["Tolerance", "tolerance_of"]

# Steps between neighbouring values at 1.
_STEPS = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23}
_ROUNDING = math.sqrt(3 / (8 * math.log(2)) / 12)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """The bounds for one model.

    Attributes:
        step: 2^-p, of the compute dtype.
        n_roundings: n.
        n_terms: k.
    """

    step: float
    n_roundings: int
    n_terms: int

    @property
    def relative(self) -> float:
        """delta.

        >>> f"{Tolerance(step=2**-7, n_roundings=72, n_terms=0).relative:.4f}"
        '0.0199'
        """
        stored = self.n_roundings * self.step**2
        return _ROUNDING * math.sqrt(2 * (stored + self.n_terms * _STEPS["float32"] ** 2))

    def largest_difference(self, n: int, root_mean_square: float, largest: float) -> float:
        """The bound on the largest of `n` differences.

        Args:
            n: values compared.
            root_mean_square: of the reference's values.
            largest: their largest magnitude.
        """
        deviations = 3 + math.sqrt(2 * math.log(max(n, 1)))
        return deviations * self.relative * root_mean_square + self.step * largest

    def words(self) -> str:
        """How the bounds come about, with the numbers, for a report."""
        return (
            f"delta = sqrt(2 (n u^2 + k v^2)) = {self.relative:.2g}, with n = {self.n_roundings} "
            f"roundings to a relative u = {_ROUNDING * self.step:.2g} and k = {self.n_terms:,} "
            f"terms summed to v = {_ROUNDING * _STEPS['float32']:.2g} on the way to an output"
        )


def tolerance_of(model: AbstractModel) -> Tolerance:
    """The bounds for a model, as deep as it is.

    Args:
        model: without values, with the dtype it runs in.
    """
    compute = str(model.backbone.compute_dtype)
    terms = sum(_terms(tuple(weight.shape)) for weight in model.model.weights)
    return Tolerance(
        step=_STEPS.get(compute, _STEPS["float32"]),
        n_roundings=_roundings(model),
        n_terms=terms,
    )


def _terms(shape: Sequence[int]) -> int:
    """The most terms that a contraction over a weight sums: its size but for one dimension."""
    return math.prod(shape) // min(shape) if len(shape) > 1 else 0


def _roundings(model: AbstractModel) -> int:
    stacks = blocks_of(model)
    inside = {id(leaf) for blocks in stacks for leaf in _leaves(blocks)}
    outside = [
        leaf for leaf in _leaves(layers_by_path(model.model).values()) if id(leaf) not in inside
    ]
    stacked = (2 * len(blocks) + len(_leaves(blocks[:1])) for blocks in stacks)
    return len(outside) + sum(stacked)


def _leaves(layers: Iterable[Any]) -> list[Any]:
    """The innermost of these layers and of those inside them, each once."""
    found: dict[int, Any] = {}
    for layer in layers:
        inner = inner_layers(layer)
        for leaf in _leaves(inner) if inner else [layer]:
            found[id(leaf)] = leaf
    return list(found.values())
