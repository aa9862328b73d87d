"""The rounded model's logits pulled to the original's: scales and norm gains of all blocks, tuned by the KL divergence.

The original's final hidden states are kept; its logits and the rounded model's are made anew, a piece of the vocabulary at
a time. Going forwards only the hidden states between blocks are kept (on disk above ``--max-memory``); going backwards each
block is computed again with its gradients (gradient checkpointing, arXiv 1604.06174) and moved at once. So one block is
dense at any time, one matrix of it in backward, and memory does not grow with the number of blocks but for the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..formats.errors import NonFiniteError
from ..model import canonical
from ..model import torch_gemma as tg
from ..model.config import GemmaConfig
from ..model.logits import BLOCK_ROWS
from .recover import END_TO_END, Fit, Tuning, batch_of, gradients, leaves_of, rate_factor
from .tunable import GAIN, Block, Gain, Shifts, through

Table = Callable[[], Iterable[tuple[int, int, Tensor]]]


def divergence(
    wanted: Tensor, found: Tensor, table: Table, cap: float | None, *, gradient: bool
) -> tuple[float, Tensor | None]:
    """KL divergence of one model's next tokens from another's, both given before the output head.

    Args:
        wanted: normed final states of the original ``[tokens, hidden]``, float32.
        found: the other's.
        table: gives ``(first, behind, rows)`` of the output head, again and again; see :meth:`.weights.Weights.table`.
        cap: final soft-cap.
        gradient: wanted too.

    Returns:
        The sum over tokens of ``KL(original || other)``, and its gradient to ``found`` or None.
    """

    def pieces() -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        for _, _, block in table():
            for start in range(0, len(block), BLOCK_ROWS):
                rows = block[start : start + BLOCK_ROWS]
                yield rows, tg.soft_cap(wanted @ rows.T, cap), tg.soft_cap(found @ rows.T, cap)

    sums = torch.full((2, len(found), 1), -torch.inf, dtype=torch.float64, device=found.device)
    for _, a, b in pieces():
        both = torch.stack([x.logsumexp(1, keepdim=True).double() for x in (a, b)])
        sums = torch.logaddexp(sums, both)
    base = sums.float()
    total, grad = 0.0, torch.zeros_like(found) if gradient else None
    for rows, a, b in pieces():
        log_p, log_q = a - base[0], b - base[1]
        p, q = log_p.exp(), log_q.exp()
        # p log(p/q) + q - p is never negative, and the two further terms sum to zero over the vocabulary
        total += float((p * (log_p - log_q) + q - p).sum(dtype=torch.float64))
        if grad is not None:
            slope = q - p
            if cap is not None:
                slope *= 1.0 - (b / cap).square()
            grad.addmm_(slope, rows)
    return total, grad


@dataclass(frozen=True)
class Sequences:
    """A batch of one length.

    Attributes:
        ids: ``[count, length]``.
        wanted: the original's final states, not yet normed ``[count * length, hidden]``, when asked for.
    """

    ids: Tensor
    wanted: Callable[[], Tensor]


class Spill:
    """Hidden states between blocks of one batch; in memory. :class:`.work.States` serves where that is too much."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def put(self, layer: int, x: Tensor) -> None:
        """Keep the input of a block."""
        self._kept[layer] = x

    def get(self, layer: int) -> Tensor:
        """And give it back, once."""
        return self._kept.pop(layer)


