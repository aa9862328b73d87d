"""g2kit: convert, quantize and prove Gemma checkpoints.

Importing this package loads no torch, jax or triton; each folder imports what it needs when used.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("g2kit")
except PackageNotFoundError:  # a source tree on sys.path without an install
    __version__ = "0+unknown"

__all__ = ["__version__"]
