"""The device mesh, and the spec that lays one array out over it.

A `Mesh` is a grid of devices with named axes. A spec names, for each dimension of an array, the
mesh axis that splits it, or None. We write a sharded array as `A[I_model, J]`.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, SupportsIndex

from autoshard.errors import MeshError

__all__ = [
    "Mesh",
    "MeshLike",
    "Spec",
    "as_mesh",
    "check_batch",
    "divides",
    "format_spec",
    "parse_mesh",
    "prime_factors",
    "round_up",
    "shard_shape",
]

Spec = tuple[str | None, ...]

_AXIS_NAMES = {1: ("model",), 2: ("batch", "model")}
_MOST_DIGITS = 9
# More devices than any machine has are a slip of the keyboard.
_MOST_DEVICES = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """A grid of devices.

    Attributes:
        shape: devices along each axis, each at least 1.
        axis_names: one name an axis, the data axis first.
    """

    shape: tuple[int, ...]
    axis_names: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "axis_names", tuple(self.axis_names))
        if not self.shape or min(self.shape) < 1:
            raise MeshError(
                f"mesh '{self}' is not a grid of devices: every axis needs at least one"
            )
        if self.n_devices > _MOST_DEVICES:
            raise MeshError(
                f"mesh '{self}' has {self.n_devices:,} devices, more than any machine; plans are "
                f"made for up to {_MOST_DEVICES:,}"
            )
        if len(self.shape) != len(self.axis_names):
            raise MeshError(
                f"mesh '{self}' has {len(self.shape)} axes and {len(self.axis_names)} axis names "
                f"({', '.join(self.axis_names)}); give one name an axis, the data axis first"
            )
        if len(set(self.axis_names)) != len(self.axis_names) or not all(
            isinstance(name, str) and name.isidentifier() for name in self.axis_names
        ):
            raise MeshError(
                f"axis names {', '.join(map(str, self.axis_names))!r}: give distinct words of "
                "letters, digits and underscores, such as batch, model"
            )

    def __str__(self) -> str:
        return "x".join(str(size) for size in self.shape)

    @property
    def named(self) -> str:
        """The mesh with the names of its axes, as `1x8 (batch, model)`."""
        return f"{self} ({', '.join(self.axis_names)})"

    @property
    def n_devices(self) -> int:
        """The number of devices: the product of the axes."""
        return math.prod(self.shape)

    @property
    def sizes(self) -> dict[str, int]:
        """Axis name -> number of devices along it."""
        return dict(zip(self.axis_names, self.shape, strict=True))

    @property
    def parallel_axes(self) -> tuple[str, ...]:
        """The axes that split anything: those of more than one device."""
        return tuple(name for name, size in self.sizes.items() if size > 1)

    @property
    def data_axis(self) -> str:
        """The axis over which Keras splits dimension 0 of the data: the first."""
        return self.axis_names[0]

    @property
    def n_data(self) -> int:
        """Devices along the data axis: so many parts a batch has."""
        return self.shape[0]


# What a caller may give for a mesh, beside the meshes of Keras and JAX.
MeshLike = Mesh | str | Sequence[int]


def parse_mesh(text: str, axis_names: Sequence[str] | None = None) -> Mesh:
    """Read a mesh such as `1x8`.

    Args:
        text: devices along each axis, joined by `x`.
        axis_names: one name an axis, the data axis first. By default `model` for one axis and
            `batch, model` for two.

    Raises:
        MeshError: the text is no mesh, or three axes or more came without names.

    >>> parse_mesh("2x4")
    Mesh(shape=(2, 4), axis_names=('batch', 'model'))
    """
    if not re.fullmatch(r"\d+([xX]\d+)*", text.strip()):
        raise MeshError(f"'{text}' is not a mesh; write the devices along each axis, like 1x8")
    sizes = re.split("[xX]", text.strip())
    if max(map(len, sizes)) > _MOST_DIGITS:
        raise MeshError(f"mesh '{text}' has more devices than there are; write them like 1x8")
    shape = tuple(map(int, sizes))
    if axis_names is None and len(shape) not in _AXIS_NAMES:
        raise MeshError(
            f"mesh '{text}' has {len(shape)} axes; name them (axes, --axes), the data axis first"
        )
    names = _AXIS_NAMES[len(shape)] if axis_names is None else axis_names
    return Mesh(shape=shape, axis_names=tuple(names))


def as_mesh(mesh: MeshLike | Any, axis_names: Sequence[str] | None = None) -> Mesh:
    """A mesh from what a caller gives.

    Args:
        mesh: a text such as `1x8`, a shape such as `(1, 8)`, or what has names: a `Mesh`, a
            `keras.distribution.DeviceMesh`, a `jax.sharding.Mesh`.
        axis_names: as for `parse_mesh`.

    Raises:
        MeshError: it is none of these, or the names are not those of the `Mesh`.
    """
    if isinstance(axis_names, str):
        raise MeshError(f"axes is the text {axis_names!r}; give a list of names, one an axis")
    if isinstance(mesh, tuple | list) and mesh and all(isinstance(n, SupportsIndex) for n in mesh):
        mesh = "x".join(str(index(size)) for size in mesh)
    if isinstance(mesh, str):
        return parse_mesh(mesh, axis_names)
    shape, names = getattr(mesh, "shape", None), getattr(mesh, "axis_names", None)
    if not isinstance(mesh, Mesh) and shape is not None and names is not None:
        sizes = shape.values() if isinstance(shape, Mapping) else shape
        mesh = Mesh(shape=tuple(map(int, sizes)), axis_names=tuple(names))
    if not isinstance(mesh, Mesh):
        raise MeshError(f"mesh is {mesh!r}; give a text like 1x8, a shape like (1, 8), or a Mesh")
    if axis_names is not None and tuple(axis_names) != mesh.axis_names:
        raise MeshError(
            f"axes {', '.join(axis_names)} beside a Mesh with axes {', '.join(mesh.axis_names)}: "
            "leave axes out"
        )
    return mesh


def prime_factors(size: int) -> tuple[int, ...]:
    """The primes whose product is `size`, in order; none for 1.

    >>> prime_factors(12)
    (2, 2, 3)
    """
    found = []
    factor = 2
    while size > 1:
        while size % factor == 0:
            found.append(factor)
            size //= factor
        factor += 1
    return tuple(found)


def round_up(size: int, step: int) -> int:
    """The least multiple of `step` that is no less than `size`.

    >>> round_up(8, 3)
    9
    """
    return -(-size // step) * step


def divides(shape: Sequence[int], spec: Spec, mesh: Mesh) -> bool:
    """Whether every dimension of `shape` is a multiple of the mesh axis that splits it."""
    sizes = mesh.sizes
    return all(
        size % sizes[axis] == 0 for size, axis in zip(shape, spec, strict=False) if axis is not None
    )


def check_batch(batch: int, mesh: Mesh) -> None:
    """Make sure that the data axis divides a global batch.

    Raises:
        MeshError: it does not.
    """
    if batch % mesh.n_data:
        raise MeshError(
            f"a batch of {batch} does not divide over the {mesh.n_data} devices of the data axis "
            f"'{mesh.data_axis}'; use a multiple of {mesh.n_data}, or a mesh whose data axis "
            "divides it"
        )


def shard_shape(shape: Sequence[int], spec: Spec, mesh: Mesh) -> tuple[int, ...]:
    """The shape of one device's shard. A spec shorter than the shape leaves the rest whole.

    >>> shard_shape((16, 3072, 256), ("model", None, None), parse_mesh("1x8"))
    (2, 3072, 256)
    """
    sizes = mesh.sizes
    axes: Iterable[str | None] = (*spec, *[None] * (len(shape) - len(spec)))
    return tuple(
        size if axis is None else -(-size // sizes[axis])
        for size, axis in zip(shape, axes, strict=True)
    )


def format_spec(spec: Spec) -> str:
    """Print a spec as Python: `("model", None)`.

    >>> format_spec(("model", None)), format_spec((None,))
    ('("model", None)', '(None,)')
    """
    entries = ", ".join("None" if axis is None else f'"{axis}"' for axis in spec)
    return f"({entries},)" if len(spec) == 1 else f"({entries})"
