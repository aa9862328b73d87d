"""The machine and software, for reports: everything that could explain a difference, nothing that changes by itself."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import __version__


def described(packages: Iterable[str] = ()) -> dict[str, Any]:
    """Versions of this package, Python and ``packages`` (None where one is not installed), system and processor."""
    return {
        "g2kit": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        **{p: _version(p) for p in packages},
    }


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


class Stopwatch:
    """What a run took, from the moment this is made."""

    def __init__(self) -> None:
        self._began, self._cpu = time.monotonic(), time.process_time()
        self._started = datetime.now(UTC)

    def run(self, command: str | None = None) -> dict[str, Any]:
        """The ``run`` object of a report.

        Args:
            command: line to repeat it with; None where it was no command.
        """
        return {
            "command": command,
            "started": self._started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._began, 3),
            "cpu_seconds": round(time.process_time() - self._cpu, 3),
            "peak_rss_mib": round(peak_rss(), 1),
        }


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
