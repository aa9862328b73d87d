"""``g2verify logits``: a model's logits as one ``.npy`` file, written tile by tile, so that no more than a tile is in memory."""

from __future__ import annotations

import os
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..convert.progress import SILENT, Tick
from ..formats.errors import SpaceError, UsageError
from ..formats.lock import Lock
from ..formats.named_files import token_ids
from ..formats.output_paths import PARTIAL
from .runners import Runner

Array = npt.NDArray[Any]
BATCH_TOKENS = 4096
TILE_BYTES = 64 << 20


def read_tokens(source: str | Path | npt.ArrayLike) -> Array:
    """Ids ``[batch, length]`` int64 from an array, or a ``.npy`` file, of ``[length]`` or ``[batch, length]``.

    Raises:
        G2Error: as :func:`g2kit.formats.named_files.token_ids`.
    """
    return np.atleast_2d(token_ids(source, "batch", fix="save token ids with numpy.save."))


def write_logits(
    runner: Runner,
    tokens: Array,
    out: str | Path,
    *,
    progress: Tick = SILENT,
) -> dict[str, Any]:
    """Run a model over ids and write its logits.

    Args:
        runner: the model.
        tokens: ids ``[batch, length]``, all real.
        out: file to write: float32 ``[batch, length, vocab]``; replaced once it is complete.
        progress: told of tokens.

    Returns:
        ``shape``, ``bytes``, ``non_finite`` (None, or batch, position and id of the first NaN or infinity) and
        ``notes``: sentences on what to bear in mind.

    Raises:
        UsageError: ids outside the vocabulary.
        SpaceError: the disk is too small.
        LockedError: another run is writing the same file.
    """
    out = Path(out).resolve()  # what a link leads to is replaced, not the link
    if out.exists() and not out.is_file():  # a device or pipe would be replaced by the file
        raise UsageError(
            "the logits are written out of order, into a file; this is none.", where=out
        )
    batch, length = tokens.shape
    shape = (batch, length, runner.config.vocab_size)
    head = _header(shape)
    size = len(head) + 4 * int(np.prod(shape))
    free = shutil.disk_usage(out.absolute().parent).free
    if size > free:
        raise SpaceError(f"the logits need {size} bytes, the disk has {free}.", where=out,
                         fix="give fewer tokens, or another disk.")  # fmt: skip
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < shape[2]:
        raise UsageError(
            f"token ids run from {tokens.min()} to {tokens.max()}, the vocabulary has {shape[2]}.",
            fix=f"give ids from 0 to {shape[2] - 1}, made by this model's tokenizer.",
        )
    context = runner.config.max_position_embeddings
    notes = (
        [f"{length} tokens are more than the model's context of {context}: it was not trained for those behind."]
        if length > context
        else []
    )  # fmt: skip
    partial = out.with_name(f".{out.name[:200]}{PARTIAL}")
    data, lock = partial / "data", Lock(partial / "lock")
    try:
        data.unlink(missing_ok=True)  # a killed run's
        fd = os.open(data, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.ftruncate(fd, size)
            os.pwrite(fd, head, 0)
            bad = _write(fd, len(head), runner, tokens, progress)
            os.fsync(fd)
        finally:
            os.close(fd)
        data.replace(out)
    finally:
        data.unlink(missing_ok=True)
        lock.release()
    return {"shape": list(shape), "bytes": size, "non_finite": bad, "notes": notes}


def _header(shape: tuple[int, ...]) -> bytes:
    buffer = BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<f4", "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


def _write(fd: int, start: int, runner: Runner, tokens: Array, progress: Tick) -> list[int] | None:
    """Sequences in batches, each batch's logits by rows of the vocabulary."""
    batch, length = tokens.shape
    vocab = runner.config.vocab_size
    some = max(1, BATCH_TOKENS // max(length, 1))
    first: list[int] | None = None
    for b in range(0, batch, some):
        part = tokens[b : b + some]
        runner.start(part)
        runner.finish()
        rows = max(256, TILE_BYTES // (8 * part.size))
        for low, _, tile in runner.logit_tiles(rows):
            values = np.ascontiguousarray(tile, dtype="<f4")
            if first is None and not np.isfinite(values.sum()):
                at = np.argwhere(~np.isfinite(values))
                first = [b + int(at[0][0]), int(at[0][1]), low + int(at[0][2])] if len(at) else None
            for i in range(len(part)):
                for p in range(length):
                    at_row = ((b + i) * length + p) * vocab + low
                    _put(fd, values[i, p], start + 4 * at_row)
        progress(int(part.size), "logits")
    return first


def _put(fd: int, row: Array, offset: int) -> None:
    data = row.view(np.uint8).data
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done
