"""Number of threads that torch computes with: more threads than processors would wait for each other."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def processors(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Return the number of processors this process may use, at least 1: its affinity, or fewer by a cgroup's quota.

    Args:
        cgroups: mount point of the second version of control groups.
        own: file that names the group of this process, "0::/path".
    """
    affinity = getattr(os, "sched_getaffinity", None)
    found = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    groups = [cgroups]
    with suppress(OSError):
        names = [line.partition("::")[2] for line in own.read_text().splitlines() if line.startswith("0::")]
        groups += [cgroups / part for name in names for part in (Path(name[1:]), *Path(name[1:]).parents)]
    for group in groups:
        with suppress(OSError, ValueError):  # no such file, or "max": without a limit
            quota, period = map(int, (group / "cpu.max").read_text().split())
            found = min(found, math.ceil(quota / period))
    return max(1, found)


@contextmanager
def at_most(threads: int) -> Iterator[None]:
    """Context in which torch computes with at most `threads` threads; if OMP_NUM_THREADS is set, nothing changes."""
    import torch

    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(before, threads))
    try:
        yield
    finally:
        torch.set_num_threads(before)
