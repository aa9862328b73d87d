"""What ``inspect`` lists of a container, whether its configuration is known or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..formats.base import Source
from .open import stored_dtype


def contents(source: Source, canonical: Mapping[str, list[str]]) -> dict[str, Any]:
    """Bytes of all files, how many tensors of each dtype, and a row per tensor.

    Args:
        source: the container.
        canonical: name in the container -> names of the canonical tensors it holds.
    """
    tensors = list(source.tensors.values())
    return {
        "bytes": sum(f.stat().st_size for f in source.files),
        "dtypes": dict(Counter(stored_dtype(t) for t in tensors)),
        "tensors": [
            {
                "name": t.name,
                "dtype": stored_dtype(t),
                "stored": t.stored,
                "shape": list(t.shape),
                "file": str(t.where),
                "canonical": canonical.get(t.name, []),
            }
            for t in tensors
        ],
    }
