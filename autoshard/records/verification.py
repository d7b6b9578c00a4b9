"""What a target's compiler says of a step, as one value that becomes JSON."""

from dataclasses import dataclass, field

from autoshard.layout.rules import LayoutRules
from autoshard.mesh import Mesh
from autoshard.model.workload import Workload
from autoshard.records.parts import Prediction, Versions

__all__ = ["MemoryUse", "StepSeconds", "Verification", "VerifiedCollective"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes of one device, by the compiler; their sum less what is aliased is the peak."""

    arguments: int
    temporaries: int
    outputs: int
    aliased: int
    peak: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSeconds:
    """Time of one step.

    Attributes:
        compute: computation, by the TPU compiler's cycles, or predicted where it counts none.
        compute_is_predicted: which of the two.
        blocking: collectives that nothing runs beside.
        overlapped: collectives that run beside the computation.
        step: compute + blocking + what the overlapped exceed compute by.
    """

    compute: float
    compute_is_predicted: bool
    blocking: float
    overlapped: float
    step: float


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedCollective:
    """Equal collectives of the program.

    Attributes:
        kind: `all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all`, `collective-permute`.
        axis: the mesh axes it runs over, joined by commas.
        n_bytes: bytes of the whole array at one device, once.
        dtype: of its elements.
        count: how often it runs in a step.
        wire_bytes: bytes through one device, all of them together, by the ring formulas.
        phase: `forward`, `backward` or `update`.
        overlapped: whether it runs beside the computation.
        layer: the layer it serves, with `*` for the block; empty where the compiler says none.
        cause: the rule's pattern, or the split of the data; None where it cannot be told.
    """

    kind: str
    axis: str
    n_bytes: int
    dtype: str
    count: int
    wire_bytes: int
    phase: str
    overlapped: bool
    layer: str
    cause: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """A step, compiled for a target.

    Attributes:
        model: its name.
        mesh: the devices.
        rules: the layout map.
        workload: the step.
        target: what it was compiled for.
        blocks: repeated blocks in the program; None where the model has none.
        n_blocks: those of the whole model.
        fits: whether it fits the memory; None from `cpu`, whose memory is not the target's, and
            where only some of the blocks were compiled and those fit.
        memory_limit: bytes a device that it may use.
        refusal: why the compiler refused it, in one sentence, or "".
        wrong: what the program gets wrong whatever it fits, in one sentence, or "".
        memory: bytes of a device; None where the compiler refused.
        step_seconds: None where the compiler refused, and from `cpu`.
        collectives: all of them, the most bytes first.
        flops_per_device: operations of one device as the compiler counts them, where it does.
        model_flops: those of the model's matmuls, all devices together, nothing twice.
        repeated_share: the part of all devices' operations that repeats another's, or recomputes;
            None where the compiler, which counts one turn of a loop, finds less than the model has.
        predicted: what the formulas say of the same step and blocks, where they were asked.
        versions: the packages.
        compiler: the compiler's own package and version.
    """

    model: str
    mesh: Mesh
    rules: LayoutRules = field(metadata={"key": "layout_map"})
    workload: Workload
    target: str
    blocks: int | None
    n_blocks: int | None
    fits: bool | None
    memory_limit: int
    refusal: str = ""
    wrong: str = ""
    memory: MemoryUse | None = None
    step_seconds: StepSeconds | None = None
    collectives: tuple[VerifiedCollective, ...] = ()
    flops_per_device: int | None = None
    model_flops: int | None = None
    repeated_share: float | None = None
    predicted: Prediction | None = None
    versions: Versions = field(default_factory=Versions)
    compiler: str = ""
