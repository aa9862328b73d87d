"""int8 to int2 weights of GPTQ quality, written for the programs people run.

>>> from g2kit.quant import quantize
>>> quantize("gemma2-2b", "gemma2-2b-w4", bits=4)  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import quantize

__all__ = ["quantize"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # lazily: quantizing needs torch, importing the package must not
    if name == "quantize":
        from .api import quantize

        return quantize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
