"""A GPU as the CUDA compiler wants it described where there is none: a `GpuTargetConfig` proto.

What differs from card to card is the chip table's `device_info`; what all cards since Volta share
stands here, from the table of compute capabilities in NVIDIA's CUDA C++ programming guide. The
proto is XLA's (`xla/stream_executor/device_description.proto`), its fields have its names.
"""

from autoshard.hardware.chips import Chip

__all__ = ["gpu_target_config"]

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
