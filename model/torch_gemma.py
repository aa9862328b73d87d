"""Gemma 1 and 2 forward pass in torch, one block at a time.

Pure functions over canonical weights, so a caller holds one block in memory, trains, or swaps a linear layer for a
quantized kernel (``linear``). Attention is written out: no fused kernel knows both soft-cap and sliding window.
Source: Gemma 2 report (arXiv 2408.00118) section 2 and the official implementations' order of casts: norms and RoPE
in float32, the embedding scale rounded to the activation dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from . import canonical
from .config import GemmaConfig

Weights = Mapping[str, Tensor]
Linear = Callable[[str, Tensor, Tensor], Tensor]  # (canonical name, x, weight) -> x @ weight.T
Cache = tuple[Tensor, Tensor]  # keys, values: [batch, kv_heads, positions, head_dim]
Tap = Callable[[str, Tensor], None]


def plain_linear(name: str, x: Tensor, weight: Tensor) -> Tensor:
    """The ordinary matrix product; ``weight`` is ``[out_features, in_features]``."""
    return torch.nn.functional.linear(x, weight)


def no_tap(name: str, x: Tensor) -> None:
    """Look at nothing."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * (1 + weight)`` over the last axis, computed in at least float32, in x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return (y * (1.0 + weight.to(wide))).to(x.dtype)


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """``cap * tanh(x / cap)``, or x without a cap."""
    return x if cap is None else torch.tanh(x / cap) * cap


def rope_tables(
    positions: Tensor, config: GemmaConfig, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine for positions ``[batch, length]``; each ``[batch, 1, length, head_dim / 2]``."""
    half = config.head_dim // 2
    wide = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(half, device=positions.device, dtype=wide) / half
    angle = positions.to(wide)[:, None, :, None] * config.rope_theta**-exponent
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs ``(i, i + head_dim / 2)``; x is ``[batch, heads, length, head_dim]``."""
    cos, sin = rope
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def attention_mask(
    queries: Tensor, keys: Tensor, window: int | None, padding: Tensor | None
) -> Tensor:
    """True where a query may look: ``0 <= q - k`` and, in local layers, ``q - k < window``.

    Args:
        queries: positions ``[batch, q]``.
        keys: positions ``[batch, k]``.
        window: sliding window, or None.
        padding: True for real keys, ``[batch, k]``, or None.

    Returns:
        ``[batch, 1, q, k]`` bool.
    """
    distance = queries[:, :, None] - keys[:, None, :]
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    if padding is not None:
        mask &= padding[:, None, :]
    return mask[:, None]


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, config: GemmaConfig, tap: Tap = no_tap
) -> Tensor:
    """Grouped-query attention with soft-capped scores; q ``[batch, heads, q, head_dim]``."""
    batch, heads, length, size = q.shape
    kv, keys = k.shape[1:3]
    # heads that share keys are rows of one product: nothing is repeated
    rows = heads // kv * length
    q = (q * config.query_pre_attn_scalar**-0.5).reshape(batch, kv, rows, size)
    scores = (q @ k.transpose(-1, -2)).view(batch, heads, length, keys)
    tap("scores", scores)
    scores = soft_cap(scores, config.attn_logit_softcapping)
    # a finite floor, as in the official code: a fully masked row (padding) stays finite
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    wide = torch.promote_types(q.dtype, torch.float32)
    shares = torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype)
    return (shares.view(batch, kv, rows, keys) @ v).view(batch, heads, length, size)


