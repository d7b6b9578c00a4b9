"""The values of cost.

Step time is not a plain sum of its parts, because some collectives run behind compute:

    step = compute + blocking collectives + max(0, overlapped collectives - compute)
"""

from dataclasses import dataclass

__all__ = ["Memory", "StepCost", "Traffic", "step_seconds"]


def step_seconds(compute: float, blocking: float, overlapped: float) -> float:
    """Seconds of a step: compute, what blocks it, and what the hidden collectives exceed it by."""
    return compute + blocking + max(0.0, overlapped - compute)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Collectives of one kind that one op causes.

    Attributes:
        kind: `all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all`, `collective-permute`.
        axis: name of the mesh axis it runs over.
        n_bytes: bytes of the full array it makes (all-gather), reads (reduce-scatter) or passes
            (the others) at one device, once.
        wire_bytes: bytes through one device, once, by the ring formulas.
        seconds: time of one.
        overlapped: whether the target runs it behind compute.
        count: how often the step runs it.
        layer: path of the layer that causes it, in the folded copy.
        backward: whether the gradient causes it.
    """

    kind: str
    axis: str
    n_bytes: int
    wire_bytes: float
    seconds: float
    overlapped: bool
    count: int
    layer: str
    backward: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on one device at the peak of the step, by part.

    Attributes:
        weights: their shards, and state that is none.
        gradients: of weights, partial sums that wait to be scattered among them.
        optimizer: its slots.
        activations: all else that the step makes, gathers or returns, and its data.
        kv_cache: the cache.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    kv_cache: int = 0

    @property
    def peak_bytes(self) -> int:
        """The sum of the parts."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.kv_cache


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """One step on one mesh of chips.

    Attributes:
        compute_seconds: matmuls by roofline, memory-bound ops by their bytes.
        blocking_seconds: collectives that compute waits for.
        overlapped_seconds: collectives that run behind compute.
        traffic: every collective.
        memory: bytes a device at the peak.
    """

    compute_seconds: float
    blocking_seconds: float
    overlapped_seconds: float
    traffic: tuple[Traffic, ...]
    memory: Memory

    @property
    def step_seconds(self) -> float:
        """Time of the step; see `step_seconds`."""
        return step_seconds(self.compute_seconds, self.blocking_seconds, self.overlapped_seconds)

    @property
    def collective_bytes(self) -> int:
        """Wire bytes through one device in one step."""
        return round(sum(item.wire_bytes * item.count for item in self.traffic))
