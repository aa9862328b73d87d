"""What a framework's own configuration says about a model, and where each value came from.

Every ``from_…`` function of this folder reads its keys through :class:`Keys`, which reports
everything that is missing at once, and returns a :class:`ConfigReading`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from ..formats.errors import ConfigError, LimitError, printable
from .config import GemmaConfig, Preset
from .config_known import SHAPE_FIELDS, audit, known_size

Where = str | Path | None
MAX_LAYERS = 1024  # a layer is ten tensors: a corrupt count must not fill the memory with names
MAX_SIZE = 1 << 24
# a released size's own value may stand in for these; no checkpoint stores them
HYPERPARAMETERS = (
    "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "sliding_window",
    "max_position_embeddings", "rope_theta", "rms_norm_eps",
)  # fmt: skip
DEFAULT = "default of every Gemma"  # the origin of what no key says
GEMMA2_ONLY = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")
CONFIG_FIX = (
    "add them, or pass --config with a complete Hugging Face config.json or a preset name such as "
    "gemma2-2b."
)
CORRECT = "correct it, or pass the right configuration with --config PRESET|FILE."
NO_GEMMA = (
    "if the model really is built so, it is no Gemma 1 or 2 and cannot be converted; if only the file is wrong, "
    "correct it, or pass the right configuration with --config PRESET|FILE."
)


@dataclass(frozen=True)
class ConfigWarning:
    """A value that is probably wrong.

    Attributes:
        field: the field, or the foreign key where there is no field.
        found: what the configuration says.
        right: what it should say, or None where that is not known.
        why: reason and source, one sentence.
    """

    field: str
    found: Any
    right: Any
    why: str

    def __str__(self) -> str:
        right = "" if self.right is None else f", the right value is {_show(self.right)}"
        return f"{self.field} is {_show(self.found)}{right}: {self.why}"


def _show(value: Any) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return "null" if value is None else printable(str(value), 60)


@dataclass(frozen=True)
class ConfigReading:
    """A configuration together with how it was arrived at.

    Attributes:
        config: the model.
        origin: field name -> where its value came from, such as ``config.json key hidden_size`` or
            ``preset gemma2-9b``.
        warnings: values that look wrong; :func:`fix` applies those with a known right value.
    """

    config: GemmaConfig
    origin: dict[str, str]
    warnings: list[ConfigWarning] = field(default_factory=list)


def fix(reading: ConfigReading) -> ConfigReading:
    """The reading with every known mistake put right (``--fix-config``); the other warnings stay."""
    wrong = {
        w.field: w for w in reading.warnings if w.field in reading.origin and w.right is not None
    }
    origin = dict(reading.origin)
    for name, warning in wrong.items():
        origin[name] = f"--fix-config (was {_show(warning.found)}, from {reading.origin[name]})"
    config = reading.config.with_(**{name: w.right for name, w in wrong.items()})
    left = [w for w in reading.warnings if w.field not in wrong]
    return ConfigReading(config, origin, left)


class _Missing:
    """Marks a key that is not there, as opposed to one that is null."""

    def __repr__(self) -> str:
        return "missing"


MISSING = _Missing()


class Keys:
    """Typed look-ups in a foreign configuration.

    Args:
        mapping: the configuration, parsed.
        where: file it comes from, for messages.
        label: how origins call it, such as ``config.json key``.
    """

    def __init__(self, mapping: Mapping[str, Any], where: Where, label: str) -> None:
        if not isinstance(mapping, Mapping):
            raise ConfigError(
                f"a configuration must be a set of keys, found {type(mapping).__name__}.",
                where=where,
                fix=CORRECT,
            )
        self.mapping = mapping
        self.where = where
        self.label = label
        self.values: dict[str, Any] = {}
        self.origin: dict[str, str] = {}
        self.missing: dict[str, str] = {}  # field -> the foreign keys it may stand under

    def error(self, what: str, fix: str | None = None) -> ConfigError:
        """A ConfigError about this configuration; its fix is to correct that value unless told otherwise."""
        return ConfigError(what, where=self.where, fix=fix or CORRECT)

    def raw(self, *keys: str) -> tuple[str, Any]:
        """The first of ``keys`` that is present and not null, else one that is null, else MISSING."""
        present = [key for key in keys if key in self.mapping]
        for key in present:
            if self.mapping[key] is not None:
                return key, self.mapping[key]
        return (present[0], None) if present else (keys[0], MISSING)

    def whole(self, name: str, *keys: str, null: bool = False) -> None:
        """Read a whole number into field ``name``."""
        self._take(name, keys, self._whole, null)

    def real(self, name: str, *keys: str, null: bool = False) -> None:
        """Read a number into field ``name``."""
        self._take(name, keys, self._real, null)

    def _take(self, name: str, keys: tuple[str, ...], read: Any, null: bool) -> None:
        key, value = self.raw(*(keys or (name,)))
        if value is MISSING or (value is None and not null):
            self.missing[name] = " or ".join(keys or (name,))
            return
        self.set(name, None if value is None else read(key, value), f"{self.label} {key}")

    def set(self, name: str, value: Any, origin: str) -> None:
        """Give field ``name`` a value that is no key's own."""
        self.values[name] = value
        self.origin[name] = origin

    def _whole(self, key: str, value: Any) -> int:
        number = value
        if isinstance(value, float) and value.is_integer():
            number = int(value)
        if isinstance(number, bool) or not isinstance(number, Integral):
            raise self.error(f"{key} must be a whole number, found {_show(value)}.")
        return int(number)

    def _real(self, key: str, value: Any) -> float:
        try:
            if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
                return float(value)
        except OverflowError:
            pass
        raise self.error(f"{key} must be a finite number, found {_show(value)}.")

    def token_ids(self, name: str, *keys: str) -> None:
        """Read one id or a list of ids; null and missing leave the default."""
        key, value = self.raw(*(keys or (name,)))
        value = getattr(value, "tolist", lambda: value)()  # of GGUF
        ids = value if isinstance(value, list | tuple) else [value]
        if value is MISSING or value is None or not ids:
            return
        read = tuple(self._whole(key, one) for one in ids)
        if any(not 0 <= one < MAX_SIZE for one in read):
            raise self.error(f"{key} must hold token ids, found {_show(value)}.")
        self.set(name, read if name == "eos_token_id" else read[0], f"{self.label} {key}")

    def reading(self, warnings: Iterable[ConfigWarning] = (), fill: bool = True) -> ConfigReading:
        """The finished reading; ``family`` must have been set.

        Args:
            warnings: findings of the caller's own.
            fill: whether a released size, recognised by its shapes, may supply missing
                hyper-parameters.

        Raises:
            ConfigError: something is missing (all of it listed) or contradictory.
            LimitError: a size no model has.
        """
        if self.values.get("family") == "gemma":
            for name in GEMMA2_ONLY:
                self.set(name, None, "Gemma 1 has none")
        preset = self._known()
        if fill and preset is not None:
            for name in [n for n in self.missing if n in HYPERPARAMETERS]:
                del self.missing[name]
                self.set(name, getattr(preset.config, name), f"preset {preset.name}")
        if self.missing:
            keys = ", ".join(self.missing.values())
            raise self.error(f"the configuration lacks {keys}.", CONFIG_FIX)
        self._bound()
        try:
            config = GemmaConfig(**self.values)
        except ConfigError as e:
            raise self.error(e.what, e.fix) from None
        origin = dict(self.origin)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"):
            origin.setdefault(name, DEFAULT)
        return ConfigReading(config, origin, [*warnings, *_audited(config)])

    def _known(self) -> Preset | None:
        key = tuple(self.values.get(name) for name in SHAPE_FIELDS)
        return known_size(self.values.get("family"), key)

    def _bound(self) -> None:
        for name, value in self.values.items():
            limit = MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE
            if isinstance(value, int) and value > limit:
                raise LimitError(
                    f"{name} is {_show(value)}; no model has more than {limit}.",
                    where=self.where,
                    fix=CORRECT,
                )


def _audited(config: GemmaConfig) -> list[ConfigWarning]:
    return [ConfigWarning(*row) for row in audit(config)]
