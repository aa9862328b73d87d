"""Path -> canonical checkpoint: config, lazy tensors under canonical names, tokenizer, fingerprint.

The order of decisions: container (bytes), table (names), config (option, files, then shapes of released sizes), then every
shape against the config. All of it happens before one weight is read.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..formats import manifest as manifests
from ..formats.base import Source
from ..formats.dtypes import FLOATS
from ..formats.errors import DtypeError, FormatError
from ..formats.names import listing
from ..model import canonical
from ..model.config import GemmaConfig
from . import sidecar
from .bits import same_values
from .checkpoint import BLOCK_BYTES, Array, Checkpoint, LazyTensor, stored_dtype
from .configuring import config_option, read_config, resolve_config
from .detect import Match, best_matches, open_container
from .fitting import fit_shapes
from .layout import Layout, Placement, Row
from .steps import STEPS, Step

__all__ = [
    "BLOCK_BYTES", "Checkpoint", "LazyTensor", "config_option", "fit_shapes", "narrows", "open_checkpoint",
    "read_config", "refuse_unfinished", "resolve_config", "stored_dtype",
]  # fmt: skip


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
