"""A mesh by axes of prime size, in which JAX can name what XLA splits over a part of an axis.

XLA splits 4 heads over 4 of an axis' 8 places. A `PartitionSpec` can only say the axis or nothing,
so what is split like that is made whole where a program begins and ends. A program of the same
devices by axes of 2, 2 and 2 is the same otherwise.
"""

from functools import cache
from typing import Any

from autoshard.mesh import prime_factors
from autoshard.model.keras_import import import_keras

__all__ = ["by_prime_axes", "prime_layout"]


def by_prime_axes(sharding: Any) -> Any:
    """The same `jax.sharding.NamedSharding`, with axes of prime size in place of each axis."""
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = sharding.mesh
    primes = {axis: prime_factors(size) or (1,) for axis, size in mesh.shape.items()}
    parts = {
        axis: tuple(f"{axis}.{i}" for i in range(len(of))) if len(of) > 1 else (axis,)
        for axis, of in primes.items()
    }
    devices = mesh.devices.reshape([size for of in primes.values() for size in of])
    whole = [(axes,) if isinstance(axes, str) else axes or () for axes in sharding.spec]
    spec = [tuple(part for axis in axes for part in parts[axis]) or None for axes in whole]
    names = [name for of in parts.values() for name in of]
    return NamedSharding(Mesh(devices, names), PartitionSpec(*spec))


@cache
def prime_layout() -> Any:
    """A `keras.distribution.TensorLayout` that JAX gets by prime axes."""

    class PrimeLayout(import_keras().distribution.TensorLayout):  # type: ignore[misc]
        @property
        def backend_layout(self) -> Any:
            return by_prime_axes(super().backend_layout)

    return PrimeLayout
