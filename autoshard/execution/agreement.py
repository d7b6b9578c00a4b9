"""Holds the results of a sharded run against those of its reference."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from autoshard.execution.requests import Part
from autoshard.execution.tolerance import Tolerance
from autoshard.records.execution import Agreement

__all__ = ["compare"]

# A sum over devices that counts copies is at least twice the sum.
_MOST_TIMES = 1.5
_LEAST_SHARE = 1e-3

Arrays = Mapping[str, Any]


def compare(
    part: Part, found: Arrays, reference: Arrays, tolerance: Tolerance, n_prompt: int
) -> tuple[Agreement, ...]:
    """Compare what a part computed.

    Args:
        part: which part.
        found: the arrays of the sharded run, as `PartOutcome` has them.
        reference: those of the reference.
        tolerance: the bounds.
        n_prompt: tokens that `generate` was given.
    """
    if part == "load":
        return (_weights(found["digests"], reference["digests"]),)
    if part == "predict":
        return tuple(
            agreement
            for name in reference
            for agreement in _outputs(name, found[name], reference[name], tolerance)
        )
    if part == "generate":
        return (_tokens(found["tokens"], reference, tolerance, n_prompt),)
    slots = _slots(found["slots"], reference["slots"], tolerance)
    return (*_losses(found["losses"], reference["losses"], tolerance), *slots)


def _weights(found: Any, reference: Any) -> Agreement:
    return Agreement(
        figure="weights that differ in any bit",
        found=int(np.sum(np.any(found != reference, axis=1))),
        allowed=0,
        note=f"{len(reference)} weights",
    )


def _outputs(
    name: str, found: Any, reference: Any, tolerance: Tolerance
) -> tuple[Agreement, Agreement]:
    values, differences = reference.astype("float64"), found.astype("float64") - reference
    rms = float(np.sqrt(np.mean(np.square(values))))
    off = float(np.sqrt(np.mean(np.square(differences))))
    allowed = tolerance.largest_difference(values.size, rms, float(np.abs(values).max()))
    return (
        Agreement(
            figure=f"{name}, root mean square of the differences",
            found=off,
            allowed=tolerance.relative * rms,
            note=f"{values.size:,} values of root mean square {rms:.4g}",
        ),
        Agreement(
            figure=f"{name}, largest difference",
            found=float(np.abs(differences).max()),
            allowed=allowed,
        ),
    )


def _tokens(tokens: Any, reference: Arrays, tolerance: Tolerance, n_prompt: int) -> Agreement:
    """Greedy tokens, as far as the sequences are the same and the choice is no near tie."""
    expected, margins = reference["tokens"], reference["margins"]
    allowed = math.sqrt(2) * tolerance.largest_difference(
        margins[:, n_prompt - 1 :].size,
        float(reference["root_mean_square"]),
        float(reference["largest"]),
    )
    n_equal = n_compared = n_wrong = 0
    for row, (made, wanted) in enumerate(zip(tokens, expected, strict=True)):
        for place in range(n_prompt, len(wanted)):
            clear = bool(margins[row, place - 1] > allowed)
            n_compared += clear
            if made[place] != wanted[place]:
                # What follows another token may well be another token.
                n_wrong += clear
                break
            n_equal += 1
    n_made = expected[:, n_prompt:].size
    return Agreement(
        figure="greedy tokens that differ although the choice was clear",
        found=n_wrong,
        allowed=0,
        note=(
            f"{n_equal} of {n_made} tokens equal; {n_compared or 'none'} chosen by a margin of "
            f"more than {allowed:.3g}"
        ),
    )


def _losses(found: Any, reference: Any, tolerance: Tolerance) -> tuple[Agreement, Agreement]:
    return (
        Agreement(
            figure="loss of a step, largest relative difference",
            found=float(np.max(np.abs(found - reference) / np.abs(reference))),
            allowed=2 * tolerance.relative,
        ),
        Agreement(
            figure="steps that left the loss as it was",
            found=int(np.sum(np.diff(found) == 0)),
            allowed=max(0, len(found) - 2),
            note="at least one has to move it",
        ),
    )


def _slots(found: Any, reference: Any, tolerance: Tolerance) -> tuple[Agreement, ...]:
    """What an optimizer has gathered of gradients: Adam's steps do not show how large these are.

    Slots far below the largest hold little but what rounding left.
    """
    if not reference.size or not reference.any():
        return ()
    share = max(_LEAST_SHARE, tolerance.relative)
    clear = reference > share * reference.max()
    times = found[clear] / reference[clear]
    return (
        Agreement(
            figure="slots of the optimizer, largest factor between root mean squares",
            found=float(np.maximum(times, 1 / times.clip(min=np.finfo(float).tiny)).max()),
            allowed=_MOST_TIMES,
            note=f"{int(clear.sum())} of {clear.size}, those above {share:.2g} of the largest",
        ),
    )
