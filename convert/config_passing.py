"""Keys of a source's config.json that are none of the model's hyper-parameters: passed on, or named as left out.

A fine-tune's config.json says more than a GemmaConfig holds: dropout for further training, labels, cache settings.
What stays true of the converted weights goes into the written file as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..formats.errors import printable
from ..model.config import GemmaConfig

# key -> why it cannot be passed on
_UNTRUE = {
    "auto_map": "loads code",
    "quantization_config": "the weights are written unquantized",
    "compression_config": "the weights are written unquantized",
    "quantization": "the weights are written unquantized",
}
# written with a constant, which a source may have otherwise
_SOURCE_WINS = ("attention_dropout", "initializer_range", "use_cache")
_OF_THE_FILE = ("dtype", "torch_dtype", "transformers_version")  # about this file, not the model
# other keys of a config.json that say what GemmaConfig's fields say
_COVERED = frozenset(
    {
        *GemmaConfig.__dataclass_fields__, *_OF_THE_FILE, "architectures", "model_type", "hidden_act",
        "hidden_activation", "layer_types", "rope_parameters", "rope_scaling", "sliding_window_size",
        "tie_word_embeddings",
    }
)  # fmt: skip


def passed_on(
    written: dict[str, Any], source: Mapping[str, Any], notes: list[str]
) -> dict[str, Any]:
    """The config.json to write, with the source's other keys in it.

    Args:
        written: what :func:`to_huggingface` makes of the model.
        source: the source's config.json, or empty.
        notes: told of every key that is left out or replaced by another value.

    Returns:
        All keys, in alphabetical order.
    """
    out = dict(written)
    if source and source.get("model_type") != written["model_type"]:
        found = _show(source.get("model_type"))
        notes.append(f"config.json is left out and made anew: its model_type is {found}")
        return out
    for key in _SOURCE_WINS:
        if source.get(key) is not None:
            out[key] = source[key]
    dropped = [f"{key} ({why})" for key, why in _UNTRUE.items() if source.get(key) is not None]
    changed = []
    for key, value in source.items():
        if key in _UNTRUE or key in _SOURCE_WINS or key in ("dtype", "torch_dtype"):
            continue
        if key not in out:
            keep = key != "sliding_window_size" or value == out.get("sliding_window")
            if keep:
                out[key] = value
            else:
                dropped.append(f"{key} (contradicts sliding_window)")
        elif value is not None and not _same(value, out[key]):
            changed.append(f"{key} {_show(value)} -> {_show(out[key])}")
    if dropped:
        notes.append(f"left out of config.json: {', '.join(dropped)}")
    if changed:
        notes.append(f"config.json says otherwise now: {', '.join(changed)}")
    return dict(sorted(out.items()))


def unheld_keys(source: Mapping[str, Any]) -> list[str]:
    """Keys of a config.json with a value that no GemmaConfig holds, in alphabetical order."""
    plain = {
        "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
    }  # fmt: skip
    return sorted(
        printable(key, 60)
        for key, value in source.items()
        if key not in _COVERED and value is not None and value != plain.get(key)
    )


def _same(a: Any, b: Any) -> bool:
    """Equal, or one id and a list of just that id."""
    return bool(a == b or a == [b] or [a] == b)


def _show(value: Any) -> str:
    return printable(str(value), 60)
