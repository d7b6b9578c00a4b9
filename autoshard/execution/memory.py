"""The memory of a run on virtual devices of one machine: what it needs, and what there is.

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
import os
from dataclasses import dataclass
from pathlib import Path
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

__all__ = ["available_bytes", "needed_bytes"]

_LIBRARY_BYTES = 2**30
_FLOAT32_BYTES = 4
_OUTPUT_BYTES = 16
_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")


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
    needed += max(_FLOAT32_BYTES * item.n_elements * item.copies for item in held)
    if part == "fit":
        trained = model.model.trainable_variables
        needed += sum(
            item.n_bytes * item.copies for item in (_held(v, rules, mesh) for v in trained)
        )
        copies = {v.path: _held(v, rules, mesh).copies for v in trained}
        for slot in make_slots(workload.optimizer, trained).slots:
            n_elements = math.prod(slot.shape)
            size = dtype_bytes(slot.dtype)
            needed += n_elements * size * copies.get(slot.owner or "", 1)
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


def available_bytes() -> int | None:
    """Memory that a new process can have without anything being swapped out.

    What the kernel says is available and what its processors keep for themselves, or what is left
    of the control group's limit if that is less; None where the system has no `/proc`.
    """
    try:
        lines = (_PROC / "meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = next(line for line in lines if line.startswith("MemAvailable:"))
    return min([int(found.split()[1]) * 1024 + _per_cpu_bytes(), *_group_bytes()])


def _per_cpu_bytes() -> int:
    """Free pages on the lists of single processors.

    Pages that a process gives back go there first: after a large one has ended, up to an eighth of
    all memory for each processor. `MemAvailable` leaves them out, and whoever asks gets them.
    """
    try:
        lines = (_PROC / "zoneinfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    counts = [line.split()[1] for line in lines if line.strip().startswith("count:")]
    return sum(map(int, counts)) * os.sysconf("SC_PAGE_SIZE")


def _group_bytes() -> tuple[int, ...]:
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = (_CGROUP / "memory.current").read_text(encoding="ascii").strip()
        kept = (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return ()
    # Files that were read lately count as used, and are given up when memory is asked for.
    files = next((int(line.split()[1]) for line in kept if line.startswith("inactive_file ")), 0)
    return () if limit == "max" else (int(limit) - int(used) + files,)
