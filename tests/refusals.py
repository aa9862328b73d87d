"""What every refusal has in common: exactly the error that fits, a message that tells, no file left open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from g2kit.formats.errors import G2Error

E = TypeVar("E", bound=G2Error)


def open_files() -> int:
    """Of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


def refusal(act: Callable[[], object], error: type[E], *parts: str) -> E:
    """The error that ``act`` raises: of this very class, with all ``parts`` in its message."""
    before = open_files()
    with pytest.raises(error) as caught:
        act()
    assert type(caught.value) is error, repr(caught.value)
    assert open_files() == before, "a file was left open"
    for part in parts:
        assert part in str(caught.value)
    return caught.value
