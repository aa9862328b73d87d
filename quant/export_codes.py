"""Codes that are there already, written in another format; nothing is rounded again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..convert.open import Checkpoint, open_checkpoint
from ..convert.progress import Progress, Report
from ..formats import output_paths as paths
from ..formats.errors import UsageError, printable
from ..formats.named_files import existing
from ..formats.sharded import size_of
from ..model.config import GemmaConfig
from . import export, plan
from .codes_file import NAME, CodesFile
from .export_targets import TARGETS
from .ggml.bridge import FORMATS_OF_CODES, BlocksOfCodes
from .ggml.export import export_gguf
from .rows import CheckpointCodes


def export_codes(
    codes: str | Path,
    src: str | Path,
    dst: str | Path,
    *,
    format: str = "compressed-tensors",
    config: str | Path | GemmaConfig | None = None,
    dtype: str = "keep",
    tokenizer: str | Path | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write kept codes, or those of a quantized checkpoint, in another format; nothing is rounded again.

    Args:
        codes: directory that ``keep_codes`` made, or a checkpoint of a uniform format.
        src: the checkpoint that was quantized, for everything else; the same as ``codes`` for a quantized checkpoint.
        dst: directory to make.
        format: one of :data:`.export_targets.TARGETS`, or ``gguf-q4_0``, ``gguf-q4_1`` or ``gguf-q8_0``, whose blocks are
            groups of 32.
        config: as :func:`.api.quantize`.
        dtype: as :func:`.api.quantize`.
        tokenizer: as :func:`.api.quantize`.
        max_shard_size: as :func:`.api.quantize`.
        overwrite: replace ``dst`` once the new copy is complete.
        progress: told of phases and bytes.

    Raises:
        G2Error: any subclass; ``dst`` is untouched.
    """
    if Path(src) == Path(codes) and (Path(codes) / NAME).is_file():
        raise UsageError(
            "these are codes without the rest of the model.", where=Path(codes),
            fix="pass the checkpoint that was quantized with --source.",
        )  # fmt: skip
    shard = size_of("max_shard_size", max_shard_size)
    options: dict[str, Any] = {
        "dtype": dtype,
        "max_shard_size": shard,
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "overwrite": overwrite,
        "progress": progress,
    }
    read = existing(codes, config)
    paths.check_apart([paths.normalise(Path(dst))], read)
    with open_checkpoint(src, config=config) as checkpoint:
        if (Path(codes) / NAME).is_file():
            with CodesFile(codes) as kept:
                kept.check()
                return _export(kept, checkpoint, dst, format, Path(codes), options)
        with open_checkpoint(codes, config=checkpoint.config) as quantized:
            found: Mapping[str, Any] = CheckpointCodes(quantized)
            return _export(found, checkpoint, dst, format, Path(codes), options)


def _export(
    codes: Any, checkpoint: Checkpoint, dst: str | Path, format: str, where: Path, options: dict[str, Any]
) -> Report:  # fmt: skip
    if not format.startswith(plan.GGUF):
        return export.export(codes, checkpoint, dst, format, **options)
    if format not in FORMATS_OF_CODES:
        raise UsageError(
            f"{printable(format, 60)} is no format for codes that are there already.",
            fix=f"use one of {', '.join((*TARGETS, *FORMATS_OF_CODES))}, or quantize into it.",
        )
    if options.pop("max_shard_size") is not None:
        raise UsageError("a GGUF is one file.", fix="leave out --max-shard-size.")
    blocks = BlocksOfCodes(codes, format, where)
    return export_gguf(blocks, checkpoint, dst, format, **options)
