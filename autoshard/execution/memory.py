"""The memory that a run on virtual devices of one machine needs.

All devices share the machine's memory, so a run needs

    sum over variables: bytes x copies, copies = devices / product of the mesh axes that split it
  + what `fit` adds for each trained variable: a gradient and the optimizer's slots, laid out alike
  + 4 bytes x elements x copies of the largest variable: XLA's CPU backend multiplies bfloat16 in
    float32, and converts one weight at a time
  + 16 bytes for each element of the outputs: they, and float32 copies for loss and comparison
  + 1 GiB a process for Python and its libraries

It holds for the flags of `autoshard.execution.children`; with XLA's defaults every weight is
converted at once, and a run needs three times as much.
"""

import math
from dataclasses import dataclass
from typing import Any

from autoshard.execution.requests import Part
from autoshard.layout.rules import LayoutRules, match
from autoshard.mesh import Mesh
from autoshard.model.inputs import output_structure
from autoshard.model.keras_import import import_keras
from autoshard.model.recipe import AbstractModel
from autoshard.model.slots import make_slots
from autoshard.model.variables import dtype_bytes
from autoshard.model.workload import Workload

__all__ = ["needed_bytes"]

_LIBRARY_BYTES = 2**30
_FLOAT32_BYTES = 4
_OUTPUT_BYTES = 16


@dataclass(frozen=True, slots=True)
class _Held:
    """A variable and how many whole copies of it the machine holds."""

    n_elements: int
    n_bytes: int
    copies: float


def needed_bytes(
    model: AbstractModel,
    part: Part,
    workload: Workload,
    rules: LayoutRules,
    mesh: Mesh | None,
    n_processes: int = 1,
) -> int:
    """Bytes of memory that a part needs, all devices together.

    Args:
        model: without values, as deep as it is to run, with low-rank factors if it has them.
        part: what is run.
        workload: batch, sequence length and optimizer.
        rules: the layout map.
        mesh: the grid of devices; None for one device.
        n_processes: processes that share the devices.
    """
    held = [_held(v, rules, mesh) for v in model.model.weights]
    needed = sum(item.n_bytes * item.copies for item in held)
    needed += max((_FLOAT32_BYTES * item.n_elements * item.copies for item in held), default=0)
    if part == "fit":
        trained = model.model.trainable_variables
        needed += sum(
            item.n_bytes * item.copies for item in (_held(v, rules, mesh) for v in trained)
        )
        copies = {v.path: _held(v, rules, mesh).copies for v in trained}
        everywhere = mesh.n_devices if mesh else 1
        for slot in make_slots(workload.optimizer, trained).slots:
            n_elements = math.prod(slot.shape)
            size = dtype_bytes(slot.dtype)
            needed += n_elements * size * copies.get(slot.owner or "", everywhere)
    needed += _OUTPUT_BYTES * _output_elements(model, workload)
    return round(needed) + n_processes * _LIBRARY_BYTES


def _held(variable: Any, rules: LayoutRules, mesh: Mesh | None) -> _Held:
    shape, path = tuple(variable.shape), variable.path
    copies = 1.0
    if mesh is not None:
        spec = match(rules, path) or ()
        copies = mesh.n_devices / math.prod(mesh.sizes[axis] for axis in spec if axis is not None)
    n_elements = math.prod(shape)
    n_bytes = n_elements * dtype_bytes(str(variable.dtype))
    return _Held(n_elements=n_elements, n_bytes=n_bytes, copies=copies)


def _output_elements(model: AbstractModel, workload: Workload) -> int:
    tensors = import_keras().tree.flatten(output_structure(model.model))
    shapes = [tuple(tensor.shape) for tensor in tensors]
    return sum(
        workload.batch * math.prod(size or workload.seq_len for size in shape[1:])
        for shape in shapes
    )
