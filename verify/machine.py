"""What a parity report says of the machine and software."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..machine import described
from .runners import RUNNERS
from .side import Engine


def environment(engines: Iterable[Engine] = ()) -> dict[str, Any]:
    """Versions, processor, threads, devices. Imports torch only where an engine needs it."""
    used = list(engines)
    packages = sorted({"numpy", *(RUNNERS[e.runner].package for e in used)})
    found = described(packages) | {"tf32": False}
    if used:  # any run uses torch, at least for the statistics
        import torch

        found["torch"] = torch.__version__
        found["threads"] = torch.get_num_threads()
        cuda = [e.device for e in used if e.device and e.device.startswith("cuda")]
        if cuda and torch.cuda.is_available():
            found["cuda"] = torch.version.cuda
            found["devices"] = sorted({torch.cuda.get_device_name(torch.device(d)) for d in cuda})
    return found