class Room:
    """A block's keys and values with room for those to come: a cache that is not copied to grow.

    Args:
        batch: sequences.
        length: positions there will be.
        config: the model.
        dtype: of keys and values.
        device: where they lie.
    """

    def __init__(
        self, batch: int, length: int, config: GemmaConfig, dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        shape = (batch, config.num_key_value_heads, length, config.head_dim)
        self._keys, self._values = (
            torch.empty(shape, dtype=dtype, device=device) for _ in range(2)
        )
        self.past = 0

    def extend(self, k: Tensor, v: Tensor) -> Cache:
        """Put positions behind those there are; all of them."""
        end = self.past + k.shape[2]
        self._keys[:, :, self.past : end], self._values[:, :, self.past : end] = k, v
        self.past = end
        return self._keys[:, :, :end], self._values[:, :, :end]


def embed(tokens: Tensor, table: Tensor, config: GemmaConfig) -> Tensor:
    """Rows of the embedding times sqrt(hidden_size), the factor rounded to the table's dtype first."""
    return table[tokens] * torch.tensor(math.sqrt(config.hidden_size), dtype=table.dtype)


def heads(
    template: str, y: Tensor, weights: Weights, layer: int, config: GemmaConfig, linear: Linear
) -> Tensor:
    """A projection of normed states as heads ``[batch, heads, length, head_dim]``."""
    name = template.format(i=layer)
    flat = linear(name, y, weights[name])
    return flat.view(*y.shape[:2], -1, config.head_dim).transpose(1, 2)


def keys_values(
    x: Tensor,
    weights: Weights,
    layer: int,
    config: GemmaConfig,
    positions: Tensor,
    *,
    linear: Linear = plain_linear,
) -> Cache:
    """What a block leaves in its cache for positions whose output nobody asks for; arguments as of :func:`block`."""
    y = rms_norm(x, weights[canonical.INPUT_NORM.format(i=layer)], config.rms_norm_eps)
    k, v = (heads(t, y, weights, layer, config, linear) for t in (canonical.K, canonical.V))
    return rotate(k, rope_tables(positions, config, x.dtype)), v


def block(
    x: Tensor,
    weights: Weights,
    layer: int,
    config: GemmaConfig,
    positions: Tensor,
    *,
    padding: Tensor | None = None,
    cache: Cache | Room | None = None,
    linear: Linear = plain_linear,
    tap: Tap = no_tap,
) -> tuple[Tensor, Cache]:
    """One decoder block.

    Args:
        x: ``[batch, length, hidden_size]``.
        weights: canonical name -> tensor; only this layer's names are read.
        layer: block index; decides local or global attention.
        config: the model.
        positions: absolute positions ``[batch, length]``.
        padding: True for real tokens among all keys ``[batch, keys]``.
        cache: keys and values of earlier positions; keys' positions are taken to end where ``positions`` begin.
        linear: how a matrix is applied; default the plain product.
        tap: called with the name and value of each intermediate.

    Returns:
        The block's output and the cache extended by these positions.
    """

    def w(template: str) -> Tensor:
        return weights[template.format(i=layer)]

    def project(template: str, y: Tensor) -> Tensor:
        return linear(template.format(i=layer), y, w(template))

    batch, length, _ = x.shape
    eps = config.rms_norm_eps
    rope = rope_tables(positions, config, x.dtype)

    y = rms_norm(x, w(canonical.INPUT_NORM), eps)
    tap("attn_in", y)
    q, k, v = (
        heads(t, y, weights, layer, config, linear) for t in (canonical.Q, canonical.K, canonical.V)
    )
    q, k = rotate(q, rope), rotate(k, rope)
    key_positions = positions
    if cache is not None:
        if isinstance(cache, Room):
            past = cache.past
            k, v = cache.extend(k, v)
        else:
            past = cache[0].shape[2]
            k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)
        back = torch.arange(-past, 0, device=positions.device)
        key_positions = torch.cat((positions[:, :1] + back, positions), dim=1)
    window = config.sliding_window if config.is_local(layer) else None
    mask = attention_mask(positions, key_positions, window, padding)
    y = attention(q, k, v, mask, config, tap).transpose(1, 2).reshape(batch, length, -1)
    tap("o_in", y)
    y = project(canonical.O, y)
    tap("attn_out", y)
    if config.has_post_norms:
        y = rms_norm(y, w(canonical.POST_ATTENTION_NORM), eps)
    x = x + y
    tap("after_attn", x)

    pre_ffw = canonical.PRE_FFW_NORM if config.has_post_norms else canonical.POST_ATTENTION_NORM
    y = rms_norm(x, w(pre_ffw), eps)
    tap("mlp_in", y)
    gate = torch.nn.functional.gelu(project(canonical.GATE, y), approximate="tanh")
    y = gate * project(canonical.UP, y)
    tap("down_in", y)
    y = project(canonical.DOWN, y)
    tap("mlp_out", y)
    if config.has_post_norms:
        y = rms_norm(y, w(canonical.POST_FFW_NORM), eps)
    x = x + y
    tap("out", x)
    return x, (k, v)


def unembed(x: Tensor, norm: Tensor, table: Tensor, config: GemmaConfig) -> Tensor:
    """Final norm, product with the (unscaled, tied) embedding, soft-cap. Returns ``[…, vocab]``."""
    y = rms_norm(x, norm, config.rms_norm_eps)
    return soft_cap(torch.nn.functional.linear(y, table), config.final_logit_softcapping)


def forward(
    tokens: Tensor,
    weights: Weights,
    config: GemmaConfig,
    *,
    padding: Tensor | None = None,
    linear: Linear = plain_linear,
    tap: Callable[[int, str, Tensor], None] | None = None,
) -> Tensor:
    """Logits ``[batch, length, vocab]`` for token ids ``[batch, length]``.

    Args:
        tokens: ids; the first should be BOS.
        weights: canonical name -> tensor, all in one dtype.
        config: the model.
        padding: True for real tokens ``[batch, length]``; positions count real tokens only.
        linear: how a matrix is applied.
        tap: called with layer, name and value of each intermediate.
    """
    if padding is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    else:
        positions = (padding.long().cumsum(-1) - 1).clamp(min=0)
    table = weights[canonical.EMBED]
    x = embed(tokens, table, config)
    for i in range(config.num_hidden_layers):

        def layer_tap(name: str, value: Tensor, layer: int = i) -> None:
            if tap is not None:
                tap(layer, name, value)

        x, _ = block(
            x, weights, i, config, positions, padding=padding, linear=linear, tap=layer_tap
        )
    return unembed(x, weights[canonical.FINAL_NORM], table, config)
