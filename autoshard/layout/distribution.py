"""Rules as Keras' own objects."""

from collections.abc import Sequence
from typing import Any

from autoshard.layout.rules import LayoutRules
from autoshard.mesh import Mesh
from autoshard.model.keras_import import import_keras

__all__ = ["keras_distribution", "keras_layout_map"]


def keras_layout_map(rules: LayoutRules, device_mesh: Any, layout_type: Any = None) -> Any:
    """The `keras.distribution.LayoutMap` of some rules on a `DeviceMesh`.

    Args:
        rules: the layout map.
        device_mesh: whose axes they name.
        layout_type: the class of its layouts, by default `keras.distribution.TensorLayout`.
    """
    distribution = import_keras().distribution
    layout_map = distribution.LayoutMap(device_mesh)
    for rule in rules:
        layout_map[rule.pattern] = (layout_type or distribution.TensorLayout)(
            rule.spec, device_mesh
        )
    return layout_map


def keras_distribution(
    rules: LayoutRules, mesh: Mesh, devices: Sequence[Any], layout_type: Any = None
) -> Any:
    """The `keras.distribution.ModelParallel` of a map.

    Data is fed as arrays that every process holds whole, so Keras need not split a data set.

    Args:
        rules: the layout map.
        mesh: the grid of devices; data is split over its first axis.
        devices: names or `jax.Device`s, one for each place of the mesh, row by row.
        layout_type: see `keras_layout_map`.
    """
    keras = import_keras()
    device_mesh = keras.distribution.DeviceMesh(mesh.shape, mesh.axis_names, list(devices))
    return keras.distribution.ModelParallel(
        layout_map=keras_layout_map(rules, device_mesh, layout_type),
        batch_dim_name=mesh.data_axis,
        auto_shard_dataset=False,
    )
