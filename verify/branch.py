"""A model with a mistake, run only where it can differ from the reference, whose states of the other places are kept.

What a mistake changes is read off the two checkpoints: which blocks, embedding and final norm have other weights or
hyper-parameters, and, where only the sliding window differs, from which position on. Everything before is the reference's
own computation, to the bit, and so is an unchanged block on the reference's input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..convert.open import Checkpoint
from ..model import canonical
from ..model.config import GemmaConfig
from .runners.base import Array, Batch, Runner, Table, Tap, Tokens, as_batch

if TYPE_CHECKING:
    from .runners.torch_runner import TorchRunner

EXACT = ("float32", "float64")
# fields that no block reads
_OUTSIDE = frozenset({
    "final_logit_softcapping", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
})  # fmt: skip


@dataclass(frozen=True)
class Change:
    """Where a checkpoint can compute something else than another.

    Attributes:
        embedding: the embedded tokens (and the head's rows).
        blocks: these blocks.
        final: the final norm.
        head: the logits of equal final states.
        start: first position at which a block can differ.
    """

    embedding: bool
    blocks: frozenset[int]
    final: bool
    head: bool
    start: int = 0

    @staticmethod
    def between(ref: Checkpoint, cand: Checkpoint, *, code: bool = False) -> Change:
        """What differs, by the tensors' identity and the configurations.

        Args:
            ref: the reference.
            cand: made from it by :mod:`.views`.
            code: every block computes otherwise, whatever the checkpoint says.
        """
        a, b = ref.config, cand.config
        every = frozenset(range(a.num_hidden_layers))
        touched = {n for n, t in cand.tensors.items() if t is not ref.tensors[n]}
        weights = frozenset(int(n.split(".")[2]) for n in touched if ".layers." in n)
        fields = {n for n in GemmaConfig.__dataclass_fields__ if getattr(a, n) != getattr(b, n)}
        numbers = bool(fields - _OUTSIDE - {"sliding_window"})
        masks = frozenset(i for i in every if _window(a, i) != _window(b, i))
        embedding = canonical.EMBED in touched
        windows = [w for i in masks for w in (_window(a, i), _window(b, i)) if w is not None]
        whole = code or numbers or weights or embedding
        return Change(
            embedding=embedding,
            blocks=every if code or numbers else weights | masks,
            final=numbers or canonical.FINAL_NORM in touched,
            head=embedding or a.final_logit_softcapping != b.final_logit_softcapping,
            start=0 if whole else min(windows, default=0),
        )

    @property
    def first(self) -> int | None:
        """The first block that runs; None where none does."""
        return 0 if self.embedding else min(self.blocks, default=None)


def _window(config: GemmaConfig, layer: int) -> int | None:
    return config.sliding_window if config.is_local(layer) else None


class Remembered(Runner):
    """A runner that runs every batch once and keeps its hidden states."""

    name: ClassVar[str] = "remembered"
    gives: ClassVar[frozenset[str]] = frozenset({"blocks"})
    dtypes: ClassVar[tuple[str, ...]] = EXACT

    def __init__(self, base: TorchRunner) -> None:
        self.base, self.config, self.dtype = base, base.config, base.dtype
        self._kept: dict[bytes, tuple[Batch, tuple[list[Array], Array]]] = {}
        self._now: tuple[list[Array], Array] | None = None

    def states(self, batch: Batch) -> tuple[list[Array], Array]:
        """The embedded tokens and every block's output, and the final norm's; run if they were not yet."""
        key = repr(batch.shape).encode() + batch.tokens.tobytes() + batch.real.tobytes()
        if key not in self._kept:
            states = self.base.hidden_states(batch.tokens, batch.real)
            self._kept[key] = batch, (states, self.base.final_hidden())
        return self._kept[key][1]

    def prefix(self, tokens: Array) -> list[Array]:
        """States of one sequence ``[1, length, hidden]``: of a sequence that begins so where one is kept, which are the same."""
        n = len(tokens)
        for batch, (states, _) in self._kept.values():
            same = (batch.tokens[:, :n] == tokens).all(1) if batch.shape[1] >= n else np.array([])
            for row in np.flatnonzero(same):
                if batch.real[row, :n].all():
                    return [s[row : row + 1, :n] for s in states]
        return self.states(as_batch(tokens, None, self.config.vocab_size))[0]

    def start(self, tokens: Tokens, padding: Any = None) -> Array:
        """See :meth:`.runners.base.Runner.start`."""
        self._now = self.states(self._begin(tokens, padding))
        return self._now[0][0]

    def advance(self, tap: Tap | None = None) -> Array:
        """See :meth:`.runners.base.Runner.advance`."""
        if tap is not None:
            raise self._cannot("taps")
        self.layer = self._next_layer() + 1
        assert self._now is not None
        return self._now[0][self.layer]

    def final_hidden(self) -> Array:
        """See :meth:`.runners.base.Runner.final_hidden`."""
        self._all_ran()
        assert self._now is not None
        return self._now[1]

    def logit_tiles(
        self, rows: int | None = None, positions: slice = slice(None)
    ) -> Iterator[tuple[int, int, Array]]:
        """Not kept."""
        raise self._cannot("logits")

    def table(self) -> Table | None:
        """See :meth:`.runners.base.Runner.table`."""
        return self.base.table()

    def close(self) -> None:
        """Let go of the states; the base stays open."""
        self._kept, self._now = {}, None


class Branch(Runner):
    """A changed model beside a reference whose states are remembered.

    Args:
        base: the reference.
        own: runs the changed model.
        change: where it can differ.
    """

    name: ClassVar[str] = "branch"
    gives: ClassVar[frozenset[str]] = frozenset({"blocks", "replay"})
    dtypes: ClassVar[tuple[str, ...]] = EXACT

    def __init__(self, base: Remembered, own: TorchRunner, change: Change) -> None:
        self.base, self.own, self.change = base, own, change
        self.config, self.dtype = own.config, own.dtype
        self.ran = 0  # blocks computed, replays included

    def start(self, tokens: Tokens, padding: Any = None) -> Array:
        """See :meth:`.runners.base.Runner.start`."""
        batch = self._begin(tokens, padding)
        self._states, self._final = self.base.states(batch)
        embedded = self.own.start(batch.tokens, batch.real)
        self._same = not self.change.embedding
        self._x = self._states[0] if self._same else embedded
        return self._x

    def advance(self, tap: Tap | None = None) -> Array:
        """See :meth:`.runners.base.Runner.advance`."""
        if tap is not None:
            raise self._cannot("taps")
        layer = self._next_layer()
        self._same = self._same and layer not in self.change.blocks
        self._x = self._states[layer + 1] if self._same else self._run(layer, self._x)
        self.layer = layer + 1
        return self._x

    def replay(self, hidden: Array, tap: Tap | None = None) -> Array:
        """See :meth:`.runners.base.Runner.replay`."""
        if tap is not None:
            raise self._cannot("taps")
        layer = self._last_layer()
        if hidden is self._states[layer] and layer not in self.change.blocks:
            return self._states[layer + 1]
        return self._run(layer, hidden)

    def _run(self, layer: int, hidden: Array) -> Array:
        """A block; where it cannot differ from the reference, the reference's states."""
        there, start = self._states[layer + 1], self.change.start
        if start >= hidden.shape[1]:
            return there
        self.ran += 1
        found = self.own.block(layer, hidden, start)
        return np.concatenate([there[:, :start], found], axis=1) if start else found

    def final_hidden(self) -> Array:
        """See :meth:`.runners.base.Runner.final_hidden`."""
        self._all_ran()
        return self._final if self._same and not self.change.final else self._normed()

    def _normed(self) -> Array:
        start = 0 if self.change.final else self.change.start
        found = self.own.normed(self._x[:, start:])
        return np.concatenate([self._final[:, :start], found], axis=1) if start else found

    def logit_tiles(
        self, rows: int | None = None, positions: slice = slice(None)
    ) -> Iterator[tuple[int, int, Array]]:
        """Not made here."""
        raise self._cannot("logits")

    def table(self) -> Table:
        """See :meth:`.runners.base.Runner.table`."""
        return self.own.table()

    def close(self) -> None:
        """Close the changed model's runner."""
        self.own.close()
