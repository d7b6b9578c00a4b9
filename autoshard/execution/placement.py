"""Holds the sharding of each variable of a model against its layout map."""

from typing import Any

from autoshard.layout.rules import LayoutRules, match
from autoshard.mesh import format_spec
from autoshard.records.execution import Placed

__all__ = ["placed_by"]


def placed_by(model: Any, rules: LayoutRules, device_mesh: Any) -> Placed:
    """Where the weights of a model lie.

    The map is read with this package's own matching, not Keras'.

    Args:
        model: a Keras model with values.
        rules: the layout map.
        device_mesh: the `keras.distribution.DeviceMesh` it was built for.
    """
    from jax.sharding import NamedSharding, PartitionSpec

    misplaced, n_split = [], 0
    for weight in model.weights:
        spec = match(rules, weight.path) or ()
        n_split += any(axis is not None for axis in spec)
        planned = NamedSharding(device_mesh.backend_mesh, PartitionSpec(*spec))
        actual = weight.value.sharding
        if not actual.is_equivalent_to(planned, len(weight.shape)):
            lies = getattr(actual, "spec", actual)
            misplaced.append(f"{weight.path} lies as {lies}, planned {format_spec(spec)}")
    return Placed(n_variables=len(model.weights), n_split=n_split, misplaced=tuple(misplaced))
