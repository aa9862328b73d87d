"""g2kit: convert, quantize and prove Gemma checkpoints.

Importing this package loads no torch, jax or triton; each folder imports what it needs when used.
"""

__version__: str
__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # when it is asked for: a command must not spend its first moments on this
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("g2kit")
    except PackageNotFoundError:  # a source tree on sys.path without an install
        found = "0+unknown"
    globals()[name] = found
    return found
