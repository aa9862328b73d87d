"""Gemma 1 and 2 in JAX, written from the model's description alone: the second opinion on every other implementation.

Sources: Gemma (arXiv 2403.08295) and Gemma 2 (arXiv 2408.00118) section 2; RMSNorm (arXiv 1910.07467); RoPE
(arXiv 2104.09864) in its half-split form; GELU's tanh form (arXiv 1606.08415). Must not import or imitate
``model/torch_gemma.py``: two implementations that share a mistake agree.

Axes: b batch, t query positions, s key positions, n query heads, k key/value heads, h head width, d hidden, f feed-forward,
v vocabulary. Weights keep the canonical order, out before in, with heads apart.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from ...model import canonical as c
from ...model.config import GemmaConfig

Weights = dict[str, jax.Array]
Taps = dict[str, jax.Array]
# name template -> axes with heads apart; a mesh's `model` axis divides n, k, f and v
AXES = {
    c.Q: "nhd", c.K: "khd", c.V: "khd", c.O: "dnh", c.GATE: "fd", c.UP: "fd", c.DOWN: "df",
    c.INPUT_NORM: "d", c.POST_ATTENTION_NORM: "d", c.PRE_FFW_NORM: "d", c.POST_FFW_NORM: "d",
    c.EMBED: "vd", c.FINAL_NORM: "d",
}  # fmt: skip
# role in a block -> name template; the same name is another role in the other family
NORMS = {
    "gemma": {"before_attn": c.INPUT_NORM, "before_mlp": c.POST_ATTENTION_NORM},
    "gemma2": {
        "before_attn": c.INPUT_NORM,
        "after_attn": c.POST_ATTENTION_NORM,
        "before_mlp": c.PRE_FFW_NORM,
        "after_mlp": c.POST_FFW_NORM,
    },
}
EVERYTHING = 2**30  # the window of a layer that has none


def wide(dtype: Any) -> Any:
    """The type sums and non-linear functions are computed in."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum summed in the wide type; HIGHEST keeps float32 from TF32 and bfloat16 passes on accelerators."""
    return jnp.einsum(
        spec, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=wide(a.dtype)
    )


def norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """``x / rms(x) * (1 + gain)`` along the last axis."""
    y = x.astype(wide(x.dtype))
    power = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
    return (y * jax.lax.rsqrt(power + eps) * (1 + gain.astype(y.dtype))).astype(x.dtype)


