"""A checkpoint's weights as torch tensors, one block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from ..convert.open import Checkpoint, LazyTensor
from ..formats.dtypes import BF16
from ..formats.errors import NonFiniteError
from ..model import canonical

_ROWS = 1 << 22  # elements of the embedding at a time


class Weights:
    """Reads blocks of a checkpoint; keeps those that fit into ``budget`` bytes for the next time.

    Args:
        checkpoint: of any format.
        budget: bytes to keep; 0 keeps nothing.
        dtype: to read in.
        device: to put them on.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        budget: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype, self.device = dtype, torch.device(device)
        self._left = budget
        self._kept: dict[int, dict[str, Tensor]] = {}
        self._table: Tensor | None = None

    def _read(self, tensor: LazyTensor) -> Tensor:
        return self._placed(tensor.read(), tensor.name)

    def _placed(self, array: np.ndarray, name: str) -> Tensor:
        return as_tensor(array, name, self.dtype).to(self.device)

    def _fits(self, elements: int) -> bool:
        """Take room for a number of elements, if there is any."""
        nbytes = elements * self.dtype.itemsize
        if nbytes > self._left:
            return False
        self._left -= nbytes
        return True

    def block(self, layer: int) -> dict[str, Tensor]:
        """Canonical name -> tensor of a block's weights.

        Raises:
            NonFiniteError: NaN or infinity; names the tensor.
        """
        if layer in self._kept:
            return dict(self._kept[layer])
        names = canonical.layer_names(self.checkpoint.config, layer)
        found = {n: self._read(self.checkpoint.tensors[n]) for n in names}
        if self._fits(sum(t.numel() for t in found.values())):
            self._kept[layer] = dict(found)
        return found

    def final_norm(self) -> Tensor:
        """``[hidden_size]``."""
        return self._read(self.checkpoint.tensors[canonical.FINAL_NORM])

    def embed(self, tokens: Tensor) -> Tensor:
        """``[…, hidden_size]``: rows of the embedding, the factor rounded to the model's own dtype as the model does."""
        config = self.checkpoint.config
        table = self.checkpoint.tensors[canonical.EMBED]
        scale = torch.tensor(config.hidden_size**0.5, dtype=_model_dtype(table)).to(self.dtype)
        if self._table is not None:
            return self._table[tokens.to(self.device)] * scale.to(self.device)
        ids, place = torch.unique(tokens.cpu(), return_inverse=True)
        rows = torch.empty(len(ids), config.hidden_size, dtype=self.dtype, device=self.device)
        want = ids.numpy()
        for start, stop in _runs(want, _ROWS // config.hidden_size):
            at = slice(*np.searchsorted(want, (start, stop)))
            block = as_tensor(table.read_rows(start, stop), table.name, self.dtype)
            rows[at] = block[torch.from_numpy(want[at] - start)].to(self.device)
        return (rows * scale.to(self.device))[place.to(self.device)]

    def table(self) -> Iterator[tuple[int, int, Tensor]]:
        """``(first, behind, rows)`` of the output head."""
        table, config = self.checkpoint.tensors[canonical.EMBED], self.checkpoint.config
        vocab, width = config.vocab_size, config.hidden_size
        if self._table is None and self._fits(vocab * width):
            self._table = torch.empty(vocab, width, dtype=self.dtype, device=self.device)
            for start, stop, rows in self._parts(table, vocab, width):
                self._table[start:stop] = rows
        if self._table is not None:
            yield 0, vocab, self._table
        else:
            yield from self._parts(table, vocab, width)

    def _parts(
        self, table: LazyTensor, vocab: int, width: int
    ) -> Iterator[tuple[int, int, Tensor]]:
        step = max(1, _ROWS // width)
        for start in range(0, vocab, step):
            stop = min(start + step, vocab)
            yield start, stop, self._placed(table.read_rows(start, stop), table.name)


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
    return as_tensor(tensor.read(), tensor.name)


def as_tensor(array: np.ndarray, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """An array of any float type as a tensor, checked.

    Raises:
        NonFiniteError: NaN or infinity; names the tensor.
    """
    if array.dtype == BF16:
        raw = np.ascontiguousarray(array)
        raw = raw if raw.flags.writeable else raw.copy()
        found = torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16).to(dtype)
    else:
        found = torch.from_numpy(np.array(array, dtype=np.float32)).to(dtype)
    flat = found.view(-1)
    bad = sum(int((~torch.isfinite(flat[a : a + _ROWS])).sum()) for a in range(0, len(flat), _ROWS))
    if bad:
        raise NonFiniteError(
            f"{bad} of {found.numel()} weights are NaN or infinite.",
            tensor=name,
            fix="get the checkpoint again; nothing was written.",
        )
    return found
