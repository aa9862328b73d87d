"""Random checkpoints of real shapes on disk, each written once, in a process of its own.

A process of its own: a child's peak memory counts from what its parent had when it was started, and the benchmarks start
what they measure as children.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def make_source(size: str, root: Path, layers: int | None, framework: str) -> None:
    """A random checkpoint as ``root/framework`` (``root/hf`` for safetensors); the same weights in every framework."""
    path = root / {"safetensors": "hf"}.get(framework, framework)
    if not path.exists():
        print(f"writing {path}", file=sys.stderr)
        root.mkdir(parents=True, exist_ok=True)
        in_child(_write, size, path, layers, framework)


def _write(size: str, path: Path, layers: int | None, framework: str) -> None:
    from sizes import model_config
    from synthetic import checkpoint

    from g2kit.convert.api import convert_checkpoint
    from g2kit.convert.plan import Options

    convert_checkpoint(
        checkpoint(model_config(size, layers)), path, Options(framework), check=False
    )


def random_ids(file: Path, length: int) -> Path:
    """A file of ids of a small part of any vocabulary, BOS first."""
    import numpy as np

    ids = np.random.default_rng(1).integers(3, 2000, length)
    ids[0] = 2
    np.save(file, ids)
    return file


def in_child(target: Callable[..., None], *args: Any) -> None:
    """Call in a process of its own; ends this one where it fails."""
    child = multiprocessing.get_context("spawn").Process(target=target, args=args)
    child.start()
    child.join()
    if child.exitcode:
        sys.exit(child.exitcode)
