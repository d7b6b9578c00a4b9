"""What is planned for: the devices, the chips, the step and its memory."""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from autoshard.errors import MeshError, UsageError
from autoshard.hardware.targets import Target, check_devices, default_target, parse_target
from autoshard.mesh import Mesh, MeshLike, as_mesh, check_batch, round_up
from autoshard.model.workload import (
    DEFAULT_BATCH,
    DEFAULT_LORA_RANK,
    DEFAULT_OPTIMIZER,
    DEFAULT_SEQ_LEN,
    Workload,
)
from autoshard.units import parse_bytes, whole_number
from autoshard.xla.attached import attached_target

__all__ = ["Setup", "check_options", "limit_bytes", "make_setup", "named_target"]

# Below these a memory limit is taken for a slip: one with a unit, and a bare number of bytes.
_LEAST_BYTES = 1000
_LEAST_UNNAMED = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is to be planned for.

    Attributes:
        mesh: the devices.
        target: the chips.
        workload: the step.
        memory_limit: bytes a device that the step may use.
        generate: whether `generate` has to run under the plan too, where the model has it.

    Raises:
        MeshError: mesh and target differ in devices, or the data axis does not divide the batch.
    """

    mesh: Mesh
    target: Target
    workload: Workload
    memory_limit: int
    generate: bool = True

    def __post_init__(self) -> None:
        check_devices(self.mesh, self.target)
        check_batch(self.workload.batch, self.mesh)


def make_setup(
    mesh: MeshLike,
    *,
    axes: Sequence[str] | None = None,
    target: str | Target | None = None,
    slices: int | None = None,
    workload: str = "train",
    batch: int | None = None,
    seq_len: int = DEFAULT_SEQ_LEN,
    lora_rank: int | None = None,
    dtype: str | None = None,
    optimizer: str = DEFAULT_OPTIMIZER,
    memory_limit: str | int | None = None,
    generate: bool = True,
) -> Setup:
    """Fill in the defaults and check that mesh, target and batch go together.

    Args:
        mesh, axes, target, slices, batch, memory_limit, generate: as for `autoshard.plan`.
        workload, seq_len, lora_rank, dtype, optimizer: the fields of a `Workload`.

    Raises:
        MeshError: mesh and target differ in devices, or the data axis does not divide the batch.
        UsageError: a value is unknown or out of range.
    """
    batch, slices = whole_number("batch", batch), whole_number("slices", slices)
    seq_len, lora_rank = whole_number("seq_len", seq_len), whole_number("lora_rank", lora_rank)
    mesh = as_mesh(mesh, axes)
    n_devices = mesh.n_devices if slices is None else _devices_per_slice(mesh, slices)
    if target is None:
        target = default_target(n_devices)
    elif isinstance(target, str):
        target = named_target(target, n_devices)
    elif not isinstance(target, Target):
        raise UsageError(f"the target is {target!r}; give a name such as tpu:v5e:2x4")
    if slices is not None:
        target = _in_slices(target, slices, n_devices)
    if batch is None:
        batch = round_up(DEFAULT_BATCH, mesh.n_data)
    if workload == "lora" and lora_rank is None:
        lora_rank = DEFAULT_LORA_RANK
    return Setup(
        mesh=mesh,
        target=target,
        workload=Workload(
            kind=workload,  # type: ignore[arg-type]
            batch=batch,
            seq_len=seq_len,
            dtype=dtype,
            optimizer=optimizer,
            lora_rank=lora_rank,
        ),
        memory_limit=limit_bytes(memory_limit, target),
        generate=generate,
    )


def check_options(function: str, options: Iterable[str], *, without: Sequence[str] = ()) -> None:
    """Refuse keywords that `make_setup` does not take, in the name of the function that was called.

    Args:
        function: its name.
        options: the names of the keywords.
        without: those of `make_setup` that the function does not take.

    Raises:
        TypeError: there is such a keyword, as Python says it.
    """
    known = inspect.signature(make_setup).parameters.keys() - set(without)
    for name in options:
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument '{name}'")


def named_target(name: str, n_devices: int) -> Target:
    """The target that a user names.

    Args:
        name: what `parse_target` reads, or `attached` for what JAX sees.
        n_devices: of what the name of a chip alone stands for, as `cpu` or `tpu:v6e`.

    Raises:
        UsageError: it is none of these, or the chip table does not know the attached devices.
        XlaError: JAX cannot start.
    """
    if name == "attached":
        return attached_target()
    return parse_target(name, n_devices)


def limit_bytes(memory_limit: str | int | None, target: Target) -> int:
    """Bytes a device that a step may take.

    Args:
        memory_limit: bytes, or a text like `15GiB`; None for all that the target's chip has.
        target: the chips.

    Raises:
        UsageError: it is not a number of bytes, or so few that a unit must be missing.
    """
    if memory_limit is None:
        return target.chip.hbm_bytes
    least = _LEAST_UNNAMED
    if isinstance(memory_limit, str):
        least = _LEAST_BYTES if memory_limit.strip()[-1:].isalpha() else least
        memory_limit = parse_bytes(memory_limit)
    n_bytes = whole_number("memory_limit", memory_limit)
    if n_bytes < least:
        raise UsageError(
            f"a memory limit of {n_bytes} bytes holds no model; give a unit, as in 15GiB"
        )
    return n_bytes


def _devices_per_slice(mesh: Mesh, n_slices: int) -> int:
    if n_slices < 1:
        raise UsageError(f"slices is {n_slices}; give 1 or more")
    if mesh.n_devices % n_slices:
        raise MeshError(
            f"mesh {mesh} has {mesh.n_devices} devices, which {n_slices} slices cannot share evenly"
        )
    return mesh.n_devices // n_slices


def _in_slices(target: Target, n_slices: int, n_devices: int) -> Target:
    """So many of a target, which may be several itself if it has the devices of one."""
    if target.n_slices > 1 and target.n_devices != n_devices:
        raise UsageError(f"target {target} has {target.n_slices} slices already")
    return replace(target, n_slices=n_slices * target.n_slices)
