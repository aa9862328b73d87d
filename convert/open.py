"""Path -> canonical checkpoint: config, lazy tensors under canonical names, tokenizer, fingerprint.

The order of decisions: container (bytes), table (names), config (option, files, then shapes of released sizes), then every
shape against the config. All of it happens before one weight is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..formats import manifest as manifests
from ..formats.base import Source, Tensor, iter_row_blocks
from ..formats.dtypes import FLOATS, short
from ..formats.errors import (
    ConfigError,
    DtypeError,
    FileIOError,
    FormatError,
    InputError,
    ShapeError,
    UsageError,
)
from ..formats.names import listing
from ..formats.strict_json import load as load_json
from ..model import canonical
from ..model.config import PRESETS, GemmaConfig
from ..model.config_formats import (
    ConfigReading,
    closest_preset,
    completed,
    from_gguf,
    from_huggingface,
    from_keras,
    from_maxtext,
    from_plain,
    from_preset,
    from_shapes,
    shape_differences,
)
from . import sidecar
from .bits import same_values, unequal
from .detect import Match, best_matches, open_container
from .layout import Layout, Placement, Row, layer_name
from .steps import STEPS, Step

Array = npt.NDArray[Any]
BLOCK_BYTES = 16 << 20


class LazyTensor:
    """One canonical tensor of an opened checkpoint, read on demand. Thread-safe.

    Attributes:
        name: canonical name.
        shape: canonical shape, ``[out_features, in_features]`` for matrices.
        dtype: element type :meth:`read` returns.
        source: the foreign tensor it lies in; ``source.quantized`` is set when it is stored in fewer bits.
    """

    def __init__(
        self, source: Tensor, placement: Placement, step: Step | None, config: GemmaConfig
    ) -> None:
        self.name = placement.canonical
        self.shape = placement.reorder.canonical_shape
        self.source = source
        self.placement = placement
        self.step = step
        self.config = config
        self.dtype = source.dtype
        self.rounded = 0  # stored elements that undoing the step has rounded, over all reads

    @property
    def nbytes(self) -> int:
        """Bytes of the array :meth:`read` returns."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def streams_rows(self) -> bool:
        """Whether any run of rows can be read by itself."""
        return self.placement.reorder.is_identity

    def read(self) -> Array:
        """The whole tensor."""
        return self._undo(
            self.placement.reorder.to_canonical(self.source.read(self.placement.index))
        )

    def read_rows(self, start: int, stop: int) -> Array:
        """Rows ``start:stop`` of axis 0; reads more than that where storage order differs.

        Raises:
            UsageError: not ``0 <= start <= stop <= shape[0]``.
        """
        if not 0 <= start <= stop <= self.shape[0]:
            raise UsageError(
                f"rows {start}:{stop} of a tensor with {self.shape[0]} rows.",
                where=self.source.where,
                tensor=self.name,
                fix=f"pass 0 <= start <= stop <= {self.shape[0]}.",
            )
        if not self.streams_rows:
            return self.read()[start:stop]
        _, index, _ = self.placement.rows(start, stop)
        box = self.source.read(index)
        return self._undo(box.reshape(stop - start, *self.shape[1:]))

    def blocks(self, limit: int = BLOCK_BYTES) -> Iterator[tuple[int, int, Array]]:
        """``(start, stop, rows)`` covering axis 0; one block when rows cannot be read apart."""
        if not self.streams_rows or self.placement.reorder.foreign_shape != self.shape:
            yield 0, self.shape[0], self.read()
            return
        for start, stop in iter_row_blocks(self.shape, self.source.dtype.itemsize, limit):
            yield start, stop, self.read_rows(start, stop)

    def _undo(self, stored: Array) -> Array:
        if self.step is None:
            return stored.astype(self.dtype, copy=False)
        x = self.step.inverse(stored, self.config, self.dtype)
        again = self.step.forward(x, self.config, stored.dtype)
        self.rounded += unequal(again, stored)
        return x

    def __repr__(self) -> str:
        return f"LazyTensor({self.name!r}, {self.dtype}, {self.shape})"


