"""The memory of the machine that autoshard itself runs on."""

import os
from pathlib import Path

__all__ = ["available_bytes"]

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")


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
