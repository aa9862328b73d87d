"""GPTQ as the paper has it (arXiv 2210.17323, algorithm 1), written without g2kit's own quantizer: what others do.

Activation order, static groups (scales from the original weights, so that no g_idx is needed), 1 % damping, lazy updates
in blocks of 128, block after block on the inputs that the quantized blocks before give. Everything in float64, so that it
never fails for want of digits, unless asked otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from g2kit.model import canonical
from g2kit.model import torch_gemma as tg
from g2kit.model.config import GemmaConfig

Rounder = Callable[[str, Tensor, Tensor], Tensor]  # name, weight, mean(x x^T) -> rounded weight
BATCH = 8  # sequences


def grid(
    weight: Tensor, bits: int, group_size: int, symmetric: bool
) -> tuple[Tensor, Tensor | float]:
    """Scales (on the bfloat16 grid, as every scheme here) and zeros ``[out, in]``, one per weight."""
    groups = weight.view(len(weight), -1, group_size)
    if symmetric:
        scale = groups.abs().amax(-1) / (2 ** (bits - 1) - 0.5)
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = (high - low) / (2**bits - 1)
    scale = scale.clamp_min(1e-8).bfloat16().to(weight.dtype)
    wide = scale.repeat_interleave(group_size, 1)
    if symmetric:
        return wide, 2.0 ** (bits - 1)
    zero = torch.round(-low / scale).clamp(0, 2**bits - 1)
    return wide, zero.repeat_interleave(group_size, 1)


def nearest(weight: Tensor, scale: Tensor, zero: Tensor | float, bits: int) -> Tensor:
    """The nearest value of the grid."""
    return (torch.round(weight / scale + zero).clamp(0, 2**bits - 1) - zero) * scale


def rtn(weight: Tensor, bits: int, group_size: int, symmetric: bool = True) -> Tensor:
    """Rounding to nearest on the plain grid ``[out, in]``."""
    return nearest(weight, *grid(weight, bits, group_size, symmetric), bits)


def gptq(
    weight: Tensor, moments: Tensor, bits: int, group_size: int, symmetric: bool = True,
    *, damp: float = 0.01, block: int = 128, dtype: torch.dtype = torch.float64,
) -> Tensor:  # fmt: skip
    """The rounded weight.

    Args:
        weight: ``[out, in]``.
        moments: second moments of the inputs ``[in, in]``; only their proportions count.
        bits: per code.
        group_size: columns that share a scale.
        symmetric: or with a zero per group.
        damp: share of the mean diagonal that is added.
        block: columns between updates of all that follow.
        dtype: to compute in.
    """
    w, h = weight.to(dtype), moments.to(dtype)
    scale, zero = grid(w, bits, group_size, symmetric)
    dead = h.diagonal() == 0
    h = h + torch.diag(dead.to(dtype))
    w = w.masked_fill(dead, 0)
    order = h.diagonal().argsort(descending=True)
    w, h, scale = w[:, order], h[order][:, order], scale[:, order]
    zero = zero[:, order] if isinstance(zero, Tensor) else zero
    h.diagonal().add_(damp * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    q, n = torch.zeros_like(w), w.shape[1]
    for i in range(0, n, block):
        j = min(i + block, n)
        error = torch.zeros(len(w), j - i, dtype=w.dtype)
        for k in range(i, j):
            z = zero[:, k] if isinstance(zero, Tensor) else zero
            q[:, k] = nearest(w[:, k], scale[:, k], z, bits)
            error[:, k - i] = (w[:, k] - q[:, k]) / inverse[k, k]
            w[:, k:j] -= error[:, k - i, None] * inverse[k, k:j]
        w[:, j:] -= error @ inverse[i:j, j:]
    out = torch.empty_like(q)
    out[:, order] = q
    return out.to(weight.dtype)


class Watch:
    """A linear layer that sums ``x x^T`` of everything it is given."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def __call__(self, name: str, x: Tensor, weight: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        self.sums[name] = self.sums.get(name, 0) + rows.T @ rows
        return torch.nn.functional.linear(x, weight)


@torch.no_grad()
def quantize(
    weights: Mapping[str, Tensor], config: GemmaConfig, ids: Tensor, rounder: Rounder, *,
    propagate: bool = True,
) -> dict[str, Tensor]:  # fmt: skip
    """A model with every linear layer rounded, block after block.

    Args:
        weights: canonical name -> float32.
        config: the model.
        ids: calibration sequences ``[sequences, length]``.
        rounder: what to do with a weight.
        propagate: later blocks see what the rounded ones give, as in the paper; else what the original ones give.
    """
    out = dict(weights)
    states = [tg.embed(part, weights[canonical.EMBED], config) for part in ids.split(BATCH)]
    for layer in range(config.num_hidden_layers):
        watch = Watch()
        after = _through(layer, weights, states, config, watch)
        for name, moments in watch.sums.items():
            out[name] = rounder(name, weights[name], moments / ids.numel())
        states = _through(layer, out, states, config) if propagate else after
    return out


def _through(
    layer: int, weights: Mapping[str, Tensor], states: list[Tensor], config: GemmaConfig,
    linear: tg.Linear = tg.plain_linear,
) -> list[Tensor]:  # fmt: skip
    positions = torch.arange(states[0].shape[1])
    return [
        tg.block(x, weights, layer, config, positions.expand(x.shape[:2]), linear=linear)[0]
        for x in states
    ]
