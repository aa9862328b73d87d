"""Commands as a person meets them, in this process, and small models on disk for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from configs import small
from memory import checkpoint, random_weights

from g2kit.convert import stream
from g2kit.convert.api import convert_checkpoint
from g2kit.convert.plan import Options
from g2kit.model.config import GemmaConfig
from g2kit.terminal import run_cli

Output = tuple[int, str, str]


def run(group: click.Group, *args: object, capsys: pytest.CaptureFixture[str]) -> Output:
    """Exit code, stdout and stderr of a command."""
    capsys.readouterr()
    status = run_cli(group, [str(a) for a in args])
    done = capsys.readouterr()
    return status, done.out, done.err


def tree(root: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.is_file()}


def save(
    root: Path,
    weights: dict[str, np.ndarray] | None = None,
    config: GemmaConfig | None = None,
    *,
    rows: int | None = None,
    **to: Any,
) -> Path:
    """A small model on disk; safetensors unless told otherwise."""
    config = config or small("gemma2-2b")
    weights = weights or random_weights(config, 1, rows=rows)
    options = Options(to.pop("to", "safetensors"), **to)
    convert_checkpoint(checkpoint(config, weights), root, options)
    return root


@contextmanager
def stopped_after(tensors: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A conversion in it is stopped when so many tensors are done, as Ctrl-C does."""
    real, done = stream.run_task, 0

    def counted(*args: Any, **more: Any) -> Any:
        nonlocal done
        done += 1
        if done > tensors:
            raise KeyboardInterrupt
        return real(*args, **more)

    with monkeypatch.context() as m:
        m.setattr(stream, "run_task", counted)
        yield
