"""What came of running a plan, as one value that becomes JSON."""

from dataclasses import dataclass, field

from autoshard.layout.rules import LayoutRules
from autoshard.mesh import Mesh
from autoshard.records.parts import Versions

__all__ = ["Agreement", "Execution", "PartRun", "PlanRun", "Placed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Where the weights lay after a part.

    Attributes:
        n_variables: all of them.
        n_split: those that the map splits over at least one mesh axis.
        misplaced: those that lay otherwise than planned, a line each.
    """

    n_variables: int
    n_split: int
    misplaced: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """One execution of a part, measured.

    Attributes:
        build_seconds: to build the model and draw its weights.
        run_seconds: of the part itself, compilation included.
        built_bytes: resident memory at its highest until the model was built, of all processes.
        peak_bytes: the same until the end.
    """

    build_seconds: float
    run_seconds: float
    built_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """A figure of the sharded run held against the reference.

    Attributes:
        figure: what was compared.
        found: how far apart they are.
        allowed: how far apart they may be.
        note: what else there is to say.
    """

    figure: str
    found: float
    allowed: float
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether they agree."""
        return self.found <= self.allowed


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRun:
    """`predict`, `generate` or `fit`, run under the plan and without it.

    Attributes:
        part: which.
        work: what was run, in words.
        blocks: repeated blocks that ran; None where the model has none.
        n_blocks: those of the whole model.
        needed_bytes: memory that the part was expected to need, of all devices together.
        missing_bytes: what the machine lacks for it at full depth; 0 where nothing.
        tolerance: how its bounds are derived, in words.
        sharded: under the plan.
        reference: what it is held against.
        placed: where the weights lay.
        losses: of each step of `fit` under the plan.
        reference_losses: of the reference.
        agreements: the comparison.
        failure: why it did not run, or "".
    """

    part: str
    work: str
    blocks: int | None
    n_blocks: int | None
    needed_bytes: int
    missing_bytes: int
    tolerance: str = ""
    sharded: Execution | None = None
    reference: Execution | None = None
    placed: Placed | None = None
    losses: tuple[float, ...] = ()
    reference_losses: tuple[float, ...] = ()
    agreements: tuple[Agreement, ...] = ()
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether it ran, every weight lay as planned, and the results agree."""
        placed = self.placed is not None and not self.placed.misplaced
        return not self.failure and placed and all(found.holds for found in self.agreements)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRun:
    """A plan, run.

    Attributes:
        model: its name.
        mesh: the devices.
        rules: the layout map.
        dtype: Keras dtype policy.
        seed: of weights and data.
        n_processes: processes that share the devices.
        against: what the results are held against.
        available_bytes: memory that was free; None where the system does not say.
        tolerance: how the bounds of the whole model are derived, in words.
        generate: False where it was not run because the plan was made without it.
        parts: what was run.
        versions: the packages.
    """

    model: str
    mesh: Mesh
    rules: LayoutRules = field(metadata={"key": "layout_map"})
    dtype: str
    seed: int
    n_processes: int
    against: str
    available_bytes: int | None
    tolerance: str
    generate: bool = True
    parts: tuple[PartRun, ...]
    versions: Versions = field(default_factory=Versions)

    @property
    def passed(self) -> bool:
        """Whether every part did."""
        return all(part.passed for part in self.parts)
