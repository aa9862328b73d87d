"""Which container is at a path, and which layout its tensor names follow. Names decide; nothing is guessed silently."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from heapq import nsmallest
from importlib import import_module
from itertools import islice
from pathlib import Path

from ..formats import manifest
from ..formats.base import Source
from ..formats.errors import (
    ExtraTensorError,
    FileIOError,
    FormatError,
    InputError,
    MissingTensorError,
    printable,
)
from ..formats.named_files import require_there
from ..model.canonical import LM_HEAD
from ..model.config import Family
from . import sidecar_files
from .layout import Rule, Variant, layer_name
from .layouts import VARIANTS

# module of g2kit.formats -> what its files look like in a directory, first bytes of a file
_CONTAINERS: dict[str, tuple[tuple[str, ...], tuple[bytes, ...]]] = {
    "safetensors": (("*.safetensors", "*.safetensors.index.json"), ()),
    "torch_pickle": (
        ("*.ckpt", "*.pt", "*.pth", "pytorch_model*.bin", "*.bin.index.json"),
        (b"PK\x03\x04", b"PK\x05\x06"),
    ),
    "gguf": (("*.gguf",), (b"GGUF",)),
    "keras_h5": (("*.weights.h5", "model.weights.json"), (b"\x89HDF\r\n\x1a\n",)),
    "orbax": (("manifest.ocdbt", "_METADATA", "checkpoint", "ocdbt.process_*"), ()),
}

# what else lies beside weights, and what a recording consists of
_BESIDE = {*sidecar_files.NAMES, "metadata.json", "recording.json", "vocabulary.spm"}


def belongs_to_checkpoint(name: str) -> bool:
    """Whether a file of that name is part of a checkpoint or recording: weights, index, configuration, tokenizer, manifest."""
    weights = (p for patterns, _ in _CONTAINERS.values() for p in patterns)
    known = name in _BESIDE or name.endswith(manifest.NAME)
    return known or any(fnmatch.fnmatchcase(name, p) for p in weights)


def open_container(path: Path, prefer: str | None = None) -> Source:
    """Open whatever checkpoint container is at ``path``.

    Args:
        path: a file or directory.
        prefer: container to take when a directory holds several.

    Raises:
        FormatError: nothing recognised, or several containers and no preference.
        NotFoundError: the path does not exist.
    """
    require_there(path, fix="pass the path of a checkpoint.")
    kinds = _in_directory(path) if path.is_dir() else [_of_file(path)]
    if not kinds:
        return _below(path)
    if prefer is not None and prefer in kinds:
        kinds = [prefer]
    if len(kinds) > 1:
        raise FormatError(
            f"the directory holds several checkpoints: {', '.join(kinds)}.",
            where=path,
            fix="pass the one file (or index) you mean, or name the source format, as in "
            f"`g2conv {kinds[0]}-to-…`.",
        )
    module = import_module(f"..formats.{kinds[0]}", __package__)
    opened: Source = module.open_source(path)
    return opened


def _in_directory(path: Path) -> list[str]:
    return [
        kind
        for kind, (patterns, _) in _CONTAINERS.items()
        if any(any(path.glob(p)) for p in patterns)
    ]


def _below(path: Path) -> Source:
    """An Orbax checkpoint may lie in a step or item directory; nothing else may."""
    from ..formats.orbax import open_source

    try:
        return open_source(path)
    except FormatError as e:
        if any(p.is_dir() for p in path.iterdir()):
            raise
        known = ", ".join(p for patterns, _ in _CONTAINERS.values() for p in patterns)
        raise FormatError(
            "no checkpoint in this directory.",
            where=path,
            fix=f"pass a directory that holds one of {known}.",
        ) from e


def _of_file(path: Path) -> str:
    if not path.is_file():
        raise FileIOError(
            "not a regular file or directory.",
            where=path,
            fix="save the stream to a file first; a checkpoint is not read from front to back.",
        )
    with path.open("rb") as f:
        head = f.read(16)
    for kind, (_, magics) in _CONTAINERS.items():
        if any(head.startswith(m) for m in magics):
            return kind
    for kind, (patterns, _) in _CONTAINERS.items():
        if any(path.match(p) for p in patterns):
            return kind
    known = ", ".join(p for patterns, _ in _CONTAINERS.values() for p in patterns)
    raise FormatError(
        f"not a checkpoint file that g2kit knows (name and first bytes {head[:8]!r}).",
        where=path,
        fix=f"pass a directory or one of {known}.",
    )


@dataclass(frozen=True)
class Match:
    """A table that fits a set of names.

    Attributes:
        variant: the table.
        family: ``gemma`` or ``gemma2``.
        num_layers: layers the names speak of.
        missing: names the table has and the file has not.
        extra: names the file has and the table has not.
    """

    variant: Variant
    family: Family
    num_layers: int
    missing: frozenset[str]
    extra: frozenset[str]

    @property
    def distance(self) -> int:
        """How far from a perfect fit."""
        return len(self.missing) + len(self.extra)


def matches(
    source_format: str,
    shapes: Mapping[str, tuple[int, ...]],
    variants: Iterable[Variant] = VARIANTS,
) -> list[Match]:
    """Every table of that container, best fit first."""
    names = _Names(shapes)
    found = [
        _match(variant, family, names)
        for variant in variants
        if variant.container == source_format
        for family in variant.rules
    ]
    return sorted(found, key=lambda m: m.distance)


def best_matches(source: Source) -> list[Match]:
    """The tables whose names fit exactly (they differ only in orientation).

    Raises:
        MissingTensorError: tensors are absent, listed together with unknown ones.
        ExtraTensorError: tensors are there that the architecture does not have.
        FormatError: the names are no Gemma 1 or 2 checkpoint's at all.
    """
    shapes = {name: t.shape for name, t in source.tensors.items()}
    ranked = matches(source.format, shapes)
    perfect = [m for m in ranked if m.distance == 0]
    if perfect:
        return perfect
    raise _no_match(source, ranked[0])


def _no_match(source: Source, best: Match) -> InputError:
    names = list(source.tensors)
    if not names:
        return MissingTensorError("the checkpoint holds no tensors.", where=source.path)
    if shard := _one_shard(source.path):
        return MissingTensorError(
            f"{len(names)} tensors are here, the others lie in other files: {_some(names, 3)}.",
            where=source.path,
            fix=_other_model(names) or shard,
        )
    known = len(names) - len(best.extra)
    if known < max(1, len(names) // 10):
        return FormatError(
            f"these are not the tensor names of a Gemma 1 or Gemma 2 checkpoint: found "
            f"{_some(names)}.",
            where=source.path,
            fix=_other_model(names)
            or "check that this is a Gemma 1 or Gemma 2 text model without adapters or quantizer wrappers.",
        )
    parts = []
    if best.missing:
        parts.append(f"{len(best.missing)} tensors are missing: {_some(best.missing)}")
    if best.extra:
        parts.append(f"{len(best.extra)} tensors are unknown: {_some(best.extra)}")
    text = (
        f"read as {best.variant.describe}, {best.num_layers} layers of {best.family}: "
        f"{'; '.join(parts)}."
    )
    fix = _other_model(names) or (
        "get the complete checkpoint." if best.missing else "remove them, or merge adapters first."
    )
    kind = MissingTensorError if best.missing else ExtraTensorError
    return kind(text, where=source.path, fix=fix)


# Hugging Face's shards are numbered from 1 of n, Keras's from 0
_SHARD = re.compile(r".*-\d{5}-of-(?!00001\.)\d{5}\..+|.*_\d{5}\.weights\.h5")


def _one_shard(path: Path) -> str | None:
    """Advice where the user named one file of several."""
    if not _SHARD.fullmatch(path.name):
        return None
    folder = printable(str(path.parent))
    return f"this file is one shard of several: pass its directory ({folder}), or the index in it."


# names that only other models have -> what to say
_FOREIGN_MARKS: tuple[tuple[str, str], ...] = (
    (r"(^|[./_])lora|adapter_", "merge the LoRA adapter into the base model first."),
    (
        r"q_norm|k_norm|_query_norm|_key_norm",
        "this looks like Gemma 3; g2kit handles Gemma 1 and 2.",
    ),
    (
        r"vision_|SigLiP|mm_",
        "this looks like a multimodal model; g2kit handles Gemma 1 and 2 text models.",
    ),
    (r"_proj\.weight\.codes", "these are codes without a model: write one with `g2quant export`."),
    (r"SimulateQuantized|qweight|weight_packed", "open the unquantized checkpoint."),
    (
        r"(^|/)(x_[ab]|rg_lru|recurrent)",
        "this looks like RecurrentGemma; g2kit handles Gemma 1 and 2.",
    ),
)


_LOOKED_AT = 2000  # names; a foreign model's marks are in every layer


def _other_model(names: list[str]) -> str | None:
    for pattern, advice in _FOREIGN_MARKS:
        if any(re.search(pattern, n[:_LONGEST]) for n in names[:_LOOKED_AT]):
            return advice
    return None


def _some(names: Collection[str], limit: int = 6) -> str:
    """The first few: in the file's order, or of a set in natural order."""
    ordered = nsmallest(limit, names, key=_natural) if isinstance(names, frozenset) else names
    shown = ", ".join(printable(n, 80) for n in islice(ordered, limit))
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


