"""What a caller may pass to watch long work."""

from __future__ import annotations

from typing import Any, Protocol

Report = dict[str, Any]


class Progress(Protocol):
    """What a caller may pass to watch long work; :class:`g2kit.terminal.Meter` is one."""

    def start(self, total: int, what: str) -> None:
        """A phase of ``total`` bytes begins."""

    def __call__(self, nbytes: int, name: str) -> None:
        """``nbytes`` more are done, of tensor ``name``."""


class Silent:
    """Tells nobody."""

    def start(self, total: int, what: str, unit: str = "B") -> None:
        """Nothing."""

    def __call__(self, nbytes: int, name: str) -> None:
        """Nothing."""
