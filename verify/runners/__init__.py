"""Independent implementations of the model behind one interface, by name.

>>> from g2kit.verify.runners import open_runner
>>> with open_runner("torch", "gemma2-2b", dtype="float32") as runner:  # doctest: +SKIP
...     logits = runner.logits([2, 651, 8012])
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...formats.errors import DependencyError, UsageError
from ...model.config import GemmaConfig
from .base import ABILITIES, TAPS, Batch, Decoder, Runner

if TYPE_CHECKING:
    from ...convert.open import Checkpoint

__all__ = [
    "ABILITIES",
    "RUNNERS",
    "TAPS",
    "Batch",
    "Decoder",
    "Runner",
    "RunnerInfo",
    "open_runner",
]


@dataclass(frozen=True)
class RunnerInfo:
    """A row of :data:`RUNNERS`, known without importing the framework.

    Attributes:
        where: module and class.
        gives: what it can give, of :data:`ABILITIES`.
        dtypes: compute types, the default first.
        reads: what it can be opened with.
        package: the optional package it needs.
        install: the command that installs it.
    """

    where: tuple[str, str]
    gives: tuple[str, ...]
    dtypes: tuple[str, ...]
    reads: str
    package: str
    install: str


RUNNERS: dict[str, RunnerInfo] = {
    "torch": RunnerInfo(
        ("torch_runner", "TorchRunner"), ABILITIES, ("float32", "bfloat16", "float64"),
        "any format", "torch", "pip install 'torch>=2.10'",
    ),
    "jax": RunnerInfo(
        ("jax_runner", "JaxRunner"), ABILITIES, ("float32", "bfloat16", "float64"),
        "any format", "jax", "pip install 'jax>=0.6'",
    ),
    "transformers": RunnerInfo(
        ("transformers_runner", "TransformersRunner"), ("logits", "blocks", "decode"),
        ("float32", "bfloat16"),
        "a Hugging Face directory", "transformers", "pip install 'transformers>=4.50' 'torch>=2.10'",
    ),
    "llama_cpp": RunnerInfo(
        ("llama_cpp_runner", "LlamaCppRunner"), ("logits", "decode"), ("float32",),
        "GGUF", "llama-cpp-python", "pip install 'llama-cpp-python>=0.3.16'",
    ),
}  # fmt: skip


def runner_class(name: str) -> type[Runner]:
    """The class behind a name of :data:`RUNNERS`.

    Raises:
        UsageError: there is no such runner.
        DependencyError: its package is not installed; says how to install it.
    """
    info = RUNNERS.get(name)
    if info is None:
        raise UsageError(f"no runner is called {name!r}.", fix=f"use one of {', '.join(RUNNERS)}.")
    module, cls = info.where
    try:
        found: type[Runner] = getattr(importlib.import_module(f".{module}", __package__), cls)
    except (ImportError, OSError) as e:  # OSError: a package is there, its shared library is not
        reason = (str(e) or repr(e)).splitlines()[0]
        raise DependencyError(
            f"the {name} runner needs {info.package}, which cannot be imported ({reason}).",
            fix=info.install,
        ) from e
    return found


def open_runner(
    name: str,
    path: str | Path | Checkpoint,
    *,
    dtype: str | None = None,
    device: str | None = None,
    config: str | Path | GemmaConfig | None = None,
    **options: Any,
) -> Runner:
    """A runner over a checkpoint.

    Args:
        name: of :data:`RUNNERS`.
        path: a checkpoint's path, or an opened one (which stays the caller's to close).
        dtype: compute type; default the runner's first.
        device: torch's or JAX's name of it; default CPU in torch, JAX's own choice in JAX.
        config: as in :func:`g2kit.convert.open_checkpoint`; torch and jax only.
        options: what the class takes besides: torch ``resident``, ``linear``; jax ``resident``, ``mesh``.

    Raises:
        UsageError: unknown runner, dtype or option.
        DependencyError: its package is not installed.
        G2Error: the checkpoint cannot be opened.
    """
    cls = runner_class(name)
    if dtype is not None and dtype not in cls.dtypes:
        raise UsageError(
            f"the {name} runner does not compute in {dtype}.", fix=f"use {' or '.join(cls.dtypes)}."
        )
    unknown = sorted(options.keys() - inspect.signature(cls).parameters.keys())
    if unknown:
        raise UsageError(f"the {name} runner has no option {unknown[0]!r}.")
    make: Any = cls
    runner: Runner = make(
        path, dtype=dtype or cls.dtypes[0], device=device, config=config, **options
    )
    return runner
