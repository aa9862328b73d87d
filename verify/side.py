"""One side of a comparison: a checkpoint of any format, or a recording of one, and what a report says of it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..convert.extras import travelling
from ..convert.open import Checkpoint, open_checkpoint
from ..convert.sidecar import Sidecars
from ..convert.sidecar_files import TOKENIZER_MODEL
from ..formats.errors import FormatError, NonFiniteError, UsageError
from ..formats.sentencepiece_model import SentencePieceModel, parse
from ..model.config import GemmaConfig
from .runners import RUNNERS, Runner, open_runner

if TYPE_CHECKING:
    from .recording_read import Recording

RECORDING_FILE = "recording.json"
DEFAULT_RUNNER = "torch"


@dataclass(frozen=True)
class Engine:
    """How a side is to be run.

    Attributes:
        runner: a name of :data:`g2kit.verify.runners.RUNNERS`.
        dtype: compute type; None for the runner's first.
        device: as the framework calls it; None for its default.
        options: what else :func:`g2kit.verify.runners.open_runner` takes, such as ``mesh``.
    """

    runner: str = DEFAULT_RUNNER
    dtype: str | None = None
    device: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def computes_in(self) -> str:
        """The compute type, resolved.

        Raises:
            UsageError: no such runner, or it does not compute in this type.
        """
        info = RUNNERS.get(self.runner)
        if info is None:
            known = ", ".join(RUNNERS)
            raise UsageError(f"no runner is called {self.runner!r}.", fix=f"use one of {known}.")
        if self.dtype is not None and self.dtype not in info.dtypes:
            raise UsageError(
                f"the {self.runner} runner does not compute in {self.dtype}.",
                fix=f"use {' or '.join(info.dtypes)}.",
            )
        return self.dtype or info.dtypes[0]

    def describe(self) -> dict[str, Any]:
        """The report's ``runner`` object."""
        return {
            "name": self.runner,
            "dtype": self.computes_in,
            "device": self.device or "cpu",
            "version": _version(RUNNERS[self.runner].package),
        }


class Side:
    """A checkpoint or a recording.

    Attributes:
        path: what the user named.
        checkpoint: the opened checkpoint; None for a recording.
        recording: the opened recording; None for a checkpoint.
    """

    def __init__(
        self, path: Path, checkpoint: Checkpoint | None, recording: Recording | None
    ) -> None:
        self.path = path
        self.checkpoint = checkpoint
        self.recording = recording

    @property
    def config(self) -> GemmaConfig:
        """The model's hyper-parameters."""
        if self.checkpoint is not None:
            return self.checkpoint.config
        assert self.recording is not None
        return self.recording.config

    @property
    def opened(self) -> Checkpoint:
        """The checkpoint.

        Raises:
            UsageError: this is a recording, which holds no weights.
        """
        if self.checkpoint is None:
            raise UsageError(
                "this is a recording, which holds no weights.",
                where=self.path,
                fix="name a checkpoint here.",
            )
        return self.checkpoint

    @cached_property
    def sidecars(self) -> Sidecars | None:
        """Tokenizer and other files that belong to a checkpoint, GGUF's vocabulary included."""
        if self.checkpoint is None:
            return None
        c = self.checkpoint
        return travelling(c.path, c.source.format, c.source.metadata.get("kv", {}), None)

    @cached_property
    def tokenizer_bytes(self) -> bytes | None:
        """The SentencePiece file, None without one."""
        if self.recording is not None:
            return self.recording.tokenizer_model
        return None if self.sidecars is None else self.sidecars.tokenizer_model

    @cached_property
    def tokenizer(self) -> SentencePieceModel | None:
        """The tokenizer, parsed."""
        if self.tokenizer_bytes is None:
            return None
        where = self.path if self.sidecars is None else self.sidecars.where(TOKENIZER_MODEL)
        return parse(self.tokenizer_bytes, where)

    @property
    def tokenizer_rebuilt(self) -> bool:
        """Whether the tokenizer was made from another file, which keeps less."""
        if self.recording is not None:
            return self.recording.tokenizer_rebuilt
        return self.sidecars is not None and TOKENIZER_MODEL in self.sidecars.origins

    @property
    def quantized(self) -> list[str]:
        """Canonical names stored in fewer bits."""
        return [] if self.checkpoint is None else self.checkpoint.quantized

    def open_runner(self, engine: Engine) -> Runner:
        """A runner over the checkpoint; the checkpoint stays open when it is closed."""
        return open_runner(
            engine.runner, self.opened, dtype=engine.dtype, device=engine.device, **engine.options
        )

    def describe(self, engine: Engine | None) -> dict[str, Any]:
        """The report's SIDE object; ``fingerprint`` is filled in once the weights were hashed."""
        if self.checkpoint is None:
            assert self.recording is not None
            said = {"path": str(self.path), "tokenizer": self.describe_tokenizer()}
            return {**_BLANK, **said, **self.recording.describe()}
        c = self.checkpoint
        return {
            **_BLANK,
            "path": str(self.path),
            "format": c.source.format,
            "layout": c.layout.variant.name,
            "dtypes": dict(sorted(Counter(_stored(t) for t in c.tensors.values()).items())),
            "quantized": len(c.quantized),
            "parameters": c.config.num_parameters,
            "bytes": sum(f.stat().st_size for f in c.source.files),
            "config": config_fields(c.config),
            "config_from": _origin(c),
            "tokenizer": self.describe_tokenizer(),
            "runner": None if engine is None else engine.describe(),
        }

    def describe_tokenizer(self) -> dict[str, Any] | None:
        """sha256 of the file and its pieces; None without one."""
        if self.tokenizer is None or self.tokenizer_bytes is None:
            return None
        digest = hashlib.sha256(self.tokenizer_bytes).hexdigest()
        return {"sha256": digest, "pieces": len(self.tokenizer.pieces)}

    def close(self) -> None:
        """Close the files."""
        if self.checkpoint is not None:
            self.checkpoint.close()


