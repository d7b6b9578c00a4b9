"""The memory of the machine that autoshard itself runs on."""

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["available_bytes"]

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")

# Of both versions of control groups: the files of the limit and of what is used, and what
# memory.stat calls files that were read lately.
_NAMES = {
    2: ("memory.max", "memory.current", "inactive_file "),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
}


def available_bytes() -> int | None:
    """Memory that a new process can have without anything being swapped out.

    What the kernel says is available and what its processors keep for themselves, or what is left
    of the limit of a control group around this process if that is less; None where the system has
    no `/proc`.
    """
    try:
        lines = (_PROC / "meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = next(line for line in lines if line.startswith("MemAvailable:"))
    return min([int(found.split()[1]) * 1024 + _per_cpu_bytes(), *_groups_bytes()])


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


def _groups_bytes() -> Iterator[int]:
    """What is left to each control group that this process is in, and to those around it."""
    try:
        lines = (_PROC / "self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in ["0::/", *lines]:
        _, controllers, name = line.split(":", 2)
        version = 1 if "memory" in controllers.split(",") else 2
        if version == 2 and controllers:
            continue
        root = _CGROUP / "memory" if version == 1 else _CGROUP
        group = Path(name.lstrip("/"))
        for folder in (group, *group.parents):
            yield from _group_bytes(root / folder, version)


def _group_bytes(folder: Path, version: int) -> tuple[int, ...]:
    limit_name, used_name, files_name = _NAMES[version]
    try:
        limit = (folder / limit_name).read_text(encoding="ascii").strip()
        used = (folder / used_name).read_text(encoding="ascii").strip()
        kept = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return ()
    # Files that were read lately count as used, and are given up when memory is asked for.
    files = next((int(line.split()[1]) for line in kept if line.startswith(files_name)), 0)
    return () if limit == "max" else (int(limit) - int(used) + files,)
