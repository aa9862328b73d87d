"""What a run will quantize and need, settled and refused before a weight is read."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..convert.open import Checkpoint
from ..formats import output_paths as paths
from ..formats.errors import UsageError, printable
from ..formats.output_commit import exists_error
from ..model import canonical
from ..model.config import GemmaConfig
from . import export
from .calibration import Wanted
from .choose import METHODS, Target
from .export_targets import TARGETS
from .ggml import block_format
from .ggml.export import require_mix
from .ggml.mixes import MIXES
from .hessian import HELD_ROWS
from .pipeline import BATCH_TOKENS, Options
from .scheme import Scheme
from .work import work_path

GGUF = "gguf-"
FORMATS = (*TARGETS, *(GGUF + name for name in MIXES))
_SINGLE = {"torch-int8": (".ckpt", ".pt", ".pth", ".bin")}


@dataclass(frozen=True)
class Goal:
    """What comes out.

    Attributes:
        format: one of :data:`FORMATS`.
        targets: canonical name of every linear weight -> what it becomes.
    """

    format: str
    targets: Mapping[str, Target]

    @property
    def is_gguf(self) -> bool:
        """Whether weights become ggml blocks."""
        return self.format.startswith(GGUF)

    def bits_per_weight(self, checkpoint: Checkpoint) -> float:
        """Stored bits per quantized weight."""
        bits = weights = 0.0
        for name, target in self.targets.items():
            out, columns = checkpoint.tensors[name].shape
            per = (
                block_format(target).bits
                if isinstance(target, str)
                else target.bits_per_weight(columns)
            )
            bits, weights = bits + per * out * columns, weights + out * columns
        return bits / weights


def goal_of(checkpoint: Checkpoint, format: str, scheme: Scheme) -> Goal:
    """The goal of a format and a scheme; GGUF mixes bring their own types.

    Raises:
        UsageError: no such format, or it cannot hold the scheme; names what can.
    """
    if format not in FORMATS:
        raise UsageError(
            f"{printable(format, 60)} is not a format g2quant writes.",
            fix=f"use one of {', '.join(FORMATS)}.",
        )
    linears = canonical.linears(checkpoint.tensors)
    if format.startswith(GGUF):
        types = require_mix(format, checkpoint)
        return Goal(format, {n: types[n] for n in linears})
    schemes = dict.fromkeys(linears, scheme)
    for name in linears:
        scheme.width(checkpoint.tensors[name].shape[1])
    export.require_format(format, schemes, checkpoint)
    return Goal(format, schemes)


def require_method(method: str) -> None:
    """Refuse an unknown method."""
    if method not in METHODS:
        raise UsageError(f"{method!r} is not a method.", fix=f"use one of {', '.join(METHODS)}.")


def require_dense(checkpoint: Checkpoint, *, allow: bool) -> None:
    """Refuse weights that were quantized before.

    Raises:
        UsageError: some are, and it was not asked for.
    """
    if checkpoint.quantized and not allow:
        raise UsageError(
            f"{len(checkpoint.quantized)} weights are quantized already.",
            where=checkpoint.path,
            fix="quantize the checkpoint it was made from, bring its codes into another format with `g2quant export`, or "
            "pass --allow-requantize.",
        )


def require_destination(dst: Path, format: str, checkpoint: Checkpoint, *, overwrite: bool) -> None:
    """Refuse now what the export would refuse after hours.

    Raises:
        ConflictError: the destination exists, is of another kind, or is not apart from the source.
        FileIOError: there is no directory to put it into.
    """
    dst = paths.normalise(dst)
    single = (
        dst.suffix == ".gguf" if format.startswith(GGUF) else dst.suffix in _SINGLE.get(format, ())
    )
    if paths.check_kind(dst, is_file=single) and not overwrite:
        raise exists_error(dst)
    files = checkpoint.source.files
    sources = (checkpoint.path, *files) if files else ()
    paths.check_apart([dst, work_path(dst)], sources)
    paths.check_names(dst, {}, (".partial", ".quantizing"))


def memory_limit(given: int | None) -> int:
    """Bytes to work in: as given, or half of what is available now."""
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, int) or given < 1:
            raise UsageError(
                f"max_memory must be a whole number of bytes, found {given!r}.",
                fix='pass a number, or a text such as "4GB".',
            )
        return given
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def keeps_states(config: GemmaConfig, rows: int, limit: int) -> bool:
    """Whether the hidden states of two blocks fit into a quarter of the memory."""
    return 8 * rows * config.hidden_size <= limit // 4


def needs(
    checkpoint: Checkpoint, goal: Goal, wanted: Wanted, options: Options, dst: Path
) -> dict[str, Any]:
    """Bytes and seconds a run will take, roughly: JSON-ready."""
    config = checkpoint.config
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    shapes = [t.shape for t in canonical.tensors(config).values() if "layers.0." in t.name]
    block = sum(s[0] * s[1] for s in shapes if len(s) == 2)
    widths = (d, heads * config.head_dim, d, f)
    rows = (wanted.samples + 2 * wanted.held) * wanted.seq_len
    hessians = sum(w * w for w in widths) if not options.sequential else 0
    largest = max(s[0] * s[1] for s in shapes if len(s) == 2)
    held = options.held_rows * (max(widths) if options.sequential else sum(widths))
    tokens = max(BATCH_TOKENS, wanted.seq_len)
    forward = tokens * (4 * f + 8 * d + 4 * heads * wanted.seq_len)
    states = 2 * rows * d if options.keep_states else 0
    # the Hessian, ordered, damped, its factor, that in order and divided; of the weight: error, values, codes and grid
    peak = 4 * (2 * block + hessians + 6 * max(widths) ** 2 + held + forward + states + 6 * largest)
    layers, seen = config.num_hidden_layers, wanted.total * wanted.seq_len
    passes = 3.2 if options.sequential else 2.0
    gather = 2.0 * seen * (passes * block + sum(w * w for w in widths))
    rounding = sum(16.0 * s[0] * s[1] ** 2 for s in shapes if len(s) == 2)
    weights = block * layers
    dense = sum(t.nbytes for n, t in checkpoint.tensors.items() if n not in goal.targets)
    at = next(p for p in dst.absolute().parents if p.exists())
    return {
        "output_bytes": round(dense + weights * goal.bits_per_weight(checkpoint) / 8),
        "work_bytes": round(8 * rows * d + weights * goal.bits_per_weight(checkpoint) / 8),
        "free_bytes": shutil.disk_usage(at).free,
        "peak_bytes": peak + (300 << 20),
        "seconds": round(layers * (gather + rounding) / _speed()),
    }


def _speed() -> float:
    """Floating-point operations per second of a matrix product on this machine, now."""
    x = torch.randn(512, 512)
    x @ x
    began = time.monotonic()
    for _ in range(4):
        x @ x
    return 4 * 2 * 512.0**3 / max(1e-6, time.monotonic() - began)


def plain_targets(goal: Goal) -> dict[str, int]:
    """How many weights become what."""
    return dict(Counter(map(str, goal.targets.values())))


__all__ = ["FORMATS", "GGUF", "HELD_ROWS", "Goal", "goal_of", "needs"]
