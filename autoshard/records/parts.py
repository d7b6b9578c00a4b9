"""The values inside a `Plan`: the model it is for, predictions, compilers' words, reasons."""

from dataclasses import dataclass, field

from autoshard.codec import keys
from autoshard.cost.values import Memory, StepCost
from autoshard.installed import installed_version
from autoshard.layout.rules import LayoutRules
from autoshard.mesh import Spec
from autoshard.model.variables import ModelTable

__all__ = [
    "Alternative",
    "CompiledCollective",
    "Compiled",
    "PlannedFamily",
    "PlannedModel",
    "Prediction",
    "Reason",
    "Versions",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFamily:
    """Variables of the model that repeat over its layers.

    Attributes:
        name: of the family.
        shape, dtype: of each variable.
        count: how many there are.
        trainable: whether a step may move them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    trainable: bool = field(default=True, metadata={"optional": True})


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedModel:
    """The model that a plan was made for.

    Attributes:
        name: preset, path or import path, by which it can be built again.
        n_parameters: its number of parameters.
        fingerprint: SHA-256 of its table of paths, shapes and dtypes.
        families: its variables, one entry for each family.
    """

    name: str
    n_parameters: int = field(metadata={"key": "parameters"})
    fingerprint: str
    families: tuple[PlannedFamily, ...]

    @classmethod
    def of(cls, table: ModelTable) -> "PlannedModel":
        """The entry of a plan for a variable table."""
        return cls(
            name=table.name,
            n_parameters=table.n_parameters,
            fingerprint=table.fingerprint,
            families=tuple(
                PlannedFamily(
                    name=family.name,
                    shape=tuple(family.shape),
                    dtype=family.dtype,
                    count=len(family.paths),
                    trainable=family.trainable,
                )
                for family in table.families()
            ),
        )

    def difference(self, table: ModelTable) -> str:
        """The first variable of `table`, or else of this model, that the other lacks."""
        planned = {family.name: family for family in self.families}
        for family in table.families():
            path, shape = family.paths[0], tuple(family.shape)
            was = planned.pop(family.name, None)
            if was is None:
                return f"'{path}' {shape} {family.dtype} is not among the plan's variables"
            if (was.shape, was.dtype) != (shape, family.dtype):
                return (
                    f"'{path}' is {shape} {family.dtype} and the plan has {was.shape} {was.dtype}"
                )
            if was.count != len(family.paths):
                last = family.paths[-1]
                return (
                    f"there are {len(family.paths)} variables '{family.name}', the last '{last}', "
                    f"and the plan has {was.count}"
                )
        if planned:
            return f"it has no variable '{next(iter(planned))}'"
        return "the same variables come in another order"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the formulas say of one step.

    Attributes:
        step_seconds: time of the step.
        compute_seconds: time its ops take on their shards.
        collective_seconds: time its collectives take, hidden or not.
        collective_bytes: bytes on the wire through one device.
        peak_bytes_per_device: arguments, temporaries and outputs, less what is donated.
        bytes_per_device: that sum by part.
    """

    step_seconds: float
    compute_seconds: float
    collective_seconds: float
    collective_bytes: int
    peak_bytes_per_device: int
    bytes_per_device: Memory

    @classmethod
    def of(cls, cost: StepCost) -> "Prediction":
        """The part of a step's cost that a plan file holds."""
        memory = cost.memory
        return cls(
            step_seconds=cost.step_seconds,
            compute_seconds=cost.compute_seconds,
            collective_seconds=cost.blocking_seconds + cost.overlapped_seconds,
            collective_bytes=cost.collective_bytes,
            peak_bytes_per_device=memory.peak_bytes,
            bytes_per_device=memory,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledCollective:
    """Collectives of one kind that a compiler put into the program.

    Attributes:
        kind: `all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all`, `collective-permute`.
        axis: the mesh axis it runs over, or several joined by a comma.
        wire_bytes: bytes through one device, all of them together.
        count: how often it runs in a step.
        layer: template of the layer that it serves, where known.
        rule: pattern of the rule that brought it about, or `the split of the data`, where known.
    """

    kind: str
    axis: str | None
    wire_bytes: int
    count: int
    layer: str | None = None
    rule: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What a compiler says of the step.

    Attributes:
        target: what it compiled for.
        blocks: how many repeated blocks the program has, None where the model has none.
        fits: whether the program fits the target's memory, None where the compiler cannot tell.
        peak_bytes_per_device: its own figure, None where it says nothing of the target.
        collectives: what it put into the program.
        step_seconds: its collectives on the mesh's links, and the cycles that a TPU's compiler
            counts or the predicted compute; None where it was not timed.
    """

    target: str
    blocks: int | None
    fits: bool | None
    peak_bytes_per_device: int | None
    collectives: tuple[CompiledCollective, ...]
    step_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why a family got its spec.

    Attributes:
        family: its name.
        spec: the choice.
        next_best: the best other choice, all else equal; None where no other is legal or worth a
            rule.
        cost_seconds: how much longer the step would take with that, by the formulas; negative
            where it is faster.
        cost_bytes: how much higher the peak would be, by the formulas.
        fits: whether it would fit the memory with that, by the formulas.
    """

    family: str
    spec: Spec
    next_best: Spec | None = None
    cost_seconds: float | None = field(default=None, metadata={"signed": True})
    cost_bytes: int | None = field(default=None, metadata={"signed": True})
    fits: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A layout that came close."""

    rules: LayoutRules = field(metadata={"key": "layout_map"})
    predicted: Prediction
    compiled: Compiled | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """The packages that made a plan, `""` for one that is not installed."""

    autoshard: str = ""
    keras: str = ""
    keras_hub: str = ""
    jax: str = ""

    @classmethod
    def installed(cls) -> "Versions":
        """The versions in this environment, without importing the packages."""
        return cls(**{key: installed_version(key.replace("_", "-")) for key in keys(cls)})
