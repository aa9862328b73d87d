"""The model in JAX, independent of every other runner: one block at a time, or resident on a device mesh.

Weights stream from the checkpoint and each block is compiled once per shape of the batch. float64 is switched on inside the
calls of the runner that asks for it, never for the process.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ...convert.open import Checkpoint
from ...formats.errors import ResourceError
from ...model import canonical
from ...model.config import GemmaConfig
from . import jax_math as m
from .base import (
    ABILITIES,
    TAPS,
    Array,
    Decoder,
    DecodeState,
    Runner,
    Table,
    Tap,
    Tokens,
    tile_edges,
)
from .jax_mesh import batch_sharding, make_mesh, weight_sharding
from .weights import Weights

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}
QUERIES = 512  # queries whose scores are in memory at a time
Cache = tuple[jax.Array, jax.Array]


class JaxRunner(Runner):
    """See :class:`.base.Runner`.

    Args:
        checkpoint: path or opened checkpoint.
        dtype: ``float32``, ``bfloat16`` or ``float64`` (CPU).
        device: JAX platform such as ``cpu``, ``gpu``, ``tpu``; default JAX's own.
        config: see :class:`.weights.Weights`.
        resident: keep blocks and embedding in memory once read; else one block at a time.
        mesh: ``data=2,model=4``: resident and divided over that many devices.
        offset: position of the first token; see :class:`.torch_runner.TorchRunner`.

    Raises:
        G2Error: the checkpoint cannot be opened, or the devices are not there.
    """

    name: ClassVar[str] = "jax"
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
        mesh: str | None = None,
        offset: int = 0,
    ) -> None:
        self.dtype = dtype
        self._offset = offset
        self._mesh = None
        self._device = None
        try:
            if mesh is not None:
                self._mesh = make_mesh(mesh, device)
            else:
                self._device = jax.devices(device)[0]
        except RuntimeError as e:
            raise ResourceError(
                f"JAX has no device of platform {device!r}: {str(e).splitlines()[0]}",
                fix="leave the device out, or install the JAX of that platform.",
            ) from e
        self._weights = Weights(checkpoint, config)
        self.config = self._weights.config
        self._resident = resident or mesh is not None
        self._kept: dict[int, m.Weights] = {}
        self._table: jax.Array | None = None
        self._loaded: tuple[int, m.Weights] | None = None
        self._x: jax.Array | None = None

    def start(self, tokens: Tokens, padding: Any = None) -> Array:
        """See :meth:`.base.Runner.start`."""
        batch = self._begin(tokens, padding)
        with self._context():
            self._x = self._embed(batch.tokens)
            self._at = self._put((batch.positions + self._offset).astype(np.int32))
            self._real = self._put(batch.real)
            return self._out(self._x)

    def advance(self, tap: Tap | None = None) -> Array:
        """See :meth:`.base.Runner.advance`."""
        layer = self._next_layer()
        with self._context():
            assert self._x is not None
            self._x = self._run(layer, self._x, tap)
            self.layer = layer + 1
            return self._out(self._x)

    def replay(self, hidden: Array, tap: Tap | None = None) -> Array:
        """See :meth:`.base.Runner.replay`."""
        layer = self._last_layer()
        with self._context():
            return self._out(self._run(layer, self._put(hidden, cast=True), tap))

    def final_hidden(self) -> Array:
        """See :meth:`.base.Runner.final_hidden`."""
        self._all_ran()
        with self._context():
            return self._out(self._final(self._x))

    def logit_tiles(
        self, rows: int | None = None, positions: slice = slice(None)
    ) -> Iterator[tuple[int, int, Array]]:
        """See :meth:`.base.Runner.logit_tiles`; on a mesh the vocabulary is one tile, divided over it."""
        self._all_ran()
        assert self._x is not None
        with self._context():
            hidden = self._final(self._x[:, positions])
        for start, stop, table in self._tiles(rows):
            with self._context():  # closed again before the caller goes on
                logits = np.asarray(m.unembed(hidden, table(), config=self.config))
            yield start, stop, logits

    def table(self) -> Table:
        """See :meth:`.base.Runner.table`."""
        return self._weights.table(self.dtype)

    def decoder(self, batch: int = 1, capacity: int | None = None) -> Decoder:
        """See :meth:`.base.Runner.decoder`. Streams all weights at every step unless ``resident``."""
        return JaxDecoder(self, DecodeState(self.config, batch, capacity))

    def close(self) -> None:
        """See :meth:`.base.Runner.close`."""
        self._kept, self._table, self._loaded, self._x = {}, None, None, None
        self._weights.close()

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_x64(self.dtype == "float64"))
            if self._device is not None:
                stack.enter_context(jax.default_device(self._device))
            yield

    def _put(self, array: Array, *, cast: bool = False) -> jax.Array:
        """Activations onto the device or mesh."""
        target = self._device
        if self._mesh is not None:
            target = batch_sharding(self._mesh, array.shape[0], array.ndim)
        out = jax.device_put(array, target)
        return self._cast(out) if cast else out

    def _cast(self, x: jax.Array) -> jax.Array:
        out: jax.Array = x.astype(DTYPES[self.dtype])
        return out

    def _out(self, x: jax.Array) -> Array:
        return np.asarray(x.astype(m.wide(x.dtype)))

    def _window(self, layer: int) -> np.int32:
        local = self.config.is_local(layer) and self.config.sliding_window
        return np.int32(min(local or m.EVERYTHING, m.EVERYTHING))

    def _weight(self, template: str, host: Array) -> jax.Array:
        """A weight with heads apart, in the compute type, where it belongs."""
        axes = m.AXES[template]
        sizes = self.config.axes | {"v": len(host)}
        host = host.reshape([sizes[a] for a in axes])
        if self._mesh is None:
            return self._cast(jax.device_put(host, self._device))
        sharding = weight_sharding(self._mesh, axes, host.shape)
        there = jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])
        return self._cast(there)

    def _block(self, layer: int) -> m.Weights:
        if layer in self._kept:
            return self._kept[layer]
        if self._loaded is None or self._loaded[0] != layer:
            self._loaded = None  # let go of the last block before reading the next
            block = {t: self._weight(t, host) for t, host in self._weights.block(layer)}
            self._loaded = (layer, block)
        if self._resident:
            self._kept[layer] = self._loaded[1]
        return self._loaded[1]

    def _run(self, layer: int, x: jax.Array, tap: Tap | None) -> jax.Array:
        y: jax.Array
        y, _, taps = m.block(
            x, self._block(layer), self._at, self._at, self._real, self._window(layer), None, 0,
            config=self.config, chunk=QUERIES, tapped=tap is not None,
        )  # fmt: skip
        if tap is not None:
            for name in TAPS:
                tap(name, self._out(taps[name]))
        return y

    def _whole_table(self) -> jax.Array:
        """The embedding, resident; on a mesh every device is given its own rows only."""
        if self._table is None:
            shape = (self.config.vocab_size, self.config.hidden_size)
            sharding: jax.sharding.Sharding = (
                jax.sharding.SingleDeviceSharding(self._device)
                if self._mesh is None
                else weight_sharding(self._mesh, m.AXES[canonical.EMBED], shape)
            )

            def rows(part: Any) -> Array:
                start, stop, _ = part[0].indices(shape[0])
                return self._weights.embedding(start, stop)

            self._table = self._cast(jax.make_array_from_callback(shape, sharding, rows))
        return self._table

    def _embed(self, tokens: Array) -> jax.Array:
        if self._resident:
            table, index = self._whole_table(), tokens
        else:
            rows, index = self._weights.embedding_of(tokens)
            table = self._cast(jax.device_put(rows, self._device))
        x: jax.Array = m.embed(table, self._put(index), config=self.config)
        return x

    def _final(self, x: jax.Array | None) -> jax.Array:
        assert x is not None
        gain = self._weight(canonical.FINAL_NORM, self._weights.read(canonical.FINAL_NORM))
        hidden: jax.Array = m.final_norm(x, gain, config=self.config)
        return hidden

    def _tiles(self, rows: int | None) -> Iterator[tuple[int, int, Any]]:
        """``(start, stop, function giving those embedding rows on the device)``."""
        vocab = self.config.vocab_size
        if self._mesh is not None:
            yield 0, vocab, self._whole_table
            return
        edges = tile_edges(vocab, rows)
        if self._resident:
            for a, b in edges:
                yield a, b, lambda a=a, b=b: self._whole_table()[a:b]
            return
        for a, b, tile in self._weights.embedding_tiles(edges):
            yield a, b, lambda tile=tile: self._weight(canonical.EMBED, tile)


class JaxDecoder(Decoder):
    """A cache of fixed size, so that every step of the same length runs the same compiled block."""

    def __init__(self, runner: JaxRunner, state: DecodeState) -> None:
        self._runner, self._state = runner, state
        self._caches: list[Cache] = []

    def step(self, tokens: Tokens, padding: Any = None, *, last: int | None = None) -> Array:
        """See :meth:`.base.Decoder.step`."""
        r = self._runner
        batch, slots = self._state.take(tokens, padding)
        with r._context():
            self._caches = self._caches or [
                self._empty() for _ in range(r.config.num_hidden_layers)
            ]
            x = r._embed(batch.tokens)
            at = r._put(batch.positions.astype(np.int32))
            k_at = r._put(self._state.positions.astype(np.int32))
            k_real = r._put(self._state.real)
            for layer in range(r.config.num_hidden_layers):
                x, self._caches[layer], _ = m.block(
                    x, r._block(layer), at, k_at, k_real, r._window(layer), self._caches[layer],
                    np.int32(slots.start), config=r.config, chunk=QUERIES,
                )  # fmt: skip
                x.block_until_ready()  # else blocks are read faster than they run, and wait in memory
            hidden = r._final(x[:, -(last or x.shape[1]) :])
            tiles = (m.unembed(hidden, rows(), config=r.config) for _, _, rows in r._tiles(None))
            return np.concatenate([np.asarray(t) for t in tiles], axis=-1)

    def _empty(self) -> Cache:
        c = self._runner.config
        shape = (*self._state.real.shape, c.num_key_value_heads, c.head_dim)
        zeros = np.zeros(shape, np.float32)
        return self._runner._put(zeros, cast=True), self._runner._put(zeros, cast=True)


def _x64(on: bool) -> contextlib.AbstractContextManager[Any]:
    """float64 allowed or not, for the calls inside."""
    state: Any = getattr(jax, "enable_x64", None)  # JAX 0.8 on; before it, in jax.experimental
    if state is None:
        state = importlib.import_module("jax.experimental").enable_x64
    context: contextlib.AbstractContextManager[Any] = state(on)
    return context
