"""How good a prediction is: statistics of pairs of what was predicted and what was compiled."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import rankdata

__all__ = ["Pair", "Score", "byte_error", "quantile", "score", "spearman"]

# Bytes below this are nothing: an error is taken relative to at least so much.
_NOTHING = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One layout, predicted and compiled.

    Attributes:
        layout: its name.
        predicted_bytes, compiled_bytes: wire bytes through one device.
        predicted_seconds, compiled_seconds: the step.
        predicted_peak, compiled_peak: memory of one device, 0 where the compiler says none.
    """

    layout: str
    predicted_bytes: float
    compiled_bytes: float
    predicted_seconds: float
    compiled_seconds: float
    predicted_peak: int = 0
    compiled_peak: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Statistics over the layouts of one model, mesh and workload, or over several such.

    Attributes:
        n: layouts.
        spearman: rank correlation of the step's time.
        median_error, p90_error: of wire bytes, relative to the compiler's.
        regret: how much slower the layout predicted fastest is than the fastest.
        peak_error: median error of memory, NaN where the compiler says none.
    """

    n: int
    spearman: float
    median_error: float
    p90_error: float
    regret: float
    peak_error: float


def score(pairs: Sequence[Pair]) -> Score:
    """Compare predictions and verdicts for one model, mesh and workload."""
    errors = [byte_error(pair) for pair in pairs]
    chosen = min(pairs, key=lambda pair: pair.predicted_seconds)
    best = min(pair.compiled_seconds for pair in pairs)
    peaks = [
        abs(pair.predicted_peak - pair.compiled_peak) / pair.compiled_peak
        for pair in pairs
        if pair.compiled_peak
    ]
    return Score(
        n=len(pairs),
        spearman=spearman(
            [pair.predicted_seconds for pair in pairs], [pair.compiled_seconds for pair in pairs]
        ),
        median_error=statistics.median(errors),
        p90_error=quantile(errors, 0.9),
        regret=chosen.compiled_seconds / best - 1,
        peak_error=statistics.median(peaks) if peaks else math.nan,
    )


def byte_error(pair: Pair) -> float:
    """Error of the predicted bytes, relative to the compiled ones (or to 1 MiB, if more)."""
    difference = abs(pair.predicted_bytes - pair.compiled_bytes)
    return difference / max(pair.compiled_bytes, _NOTHING)


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation, equal values sharing their mean rank; NaN where one side is constant.

    >>> spearman([1, 2, 3, 4], [10, 30, 20, 40])
    0.8
    """
    ranks = rankdata(first), rankdata(second)
    if any(len(set(side)) < 2 for side in (first, second)):
        return math.nan
    return round(statistics.correlation(*(list(map(float, side)) for side in ranks)), 12)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed.

    >>> quantile([4, 1, 3, 2], 0.75)
    3
    """
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1]
