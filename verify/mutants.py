"""Known mistakes of converters and engines, made on purpose, to see whether a comparison notices them.

A mutant is the reference with one thing changed: a hyper-parameter, some weights, or a step of the computation. Sources:
mistakes found in the wild (soft-caps, window, norms, BOS, layouts) and the ones a layout table can make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..convert.open import Checkpoint, LazyTensor
from ..formats.dtypes import BF16, F16, F32, F64
from ..model import canonical
from ..model.config import GemmaConfig
from .block_errors import EMBEDDING
from .views import changed, edited, renamed, shifted_rows

Array = np.ndarray[Any, np.dtype[Any]]
# bit that multiplies by 2**16, or divides by it where it is set (float16 has no such bit: its highest exponent bit)
_EXPONENT_BIT = {BF16: 7 + 4, F32: 23 + 4, F64: 52 + 4, F16: 14}
_WHOLE = {2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        id: short name.
        title: what was done, in words.
        checkpoint: the reference with the mistake.
        layers: blocks that must differ by themselves; empty where no block does (embedding, final norm, head: see ``place``).
        place: layer number where the models part: -1 the embedding, the number of blocks the final norm, one more the head.
        kind: ``config``, ``weight`` or ``code``: what no file says.
        window: whether it shows only beyond the sliding window.
        activation: for ``code``: name of the activation in :mod:`.rounding` to run with.
    """

    id: str
    title: str
    checkpoint: Checkpoint
    layers: tuple[int, ...]
    place: int
    kind: str
    window: bool = False
    activation: str | None = None

    @property
    def all_layers(self) -> bool:
        """Whether every block is changed."""
        return len(self.layers) == self.checkpoint.config.num_hidden_layers


@dataclass(frozen=True)
class ExchangedLayers(GemmaConfig):
    """Local and global layers exchanged, or in ``exchanged`` layers only. No file can say this; code can do it."""

    exchanged: tuple[int, ...] | None = field(default=None)

    def is_local(self, layer: int) -> bool:
        """See :class:`GemmaConfig`."""
        swap = self.exchanged is None or layer in self.exchanged
        usual = layer % 2 == 0
        return self.sliding_window is not None and usual != swap


def mutants(checkpoint: Checkpoint) -> Iterator[Mutant]:
    """Every mistake that this model can have, one after the other."""
    for make in _MAKERS:
        yield from make(checkpoint)


def middle_layer(config: GemmaConfig) -> int:
    """The block that gets a weight fault: in the middle, so that some come before and some after it."""
    return config.num_hidden_layers // 2


# ---- hyper-parameters ---------------------------------------------------------------------------------------------


def _with(config: GemmaConfig, **changes: Any) -> GemmaConfig:
    return config.with_(**changes)


def _exchanged(config: GemmaConfig, layers: tuple[int, ...] | None) -> GemmaConfig:
    values = {n: getattr(config, n) for n in GemmaConfig.__dataclass_fields__}
    return ExchangedLayers(**values, exchanged=layers)


def _config_mutant(
    c: Checkpoint, name: str, title: str, config: GemmaConfig, layers: Iterable[int], **more: Any
) -> Mutant:
    found = tuple(layers)
    kind = "code" if isinstance(config, ExchangedLayers) else "config"
    return Mutant(name, title, changed(c, config=config), found, found[0], kind, **more)


def _window(c: Checkpoint) -> Iterator[Mutant]:
    config = c.config
    if config.sliding_window is None:
        return
    every = range(config.num_hidden_layers)
    local = [i for i in every if config.is_local(i)]
    at = next((i for i in local if i >= middle_layer(config)), local[-1])
    w = config.sliding_window
    rows: list[tuple[str, str, GemmaConfig, Iterable[int]]] = [
        ("window-off", "sliding window off", _with(config, sliding_window=None), local),
        ("window-by-one", f"sliding window {w + 1} instead of {w}", _with(config, sliding_window=w + 1), local),
        ("layers-flipped", "local and global layers exchanged", _exchanged(config, None), every),
        ("layer-global", f"layer {at} without its sliding window", _exchanged(config, (at,)), [at]),
    ]  # fmt: skip
    for name, title, wrong, layers in rows:
        yield _config_mutant(c, name, title, wrong, layers, window=True)


