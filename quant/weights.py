"""A checkpoint's weights as torch tensors, one block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from ..convert.open import Checkpoint, LazyTensor
from ..formats.errors import NonFiniteError
from ..model import canonical

_ROWS = 1 << 22  # elements of the embedding at a time


class Weights:
    """Reads blocks of a checkpoint in float32; keeps those that fit into ``budget`` bytes for the next time.

    Args:
        checkpoint: of any format.
        budget: bytes of float32 to keep; 0 keeps nothing.
    """

    def __init__(self, checkpoint: Checkpoint, budget: int = 0) -> None:
        self.checkpoint = checkpoint
        self._left = budget
        self._kept: dict[int, dict[str, Tensor]] = {}
        self._table: list[tuple[int, int, Tensor]] = []

    def block(self, layer: int) -> dict[str, Tensor]:
        """Canonical name -> float32 tensor of a block's weights.

        Raises:
            NonFiniteError: NaN or infinity; names the tensor.
        """
        if layer in self._kept:
            return dict(self._kept[layer])
        names = canonical.layer_names(self.checkpoint.config, layer)
        found = {n: read(self.checkpoint.tensors[n]) for n in names}
        size = sum(4 * t.numel() for t in found.values())
        if size <= self._left:
            self._left -= size
            self._kept[layer] = dict(found)
        return found

    def final_norm(self) -> Tensor:
        """float32 ``[hidden_size]``."""
        return read(self.checkpoint.tensors[canonical.FINAL_NORM])

    def embed(self, tokens: Tensor) -> Tensor:
        """float32 ``[…, hidden_size]``: rows of the embedding, the factor rounded to the model's own dtype as the model does."""
        config = self.checkpoint.config
        table = self.checkpoint.tensors[canonical.EMBED]
        ids, place = torch.unique(tokens, return_inverse=True)
        rows = torch.empty(len(ids), config.hidden_size)
        want = ids.numpy()
        for start, stop in _runs(want, _ROWS // config.hidden_size):
            at = slice(*np.searchsorted(want, (start, stop)))
            block = as_float32(table.read_rows(start, stop), table.name)
            rows[at] = block[torch.from_numpy(want[at] - start)]
        scale = torch.tensor(config.hidden_size**0.5, dtype=_model_dtype(table)).float()
        return (rows * scale)[place]

    def table(self) -> Iterator[tuple[int, int, Tensor]]:
        """``(first, behind, rows)`` of the output head, float32."""
        if self._table:
            yield from self._table
            return
        table, vocab = self.checkpoint.tensors[canonical.EMBED], self.checkpoint.config.vocab_size
        keep = 4 * vocab * self.checkpoint.config.hidden_size <= self._left
        kept = []
        step = max(1, _ROWS // self.checkpoint.config.hidden_size)
        for start in range(0, vocab, step):
            stop = min(start + step, vocab)
            block = (start, stop, as_float32(table.read_rows(start, stop), table.name))
            if keep:
                kept.append(block)
            yield block
        if keep:
            self._left -= 4 * vocab * self.checkpoint.config.hidden_size
            self._table = kept


def _runs(ids: np.ndarray, step: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most ``step`` rows that hold all sorted ids, few and short."""
    at = 0
    while at < len(ids):
        start = int(ids[at])
        at = int(np.searchsorted(ids, start + max(1, step)))
        yield start, int(ids[at - 1]) + 1


def _model_dtype(table: LazyTensor) -> torch.dtype:
    names: Mapping[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    return names.get(table.dtype.name, torch.float32)


def read(tensor: LazyTensor) -> Tensor:
    """A whole tensor in float32.

    Raises:
        NonFiniteError: NaN or infinity in it.
    """
    return as_float32(tensor.read(), tensor.name)


def as_float32(array: np.ndarray, name: str) -> Tensor:
    """An array of any float type as float32, checked.

    Raises:
        NonFiniteError: NaN or infinity; names the tensor.
    """
    found = torch.from_numpy(np.array(array, dtype=np.float32))
    if not bool(torch.isfinite(found).all()):
        bad = int((~torch.isfinite(found)).sum())
        raise NonFiniteError(
            f"{bad} of {found.numel()} weights are NaN or infinite.",
            tensor=name,
            fix="get the checkpoint again; nothing was written.",
        )
    return found
