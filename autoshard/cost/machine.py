"""What a step runs on."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

from autoshard.graph.axis_parts import AxisParts
from autoshard.graph.program import Layout
from autoshard.hardware.chips import Chip
from autoshard.hardware.efficiency import ON_CHIP_SHARE
from autoshard.hardware.links import AxisLink, group_link
from autoshard.hardware.targets import Target
from autoshard.mesh import Mesh

__all__ = ["Machine"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Machine:
    """The chips and the links between them, mesh axis by mesh axis.

    Attributes:
        chip: one device.
        parts: the mesh axes of more than one device, in order, and what each is cut into. An axis
            of layouts is a part of one.
        links: what carries each part; then, where some axis is cut, what carries each axis; then
            what carries several axes together, of three any two; all of them last.
        matmul_dtype: dtype of the matmuls, for the peak.
        as_partitioned: whether the collectives are wanted as the partitioner makes them, without
            what the TPU compiler makes of them: it finds gathers of the forward pass that are
            equal but were made in different groups of devices, and sums some reduce-scatters whole.
    """

    chip: Chip
    parts: AxisParts
    links: tuple[AxisLink, ...]
    matmul_dtype: str = "bfloat16"
    as_partitioned: bool = False

    @classmethod
    def of(
        cls,
        mesh: Mesh,
        target: Target,
        matmul_dtype: str = "bfloat16",
        parts: AxisParts | None = None,
    ) -> Self:
        """The chips of a target under a mesh of as many devices.

        Args:
            mesh: the mesh.
            target: a target with as many devices.
            matmul_dtype: see the class.
            parts: of the axes of more than one device; by default each stays whole.
        """
        axes = mesh.parallel_axes
        parts = parts or AxisParts.uncut([mesh.sizes[axis] for axis in axes])
        groups = [tuple(axes[axis] for axis in group) for group in _groups_of_axes(len(axes))]
        links = [group_link(group, mesh, target) for group in groups]
        if parts.is_cut:
            links = [*_part_links(parts, mesh, target), *links]
        return cls(chip=target.chip, parts=parts, links=tuple(links), matmul_dtype=matmul_dtype)

    @property
    def axis_sizes(self) -> tuple[int, ...]:
        """Devices along each axis of a layout."""
        return self.parts.sizes

    @property
    def all_axes(self) -> int:
        """The index of the link of all axes together."""
        return len(self.links) - 1

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The axes of a layout over which each link goes."""
        places = self.parts.places
        several = [
            tuple(itertools.chain.from_iterable(places[axis] for axis in group))
            for group in _groups_of_axes(len(places))
        ]
        parts = [(place,) for place in range(len(self.axis_sizes))] if self.parts.is_cut else []
        return (*parts, *several)

    def axis_of(self, link: int) -> int:
        """The first axis of a link; all of them split one dimension of what is moved over it."""
        return self.groups[link][0]

    @cached_property
    def uncut(self) -> "Machine":
        """The same with layouts by whole mesh axes; its links are the last of this one's."""
        parts = AxisParts.uncut([math.prod(of) for of in self.parts.parts])
        n_links = len(_groups_of_axes(len(parts.sizes)))
        return replace(self, parts=parts, links=self.links[-n_links:])

    def simplest(self, layouts: Sequence[Layout]) -> tuple[Sequence[Layout], "Machine"]:
        """The layouts by whole axes and `uncut`, where no part of an axis is on its own."""
        by_axis = self.parts.by_axis(layouts) if self.parts.is_cut else None
        return (layouts, self) if by_axis is None else (by_axis, self.uncut)

    @property
    def on_chip_bytes(self) -> float:
        """What arrays may fill of a core's vector memory, one or all together."""
        return ON_CHIP_SHARE * self.chip.vmem_bytes

    @property
    def compiles_for_tpu(self) -> bool:
        """Whether the TPU compiler has the last word, on compute as on collectives."""
        return self.chip.kind == "tpu" and not self.as_partitioned

    def keeps_on_chip(self, n_bytes: float) -> bool:
        """Whether an array of so many bytes may live in the vector memory of a TPU."""
        return self.compiles_for_tpu and n_bytes <= self.on_chip_bytes

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
        return self.compiles_for_tpu and "all-gather" in self.chip.overlapped_collectives

    @property
    def decomposes_sums(self) -> bool:
        """Whether the chip's compiler makes rings of permutations of reduce-scatters."""
        return self.compiles_for_tpu and self.hides_permutes


def _groups_of_axes(n_axes: int) -> list[tuple[int, ...]]:
    """Each of some mesh axes, and several of them together, all of them last.

    >>> _groups_of_axes(3)
    [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
    """
    sizes = range(1, n_axes + 1)
    groups = [group for size in sizes for group in itertools.combinations(range(n_axes), size)]
    return groups or [()]


def _part_links(parts: AxisParts, mesh: Mesh, target: Target) -> list[AxisLink]:
    """What carries each part of an axis, under the name of the axis."""
    owners = [
        axis
        for axis, sizes in zip(mesh.parallel_axes, parts.parts, strict=True)
        for _ in range(len(sizes))
    ]
    names = tuple(f"{axis}_part_{i}" for i, axis in enumerate(owners))
    cut = Mesh(shape=parts.sizes, axis_names=names)
    links = (group_link((name,), cut, target) for name in names)
    return [replace(link, axis=axis) for link, axis in zip(links, owners, strict=True)]
