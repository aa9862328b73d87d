"""Sequences that the model writes itself: calibration without a corpus, in the model's own distribution.

Every sequence begins with BOS (and a user's turn where the model was tuned for chat) and goes on by sampling at
temperature 1, hotter for the first few tokens, so that the sequences part soon (arXiv 2410.17170 has such a schedule). The
end of a document, BOS and padding are never drawn, so all sequences have the same length. Many are written at once, one
position after another: every step reads all weights, from memory where they fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..convert.progress import SILENT, Tick
from ..formats.errors import NonFiniteError
from ..model import torch_gemma as tg
from ..model.config import GemmaConfig
from .calibration import Ids
from .weights import Weights

AT_ONCE = 64  # sequences; more gain nothing on a processor
HOT, HEAT = 8, 2.0  # tokens drawn at more than temperature 1, and the first one's
_PART = 1024  # tokens of the vocabulary whose shares are summed before one of them is chosen


def cache_bytes(config: GemmaConfig, length: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of one sequence's keys and values."""
    width = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * width * length * dtype.itemsize


def writing_dtype(weights_dtype: str) -> torch.dtype:
    """What to compute in: bfloat16 for a bfloat16 model where the processor multiplies it itself, else float32."""
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if weights_dtype == "bfloat16" and native() else torch.float32


def at_once(config: GemmaConfig, count: int, length: int, memory: int, dtype: torch.dtype) -> int:
    """How many sequences are written at once: all, up to :data:`AT_ONCE` and what their keys and values leave room for."""
    return max(1, min(count, AT_ONCE, memory // cache_bytes(config, length, dtype)))


def sample_sequences(
    weights: Weights,
    count: int,
    length: int,
    *,
    seed: int = 0,
    prefix: Sequence[int] = (),
    memory: int = 1 << 30,
    progress: Tick = SILENT,
) -> list[Ids]:
    """Let the model write.

    Args:
        weights: the model, in the dtype and on the device to compute with.
        count: sequences.
        length: tokens of each, BOS included.
        seed: of the draws; the same gives the same sequences on the same machine with the same number written at once.
        prefix: ids behind the BOS of every sequence.
        memory: bytes for keys and values; decides how many sequences are written at once.
        progress: told of tokens done.

    Returns:
        ``count`` arrays of ids ``[length]``.

    Raises:
        NonFiniteError: the model's output is not finite.
    """
    few = at_once(weights.checkpoint.config, count, length, memory, weights.dtype)
    # every sequence draws its own numbers, so that these do not depend on how many are written at once
    draws = [
        torch.rand(length, generator=torch.Generator().manual_seed(seed * 1_000_003 + i),
                   dtype=torch.float64)
        for i in range(count)
    ]  # fmt: skip
    out: list[Ids] = []
    for start in range(0, count, few):
        part = torch.stack(draws[start : start + few])
        ids = _write(weights, length, prefix, part, progress)
        out += [row.copy() for row in ids.numpy()]
    return out


@torch.no_grad()
def _write(
    weights: Weights, length: int, prefix: Sequence[int], draws: Tensor, progress: Tick
) -> Tensor:
    n, config = len(draws), weights.checkpoint.config
    begin = [config.bos_token_id, *prefix][: length - 1]
    ids = torch.empty(n, length, dtype=torch.int64)
    ids[:, : len(begin)] = torch.tensor(begin)
    rooms = [
        tg.Room(n, length, config, weights.dtype, weights.device)
        for _ in range(config.num_hidden_layers)
    ]
    norm = weights.final_norm()
    done = 0
    for end in range(len(begin), length):
        x = weights.embed(ids[:, done:end])
        positions = torch.arange(done, end, device=weights.device).expand(n, -1)
        for layer, room in enumerate(rooms):
            x, _ = tg.block(x, weights.block(layer), layer, config, positions, cache=room)
        hidden = tg.rms_norm(x[:, -1], norm, config.rms_norm_eps)
        ids[:, end] = _draw(_logits(hidden, weights), draws[:, end], _heat(end - len(begin)))
        progress(n, "writing calibration text")
        done = end
    return ids


def _heat(position: int) -> float:
    """The temperature, falling evenly to 1."""
    return 1.0 + (HEAT - 1.0) * max(0.0, 1.0 - position / HOT)


def _logits(hidden: Tensor, weights: Weights) -> Tensor:
    """float32 ``[sequences, vocab]``; what must not be drawn is minus infinity.

    Raises:
        NonFiniteError: one is NaN or infinite.
    """
    config = weights.checkpoint.config
    logits = torch.empty(len(hidden), config.vocab_size, device=hidden.device)
    for start, stop, rows in weights.table():
        logits[:, start:stop] = hidden @ rows.T
    logits = tg.soft_cap(logits, config.final_logit_softcapping)
    if not bool(torch.isfinite(logits.sum())):
        raise NonFiniteError(
            "the model's output is NaN or infinite while it writes calibration text.",
            where=weights.checkpoint.path, fix="check it with `g2verify compare`.",
        )  # fmt: skip
    never = [config.bos_token_id, config.filler, *config.eos_token_id[:1]]
    logits[:, never] = -torch.inf
    return logits


def _draw(logits: Tensor, draws: Tensor, heat: float) -> Tensor:
    """One id per row: where the sum of shares passes the row's number, first by parts of the vocabulary, then in one."""
    shares = torch.softmax(logits.div_(heat), -1)
    parts = torch.nn.functional.pad(shares, (0, -shares.shape[1] % _PART))
    parts = parts.view(len(shares), -1, _PART)
    sums = parts.sum(-1, dtype=torch.float64).cumsum(-1)
    want = draws.to(sums)[:, None] * sums[:, -1:]
    part = torch.searchsorted(sums, want, right=True).clamp_max(sums.shape[1] - 1)
    before = torch.where(part > 0, sums.gather(1, (part - 1).clamp_min(0)), 0.0)
    inside = parts.gather(1, part[..., None].expand(-1, 1, _PART))[:, 0].double()
    at = torch.searchsorted(inside.cumsum(-1), want - before, right=True)
    # rounding may leave a number behind the last share: take the last token that has one
    last = (inside > 0).to(torch.int64).mul(torch.arange(1, _PART + 1, device=at.device)).amax(1)
    return (part * _PART + torch.minimum(at, (last - 1).clamp_min(0)[:, None]))[:, 0].cpu()


def chat_prefix(tokenize: Callable[[str], list[int]], start: str) -> list[int]:
    """What a conversation begins with behind its BOS."""
    return [int(i) for i in np.array(tokenize(f"{start}user\n"), np.int64)]
