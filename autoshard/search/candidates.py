"""The layouts that a LayoutMap can ask for, family by family, and what they fix in a program.

A spec puts each mesh axis on at most one dimension, and on each dimension at most one axis (Keras'
TensorLayout takes no more); a dimension must be a multiple of its axis (JAX pads nothing).
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from autoshard.graph.program import WHOLE, Layout, Program
from autoshard.mesh import Mesh, Spec, divides

__all__ = ["Assignment", "Choices", "family_choices", "fixed_layouts", "legal_specs", "replicated"]

Assignment = Mapping[str, Spec]

# A family of less than this share of the model's bytes stays whole: a rule for it would be longer
# than its gain.
_NEGLIGIBLE_SHARE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What is to be decided for one family.

    Attributes:
        family: its name.
        shape: shape of each of its variables.
        specs: the legal ones, the replicated one first.
        siblings: name shared by families that are read by the same op shapes (query, key and
            value; gate and up), and so are moved together before they are moved alone.
        n_bytes: bytes of all its variables, whole.
    """

    family: str
    shape: tuple[int, ...]
    specs: tuple[Spec, ...]
    siblings: str
    n_bytes: int


def replicated(shape: Sequence[int]) -> Spec:
    """The spec that splits nothing."""
    return (None,) * len(shape)


def legal_specs(shape: Sequence[int], mesh: Mesh) -> Iterator[Spec]:
    """Every spec of an array of `shape`, the replicated one first.

    >>> from autoshard.mesh import parse_mesh
    >>> list(legal_specs((16, 3), parse_mesh("1x8")))
    [(None, None), ('model', None)]
    """
    axes = mesh.parallel_axes
    for dims in itertools.product(range(-1, len(shape)), repeat=len(axes)):
        used = [dim for dim in dims if dim >= 0]
        if len(set(used)) < len(used):
            continue
        entries: list[str | None] = [None] * len(shape)
        for dim, axis in zip(dims, axes, strict=True):
            if dim >= 0:
                entries[dim] = axis
        if divides(shape, tuple(entries), mesh):
            yield tuple(entries)


def family_choices(program: Program, mesh: Mesh) -> tuple[Choices, ...]:
    """The families of a program with their legal specs, largest first.

    Families that make up less than a thousandth of the weights have the replicated spec alone.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    n_bytes: dict[str, int] = {}
    for argument in program.arguments:
        if argument.role == "weight" and argument.family is not None:
            shapes[argument.family] = argument.shape
            total = argument.n_bytes * argument.count
            n_bytes[argument.family] = n_bytes.get(argument.family, 0) + total
    floor = _NEGLIGIBLE_SHARE * sum(n_bytes.values())
    return tuple(
        Choices(
            family=family,
            shape=shapes[family],
            specs=tuple(legal_specs(shapes[family], mesh))
            if n_bytes[family] >= floor
            else (replicated(shapes[family]),),
            siblings=f"{_parent(family)} {shapes[family]}",
            n_bytes=n_bytes[family],
        )
        for family in sorted(n_bytes, key=lambda name: (-n_bytes[name], name))
    )


def _parent(family: str) -> str:
    """The block a family's layer stands in: its path less the layer and the variable."""
    return family.rsplit("/", 2)[0]


def fixed_layouts(program: Program, assignment: Assignment, mesh: Mesh) -> dict[int, Layout]:
    """The layouts of the argument groups under an assignment.

    Data is split on dimension 0 over the data axis, as Keras does; a KV cache is left free, since
    Keras makes it inside the step; what has no family is whole.
    """
    axes = mesh.parallel_axes
    fixed: dict[int, Layout] = {}
    for argument in program.arguments:
        if argument.group is None or argument.role == "cache":
            continue
        spec: Spec = ()
        if argument.role == "data":
            spec = (mesh.data_axis,)
        elif argument.family is not None:
            spec = assignment.get(argument.family, ())
        layout = [WHOLE] * len(axes)
        for axis, dim in zip(spec, argument.dims, strict=False):
            if axis in axes and dim is not None:
                layout[axes.index(axis)] = dim
        fixed[argument.group] = tuple(layout)
    return fixed
