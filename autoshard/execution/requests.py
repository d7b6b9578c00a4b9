"""What is asked of a process that runs a model, and what it answers, as values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from autoshard.layout.rules import LayoutRules
from autoshard.mesh import Mesh
from autoshard.model.workload import Workload
from autoshard.records.execution import Placed

__all__ = ["Cluster", "PartOutcome", "Part", "RunRequest"]

Part = Literal["load", "predict", "generate", "fit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The place of a process among several that run one program.

    Attributes:
        address: `host:port` of the first, which coordinates.
        n_processes: how many there are.
        process_id: which one this is, from 0.
    """

    address: str
    n_processes: int
    process_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """One part of a run.

    Attributes:
        part: `load` (the weights of a preset directory; the other parts draw theirs), `predict`,
            `generate` (greedy) or `fit`.
        model: the model's name, as `autoshard.model.build` takes it.
        workload: dtype, optimizer and rank of the low-rank factors; batch and sequence length of
            this part.
        mesh: the grid of devices; None for one device without a distribution.
        rules: the layout map.
        periods: how many periods of each stack of repeated blocks; None for the whole model.
        n_prompt: tokens of the prompt of `generate`; the rest of the sequence is made.
        n_steps: steps of `fit`.
        with_margins: whether `generate` is followed by a pass over what it made, for the margin of
            each token.
        seed: of weights and data.
        cluster: where several processes run this together.
    """

    part: Part
    model: str
    workload: Workload
    mesh: Mesh | None
    rules: LayoutRules = ()
    periods: int | None = None
    n_prompt: int = 4
    n_steps: int = 3
    with_margins: bool = False
    seed: int = 0
    cluster: Cluster | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PartOutcome:
    """What a process found.

    Attributes:
        build_seconds: to build the model and draw its weights.
        run_seconds: of the part itself, its compilation included.
        built_bytes: the most memory the process held until the model was built.
        peak_bytes: the most memory the process held.
        placed: where the weights lie afterwards; None without a distribution.
        arrays: what was computed. `load`: `digests` `[weights, 32]`, the SHA-256 of each weight.
            `predict`: one array an output, float32. `generate`: `tokens` `[batch, sequence]`, and
            with margins `margins` `[batch, sequence - 1]`, the distance of the two largest logits
            behind each token, `root_mean_square` and `largest` of all logits. `fit`: `losses`
            `[steps]`, and `slots` `[slots]`, the root mean square of each slot of the optimizer.
        loss: what `fit` minimised, in words.
    """

    build_seconds: float
    run_seconds: float
    built_bytes: int
    peak_bytes: int
    placed: Placed | None
    arrays: Mapping[str, Any] = field(default_factory=dict)
    loss: str = ""
