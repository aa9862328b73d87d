"""The GGUF file as its users run it: llama.cpp, through llama-cpp-python."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import llama_cpp
import numpy as np

from ...convert.open import Checkpoint, open_checkpoint
from ...formats.errors import FormatError, UsageError
from ...model.config import GemmaConfig
from .base import Array, Batch, Decoder, DecodeState, Runner, Tokens, tile_edges

GGML_F32 = 0  # key/value cache in float32; llama.cpp's default is float16


class LlamaCppRunner(Runner):
    """See :class:`.base.Runner`. Computes in llama.cpp's own mix of types; sequences run one after the other, unpadded.

    Args:
        checkpoint: a ``.gguf`` file, or a directory with one (a checkpoint's path is taken).
        dtype: ``float32``, which here means the file's types with a float32 cache.
        device: None or ``cpu``.
        config: not taken: what llama.cpp makes of the file is what is looked at.

    Raises:
        G2Error: it is no GGUF of a Gemma, or llama.cpp cannot load it.
    """

    name: ClassVar[str] = "llama_cpp"
    gives: ClassVar[frozenset[str]] = frozenset({"logits", "decode"})
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)

    def __init__(
        self,
        checkpoint: str | Path | Checkpoint,
        *,
        dtype: str = "float32",
        device: str | None = None,
        config: str | Path | GemmaConfig | None = None,
    ) -> None:
        if config is not None or device not in (None, "cpu"):
            raise UsageError(
                "the llama_cpp runner takes no config (the GGUF has it), and runs on cpu."
            )
        path = checkpoint.path if isinstance(checkpoint, Checkpoint) else Path(checkpoint)
        with open_checkpoint(path) as opened:
            if opened.source.format != "gguf":
                raise FormatError(
                    f"llama.cpp reads GGUF, this is {opened.source.format}.",
                    where=path,
                    fix="convert it with `g2conv convert SRC DIR --to gguf --dtype f32`.",
                )
            self.config = opened.config
            self._file = Path(
                opened.source.files[0]
            )  # of a split model: the first, which llama.cpp wants
        self.dtype = dtype
        self._logits: list[Array] = []

    def start(self, tokens: Tokens, padding: Any = None) -> None:
        """See :meth:`.base.Runner.start`. Runs the whole model."""
        batch = self._begin(tokens, padding)
        model = _open(self._file, int(batch.real.sum(1).max()))
        self._logits = []
        for row, real in zip(batch.tokens, batch.real, strict=True):
            model.reset()
            self._logits.append(_eval(model, row[real], self.config.vocab_size))
        model.close()

    def logit_tiles(
        self, rows: int | None = None, positions: slice = slice(None)
    ) -> Iterator[tuple[int, int, Array]]:
        """See :meth:`.base.Runner.logit_tiles`. Zero at padding, which llama.cpp is not shown."""
        batch = self._started()
        for start, stop in tile_edges(self.config.vocab_size, rows):
            tile = np.zeros((*batch.shape, stop - start), np.float32)
            for out, real, logits in zip(tile, batch.real, self._logits, strict=True):
                out[real] = logits[:, start:stop]
            yield start, stop, tile[:, positions]

    def decoder(self, batch: int = 1, capacity: int | None = None) -> Decoder:
        """See :meth:`.base.Runner.decoder`."""
        return LlamaCppDecoder(self._file, DecodeState(self.config, batch, capacity))

    def close(self) -> None:
        """See :meth:`.base.Runner.close`."""
        self._logits = []

    def _started(self) -> Batch:
        if self.batch is None:
            raise UsageError("no batch: call start(tokens) first.")
        return self.batch


class LlamaCppDecoder(Decoder):
    """One context of llama.cpp per sequence; a small model's worth of memory each, the weights are shared by mmap."""

    def __init__(self, file: Path, state: DecodeState) -> None:
        self._state = state
        self._models = [_open(file, state.capacity) for _ in state.real]

    def step(self, tokens: Tokens, padding: Any = None, *, last: int | None = None) -> Array:
        """See :meth:`.base.Decoder.step`."""
        batch, _ = self._state.take(tokens, padding)
        out = np.zeros((*batch.shape, self._state.vocab_size), np.float32)
        for model, row, real, logits in zip(
            self._models, batch.tokens, batch.real, out, strict=True
        ):
            logits[real] = _eval(model, row[real], self._state.vocab_size)
        return out[:, -(last or out.shape[1]) :]


def _open(file: Path, room: int) -> Any:
    """llama.cpp with room for that many positions.

    Raises:
        FormatError: it cannot load the file.
    """
    try:
        return llama_cpp.Llama(
            str(file), n_ctx=room, n_batch=min(room, 512), logits_all=True, verbose=False,
            type_k=GGML_F32, type_v=GGML_F32, flash_attn=False, swa_full=False,
        )  # fmt: skip
    except (ValueError, AssertionError, RuntimeError) as e:
        raise FormatError(
            f"llama.cpp (llama-cpp-python {llama_cpp.__version__}) cannot load it: {e}", where=file
        ) from e


def _eval(model: Any, ids: Array, vocab: int) -> Array:
    """Logits ``[len(ids), vocab]`` of the next positions."""
    before = model.n_tokens
    model.eval(ids.tolist())
    return np.array(model.scores[before : model.n_tokens, :vocab])