def turn(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """RoPE: the pair ``(i, i + h/2)`` of ``x[b, t, heads, h]`` turned by ``positions[b, t] * base^(-2i/h)``."""
    y = x.astype(wide(x.dtype))
    half = x.shape[-1] // 2
    frequency = jnp.power(jnp.asarray(base, y.dtype), -jnp.arange(half, dtype=y.dtype) / half)
    angle = positions.astype(y.dtype)[:, :, None, None] * frequency
    first, second = y[..., :half], y[..., half:]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def cap(x: jax.Array, limit: float | None) -> jax.Array:
    """``limit * tanh(x / limit)``, or ``x`` where there is no limit."""
    return x if limit is None else limit * jnp.tanh(x / limit)


def gelu(x: jax.Array) -> jax.Array:
    """GELU's tanh form."""
    return 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def visible(q_at: jax.Array, k_at: jax.Array, k_real: jax.Array, window: jax.Array) -> jax.Array:
    """``[b, t, s]``: a query sees a real key at its own position or before it, fewer than ``window`` back."""
    back = q_at[:, :, None] - k_at[:, None, :]
    return (back >= 0) & (back < window) & k_real[:, None, :]


def attend(
    q: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array, config: GemmaConfig
) -> tuple[jax.Array, jax.Array]:
    """Soft-capped attention of ``q[b,t,n,h]`` over ``keys[b,s,k,h]``; also the scores before the cap ``[b,n,t,s]``."""
    groups = q.shape[2] // keys.shape[2]  # query head i listens to key head i // groups
    keys, values = (jnp.repeat(x, groups, axis=2) for x in (keys, values))
    scores = product("btnh,bsnh->bnts", q, keys)
    kept = jnp.where(seen[:, None], cap(scores, config.attn_logit_softcapping), -jnp.inf)
    top = jnp.max(kept, axis=-1, keepdims=True)
    # a padding query may see nothing at all: weight zero everywhere, not NaN
    weight = jnp.exp(kept - jnp.where(jnp.isfinite(top), top, 0))
    share = weight / jnp.maximum(
        jnp.sum(weight, axis=-1, keepdims=True), jnp.finfo(weight.dtype).tiny
    )
    return product("bnts,bsnh->btnh", share.astype(q.dtype), values).astype(q.dtype), scores


@functools.partial(jax.jit, static_argnames=("config", "chunk", "tapped"))
def block(
    x: jax.Array,
    w: Weights,
    q_at: jax.Array,
    k_at: jax.Array,
    k_real: jax.Array,
    window: jax.Array,
    cache: tuple[jax.Array, jax.Array] | None,
    slot: jax.Array,
    *,
    config: GemmaConfig,
    chunk: int,
    tapped: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array], Taps]:
    """One decoder block.

    Args:
        x: ``[b, t, d]``.
        w: name template -> weight with heads apart (:data:`AXES`).
        q_at: positions of the queries ``[b, t]``.
        k_at: positions of the keys ``[b, s]``; without a cache ``s`` is ``t``.
        k_real: which keys are no padding and taken ``[b, s]``.
        window: keys a query sees, itself included.
        cache: keys and values ``[b, s, k, h]`` so far.
        slot: where in the cache these positions go.
        config: the model.
        chunk: queries whose scores are in memory at a time.
        tapped: return intermediates too.

    Returns:
        ``(output, keys and values, intermediates)``.
    """
    dtype, eps, norms = x.dtype, config.rms_norm_eps, NORMS[config.family]
    taps: Taps = {}
    y = taps["attn_in"] = norm(x, w[norms["before_attn"]], eps)
    q = product("btd,nhd->btnh", y, w[c.Q]).astype(dtype)
    k = product("btd,khd->btkh", y, w[c.K]).astype(dtype)
    v = product("btd,khd->btkh", y, w[c.V]).astype(dtype)
    q = turn(q, q_at, config.rope_theta) * jnp.asarray(config.query_pre_attn_scalar**-0.5, dtype)
    k = turn(k, q_at, config.rope_theta)
    if cache is not None:
        k, v = (
            jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=1)
            for old, new in zip(cache, (k, v), strict=True)
        )
    mixed, scores = [], []
    for start in range(0, x.shape[1], chunk):
        part = slice(start, start + chunk)
        seen = visible(q_at[:, part], k_at, k_real, window)
        out, raw = attend(q[:, part], k, v, seen, config)
        mixed.append(out)
        scores.append(raw)
    y = jnp.concatenate(mixed, axis=1)
    taps["scores"] = jnp.concatenate(scores, axis=2) if tapped else jnp.zeros(())
    taps["o_in"] = y.reshape(*y.shape[:2], -1)
    y = taps["attn_out"] = product("btnh,dnh->btd", y, w[c.O]).astype(dtype)
    if "after_attn" in norms:
        y = norm(y, w[norms["after_attn"]], eps)
    x = taps["after_attn"] = x + y
    y = taps["mlp_in"] = norm(x, w[norms["before_mlp"]], eps)
    gate = gelu(product("btd,fd->btf", y, w[c.GATE])).astype(dtype)
    y = taps["down_in"] = gate * product("btd,fd->btf", y, w[c.UP]).astype(dtype)
    y = taps["mlp_out"] = product("btf,df->btd", y, w[c.DOWN]).astype(dtype)
    if "after_mlp" in norms:
        y = norm(y, w[norms["after_mlp"]], eps)
    x = taps["out"] = x + y
    return x, (k, v), taps if tapped else {}


@functools.partial(jax.jit, static_argnames="config")
def embed(rows: jax.Array, index: jax.Array, *, config: GemmaConfig) -> jax.Array:
    """``rows[index]`` times sqrt(d), the factor rounded to the compute type first."""
    return rows[index] * jnp.asarray(math.sqrt(config.hidden_size), rows.dtype)


@functools.partial(jax.jit, static_argnames="config")
def final_norm(x: jax.Array, gain: jax.Array, *, config: GemmaConfig) -> jax.Array:
    """The norm before the output head."""
    return norm(x, gain, config.rms_norm_eps)


@functools.partial(jax.jit, static_argnames="config")
def unembed(x: jax.Array, rows: jax.Array, *, config: GemmaConfig) -> jax.Array:
    """Logits ``[b, t, rows]`` of final hidden states against unscaled embedding rows, soft-cap applied, in the wide type."""
    return cap(product("btd,vd->btv", x, rows), config.final_logit_softcapping)
