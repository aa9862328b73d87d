"""Run a command as a child process; report wall time, CPU time and peak resident memory of it and its children."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """One finished child: seconds, CPU seconds, peak resident MiB of the largest process."""

    wall: float
    cpu: float
    peak_mib: float


def run(command: Sequence[str]) -> Run:
    """Run to the end; a failing command ends the benchmark."""
    began = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.monotonic() - began
    if status:
        sys.exit(f"failed ({status}): {' '.join(command)}")
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def idle() -> float:
    """Peak resident MiB of an interpreter that does nothing."""
    return run([sys.executable, "-c", "pass"]).peak_mib
