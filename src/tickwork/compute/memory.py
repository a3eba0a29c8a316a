"""How much memory is free: on the device, or on a host that may be a container."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

# Where the system tells nothing.
ASSUMED = 2**31
# Files of a control group: its limit, what it uses, and what of that the kernel gives back when asked.
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def is_there(device: torch.device) -> bool:
    """Whether torch sees the device."""
    return device.type == "cpu" or (device.index or 0) < torch.cuda.device_count()


def free_bytes(device: torch.device) -> int:
    """Return the bytes that could be allocated on a device, those that torch keeps for later included."""
    if device.type != "cuda":
        return host_free()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def host_free(root: Path = Path("/")) -> int:
    """Return the bytes that this process could still take: of the machine's, within the limits of its control groups.

    Args:
        root: of the file system, for tests.
    """
    return max(0, min([_machine(root), *_groups(root)]))


def _machine(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return _from_sysconf()


def _from_sysconf() -> int:
    """Outside Linux: what is free, or half of what there is."""
    for name, share in (("SC_AVPHYS_PAGES", 1), ("SC_PHYS_PAGES", 2)):
        try:
            return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") // share
        except (AttributeError, ValueError, OSError):
            continue
    return ASSUMED


def _groups(root: Path) -> Iterator[int]:
    """Yield what is left within each control group around this process, version 2 and version 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            top = root / "sys/fs/cgroup" / controllers
            own = top / path.lstrip("/")
            # In a container the path may be that of the host, which is not there: then its top is its own.
            for folder in [own, *(parent for parent in own.parents if parent.is_relative_to(top))]:
                yield from _left(folder, V1 if controllers else V2)


def _left(folder: Path, names: tuple[str, str, str]) -> Iterator[int]:
    limit, usage, reclaimable = names
    try:
        most, used = (int((folder / name).read_text()) for name in (limit, usage))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or "max": no limit
        return
    yield most - used + int(stat.get(reclaimable, 0))
