"""What a side's configuration says besides a GemmaConfig: values its reader calls wrong, keys no Gemma has, a replaced file.

The weights may be read well in spite of them, but whoever takes the file at its word computes something else. Values
that are wrong on both sides alike are no difference between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..convert.detect import best_matches
from ..convert.open import resolve_config
from ..formats.errors import G2Error, printable
from ..model.config_reading import ConfigReading
from .side import Side, config_fields

_CLASSES = {"gemma": ["GemmaForCausalLM"], "gemma2": ["Gemma2ForCausalLM"]}
# keys that tell a reader that weights are packed; true of packed ones
_PACKED = ("quantization_config", "compression_config", "quantization")
# keys of other architectures, all of which change what is computed
_FOREIGN = ("num_experts", "num_local_experts", "num_experts_per_tok", "use_bidirectional_attention",
            "attention_bias", "mlp_bias", "partial_rotary_factor", "auto_map")  # fmt: skip
_WINDOWS = ("sliding_window", "sliding_window_size")
_EMPTY: tuple[Any, ...] = (None, False, 0, {}, [])
_STATED = ("dtype", "torch_dtype")
_OVERRIDES = ("--config", "config argument")
_ASSUMED = ("shapes", "preset ", "default of every Gemma", "llama.cpp's rule")


def wrong_values(side: Side) -> dict[str, tuple[Any, Any]]:
    """Key -> (what the configuration says, what it should say), of all that is wrong and in no GemmaConfig field.

    A file that ``--config`` replaces is not looked at.
    """
    if side.checkpoint is None:
        return {}
    reading = side.checkpoint.reading
    fields = type(reading.config).__dataclass_fields__
    found = {w.field: (w.found, w.right) for w in reading.warnings if w.field not in fields}
    return found if overridden(side) else found | _wrong_keys(side)


def _wrong_keys(side: Side) -> dict[str, tuple[Any, Any]]:
    keys = _file(side)
    found: dict[str, tuple[Any, Any]] = {}
    right = _CLASSES[side.config.family]
    if keys.get("architectures") not in (None, [], right):
        found["architectures"] = (keys["architectures"], right)
    window = side.config.sliding_window
    if window is not None and keys.get("sliding_window", window) is None:
        found["sliding_window"] = (None, window)  # read from sliding_window_size by g2kit alone
    named = (*_FOREIGN, *(() if side.quantized else _PACKED))
    return found | {k: (keys[k], None) for k in named if keys.get(k) not in _EMPTY}


def file_differences(ref: Side, cand: Side) -> Iterator[tuple[str, Any, Any]]:
    """``(field, reference, candidate)`` of every wrong value that is not the same on both sides."""
    one, two = wrong_values(ref), wrong_values(cand)
    for key in dict.fromkeys((*one, *two)):
        right = (two if key in two else one)[key][1]
        a, b = (_said(s, found, key, right) for s, found in ((ref, one), (cand, two)))
        if a != b:
            yield f"config.{key}", a, b


def _said(side: Side, wrong: Mapping[str, tuple[Any, Any]], key: str, right: Any) -> Any:
    """What a side's file says under a key that is wrong on one side; ``right`` is what it should say there."""
    if key in wrong:
        return wrong[key][0]
    return side.config.sliding_window if key in _WINDOWS else right


def stated_types(ref: Side, cand: Side) -> Iterator[tuple[str, Any, Any]]:
    """The type the candidate's config.json asks for, where it is not that of its weights and the reference's is another.

    Readers convert the weights to it.
    """
    one, two = (_stated(s) for s in (ref, cand))
    if cand.checkpoint is None or overridden(cand) or cand.quantized or not one or not two:
        return
    stored = {str(t.dtype) for t in cand.checkpoint.tensors.values()}
    for key, value in two.items():
        other = one.get(key, next(iter(one.values())))
        if value != other and value not in stored:
            yield f"config.{key}", other, value


def _stated(side: Side) -> dict[str, str]:
    keys = _file(side)
    return {k: keys[k] for k in _STATED if isinstance(keys.get(k), str)}


def _file(side: Side) -> Mapping[str, Any]:
    """Hugging Face's config.json of a side, empty without one."""
    found = None if side.sidecars is None else side.sidecars.config
    return found if found is not None and "model_type" in found else {}


def overridden(side: Side) -> bool:
    """Whether the caller gave the configuration (``--config``)."""
    if side.checkpoint is None:
        return False
    return side.checkpoint.reading.origin.get("family", "").startswith(_OVERRIDES)


def replaced_file(side: Side, name: str) -> str | None:
    """A sentence where ``--config`` stands in for a side's own configuration that says otherwise; None where not.

    Args:
        side: the side.
        name: ``reference`` or ``candidate``.
    """
    c = side.checkpoint
    if c is None or not overridden(side):
        return None
    begin = f"--config replaced the {name}'s own configuration, which"
    try:
        own = resolve_config(c.source, best_matches(c.source), None, c.sidecars)
    except G2Error as e:
        none = not c.sidecars.names or c.sidecars.config is None
        return None if none else f"{begin} cannot be read: {printable(str(e), 300)}"
    said = _disagreements(own, side)
    return f"{begin} says otherwise: {'; '.join(said)}." if said else None


def _disagreements(own: ConfigReading, side: Side) -> list[str]:
    a, b = config_fields(own.config), config_fields(side.config)
    said = [
        f"{key} is {_show(a[key])}, {_show(b[key])} was used"
        for key in a
        if a[key] != b[key] and not own.origin.get(key, "").startswith(_ASSUMED)
    ]
    wrong = {w.field: w.found for w in own.warnings if w.field not in a}
    wrong |= {k: found for k, (found, _) in _wrong_keys(side).items()}
    return said + [f"{key} is {_show(value)}" for key, value in wrong.items()]


def _show(value: Any) -> str:
    return "null" if value is None else printable(str(value), 60)
