"""What is planned for: the devices, the chips, the step and its memory."""

from collections.abc import Sequence
from dataclasses import dataclass

from autoshard.errors import MeshError
from autoshard.hardware.targets import Target, check_devices, default_target, parse_target
from autoshard.mesh import Mesh, parse_mesh
from autoshard.model.workload import Workload
from autoshard.units import parse_bytes

__all__ = ["Setup", "make_setup"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is to be planned for.

    Attributes:
        mesh: the devices.
        target: the chips.
        workload: the step.
        memory_limit: bytes a device that the step may use.
        generate: whether `generate` has to run under the plan too, where the model has it.
    """

    mesh: Mesh
    target: Target
    workload: Workload
    memory_limit: int
    generate: bool = True


def make_setup(
    mesh: str | Mesh,
    *,
    axes: Sequence[str] | None = None,
    target: str | Target | None = None,
    workload: str = "train",
    batch: int | None = None,
    seq_len: int = 512,
    lora_rank: int | None = None,
    dtype: str = "bfloat16",
    optimizer: str = "adam",
    memory_limit: str | int | None = None,
    generate: bool = True,
) -> Setup:
    """Fill in the defaults and check that mesh, target and batch go together.

    Raises:
        MeshError: mesh and target differ in devices, or the data axis does not divide the batch.
        UsageError: a value is unknown or out of range.
    """
    if isinstance(mesh, str):
        mesh = parse_mesh(mesh, axes)
    if target is None:
        target = default_target(mesh)
    elif isinstance(target, str):
        target = parse_target(target)
    check_devices(mesh, target)
    n_data = mesh.sizes[mesh.data_axis]
    if batch is None:
        batch = -(-8 // n_data) * n_data
    if batch % n_data:
        raise MeshError(
            f"a batch of {batch} does not divide over the {n_data} devices of the data axis "
            f"'{mesh.data_axis}'; use a multiple of {n_data}"
        )
    if isinstance(memory_limit, str):
        memory_limit = parse_bytes(memory_limit)
    if workload == "lora" and lora_rank is None:
        lora_rank = 4
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
        memory_limit=memory_limit or target.chip.hbm_bytes,
        generate=generate,
    )