@dataclass
class Checkpoint:
    """A checkpoint of any format in canonical terms.

    Attributes:
        path: what the user named.
        source: the container.
        layout: the table that fits, expanded.
        reading: the config, where each value came from, and warnings about it.
        tensors: canonical name -> lazy tensor, in forward order.
        sidecars: tokenizer and other files found beside the weights.
        notes: odd but harmless findings.
        gating: where the orientation of Flax gating matrices is known from, empty for other layouts.
    """

    path: Path
    source: Source
    layout: Layout
    reading: ConfigReading
    tensors: dict[str, LazyTensor]
    sidecars: sidecar.Sidecars
    notes: list[str] = field(default_factory=list)
    gating: str = ""

    def __repr__(self) -> str:
        c = self.config
        return (
            f"<Checkpoint {str(self.path)!r}: {c.family}, {c.num_hidden_layers} layers, {c.num_parameters:,} "
            f"parameters, {_dtypes(self.tensors.values())}, {self.layout.variant.describe}>"
        )

    @property
    def config(self) -> GemmaConfig:
        """The model's hyper-parameters."""
        return self.reading.config

    @property
    def quantized(self) -> list[str]:
        """Canonical names stored in fewer bits."""
        return [n for n, t in self.tensors.items() if t.source.quantized is not None]

    @property
    def head(self) -> Tensor | None:
        """A stored output head, which Gemma ties to the embedding; must be compared before it is dropped."""
        return self.source.tensors.get(canonical.LM_HEAD)

    def close(self) -> None:
        """Close the files."""
        self.source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _dtypes(tensors: Iterable[LazyTensor]) -> str:
    return "/".join(dict.fromkeys(stored_dtype(t.source) for t in tensors))


def stored_dtype(tensor: Tensor) -> str:
    """One spelling for every container's types: ``bf16``, or the packed kind of quantized weights, ``Q4_K``."""
    return tensor.stored if tensor.quantized is not None else short(tensor.dtype)


def open_checkpoint(
    path: str | Path,
    *,
    config: str | Path | GemmaConfig | None = None,
    container: str | None = None,
    gating: str | None = None,
    fix_config: bool = False,
    staged: bool = False,
) -> Checkpoint:
    """Open any Gemma 1 or 2 checkpoint. Reads headers and norms only.

    Args:
        path: file or directory, in any supported format.
        config: preset name, Hugging Face config.json (or its directory), or a GemmaConfig; wins over what the files say.
        container: format module to take where a directory holds several.
        gating: ``df`` or ``fd``, for a Flax checkpoint whose hidden and intermediate sizes are equal.
        fix_config: correct hyper-parameters known to be wrong in published files.
        staged: the path is an output in the making, which is refused otherwise.

    Raises:
        G2Error: any subclass; see :mod:`g2kit.formats.errors`.
    """
    path = Path(path)
    if not staged:
        refuse_unfinished(path)
    source = open_container(path, container)
    try:
        return _open(path, source, config, gating, fix_config)
    except BaseException:
        source.close()
        raise


def refuse_unfinished(path: Path) -> None:
    """Raise FormatError for what an interrupted g2conv left behind: its files have holes."""
    for folder in (path, *path.parents[:3]):
        if folder.name.endswith(".partial") and (folder / "journal").is_file():
            raise FormatError(
                "this is the unfinished output of an interrupted g2conv.",
                where=folder,
                fix="run the same g2conv command again to finish it.",
            )


def _open(
    path: Path,
    source: Source,
    config: str | Path | GemmaConfig | None,
    gating: str | None,
    fix_config: bool,
) -> Checkpoint:
    source = _unpacked(path, source)
    fits = best_matches(source)
    sidecars = sidecar.find_sidecars(path, source.format)
    reading = resolve_config(source, fits, config, sidecars)
    if fix_config:
        from ..model.config_formats import fix

        reading = fix(reading)
    layout, oriented = _oriented(source, fits, reading.config, gating, sidecars)
    tensors = {
        name: _lazy(source, *layout.placements[name], reading.config) for name in layout.tensors
    }
    _restore_norm_dtype(tensors)
    notes = _notes(source, sidecars)
    checkpoint = Checkpoint(path, source, layout, reading, tensors, sidecars, notes, oriented)
    if state := _state(source, layout):
        notes.append(f"left out, derived or training state: {listing(state)}")
    extra = source.metadata.get("extra")
    if extra:
        notes.append(f"left out, not weights of the model: {listing(list(extra))}")
    return checkpoint


def _unpacked(path: Path, source: Source) -> Source:
    """The source with packed weights as one tensor each; GGUF's are so already."""
    from ..formats.packed import table, torch_int8

    if any(name.endswith(".weight_scaler") for name in source.tensors):
        return torch_int8.combine(source)
    if source.format not in ("safetensors", "torch_pickle") or not table.looks_packed(source):
        return source
    config = sidecar.find_sidecars(path, source.format).config or {}
    if table.quantization_of(config) is None and not table.named_packed(source):
        return source  # stray integers, which the tables judge
    return table.combine(source, config)


