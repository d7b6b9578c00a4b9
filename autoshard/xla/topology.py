"""A machine as compilers want it described where there is none.

A GPU is a `GpuTargetConfig` proto. What differs from card to card is the chip table's
`device_info`; what all cards since Volta share stands here, from the table of compute capabilities
in NVIDIA's CUDA C++ programming guide. The proto is XLA's
(`xla/stream_executor/device_description.proto`), its fields have its names.
"""

from autoshard.hardware.chips import Chip
from autoshard.hardware.targets import Target

__all__ = ["gpu_target_config", "topology_options"]

_SHARED_BY_ALL = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49152,
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
}
# A cuDNN that the compiler accepts; no plan depends on it.
_CUDNN = (9, 10, 0)


def topology_options(target: Target) -> dict[str, object]:
    """The arguments by which `jax.experimental.topologies.get_topology_desc` makes a machine.

    The TPU compiler deals slices out to hosts of 2x2 chips and refuses what these do not tile;
    one chip a host makes any slice compile, 1x1 and 2x3 too. The CUDA compiler counts slices,
    nodes and GPUs of a node, and is told what a GPU is.

    Args:
        target: TPUs or GPUs.

    >>> from autoshard.hardware.targets import parse_target
    >>> topology_options(parse_target("tpu:v5e:2x3"))["chips_per_host_bounds"]
    (1, 1, 1)
    >>> topology_options(parse_target("gpu:h100-sxm:2x8"))["topology"]
    '1x2x8'
    """
    assert target.chip.kind != "cpu", target
    if target.chip.kind == "gpu":
        return {
            "platform": "cuda",
            "topology_name": "",
            "target_config": gpu_target_config(target.chip),
            "topology": f"1x{target.n_slices}x{target.topology[0]}",
        }
    sizes = "x".join(str(size) for size in target.topology)
    options: dict[str, object] = {
        "platform": "tpu",
        "topology_name": f"{target.chip.name.removeprefix('tpu:')}:{sizes}",
        **target.chip.topology_options,
    }
    if target.n_slices > 1:
        options["num_slices"] = target.n_slices
    if not target.has_square_hosts:
        options["chips_per_host_bounds"] = (1, 1, 1)
    return options


def gpu_target_config(chip: Chip) -> str:
    """The text proto that describes a GPU to XLA's compiler.

    Args:
        chip: a GPU of the table.

    >>> from autoshard.hardware.chips import get_chip
    >>> text = gpu_target_config(get_chip("gpu:h100-sxm"))
    >>> "core_count: 132" in text, "cuda_compute_capability { major: 9 minor: 0 }" in text
    (True, True)
    """
    info = dict(chip.device_info)
    major, minor = (int(info.pop(f"compute_capability_{part}")) for part in ("major", "minor"))
    numbers = {**_SHARED_BY_ALL, "memory_bandwidth": int(chip.hbm_bytes_per_second), **info}
    fields = " ".join(f"{name}: {value}" for name, value in numbers.items())
    cudnn = " ".join(
        f"{part}: {number}"
        for part, number in zip(("major", "minor", "patch"), _CUDNN, strict=True)
    )
    return (
        f"gpu_device_info {{ {fields} "
        f"cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
        f'platform_name: "CUDA" dnn_version_info {{ {cudnn} }} '
        f'device_description_str: "{chip.jax_device_kinds[0]}"'
    )
