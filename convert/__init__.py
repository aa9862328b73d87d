"""Any Gemma checkpoint layout to any other, bit for bit, in bounded memory.

>>> from g2kit.convert import convert, fingerprint, open_checkpoint
>>> convert("gemma2-2b-flax", "gemma2-2b", to="safetensors")  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import convert, fingerprint
    from .open import open_checkpoint

__all__ = ["convert", "fingerprint", "open_checkpoint"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # lazily: importing a layout table must not pull in every container's library
    if name in ("convert", "fingerprint"):
        from . import api

        return getattr(api, name)
    if name == "open_checkpoint":
        from .open import open_checkpoint

        return open_checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
