"""What a report says of the machine and software: everything that could explain a difference, nothing that changes by itself."""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from .runners import RUNNERS
from .side import Engine


def environment(engines: Iterable[Engine] = ()) -> dict[str, Any]:
    """Versions, processor, threads, devices. Imports torch only where an engine needs it."""
    used = list(engines)
    packages = sorted({"numpy", *(RUNNERS[e.runner].package for e in used)})
    found: dict[str, Any] = {
        "g2kit": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        **{p: _version(p) for p in packages},
        "tf32": False,
    }
    if used:  # any run uses torch, at least for the statistics
        import torch

        found["torch"] = torch.__version__
        found["threads"] = torch.get_num_threads()
        cuda = [e.device for e in used if e.device and e.device.startswith("cuda")]
        if cuda and torch.cuda.is_available():
            found["cuda"] = torch.version.cuda
            found["devices"] = sorted({torch.cuda.get_device_name(torch.device(d)) for d in cuda})
    return found


def peak_rss() -> float:
    """Largest resident size of this process so far, MiB.

    Linux keeps it per address space in /proc; rusage there starts a child at its parent's size.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(a for a in lines if a.startswith("VmHWM:")).split()[1]) / 1024
    except (OSError, StopIteration):  # no such file system: not Linux
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024


def memory_limit() -> int:
    """Bytes of memory this process may use: the machine's, or its container's."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(name).read_text()))
        except (OSError, ValueError):
            continue
    return min(limits)


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
