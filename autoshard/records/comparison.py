"""Several layouts of one model, priced alike, as one value that becomes JSON."""

from dataclasses import dataclass, field

from autoshard.layout.rules import LayoutRules
from autoshard.mesh import Mesh
from autoshard.model.workload import Workload
from autoshard.records.parts import Prediction, Versions

__all__ = ["ComparedLayout", "Comparison", "CostlyCollective"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CostlyCollective:
    """Equal collectives of a step, as the formulas predict them.

    Attributes:
        kind: `all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all`, `collective-permute`.
        axis: the mesh axis it runs over.
        n_bytes: bytes of the whole array at one device, once.
        count: how often it runs in a step.
        seconds: of all of them together.
        overlapped: whether they run beside the computation.
        layer: the layer that needs it, with `*` for the block; empty for none.
        cause: pattern of the rule that splits what the layer holds, else of that without which
            it is not there; `the split of the data`, or `several rules`.
    """

    kind: str
    axis: str
    n_bytes: int
    count: int
    seconds: float
    overlapped: bool
    layer: str
    cause: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedLayout:
    """One layout of a comparison.

    Attributes:
        name: the file, or the word, that it was given by.
        rules: its layout map.
        predicted: by the formulas; None where it is not priced.
        excess_bytes: predicted bytes a device above the memory limit; 0 where it fits.
        whole_bytes: bytes of the weights that no rule splits, which every device holds.
        collectives: the predicted ones, the costliest first.
        warnings: what of the map Keras passes over in silence, such as a rule that takes nothing.
        failure: why Keras refuses the map or it is not priced, or "".
    """

    name: str
    rules: LayoutRules = field(metadata={"key": "layout_map"})
    predicted: Prediction | None = None
    excess_bytes: int = 0
    whole_bytes: int = 0
    collectives: tuple[CostlyCollective, ...] = ()
    warnings: tuple[str, ...] = ()
    failure: str = ""

    @property
    def rank(self) -> tuple[bool, int, float]:
        """What runs before what does not; what fits before what does not; then the faster."""
        if self.predicted is None:
            return True, 0, 0.0
        return False, self.excess_bytes, self.predicted.step_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Layouts of one model for one step on one mesh, best first.

    Attributes:
        model: its name.
        mesh: the devices.
        workload: the step.
        target: the chips.
        memory_limit: bytes a device that the step may use.
        layouts: best first; those that Keras refuses last.
        versions: the packages.
    """

    model: str
    mesh: Mesh
    workload: Workload
    target: str
    memory_limit: int
    layouts: tuple[ComparedLayout, ...]
    versions: Versions = field(default_factory=Versions)