def _numbers(c: Checkpoint) -> Iterator[Mutant]:
    config = c.config
    every = range(config.num_hidden_layers)
    if config.attn_logit_softcapping is not None:
        wrong = _with(config, attn_logit_softcapping=None)
        yield _config_mutant(c, "attention-cap", "attention soft-cap missing", wrong, every)
    if config.final_logit_softcapping is not None:
        wrong = _with(config, final_logit_softcapping=None)
        head = len(every) + 1
        yield Mutant("final-cap", "final soft-cap missing", changed(c, config=wrong), (), head, "config")  # fmt: skip
    scale = _other_scale(config)
    wrong = _with(config, query_pre_attn_scalar=scale)
    title = f"query_pre_attn_scalar {scale:g} instead of {config.query_pre_attn_scalar:g}"
    yield _config_mutant(c, "query-scale", title, wrong, every)
    theta = config.rope_theta * 50
    wrong = _with(config, rope_theta=theta)
    title = f"RoPE base {theta:g} instead of {config.rope_theta:g}"
    yield _config_mutant(c, "rope-base", title, wrong, every)
    eps = float(f"{config.rms_norm_eps * 10:.6g}")
    title = f"norm epsilon {eps:g} instead of {config.rms_norm_eps:g}"
    yield _config_mutant(c, "norm-epsilon", title, _with(config, rms_norm_eps=eps), every)


def _other_scale(config: GemmaConfig) -> float:
    """The other rule for it: head_dim where the model has hidden_size / heads, and the other way round."""
    rules = (float(config.head_dim), config.hidden_size / config.num_attention_heads)
    other = [r for r in rules if r != config.query_pre_attn_scalar]
    return other[0] if other else config.query_pre_attn_scalar * 1.125


def _activation(c: Checkpoint) -> Iterator[Mutant]:
    every = tuple(range(c.config.num_hidden_layers))
    title = "exact GELU instead of its tanh approximation"
    yield Mutant("gelu-erf", title, c, every, 0, "code", activation="erf_gelu")


# ---- weights ------------------------------------------------------------------------------------------------------


def _weight_mutant(
    c: Checkpoint, name: str, title: str, tensors: dict[str, LazyTensor], layers: tuple[int, ...]
) -> Mutant:
    return Mutant(name, title, changed(c, tensors), layers, layers[0], "weight")


def _edit(
    c: Checkpoint, template: str, layer: int, edit: Callable[[Array], Array]
) -> dict[str, LazyTensor]:
    name = template.format(i=layer)
    return {name: edited(c.tensors[name], edit)}


def _swap(c: Checkpoint, *pairs: tuple[str, str]) -> dict[str, LazyTensor]:
    """Tensors with each other's values."""
    t = c.tensors
    both = [*pairs, *((b, a) for a, b in pairs)]
    return {a: renamed(t[a], t[b]) for a, b in both}


def _add_one(w: Array) -> Array:
    return (w.astype(np.float32) + 1).astype(w.dtype)


def _norms(c: Checkpoint) -> Iterator[Mutant]:
    config, at = c.config, middle_layer(c.config)
    names = [n for n, t in c.tensors.items() if len(t.shape) == 1]
    twice: dict[str, LazyTensor] = {n: edited(c.tensors[n], _add_one) for n in names}
    every = tuple(range(config.num_hidden_layers))
    yield _weight_mutant(c, "norms-plus-one", "1 added to the gain of every norm, which adds 1 itself", twice, every)  # fmt: skip
    one = _edit(c, canonical.INPUT_NORM, at, _add_one)
    yield _weight_mutant(c, "norm-plus-one", f"1 added to layer {at}'s input norm", one, (at,))
    last: dict[str, LazyTensor] = {
        canonical.FINAL_NORM: edited(c.tensors[canonical.FINAL_NORM], _add_one)
    }
    yield Mutant("final-norm", "1 added to the final norm's gain", changed(c, last), (), len(every), "weight")  # fmt: skip
    pairs = []
    if config.has_post_norms:
        which = "post-attention and pre-feed-forward norms"
        pairs.append(
            ("norms-swapped", which, canonical.POST_ATTENTION_NORM, canonical.PRE_FFW_NORM)
        )
    second = canonical.POST_FFW_NORM if config.has_post_norms else canonical.POST_ATTENTION_NORM
    pairs.append(("norms-swapped-2", "input norm and the last norm", canonical.INPUT_NORM, second))
    for name, which, a, b in pairs:
        tensors = _swap(c, (a.format(i=at), b.format(i=at)))
        yield _weight_mutant(c, name, f"layer {at}'s {which} exchanged", tensors, (at,))


