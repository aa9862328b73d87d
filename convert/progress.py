"""What a caller may pass to watch long work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

Report = dict[str, Any]
Tick = Callable[[int, str], None]  # so many more bytes (or tokens) are done, of what


class Progress(Protocol):
    """What a caller may pass to watch long work; :class:`g2kit.terminal.Meter` is one."""

    def start(self, total: int, what: str, unit: str = "B") -> None:
        """A phase of ``total`` bytes, or another unit, begins."""

    def __call__(self, count: int, name: str, /) -> None:
        """``count`` more are done, of tensor or place ``name``."""


class Silent:
    """Tells nobody."""

    def start(self, total: int, what: str, unit: str = "B") -> None:
        """Nothing."""

    def __call__(self, count: int, name: str, /) -> None:
        """Nothing."""


SILENT = Silent()
