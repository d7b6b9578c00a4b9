"""What is asked of a compiler, and what it answers, as values."""

from dataclasses import dataclass

from autoshard.errors import UsageError
from autoshard.layout.rules import LayoutRules
from autoshard.mesh import Mesh
from autoshard.model.folding import BlockStack
from autoshard.model.workload import Workload
from autoshard.xla.collectives import Collective, merge_collectives
from autoshard.xla.copies import SumOfCopies

__all__ = ["CompileRequest", "CompiledStep"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileRequest:
    """A step to compile.

    Attributes:
        model: the model's name, as `autoshard.model.build` takes it.
        workload: what the model does in the step.
        mesh: the grid of devices, the data axis first.
        rules: the layout map.
        target: the machine, such as `cpu:8` or `tpu:v5e:2x4`.
        periods: how many periods of each stack of repeated blocks; None for the whole model.
        leaves_out: whether blocks may be left out of the step that the model has to have.
        attention: the chip whose attention the step takes, such as `tpu:v5e`; None for the
            target's.
    """

    model: str
    workload: Workload
    mesh: Mesh
    rules: LayoutRules
    target: str
    periods: int | None = None
    leaves_out: bool = False
    attention: str | None = None

    def __post_init__(self) -> None:
        if self.periods is not None and self.periods < 1:
            raise UsageError(f"cannot compile {self.periods} periods of blocks; at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledStep:
    """The compiler's answer: one step's program for one device.

    Attributes:
        target: the machine that it was compiled for.
        blocks: the stacks of repeated blocks; `traced` of their `n_blocks` are in the program.
        argument_bytes: weights, optimizer state and data of a device.
        output_bytes: results of a device.
        temporary_bytes: what the program needs between; says nothing on `cpu`, where bfloat16 is
            computed in float32 and nothing is rematerialised.
        alias_bytes: results that take the place of donated arguments.
        live_bytes: what is in use at once at the most, arguments and what is in the chip's own
            memory included; None where the compiler does not say.
        collectives: every movement between devices in one step.
        sums_of_copies: the sums in it that are too large.
        estimated_cycles: the TPU compiler's estimate of a device's cycles of computation; None
            where it has none of some instruction.
        flops: floating point operations of a device as XLA counts them, where it does; those of
            loops are counted once.
        model_flops: those of the model's matmuls, all devices together, nothing twice.
    """

    target: str
    blocks: tuple[BlockStack, ...]
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    alias_bytes: int
    collectives: tuple[Collective, ...]
    sums_of_copies: tuple[SumOfCopies, ...] = ()
    live_bytes: int | None = None
    estimated_cycles: int | None = None
    flops: int | None = None
    model_flops: int | None = None

    @property
    def traced_blocks(self) -> int | None:
        """The blocks that are in the program; None where the model repeats none."""
        return sum(stack.traced for stack in self.blocks) or None

    @property
    def n_blocks(self) -> int | None:
        """The blocks of the whole model; None where it repeats none."""
        return sum(stack.n_blocks for stack in self.blocks) or None

    @property
    def is_whole(self) -> bool:
        """Whether this is the program of the whole model, compiled or extrapolated."""
        return all(stack.traced == stack.n_blocks for stack in self.blocks)

    @property
    def on_cpu(self) -> bool:
        """Whether it was compiled for CPU devices: it says nothing of compute and memory then."""
        return self.target.startswith("cpu")

    @property
    def peak_bytes(self) -> int:
        """Peak bytes of a device: argument + temporary + output - alias."""
        return self.argument_bytes + self.temporary_bytes + self.output_bytes - self.alias_bytes

    def merged_collectives(self) -> tuple[Collective, ...]:
        """The collectives, those of all blocks together."""
        return merge_collectives(self.collectives, [stack.template for stack in self.blocks])