def _state(source: Source, layout: Layout) -> list[str]:
    """What the file holds besides weights and no conversion carries over: optimizer state, steps, derived buffers."""
    ignored = sorted(n for n in source.tensors if layout.variant.is_ignored(n))
    scalars = source.metadata.get("scalars", {})
    return ignored + [f"{name} = {value}" for name, value in scalars.items()]


def _notes(source: Source, sidecars: sidecar.Sidecars) -> list[str]:
    """What was found; Orbax's lack of checksums is nothing beside a manifest that has them."""
    found = [*source.notes, *sidecars.notes]
    if source.format != "orbax" or not sidecars.manifest_fits:
        return found
    from ..formats.orbax import NO_CHECKSUM

    instead = "Orbax stores no checksums, but g2kit's manifest has them: `g2conv check` compares every file."
    return [instead if note == NO_CHECKSUM else note for note in found]


def _oriented(
    source: Source,
    fits: list[Match],
    config: GemmaConfig,
    gating: str | None,
    sidecars: sidecar.Sidecars,
) -> tuple[Layout, str]:
    """The table, and what tells the orientation of its gating matrices."""
    manifest = sidecars.own_manifest if sidecars.manifest_fits else None
    noted = manifest.gating if manifest else None
    layout = fit_shapes(source, fits, config, gating or noted)
    if "transposed" not in layout.variant.options:
        return layout, ""
    if config.hidden_size != config.intermediate_size:
        return layout, "the shapes"
    if gating is not None:
        return layout, "--gating"
    return layout, manifests.NAME if noted else "the released model of this configuration"


def _lazy(source: Source, row: Row, placement: Placement, config: GemmaConfig) -> LazyTensor:
    tensor = source.tensors[row.name]
    if tensor.dtype not in FLOATS:
        raise DtypeError(
            f"stored as {tensor.stored}; weights must be bf16, f16, f32 or f64.",
            where=tensor.where,
            tensor=tensor.name,
            fix="this looks like a quantized copy; convert the checkpoint it was made from.",
            found=tensor.stored,
            expected=["bf16", "f16", "f32", "f64"],
        )
    step = STEPS[placement.step] if placement.step else None
    if step is not None and step.is_identity(config):
        step = None
    return LazyTensor(tensor, placement, step, config)


def _restore_norm_dtype(tensors: dict[str, LazyTensor]) -> None:
    """Give norms stored wider than the model (GGUF: 1 + w in float32) the model's dtype back, if that loses nothing."""
    model = tensors[canonical.EMBED]
    if model.source.quantized is not None:
        return
    for t in tensors.values():
        if t.step is None or t.dtype.itemsize <= model.dtype.itemsize or len(t.shape) != 1:
            continue
        stored = t.source.read(t.placement.index)
        if narrows(t.step, stored, t.config, model.dtype):
            t.dtype = model.dtype


def narrows(step: Step, stored: Array, config: GemmaConfig, dtype: np.dtype) -> bool:
    """Whether a norm that is stored wider than the model's ``dtype`` is read in that: no value changes by it."""
    narrow = step.inverse(stored, config, dtype)
    return same_values(step.forward(narrow, config, stored.dtype), stored)


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


def _shapes_differ(
    source: Source, layout: Layout
) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """``(name, found, expected)`` of every tensor whose shape the layout does not allow."""
    return [
        (name, source.tensors[name].shape, row.shape)
        for name, row in layout.rows.items()
        if source.tensors[name].shape != row.shape
    ]


def _layout(source: Source, fit: Match, config: GemmaConfig) -> Layout:
    """The fit expanded, with as many embedding rows as the file has."""
    name = next(r.foreign for r in fit.variant.rules[fit.family] if canonical.EMBED in r.canonical)
    shape = source.tensors[name].shape
    rows = shape[0] if shape and shape[0] > config.vocab_size else None
    return Layout(fit.variant, config, rows)


def _from_released_shapes(source: Source, fits: list[Match]) -> ConfigReading:
    """The released model whose shapes these are; an error that lists what was found otherwise."""
    found = [sizes for fit in fits if (sizes := _axis_sizes(source, fit)) is not None]
    if not found:
        raise ShapeError(
            "the tensors' shapes contradict each other.",
            where=source.path,
            fix="get the checkpoint again; it may mix files of several models.",
        )
    return from_shapes(fits[0].family, found[0], source.path)


