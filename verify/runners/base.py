"""What every runner is to the verifier: token ids in, logits and, where it can, hidden states block by block out.

A runner is an independent implementation of the model, so nothing here computes any of it: this module checks the input,
keeps the order of calls and gives arrays one form. All arrays are NumPy; hidden states and logits are float32 (exact for a
bfloat16 run), or float64 for a float64 run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from ...formats.errors import UsageError
from ...model.config import GemmaConfig

Array = npt.NDArray[Any]
Tokens = Array | Sequence[int] | Sequence[Sequence[int]]
Tap = Callable[[str, Array], None]
Table = Callable[[], Iterator[tuple[int, int, Array]]]
# what a runner may give; `blocks` also means hidden states, `replay` a block run on hidden states of the caller's choice
ABILITIES = ("logits", "blocks", "replay", "taps", "decode")
# names of intermediates inside a block, in forward order, as in model/torch_gemma.py
TAPS = (
    "attn_in", "scores", "o_in", "attn_out", "after_attn", "mlp_in", "down_in", "mlp_out", "out",
)  # fmt: skip
TILE_ROWS = 8192  # vocabulary rows per unembedding tile: 75 MB of float32 at 2B


@dataclass(frozen=True)
class Batch:
    """Checked input.

    Attributes:
        tokens: ids ``[batch, length]`` int64.
        real: True where a token is no padding ``[batch, length]``.
        positions: position of every token in its own sequence, padding not counted ``[batch, length]`` int64; 0 in front.
    """

    tokens: Array
    real: Array
    positions: Array

    @property
    def shape(self) -> tuple[int, int]:
        """``(batch, length)``."""
        return self.tokens.shape[0], self.tokens.shape[1]


def as_batch(
    tokens: Tokens, padding: Any, vocab_size: int, *, offset: Array | None = None
) -> Batch:
    """Token ids and padding mask as a :class:`Batch`.

    Args:
        tokens: ids ``[length]`` or ``[batch, length]``.
        padding: True for real tokens, the shape of ``tokens``; None means all are real. Left, right, or both.
        vocab_size: ids must be below it.
        offset: real tokens that came before, per sequence ``[batch]``.

    Raises:
        UsageError: ids or mask are not that; the message has the first offender.
    """
    ids = np.asarray(tokens)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise UsageError(
            f"token ids must be whole numbers of shape [batch, length], found {ids.dtype} {ids.shape}."
        )
    real = np.ones(ids.shape, bool) if padding is None else np.asarray(padding)
    real = real[None] if real.ndim == 1 else real
    if real.shape != ids.shape or real.dtype != np.bool_:
        raise UsageError(
            f"padding must be bool of shape {ids.shape}, True for real tokens; found {real.dtype} {real.shape}."
        )
    wrong = np.argwhere((ids < 0) | (ids >= vocab_size))
    if len(wrong):
        b, t = wrong[0]
        raise UsageError(
            f"token id {ids[b, t]} at sequence {b}, position {t} is outside the vocabulary of {vocab_size}."
        )
    edges = np.diff(real.astype(np.int8), axis=1, prepend=0, append=0)
    holes = np.flatnonzero((edges == 1).sum(1) != 1)
    if len(holes):
        raise UsageError(
            f"sequence {holes[0]} has no real token, or padding between real ones; padding goes in front or behind."
        )
    before = np.zeros(len(ids), np.int64) if offset is None else offset
    positions = np.maximum(before[:, None] + np.cumsum(real, axis=1) - 1, 0)
    return Batch(ids.astype(np.int64), real, positions)


class Decoder(ABC):
    """Generation with a key/value cache, some tokens at a time."""

    @abstractmethod
    def step(self, tokens: Tokens, padding: Any = None, *, last: int | None = None) -> Array:
        """Feed ``[batch, n]`` ids (the first step may be a padded prompt); logits ``[batch, n, vocab]``.

        Args:
            tokens: what comes next.
            padding: True for real tokens, same shape; None means all.
            last: logits of only so many last positions.

        Raises:
            UsageError: wrong ids, another batch than before, or more positions than the cache has room for.
        """


class Runner(ABC):
    """One checkpoint in one implementation.

    Use :func:`g2kit.verify.runners.open_runner`. One batch at a time: :meth:`start` forgets the one before.
    Hidden states at padding are finite but mean nothing.

    Attributes:
        name: the registry's name.
        gives: which of :data:`ABILITIES` it has.
        dtypes: compute types it has, the default first.
        config: the model.
        dtype: this one's compute type, such as ``float32``.
        layer: blocks run since :meth:`start`.
    """

    name: ClassVar[str]
    gives: ClassVar[frozenset[str]]
    dtypes: ClassVar[tuple[str, ...]]
    config: GemmaConfig
    dtype: str
    layer: int = 0
    batch: Batch | None = None

    @abstractmethod
    def start(self, tokens: Tokens, padding: Any = None) -> Array | None:
        """Take a batch and embed it.

        Args:
            tokens: ids ``[length]`` or ``[batch, length]``.
            padding: True for real tokens, same shape; None means all.

        Returns:
            The embedded tokens, scaled, ``[batch, length, hidden]``; None from a runner without ``blocks``.
        """

    @abstractmethod
    def logit_tiles(
        self, rows: int | None = None, positions: slice = slice(None)
    ) -> Iterator[tuple[int, int, Array]]:
        """``(start, stop, logits[batch, positions, stop - start])`` over the vocabulary, soft-cap applied.

        Args:
            rows: vocabulary rows per tile; the default bounds memory.
            positions: which positions of the batch.
        """

    def advance(self, tap: Tap | None = None) -> Array:
        """Run the next block; its output ``[batch, length, hidden]``.

        Args:
            tap: called with name (of :data:`TAPS`) and value of each intermediate.
        """
        raise self._cannot("blocks")

    def replay(self, hidden: Array, tap: Tap | None = None) -> Array:
        """The block :meth:`advance` ran last, on other hidden states ``[batch, length, hidden]``; changes nothing."""
        raise self._cannot("replay")

    def final_hidden(self) -> Array:
        """Hidden states after the last block and the final norm, ``[batch, length, hidden]``."""
        raise self._cannot("blocks")

    def table(self) -> Table | None:
        """The unembedding that :meth:`logit_tiles` multiplies the final hidden states with; None where it keeps that to itself.

        Returns:
            A function whose every call reads the table once: ``(start, stop, rows[stop - start, hidden])`` in order, in
            the stored dtype, rounded where the compute type is narrower.
        """
        return None

    def decoder(self, batch: int = 1, capacity: int | None = None) -> Decoder:
        """A decoder with room for ``capacity`` positions, padding included; default the model's context."""
        raise self._cannot("decode")

    def finish(self) -> None:
        """Run the blocks that are left."""
        while "blocks" in self.gives and self.layer < self.config.num_hidden_layers:
            self.advance()

    def logits(self, tokens: Tokens, padding: Any = None) -> Array:
        """Logits of every position, ``[batch, length, vocab]``; large (1 MB per position at 256 000)."""
        self.start(tokens, padding)
        self.finish()
        return np.concatenate([tile for _, _, tile in self.logit_tiles()], axis=-1)

    def hidden_states(self, tokens: Tokens, padding: Any = None) -> list[Array]:
        """The embedded tokens, then every block's output: ``num_hidden_layers + 1`` arrays."""
        first = self.start(tokens, padding)
        if first is None:
            raise self._cannot("blocks")
        return [first, *(self.advance() for _ in range(self.config.num_hidden_layers))]

    @abstractmethod
    def close(self) -> None:
        """Let go of files and memory."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _cannot(self, ability: str) -> UsageError:
        has = ", ".join(a for a in ABILITIES if a in self.gives)
        return UsageError(f"the {self.name} runner does not give {ability}; it gives {has}.")

    def _begin(self, tokens: Tokens, padding: Any) -> Batch:
        self.batch = as_batch(tokens, padding, self.config.vocab_size)
        self.layer = 0
        return self.batch

    def _next_layer(self) -> int:
        """The block to run now, or an error when there is none."""
        if self.batch is None:
            raise UsageError("no batch: call start(tokens) first.")
        if self.layer >= self.config.num_hidden_layers:
            raise UsageError(
                f"all {self.layer} blocks have run; call start(tokens) for a new batch."
            )
        return self.layer

    def _last_layer(self) -> int:
        """The block that ran last, or an error when none has."""
        if self.layer == 0:
            raise UsageError("no block has run; call advance() first.")
        return self.layer - 1

    def _all_ran(self) -> Batch:
        """The batch, or an error when blocks are left to run."""
        if self.batch is None:
            raise UsageError("no batch: call start(tokens) first.")
        if self.layer < self.config.num_hidden_layers:
            raise UsageError(
                f"{self.layer} of {self.config.num_hidden_layers} blocks have run; call finish() or advance() first."
            )
        return self.batch


def tile_edges(total: int, rows: int | None) -> Iterator[tuple[int, int]]:
    """``(start, stop)`` of tiles of ``rows`` rows (default :data:`TILE_ROWS`) over ``total``."""
    step = TILE_ROWS if rows is None else max(1, rows)
    for start in range(0, total, step):
        yield start, min(start + step, total)


class DecodeState:
    """Which slots of a cache are taken and where their tokens stand. Bookkeeping only.

    Attributes:
        used: slots taken.
        real: True where a slot holds a token that is no padding ``[batch, capacity]``.
        positions: position of every slot's token ``[batch, capacity]``.
    """

    def __init__(self, config: GemmaConfig, batch: int, capacity: int | None) -> None:
        self.capacity = config.max_position_embeddings if capacity is None else capacity
        if batch < 1 or self.capacity < 1:
            raise UsageError(f"batch {batch} and capacity {self.capacity} must be at least 1.")
        self.vocab_size = config.vocab_size
        self.used = 0
        self.real = np.zeros((batch, self.capacity), bool)
        self.positions = np.zeros((batch, self.capacity), np.int64)

    def take(self, tokens: Tokens, padding: Any) -> tuple[Batch, slice]:
        """Check the step's input and give it its slots."""
        before = self.real[:, : self.used].sum(1)
        new = as_batch(tokens, padding, self.vocab_size, offset=before if self.used else None)
        if len(new.tokens) != len(self.real):
            raise UsageError(
                f"this decoder was made for a batch of {len(self.real)}, the step has {len(new.tokens)} sequences."
            )
        if not (new.real[:, -1].all() and (self.used == 0 or new.real.all())):
            raise UsageError("for decoding, padding goes in front of the prompt only.")
        slots = slice(self.used, self.used + new.shape[1])
        if slots.stop > self.capacity:
            raise UsageError(
                f"the cache has room for {self.capacity} positions, this step needs {slots.stop}.",
                fix="make the decoder with a larger capacity.",
            )
        self.real[:, slots], self.positions[:, slots] = new.real, new.positions
        self.used = slots.stop
        return new, slots
