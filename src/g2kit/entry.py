"""Entry points of the commands. Importing a command takes a moment, in which Ctrl-C must not print a traceback.

Nothing else is imported here, so that the moment before that is short.
"""

from __future__ import annotations

import signal
import sys
from importlib import import_module


def g2conv() -> None:
    """Run g2conv."""
    _run("g2kit.convert.cli")


def g2quant() -> None:
    """Run g2quant."""
    _run("g2kit.quant.cli")


def g2verify() -> None:
    """Run g2verify."""
    _run("g2kit.verify.cli")


def _run(module: str) -> None:
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # else the caller wants it ignored, as nohup does
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is begun: simply end
    main = import_module(module).main
    signal.signal(signal.SIGINT, handler)
    try:
        main()
    except KeyboardInterrupt:  # before or after the command's own care for it
        sys.exit(128 + signal.SIGINT)
