"""The model in torch, through ``model/torch_gemma.py``, one block at a time, on CPU or CUDA."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...convert.open import Checkpoint
from ...formats.dtypes import BF16
from ...formats.errors import ResourceError, UsageError
from ...model import canonical, torch_gemma
from ...model.config import GemmaConfig
from .base import ABILITIES, Array, Decoder, DecodeState, Runner, Table, Tap, Tokens, tile_edges
from .weights import Weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
SCORE_BYTES = 256 << 20  # attention scores in memory at a time


class TorchRunner(Runner):
    """See :class:`.base.Runner`.

    Args:
        checkpoint: path or opened checkpoint.
        dtype: ``float32`` (TF32 off), ``bfloat16`` or ``float64``.
        device: ``cpu`` (default), ``cuda`` or ``cuda:1``.
        config: see :class:`.weights.Weights`.
        resident: keep blocks and embedding in memory once read; else one block at a time.
        linear: how matrices of the blocks are applied; default the plain product.
        offset: position of the first token. The model is the same whatever it is; rounding of RoPE's angles is not, which
            noise floors of long sequences need.

    Raises:
        G2Error: the checkpoint cannot be opened, or the device is not there.
    """

    name: ClassVar[str] = "torch"
    gives: ClassVar[frozenset[str]] = frozenset(ABILITIES)
    dtypes: ClassVar[tuple[str, ...]] = tuple(DTYPES)

    def __init__(
        self,
        checkpoint: str | Path | Checkpoint,
        *,
        dtype: str = "float32",
        device: str | None = None,
        config: str | Path | GemmaConfig | None = None,
        resident: bool = False,
        linear: torch_gemma.Linear = torch_gemma.plain_linear,
        offset: int = 0,
    ) -> None:
        self.dtype = dtype
        self._type = DTYPES[dtype]
        self._device = torch_device(device)
        self._weights = Weights(checkpoint, config)
        self.config = self._weights.config
        self._resident = resident
        self._linear = linear
        self._offset = offset
        self._kept: dict[int, dict[str, Tensor]] = {}
        self._table: Tensor | None = None
        self._loaded: tuple[int, dict[str, Tensor]] | None = None
        self._x: Tensor | None = None

    def start(self, tokens: Tokens, padding: Any = None) -> Array:
        """See :meth:`.base.Runner.start`."""
        batch = self._begin(tokens, padding)
        with exact_products():
            self._x = self._embed(batch.tokens)
            self._at = torch.from_numpy(batch.positions + self._offset).to(self._device)
            self._real = torch.from_numpy(batch.real).to(self._device)
            return as_numpy(self._x)

    def advance(self, tap: Tap | None = None) -> Array:
        """See :meth:`.base.Runner.advance`."""
        layer = self._next_layer()
        assert self._x is not None
        with exact_products():
            self._x = self._run(layer, self._x, tap)
            self.layer = layer + 1
            return as_numpy(self._x)

    def replay(self, hidden: Array, tap: Tap | None = None) -> Array:
        """See :meth:`.base.Runner.replay`."""
        layer = self._last_layer()
        with exact_products():
            return as_numpy(self._run(layer, self._tensor(np.array(hidden)), tap))

    def block(self, layer: int, hidden: Array, start: int = 0, tap: Tap | None = None) -> Array:
        """Any block on hidden states of the caller's choice, for the batch of the last :meth:`start`; changes nothing.

        Args:
            layer: the block.
            hidden: of all positions ``[batch, length, hidden]``; a prefix of the batch's will do.
            start: give the output from this position on; earlier ones only serve as keys and values.
            tap: called with name and value of each intermediate, of these positions.

        Returns:
            ``[batch, length - start, hidden]``.
        """
        with exact_products():
            return as_numpy(self._run(layer, self._tensor(np.array(hidden)), tap, start))

    def normed(self, hidden: Array) -> Array:
        """The final norm of hidden states of the caller's choice ``[batch, length, hidden]``."""
        with exact_products():
            return as_numpy(self._final(self._tensor(np.array(hidden))))

    def final_hidden(self) -> Array:
        """See :meth:`.base.Runner.final_hidden`."""
        self._all_ran()
        with exact_products():
            return as_numpy(self._final(self._x))

    def logit_tiles(
        self, rows: int | None = None, positions: slice = slice(None)
    ) -> Iterator[tuple[int, int, Array]]:
        """See :meth:`.base.Runner.logit_tiles`."""
        self._all_ran()
        assert self._x is not None
        with exact_products():
            hidden = self._final(self._x[:, positions])
        for start, stop, tile in self._tiles(rows):
            with exact_products():
                logits = as_numpy(self._unembed(hidden, tile))
            yield start, stop, logits

    def table(self) -> Table:
        """See :meth:`.base.Runner.table`."""
        return self._weights.table(self.dtype)

    def decoder(self, batch: int = 1, capacity: int | None = None) -> Decoder:
        """See :meth:`.base.Runner.decoder`. Streams all weights at every step unless ``resident``."""
        return TorchDecoder(self, DecodeState(self.config, batch, capacity))

    def close(self) -> None:
        """See :meth:`.base.Runner.close`."""
        self._kept, self._table, self._loaded, self._x = {}, None, None, None
        self._weights.close()

    def _tensor(self, host: Array) -> Tensor:
        """A NumPy array on the device in the compute type."""
        bf16 = host.dtype == BF16  # which torch does not know from NumPy
        there = torch.from_numpy(host.view(np.uint16) if bf16 else host)
        there = there.view(torch.bfloat16) if bf16 else there
        return there.to(self._device).to(self._type)

    def _block(self, layer: int) -> dict[str, Tensor]:
        if layer in self._kept:
            return self._kept[layer]
        if self._loaded is None or self._loaded[0] != layer:
            self._loaded = None  # let go of the last block before reading the next
            block = {t.format(i=layer): self._tensor(w) for t, w in self._weights.block(layer)}
            self._loaded = (layer, block)
        if self._resident:
            self._kept[layer] = self._loaded[1]
        return self._loaded[1]

    def _run(self, layer: int, x: Tensor, tap: Tap | None, first: int = 0) -> Tensor:
        """One block from position ``first`` on; queries in pieces where scores would be large, whole for taps."""
        weights, length = self._block(layer), x.shape[1]
        step = self._queries(x.shape[0], length)
        cache: torch_gemma.Cache | None = None
        if first:
            cache = torch_gemma.keys_values(
                x[:, :first], weights, layer, self.config, self._at[:, :first], linear=self._linear
            )
        if tap is not None:
            return self._piece(
                layer, weights, x, slice(first, None), cache, lambda n, v: tap(n, as_numpy(v))
            )[0]
        pieces = []
        for start in range(first, length, step):
            part = slice(start, min(start + step, length))
            y, cache = self._piece(layer, weights, x, part, cache)
            pieces.append(y)
        return torch.cat(pieces, dim=1)

    def _queries(self, batch: int, keys: int) -> int:
        """How many of a sequence's queries meet that many keys at a time."""
        scores = batch * self.config.num_attention_heads * keys * self._type.itemsize
        return max(16, SCORE_BYTES // scores)

    def _piece(
        self,
        layer: int,
        weights: dict[str, Tensor],
        x: Tensor,
        part: slice,
        cache: torch_gemma.Cache | None,
        tap: torch_gemma.Tap = torch_gemma.no_tap,
    ) -> tuple[Tensor, torch_gemma.Cache]:
        return torch_gemma.block(
            x[:, part], weights, layer, self.config, self._at[:, : x.shape[1]][:, part],
            padding=self._real[:, : part.stop or x.shape[1]], cache=cache, linear=self._linear, tap=tap,
        )  # fmt: skip

    def _whole_table(self) -> Tensor:
        if self._table is None:
            self._table = self._tensor(self._weights.read(canonical.EMBED))
        return self._table

    def _embed(self, tokens: Array) -> Tensor:
        if self._resident:
            ids = torch.from_numpy(tokens).to(self._device)
            return torch_gemma.embed(ids, self._whole_table(), self.config)
        rows, index = self._weights.embedding_of(tokens)
        ids = torch.from_numpy(index).to(self._device)
        return torch_gemma.embed(ids, self._tensor(rows), self.config)

    def _final(self, x: Tensor | None) -> Tensor:
        assert x is not None
        gain = self._tensor(self._weights.read(canonical.FINAL_NORM))
        return torch_gemma.rms_norm(x, gain, self.config.rms_norm_eps)

    def _unembed(self, hidden: Tensor, table: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(hidden, table)
        cap = self.config.final_logit_softcapping
        # as torch_gemma.soft_cap, without its copies: a tile is large
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def _tiles(self, rows: int | None) -> Iterator[tuple[int, int, Tensor]]:
        edges = tile_edges(self.config.vocab_size, rows)
        if self._resident:
            yield from ((a, b, self._whole_table()[a:b]) for a, b in edges)
            return
        for start, stop, tile in self._weights.embedding_tiles(edges):
            yield start, stop, self._tensor(tile)


class TorchDecoder(Decoder):
    """A cache that grows with every step."""

    def __init__(self, runner: TorchRunner, state: DecodeState) -> None:
        self._runner, self._state = runner, state
        self._caches: list[torch_gemma.Cache | None] = [None] * runner.config.num_hidden_layers

    def step(self, tokens: Tokens, padding: Any = None, *, last: int | None = None) -> Array:
        """See :meth:`.base.Decoder.step`."""
        r = self._runner
        batch, slots = self._state.take(tokens, padding)
        with exact_products():
            x = r._embed(batch.tokens)
            at = torch.from_numpy(batch.positions).to(r._device)
            real = torch.from_numpy(self._state.real[:, : slots.stop]).to(r._device)
            few = r._queries(len(x), slots.stop)
            for i in range(len(self._caches)):
                pieces = []
                for start in range(0, x.shape[1], few):
                    part = slice(start, min(start + few, x.shape[1]))
                    y, self._caches[i] = torch_gemma.block(
                        x[:, part], r._block(i), i, r.config, at[:, part],
                        padding=real[:, : slots.start + part.stop], cache=self._caches[i],
                        linear=r._linear,
                    )  # fmt: skip
                    pieces.append(y)
                x = torch.cat(pieces, dim=1)
            hidden = r._final(x[:, -(last or x.shape[1]) :])
            tiles = [as_numpy(r._unembed(hidden, rows)) for _, _, rows in r._tiles(None)]
            return np.concatenate(tiles, axis=-1)


def torch_device(name: str | None) -> torch.device:
    """The device of that name.

    Raises:
        UsageError: no device is called so.
        ResourceError: this machine does not have it.
    """
    found = re.fullmatch(r"(cpu|cuda)(?::([0-9]{1,9}))?", name or "cpu")
    if not found or (found[1] == "cpu" and found[2]):
        raise UsageError(f"device {name!r} is none of cpu, cuda, cuda:1, …")
    index, there = int(found[2] or 0), torch.cuda.device_count()
    if found[1] == "cuda" and index >= there:
        raise ResourceError(
            f"device {name!r} is not there: torch {torch.__version__} sees {there} CUDA devices.",
            fix="use cpu, or a torch built for CUDA on a machine with that device.",
        )
    return torch.device(name or "cpu")


def as_numpy(x: Tensor) -> Array:
    """A copy as NumPy, bfloat16 widened."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.detach().to(device="cpu", dtype=wide, copy=True).contiguous().numpy()


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """No gradients, and float32 products in float32: neither TF32 on CUDA nor bfloat16 on CPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_float32_matmul_precision(before)