_BLANK: dict[str, Any] = {
    "path": None, "kind": "checkpoint", "format": None, "layout": None, "dtypes": {}, "quantized": 0,
    "fingerprint": None, "parameters": None, "bytes": None, "config": {}, "config_from": None,
    "tokenizer": None, "runner": None,
}  # fmt: skip


@contextlib.contextmanager
def open_side(
    path: str | Path | Checkpoint,
    config: str | Path | GemmaConfig | None = None,
    *,
    fix_config: bool = False,
    gating: str | None = None,
) -> Iterator[Side]:
    """Open a checkpoint (any format) or a recording, told apart by ``recording.json``.

    Args:
        path: what the user named, or an opened checkpoint, which stays the caller's to close.
        config: for checkpoints that carry none; wins over what the files say.
        fix_config: correct values known to be wrong in published files.
        gating: ``df`` or ``fd``, for a Flax checkpoint whose sizes leave the orientation open.

    Raises:
        G2Error: it cannot be opened.
    """
    if isinstance(path, Checkpoint):
        yield Side(path.path, path, None)
        return
    path = Path(path)
    if (path / RECORDING_FILE).is_file() or path.name == RECORDING_FILE:
        with _recording(path) as recording:
            yield Side(path, None, recording)
        return
    side = Side(
        path, open_checkpoint(path, config=config, fix_config=fix_config, gating=gating), None
    )
    try:
        yield side
    finally:
        side.close()


def _recording(path: Path) -> Recording:
    """Open a recording; numbers that are none make it a damaged file, they say nothing of the weights that ran."""
    from .recording_read import open_recording

    try:
        return open_recording(path)
    except NonFiniteError as e:
        raise FormatError(e.what, where=e.where, tensor=e.tensor, fix=e.fix) from e


def config_fields(config: GemmaConfig) -> dict[str, Any]:
    """A config as plain data."""
    values = {name: getattr(config, name) for name in GemmaConfig.__dataclass_fields__}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _stored(tensor: Any) -> str:
    quantized = tensor.source.quantized is not None
    return str(tensor.source.stored) if quantized else str(tensor.dtype)


def _origin(checkpoint: Checkpoint) -> str:
    """Where most of the configuration came from, without the keys' names."""
    words = Counter(o.split(" key ")[0] for o in checkpoint.reading.origin.values())
    return words.most_common(1)[0][0]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
