"""The library calls behind the commands: convert, inspect, fingerprint, check, sample. Plain data out."""

from __future__ import annotations

import time
from pathlib import Path

from ..formats.errors import UsageError
from ..formats.sharded import size_of
from ..model.config import GemmaConfig
from .checking import check
from .conversion_report import plan_report
from .conversion_report import result_report as _result_report
from .inspecting import fingerprint, fingerprint_report, inspect
from .moving import execute, output_of
from .open import Checkpoint, open_checkpoint
from .plan import Options, plan_conversion
from .progress import Progress, Report, Silent
from .targets import SOURCES, TARGETS, framework_of

__all__ = [
    "Progress", "Report", "check", "convert", "convert_checkpoint", "fingerprint", "fingerprint_report", "inspect",
    "sample",
]  # fmt: skip


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: str,
    source: str | None = None,
    layout: str | None = None,
    config: str | Path | GemmaConfig | None = None,
    fix_config: bool = False,
    gating: str | None = None,
    dtype: str = "keep",
    max_shard_size: int | str | None = None,
    tokenizer: str | Path | None = None,
    check: str = "weights",
    drop_padding: bool = False,
    fold_query_scale: bool = False,
    dry_run: bool = False,
    resume: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Convert the checkpoint at ``src`` to ``dst``.

    Args:
        src: any supported checkpoint; left untouched.
        dst: directory to make, or a single file where the suffix says so (``.gguf``, ``.ckpt``, ``.safetensors``…).
        to: ``flax``, ``torch``, ``safetensors``, ``gguf``, ``maxtext`` or ``keras``.
        source: framework the source must be, or None for any.
        layout: layout of the target; None for its usual one.
        config: preset name, config.json or GemmaConfig, for checkpoints that carry none.
        fix_config: correct hyper-parameters known to be wrong in published files.
        gating: ``df`` or ``fd``; see :func:`g2kit.convert.open_checkpoint`.
        dtype: ``keep``, ``bf16``, ``f16`` or ``f32``.
        max_shard_size: bytes of weights per file, as a number or as in ``"5GB"``; None for one file.
        tokenizer: tokenizer.model to put into the output instead of the one found.
        check: ``weights`` re-opens the output and compares every tensor's hash; ``none`` does not.
        drop_padding: leave out embedding rows past vocab_size though they are not all zero.
        fold_query_scale: GGUF: scale the query projection for llama.cpp although that rounds.
        dry_run: plan only; write nothing.
        resume: continue an interrupted run of the same conversion; False starts afresh.
        overwrite: replace ``dst`` once the new copy is complete.
        progress: told of phases and bytes.

    Returns:
        A report: source, output, fingerprints, lossy steps with counts, notes, timing. JSON-ready.

    Raises:
        G2Error: any subclass; ``dst`` is untouched. See :mod:`g2kit.formats.errors`.
    """
    src, dst = Path(src), Path(dst)
    if to not in TARGETS:
        raise UsageError(f"{to!r} is not a framework.", fix=f"use one of {', '.join(TARGETS)}.")
    if check not in ("weights", "none"):
        raise UsageError(f"check must be weights or none, not {check!r}.")
    if dtype not in ("keep", "bf16", "f16", "f32"):
        raise UsageError(f"dtype must be keep, bf16, f16 or f32, not {dtype!r}.")
    if source is not None and source not in TARGETS:
        raise UsageError(f"{source!r} is not a framework.", fix=f"use one of {', '.join(TARGETS)}.")
    if gating not in (None, "df", "fd"):
        raise UsageError(f"gating must be df or fd, not {gating!r}.")
    options = Options(
        to, layout, dtype, size_of("max_shard_size", max_shard_size), gating, drop_padding, fold_query_scale,
        None if tokenizer is None else str(tokenizer),
    )  # fmt: skip
    with _open(src, source, config, gating, fix_config) as checkpoint:
        return convert_checkpoint(
            checkpoint, dst, options, check=check == "weights", dry_run=dry_run, resume=resume,
            overwrite=overwrite, progress=progress,
        )  # fmt: skip


def convert_checkpoint(
    checkpoint: Checkpoint,
    dst: Path,
    options: Options,
    *,
    check: bool = True,
    dry_run: bool = False,
    resume: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """:func:`convert` for a checkpoint that is open already, or that exists in memory only."""
    began = time.monotonic()
    plan = plan_conversion(checkpoint, dst, options)
    if dry_run:
        output_of(plan, dst, resume, overwrite).preflight()
        return plan_report(plan, dst)
    meter = progress or Silent()
    records, files, resumed, checked = execute(plan, dst, check, resume, overwrite, meter)
    return _result_report(plan, dst, records, files, resumed, checked, began)


def _open(
    path: Path,
    source: str | None,
    config: str | Path | GemmaConfig | None,
    gating: str | None,
    fix_config: bool,
) -> Checkpoint:
    container = TARGETS[source].container if source else None
    checkpoint = open_checkpoint(
        path, config=config, container=container, gating=gating, fix_config=fix_config
    )
    found = framework_of(checkpoint.layout.variant.name)
    if source is not None and checkpoint.layout.variant.name not in SOURCES[source]:
        checkpoint.close()
        raise UsageError(
            f"the source is {found} ({checkpoint.layout.variant.describe}), the command says {source}.",
            where=path,
            fix=f"use `g2conv {found}-to-…`, or `g2conv convert SRC DST --to …` for any source.",
        )
    return checkpoint


def sample(
    directory: str | Path,
    *,
    to: str = "safetensors",
    layout: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write the bundled model, a small trained Gemma 2, in any format."""
    from ..model.sample import sample_dir

    return convert(
        sample_dir(), directory, to=to, layout=layout, overwrite=overwrite, progress=progress
    )