def _axis_sizes(source: Source, fit: Match) -> dict[str, int] | None:
    """Sizes of the named axes that the first layer's shapes show; None when they contradict each other."""
    sizes: dict[str, int] = {"layers": fit.num_layers}
    fused = 0
    period = fit.variant.periods.get(fit.family, 1)
    for rule in fit.variant.rules[fit.family]:
        shape = source.tensors[layer_name(rule.foreign, 0, period)].shape
        groups = canonical.axis_groups(rule.axes.split("->")[0])
        if len(groups) != len(shape):
            return None
        for group, size in zip(groups, shape, strict=True):
            if group == ("cat",):
                fused = size
            elif group not in (("layer",), ("part",)):
                axis = group[0] if len(group) == 1 else f"({' '.join(group)})"
                if sizes.setdefault(axis, size) != size:
                    return None
    if fused:  # q, k and v rows in one matrix
        sizes["(k h)"] = (fused - sizes["(n h)"]) // 2
    return sizes


def _fused_misfit(fit: Match, config: GemmaConfig) -> bool:
    fused = fit.variant.options.get("fused", False)
    return fused and config.num_attention_heads != config.num_key_value_heads


def fit_shapes(
    source: Source, fits: list[Match], config: GemmaConfig, gating: str | None = None
) -> Layout:
    """The one table whose shapes all hold under ``config``.

    Raises:
        ConfigError: the config is another family's or depth's, or orientation cannot be told.
        ShapeError: shapes contradict the config; lists them and names the released size they fit, if any.
    """
    same = [f for f in fits if f.family == config.family]
    if not same or same[0].num_layers != config.num_hidden_layers:
        f = (same or fits)[0]
        raise ConfigError(
            f"the tensors are {f.num_layers} layers of {f.family}, the configuration says "
            f"{config.num_hidden_layers} layers of {config.family}.",
            where=source.path,
            fix=_looks_like(source, fits) or "pass the configuration of this model with --config.",
            found=[f.family, f.num_layers],
            expected=[config.family, config.num_hidden_layers],
        )
    candidates = [_layout(source, f, config) for f in same if not _fused_misfit(f, config)]
    if not candidates:
        raise ConfigError(
            "query, key and value are stored as one tensor, which needs as many kv heads as heads; the "
            f"configuration says {config.num_attention_heads} and {config.num_key_value_heads}.",
            where=source.path,
            fix=_looks_like(source, fits) or "pass the configuration of this model with --config.",
        )
    wrong = [_shapes_differ(source, layout) for layout in candidates]
    fitting = [layout for layout, bad in zip(candidates, wrong, strict=True) if not bad]
    if len(fitting) > 1:
        return _choose_orientation(source, fitting, config, gating)
    if fitting:
        return fitting[0]
    bad = min(wrong, key=len)
    lines = [f"{n} is {found}, expected {want}" for n, found, want in bad[:6]]
    more = f" and {len(bad) - 6} more" if len(bad) > 6 else ""
    raise ShapeError(
        f"{len(bad)} shapes contradict the configuration: {'; '.join(lines)}{more}.",
        where=source.path,
        tensor=bad[0][0] if len(bad) == 1 else None,
        fix=_looks_like(source, fits) or "pass the configuration of this model with --config.",
        found={name: list(shape) for name, shape, _ in bad},
        expected={name: list(shape) for name, _, shape in bad},
    )


def _looks_like(source: Source, fits: list[Match]) -> str | None:
    """Advice when the shapes are a released model's."""
    for fit in fits:
        sizes = _axis_sizes(source, fit)
        if sizes is None:
            continue
        name = closest_preset(fit.family, sizes)
        if name and not shape_differences(name, sizes):
            return f"this looks like {name}; pass --config {name}."
    return None


def _choose_orientation(
    source: Source, fitting: list[Layout], config: GemmaConfig, gating: str | None
) -> Layout:
    """Both gating orientations fit only when hidden_size equals intermediate_size."""
    if gating is not None:
        wanted = gating == "fd"
        return next(x for x in fitting if x.variant.options.get("transposed") == wanted)
    for released in PRESETS.values():
        if released.config.with_(eos_token_id=config.eos_token_id) == config:
            return next(
                x
                for x in fitting
                if x.variant.options.get("transposed") == released.gating_transposed
            )
    raise ConfigError(
        f"hidden_size and intermediate_size are both {config.hidden_size}, so shapes do not tell "
        "whether gating_einsum is [2, d, f] or [2, f, d].",
        where=source.path,
        fix="pass --gating df or --gating fd.",
    )