_DIGITS = re.compile(r"[0-9]+")
_LONGEST = 256  # characters; no framework's names come near


class _Names:
    """A file's tensor names, sorted once for all tables: a hostile header has a hundred thousand.

    Attributes:
        shapes: name -> shape.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self._alike: dict[str, list[str]] = {}  # names that differ in numbers only
        self._kept: dict[tuple[str, ...], frozenset[str]] = {}
        for name in shapes:
            if len(name) <= _LONGEST:
                self._alike.setdefault(_DIGITS.sub("0", name), []).append(name)

    def like(self, template: str, period: int) -> Iterator[str]:
        """The names that the template may give for some layer."""
        forms = {_DIGITS.sub("0", layer_name(template, i, period)) for i in (0, 1)}
        for form in sorted(forms):
            yield from self._alike.get(form, ())

    def kept(self, variant: Variant) -> frozenset[str]:
        """The names that the table does not ignore."""
        if variant.ignored not in self._kept:
            ignored = {n for names in self._alike.values() for n in names if variant.is_ignored(n)}
            self._kept[variant.ignored] = frozenset(self.shapes.keys() - ignored)
        return self._kept[variant.ignored]


def _match(variant: Variant, family: Family, names: _Names) -> Match:
    rules = variant.rules[family]
    period = variant.periods.get(family, 1)
    layers = _count_layers(rules, period, names)
    expected = {
        layer_name(r.foreign, i, period)
        for r in rules
        for i in (range(layers) if "{i}" in r.canonical[0] else (0,))
    }
    have = names.kept(variant)
    if variant.name.startswith("huggingface"):
        have -= {LM_HEAD}  # compared with the embedding when the weights are read
    return Match(variant, family, layers, frozenset(expected - have), have - expected)


def _count_layers(rules: tuple[Rule, ...], period: int, names: _Names) -> int:
    """Layers the names speak of: the highest index found by any rule, or the stack's size times the period."""
    highest = 0
    for rule in rules:
        if "{i}" not in rule.canonical[0]:
            continue
        left = rule.axes.split("->")[0].split()
        pattern = _template_pattern(rule.foreign)
        for name in names.like(rule.foreign, period):
            hit = pattern.fullmatch(name)
            if hit is None:
                continue
            if "layer" in left:
                axis, shape = left.index("layer"), names.shapes[name]
                highest = max(highest, shape[axis] * period if axis < len(shape) else 0)
                continue
            at = hit.groupdict()
            if "s" in at:
                i = int((at["s"] or "_0")[1:])
            elif "j" in at:
                i = int(at["j"]) * period + period - 1
            else:
                i = int(at.get("i", 0))
            highest = max(highest, i + 1)
    return min(highest, _MAX_LAYERS)


_MAX_LAYERS = 512  # a corrupt name must not make a table of a billion rows


def _template_pattern(template: str) -> re.Pattern[str]:
    pattern = re.escape(template)
    for field, regex in (
        ("i", r"(?P<i>0|[1-9]\d{0,5})"),
        ("j", r"(?P<j>0|[1-9]\d{0,5})"),
        ("p", r"\d{1,3}"),
        ("kind", "(?:local|global)"),
        ("suffix", r"(?P<s>|_[1-9]\d{0,5})"),
    ):
        # a field that occurs twice may be captured once only
        escaped = re.escape(f"{{{field}}}")
        pattern = pattern.replace(escaped, regex, 1)
    return re.compile(pattern)


def _natural(name: str) -> list[object]:
    return [(0, int(t)) if t.isdigit() else (1, t) for t in re.split(r"(\d+)", name)]
