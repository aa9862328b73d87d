"""The configuration when nothing but array shapes is known.

Flax and gemma_pytorch checkpoints carry no config. L, D, F, H, K and h tell the five released sizes
apart. What no checkpoint stores (query scale, soft-caps, window, RoPE base, epsilon) comes from the
released size or from the user, never from a guess.

Axes are those of :attr:`GemmaConfig.axes` plus ``layers``; where a container only shows products,
``(n h)`` and ``(k h)`` stand for them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from ..formats.errors import ConfigError, UnknownConfigError
from .canonical import shape_of
from .config import PRESETS, Family, GemmaConfig, Preset
from .config_known import BASES, SHAPE_FIELDS
from .config_reading import ConfigReading, Where

PADDING_ROWS = 128  # what Google's Flax releases add to the vocabulary for TPUs
_LABELS = {
    "layers": "num_hidden_layers", "d": "hidden_size", "f": "intermediate_size",
    "n": "num_attention_heads", "k": "num_key_value_heads", "h": "head_dim",
    "(n h)": "num_attention_heads * head_dim", "(k h)": "num_key_value_heads * head_dim",
    "vocab": "embedding rows",
}  # fmt: skip
_NEEDED = ("layers", "d", "f")
_UNSTORED = {
    "gemma": ("rope_theta", "rms_norm_eps"),
    "gemma2": ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "sliding_window",
               "rope_theta", "rms_norm_eps"),
}  # fmt: skip


def axis_sizes(config: GemmaConfig) -> dict[str, int]:
    """Every axis a shape can show, products included."""
    sizes = config.axes
    products = {axis: shape_of(axis, sizes)[0] for axis in ("(n h)", "(k h)")}
    return sizes | products | {"layers": config.num_hidden_layers}


def from_preset(name: str, label: str = "preset") -> ConfigReading:
    """A released model by name, such as ``gemma2-2b-it``.

    Raises:
        ConfigError: there is none of that name; the message lists them.
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset is called {name!r}.", fix=f"use one of {', '.join(PRESETS)}.")
    return _whole_preset(PRESETS[name], f"{label} {name}")


def _whole_preset(preset: Preset, origin: str) -> ConfigReading:
    return ConfigReading(preset.config, dict.fromkeys(preset.config.__dataclass_fields__, origin))


def from_shapes(family: Family, shapes: Mapping[str, int], where: Where = None) -> ConfigReading:
    """The released model that has these shapes.

    Args:
        family: Gemma 1 or 2; Gemma 2 has norms behind attention and feed-forward.
        shapes: axis -> size; ``layers``, ``d`` and ``f`` at least, the more the better. ``vocab``
            is the number of embedding rows and may differ from the release.
        where: checkpoint, for messages.

    Raises:
        ConfigError: no released size has these shapes; the message says what is missing and how to
            give it.
    """
    lacking = [axis for axis in _NEEDED if axis not in shapes]
    if lacking:
        raise ValueError(f"from_shapes needs the axes {', '.join(lacking)}")
    for preset in BASES.values():
        sizes = axis_sizes(preset.config)
        if preset.config.family == family and all(
            sizes[axis] == size for axis, size in shapes.items() if axis != "vocab"
        ):
            return _with_rows(preset, shapes.get("vocab"))
    raise _unknown(family, shapes, where)


def _with_rows(preset: Preset, rows: int | None) -> ConfigReading:
    reading = _whole_preset(preset, f"preset {preset.name}")
    origin = reading.origin | dict.fromkeys(
        SHAPE_FIELDS, f"shapes (preset {preset.name})"
    )  # fmt: skip
    config = preset.config
    if rows == config.vocab_size + PADDING_ROWS:
        origin["vocab_size"] = f"shapes ({rows} rows, {PADDING_ROWS} of them padding)"
    elif rows is not None:
        config = config.with_(vocab_size=rows)
        origin["vocab_size"] = "shapes"
    return ConfigReading(config, origin)


def _unknown(family: Family, shapes: Mapping[str, int], where: Where) -> ConfigError:
    found = ", ".join(f"{_LABELS[axis]} {size}" for axis, size in shapes.items())
    near = closest_preset(family, shapes)
    looks = f" It looks like {near}, but {shape_differences(near, shapes)}." if near else ""
    example = {"model_type": family} | {
        _LABELS[a]: shapes.get(a, "…") for a in ("layers", "d", "f", "n", "k", "h")
    }
    example |= {"vocab_size": shapes.get("vocab", "…"), "max_position_embeddings": "…"}
    example |= dict.fromkeys(_UNSTORED[family], "…")
    names = ", ".join(_UNSTORED[family])
    return UnknownConfigError(
        f"no released {family} model has these shapes: {found}.{looks} A checkpoint of arrays does not store "
        f"{names}, so they cannot be known.",
        where=where,
        fix="pass --config FILE with a Hugging Face config.json such as "
        f"{json.dumps(example, ensure_ascii=False)} with every … filled in, or --config with a preset name if "
        "the shapes are wrong.",
        found={_LABELS[axis]: size for axis, size in shapes.items()},
        expected=list(_UNSTORED[family]),
    )


def closest_preset(family: Family, shapes: Mapping[str, int]) -> str | None:
    """Name of the released model most shapes agree with; None when fewer than half do."""
    known = [axis for axis in shapes if axis != "vocab"]
    scores = {
        name: sum(axis_sizes(p.config)[axis] == shapes[axis] for axis in known)
        for name, p in BASES.items()
        if p.config.family == family
    }
    best = max(scores, key=lambda name: scores[name])
    return best if 2 * scores[best] >= max(len(known), 1) else None


def shape_differences(name: str, shapes: Mapping[str, int]) -> str:
    """Where a released model's sizes are others, as text; empty when they agree."""
    sizes = axis_sizes(BASES[name].config)
    wrong = [axis for axis in shapes if axis != "vocab" and sizes[axis] != shapes[axis]]
    return ", ".join(f"{_LABELS[a]} is {sizes[a]} there" for a in wrong)


def check_shapes(config: GemmaConfig, shapes: Mapping[str, int], where: Where = None) -> None:
    """Compare a configuration with the shapes of the arrays it is to describe.

    Args:
        config: what the configuration says.
        shapes: axis -> size found; ``vocab`` may exceed the configuration's (padding rows).
        where: checkpoint, for messages.

    Raises:
        ConfigError: they differ; the message has a table of every axis, and names the model the
            shapes belong to.
    """
    sizes = axis_sizes(config)
    wrong = [
        axis
        for axis, found in shapes.items()
        if (found < sizes[axis] if axis == "vocab" else found != sizes[axis])
    ]
    if not wrong:
        return
    table = "; ".join(
        f"{_LABELS[axis]} {sizes[axis]} / {found}{' (!)' if axis in wrong else ''}"
        for axis, found in shapes.items()
    )
    near = [
        name
        for name, p in BASES.items()
        if all(axis_sizes(p.config)[a] == n for a, n in shapes.items() if a != "vocab")
    ]
    looks = f" The weights look like {near[0]}." if near else ""
    raise ConfigError(
        f"the configuration does not belong to these weights (configuration / weights): {table}.{looks}",
        where=where,
        fix=f"pass --config {near[0] if near else 'with the configuration of this checkpoint'}.",
    )
