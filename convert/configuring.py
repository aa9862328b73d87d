"""Which configuration a checkpoint has: ``--config``, then its files, then the shapes of released sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..formats import manifest as manifests
from ..formats.base import Source
from ..formats.errors import ConfigError, FileIOError, InputError, ShapeError
from ..formats.strict_json import load as load_json
from ..model.config import PRESETS, GemmaConfig
from ..model.config_formats import (
    ConfigReading,
    completed,
    from_gguf,
    from_huggingface,
    from_keras,
    from_maxtext,
    from_plain,
    from_preset,
    from_shapes,
)
from . import sidecar
from .detect import Match
from .fitting import axis_sizes


def resolve_config(
    source: Source,
    fits: list[Match],
    option: str | Path | GemmaConfig | None,
    sidecars: sidecar.Sidecars,
) -> ConfigReading:
    """The config and where it came from: option, then the checkpoint's files, then a released size's shapes.

    Raises:
        ConfigError: nothing says what the hyper-parameters are, or the sources are unusable.
    """
    if option is not None:
        return config_option(option)
    beside = _beside(source, sidecars)
    if source.format == "gguf":
        reading = from_gguf(source.metadata["kv"], source.path, next(iter(beside), None))
        return completed(reading, beside)
    if source.format == "keras_h5" and "config" in source.metadata:
        return completed(from_keras(source.metadata["config"], source.path), beside)
    return beside[0] if beside else _from_released_shapes(source, fits)


def _beside(source: Source, sidecars: sidecar.Sidecars) -> list[ConfigReading]:
    """What config.json and g2kit's manifest say, the more trusted one first."""
    told = sidecars.manifest_config
    found = [] if told is None else [from_plain(told, sidecars.where(manifests.NAME))]
    # a single file's own manifest tells more surely about it than a config.json in the same directory
    at = len(found) if sidecars.has_own_manifest else 0
    try:
        if sidecars.config is not None:
            found.insert(at, read_config(sidecars.config, sidecars.config_path))
    except InputError:
        # a GGUF file tells what it is by itself; what lies beside it may be another model's
        if source.format != "gguf" and not found[:at]:
            raise
    return found


def config_option(option: str | Path | GemmaConfig) -> ConfigReading:
    """A ``--config`` value: a GemmaConfig, a preset's name, a config.json or a directory with one."""
    fields = GemmaConfig.__dataclass_fields__
    if isinstance(option, GemmaConfig):
        return ConfigReading(option, dict.fromkeys(fields, "config argument"), [])
    if str(option) in PRESETS:
        return from_preset(str(option), "--config")
    path = Path(option)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"{str(option)!r} is neither a preset nor a config.json.",
            fix=f"use one of {', '.join(PRESETS)}, or a path to a Hugging Face config.json.",
        )
    try:
        return read_config(load_json(path), path, label="--config key")
    except OSError as e:
        raise FileIOError(f"cannot read: {e.strerror}.", where=path) from e


# key only this framework's configuration has -> its reader
_CONFIG_KINDS = (
    ("base_emb_dim", from_maxtext),
    ("registered_name", from_keras),
    ("hidden_dim", from_keras),
)


def read_config(mapping: Any, where: Path, label: str = "config.json key") -> ConfigReading:
    """A parsed configuration of Hugging Face, MaxText or Keras, told apart by their keys."""
    if not isinstance(mapping, dict):
        raise ConfigError(
            "the configuration is not a JSON object.",
            where=where,
            fix="pass a Hugging Face config.json or a preset's name with --config.",
        )
    if "model_type" not in mapping:
        for key, reader in _CONFIG_KINDS:
            if key in mapping:
                return reader(mapping, where)
    return from_huggingface(mapping, where, label=label)


def _from_released_shapes(source: Source, fits: list[Match]) -> ConfigReading:
    """The released model whose shapes these are; an error that lists what was found otherwise."""
    found = [sizes for fit in fits if (sizes := axis_sizes(source, fit)) is not None]
    if not found:
        raise ShapeError(
            "the tensors' shapes contradict each other.",
            where=source.path,
            fix="get the checkpoint again; it may mix files of several models.",
        )
    return from_shapes(fits[0].family, found[0], source.path)