def _matrices(c: Checkpoint) -> Iterator[Mutant]:
    at = middle_layer(c.config)
    gate, up = canonical.GATE.format(i=at), canonical.UP.format(i=at)
    yield _weight_mutant(c, "gate-up", f"layer {at}'s gate and up exchanged", _swap(c, (gate, up)), (at,))  # fmt: skip
    title = f"layer {at}'s keys in place of as many query rows, and back"
    yield _weight_mutant(c, "query-key", title, _query_key(c, at), (at,))
    other = at - 1 if at else at + 1
    if other < c.config.num_hidden_layers:
        low, high = sorted((at, other))
        pairs = [(t.format(i=low), t.format(i=high)) for t in canonical.LAYER_AXES[c.config.family]]
        title = f"layers {low} and {high} exchanged"
        yield _weight_mutant(c, "layers-swapped", title, _swap(c, *pairs), (low, high))
    row = _edit(c, canonical.V, at, _zero_row)
    yield _weight_mutant(c, "value-row", f"a row of layer {at}'s values is zero", row, (at,))
    double = _edit(c, canonical.DOWN, at, _double_largest)
    yield _weight_mutant(c, "one-weight", f"layer {at}: the largest weight of down_proj doubled", double, (at,))  # fmt: skip
    bit = _edit(c, canonical.O, at, _flip_exponent)
    yield _weight_mutant(c, "one-bit", f"layer {at}: an exponent bit of one weight of o_proj flipped", bit, (at,))  # fmt: skip


def _query_key(c: Checkpoint, layer: int) -> dict[str, LazyTensor]:
    q, k = (c.tensors[t.format(i=layer)] for t in (canonical.Q, canonical.K))
    rows = k.shape[0]

    def query(w: Array) -> Array:
        w[:rows] = k.read()
        return w

    return {q.name: edited(q, query), k.name: edited(k, lambda w: q.read()[: len(w)])}


def _zero_row(w: Array) -> Array:
    """The row of largest norm."""
    size = np.square(w.astype(np.float32)).sum(1)
    w[int(size.argmax())] = 0
    return w


def _double_largest(w: Array) -> Array:
    at = np.unravel_index(np.abs(w.astype(np.float32)).argmax(), w.shape)
    w[at] = w.dtype.type(2 * float(w[at]))
    return w


def _flip_exponent(w: Array) -> Array:
    """The bit is flipped where that makes the largest finite number."""
    whole = _WHOLE[w.dtype.itemsize]
    flipped = (w.view(whole) ^ whole(1 << _EXPONENT_BIT[w.dtype])).view(w.dtype)
    size = np.abs(flipped.astype(np.float64))
    at = np.unravel_index(np.where(np.isfinite(size), size, -1).argmax(), w.shape)
    w[at] = flipped[at]
    return w


def _embedding(c: Checkpoint) -> Iterator[Mutant]:
    tensors: dict[str, LazyTensor] = {canonical.EMBED: shifted_rows(c.tensors[canonical.EMBED])}
    yield Mutant("embedding-shifted", "embedding rows shifted by one", changed(c, tensors), (), EMBEDDING, "weight")  # fmt: skip


_MAKERS: tuple[Callable[[Checkpoint], Iterator[Mutant]], ...] = (
    _window, _numbers, _activation, _norms, _matrices, _embedding,
)  # fmt: skip
