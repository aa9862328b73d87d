"""What rounding lost, on held-out sequences that decided nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..convert.open import Checkpoint
from ..model import canonical
from ..model import torch_gemma as tg
from ..model.logits import compare
from ..model.logits_stats import Record
from ..model.logits_summary import Summary, summarise
from .calibration import Ids
from .recover import relative_error
from .states import States
from .weights import read

Pairs = Iterable[
    tuple[Tensor, Tensor]
]  # states of the original, of the rounded model [length, width]


class Judge:
    """Measures.

    Args:
        checkpoint: the original.
        held: held-out sequences.
        first: those before it choose between methods, so they do not measure.
    """

    def __init__(self, checkpoint: Checkpoint, held: Sequence[Ids], first: int) -> None:
        self.held = held
        self._checkpoint, self._first = checkpoint, first
        self._tokens = sum(map(len, held))

    def pairs(self, states: States, row: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """States of the sequences that measure.

        Args:
            states: of the rounded model, all held-out sequences, and directly behind them those of the original.
            row: where the first held-out sequence begins.
        """
        row += sum(map(len, self.held[: self._first]))
        for ids in self.held[self._first :]:
            at = row + self._tokens
            yield states.read(at, at + len(ids)), states.read(row, row + len(ids))
            row += len(ids)

    def error(self, pairs: Pairs) -> float:
        """Root mean square over tokens of the states' relative difference."""
        total = count = 0.0
        for a, b in pairs:
            total += float(relative_error(b.double(), a.double()))
            count += len(a)
        return float((total / count) ** 0.5)

    def quality(self, pairs: Pairs, norm: Tensor | None = None) -> dict[str, Any]:
        """Figures of a report.

        Args:
            pairs: of the last block's output.
            norm: the rounded model's final norm, where it is another.
        """
        config, tensors = self._checkpoint.config, self._checkpoint.tensors
        own = read(tensors[canonical.FINAL_NORM])
        records = []
        for i, (ref, rounded) in enumerate(pairs):
            ids = torch.from_numpy(self.held[self._first + i])
            targets = torch.cat([ids[1:], torch.tensor([-1])])
            one = tg.rms_norm(ref, own, config.rms_norm_eps)
            two = tg.rms_norm(rounded, own if norm is None else norm, config.rms_norm_eps)
            stats = compare(
                one, two, tensors[canonical.EMBED], cap=config.final_logit_softcapping,
                targets=targets, vocab=config.vocab_size, scratch=64 << 20,
            )  # fmt: skip
            records.append(Record(f"held/{i:05}", "held-out", stats))
        return quality(summarise(records))


def quality(summary: Summary) -> dict[str, Any]:
    """The figures of a report: divergence from the original, agreement, perplexities, with 95 % intervals."""
    o, intervals = summary.overall, summary.intervals
    kl = o.metrics.get("kl")

    def interval(name: str) -> list[float | None] | None:
        found = intervals.get(name)
        return None if found is None or found.low is None else [found.low, found.high]

    return {
        "sequences": o.documents,
        "positions": o.positions,
        "kl": None if kl is None else kl.mean,
        "kl_interval": interval("kl"),
        "kl_percentiles": {} if kl is None else kl.percentiles,
        "top1_agreement": o.agreement,
        "top1_agreement_interval": interval("agreement"),
        "perplexity": o.perplexity_cand,
        "perplexity_original": o.perplexity_ref,
        "perplexity_ratio_interval": interval("perplexity_ratio"),
    }
