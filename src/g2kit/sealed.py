"""Reports as JSON that says the same wherever it was made: plain data, keys in order, and an id over what was found."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any


def sealed(document: Mapping[str, Any], run: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The document with its ``content_id``, which is over everything but itself and ``run``."""
    found: dict[str, Any] = plain(
        {k: v for k, v in document.items() if k not in ("content_id", "run")}
    )
    text = json.dumps(found, sort_keys=True, allow_nan=False)
    digest = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    return {**found, "content_id": digest, "run": None if run is None else plain(run)}


def dumps(document: Mapping[str, Any]) -> str:
    """JSON text, the same for the same document."""
    return json.dumps(document, sort_keys=True, indent=1, allow_nan=False) + "\n"


def unicode(text: str) -> str:
    """Text that is Unicode: bytes of a path that are none, which Python keeps as half characters, are spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def plain(value: Any) -> Any:
    """Only what JSON can hold, keys in order; numbers that do not exist are null."""
    if isinstance(value, Mapping):
        return {unicode(str(k)): plain(value[k]) for k in sorted(value, key=str)}
    if isinstance(value, str):
        return unicode(value)
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