class Distillation:
    """The end-to-end stage.

    Args:
        config: the model.
        dense: block's index -> its original weights.
        blocks: block's index -> what can move in it; may be made anew each time.
        norm: the final norm.
        embed: ids -> first hidden states.
        table: of the output head.
        train: batches to tune on.
        watch: batches to stop early by; without any, those to tune on.
        spill: where hidden states go.
        tuning: how far.
    """

    def __init__(
        self, config: GemmaConfig, dense: Callable[[int], Mapping[str, Tensor]],
        blocks: Callable[[int], Block], norm: Gain, embed: Callable[[Tensor], Tensor], table: Table,
        train: Sequence[Sequences], watch: Sequence[Sequences], spill: Any = None,
        tuning: Tuning = END_TO_END,
    ) -> None:  # fmt: skip
        self.config, self.tuning = config, tuning
        self._dense, self._blocks, self._norm = dense, blocks, norm
        self._embed, self._table = embed, table
        self._train, self._watch = train, watch or train
        self._spill = spill or Spill()
        self._names: dict[int, list[str]] = {}

    def begin(self) -> Fit:
        """Nothing moved yet."""
        shifts: Shifts = {canonical.FINAL_NORM: [torch.zeros_like(self._norm.start)]}
        kinds = {canonical.FINAL_NORM: [GAIN]}
        for layer in range(self.config.num_hidden_layers):
            block = self._blocks(layer)
            own = block.begin()
            self._names[layer] = list(own)
            shifts |= own
            kinds |= block.kinds()
        return Fit.begin(shifts, kinds, self.tuning)

    def run(self, fit: Fit, looked: Callable[[Fit], None], stepped: Callable[[], None]) -> None:
        """Go on to the end.

        Args:
            fit: of :meth:`begin`, or an interrupted one taken up.
            looked: called after each look at the watched sequences.
            stepped: called after each step.
        """

        def gradient(step: int) -> None:
            self._step(fit, self._train[batch_of(step, len(self._train), 0)], step)
            stepped()

        fit.run(gradient, lambda: self.loss(fit.shifts), "model", lambda: looked(fit))

    @torch.no_grad()
    def loss(self, shifts: Shifts) -> float:
        """KL per token on the watched sequences."""
        total = count = 0.0
        for batch in self._watch:
            x = self._forward(batch, shifts, keep=False)
            y = tg.rms_norm(x, self._final(shifts), self.config.rms_norm_eps).flatten(0, 1)
            total += divergence(
                self._wanted(batch), y, self._table, self.config.final_logit_softcapping,
                gradient=False,
            )[0]  # fmt: skip
            count += len(y)
        return total / count

    # ---- one step

    def _final(self, shifts: Shifts) -> Tensor:
        return through(self._norm.moved(shifts[canonical.FINAL_NORM][0]), self._norm.snap)

    def _wanted(self, batch: Sequences) -> Tensor:
        return tg.rms_norm(batch.wanted(), self._norm.start, self.config.rms_norm_eps)

    def _block(self, layer: int, x: Tensor, shifts: Shifts) -> Tensor:
        block = self._blocks(layer)
        weights = {**self._dense(layer), **block.norms(shifts)}
        positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        return tg.block(
            x, weights, layer, self.config, positions, linear=block.linear(shifts)
        )[0]  # fmt: skip

    @torch.no_grad()
    def _forward(self, batch: Sequences, shifts: Shifts, *, keep: bool) -> Tensor:
        x = self._embed(batch.ids)
        for layer in range(self.config.num_hidden_layers):
            if keep:
                self._spill.put(layer, x)
            x = self._block(layer, x, shifts)
        return x

    def _step(self, fit: Fit, batch: Sequences, step: int) -> None:
        factor = rate_factor(step, self.tuning.steps)
        grad = self._top(fit, batch, self._forward(batch, fit.shifts, keep=True), step, factor)
        for layer in reversed(range(self.config.num_hidden_layers)):
            names = self._names[layer]
            leaves = leaves_of(fit.shifts, names)
            x = self._spill.get(layer).detach().requires_grad_()
            with torch.enable_grad():
                self._block(layer, x, leaves).backward(grad)  # type: ignore[no-untyped-call]
            assert x.grad is not None
            grad = x.grad
            if not bool(torch.isfinite(grad).all()):
                raise NonFiniteError(
                    "the gradient of the divergence is NaN or infinite.",
                    tensor=canonical.DOWN.format(i=layer),
                    fix="use --recover none; nothing was written.",
                )
            fit.adam.step(names, gradients(leaves), step, factor)

    def _top(self, fit: Fit, batch: Sequences, x: Tensor, step: int, factor: float) -> Tensor:
        """Gradient at the last block's output; moves the final norm."""
        name = canonical.FINAL_NORM
        leaves = leaves_of(fit.shifts, [name])
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = tg.rms_norm(x, self._final(leaves), self.config.rms_norm_eps)
        flat = y.detach().flatten(0, 1)
        with torch.no_grad():
            _, slope = divergence(
                self._wanted(batch), flat, self._table, self.config.final_logit_softcapping,
                gradient=True,
            )  # fmt: skip
        assert slope is not None
        y.backward((slope / len(flat)).view_as(y))  # type: ignore[no-untyped-call]
        fit.adam.step([name], gradients(leaves), step, factor)
        assert x.grad is not None
        return x.grad
