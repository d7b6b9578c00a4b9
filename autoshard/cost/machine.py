"""What a step runs on."""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

from autoshard.hardware.chips import Chip
from autoshard.hardware.links import AxisLink, group_link
from autoshard.hardware.targets import Target
from autoshard.mesh import Mesh

__all__ = ["Machine"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Machine:
    """The chips and the links between them, mesh axis by mesh axis.

    Attributes:
        chip: one device.
        links: what carries each mesh axis of more than one device, in mesh order; last, what
            carries all of them together.
        matmul_dtype: dtype of the matmuls, for the peak.
        as_partitioned: whether the collectives are wanted as the partitioner makes them, without
            what the TPU compiler makes of them: it finds gathers of the forward pass that are
            equal but were made in different groups of devices, and sums some reduce-scatters whole.
    """

    chip: Chip
    links: tuple[AxisLink, ...]
    matmul_dtype: str = "bfloat16"
    as_partitioned: bool = False

    @classmethod
    def of(cls, mesh: Mesh, target: Target, matmul_dtype: str = "bfloat16") -> Self:
        """The chips of a target under a mesh of as many devices."""
        axes = mesh.parallel_axes
        groups = [*((axis,) for axis in axes), axes]
        return cls(
            chip=target.chip,
            links=tuple(group_link(group, mesh, target) for group in groups),
            matmul_dtype=matmul_dtype,
        )

    @cached_property
    def axis_sizes(self) -> tuple[int, ...]:
        """Devices along each axis."""
        return tuple(link.size for link in self.links[:-1])

    @property
    def is_tpu(self) -> bool:
        """Whether the TPU compiler has the last word on the collectives."""
        return self.chip.kind == "tpu" and not self.as_partitioned

    @property
    def folds_sums(self) -> bool:
        """Whether the chip's compiler makes one all-reduce of several, one after the other."""
        return self.chip.kind != "cpu" and not self.as_partitioned

    @property
    def hides_permutes(self) -> bool:
        """Whether the chip's compiler runs permutations behind compute."""
        return "collective-permute" in self.chip.overlapped_collectives

    @property
    def hides_gathers(self) -> bool:
        """Whether the chip's compiler runs gathers behind compute."""
        return self.is_tpu and "all-gather" in self.chip.overlapped_collectives

    @property
    def decomposes_sums(self) -> bool:
        """Whether the chip's compiler makes rings of permutations of reduce-scatters."""
        return self.is_tpu and self.hides_permutes

    @property
    def all_axes(self) -> int:
        """The index of the link of all axes together."""
        return len(self.links) - 1
