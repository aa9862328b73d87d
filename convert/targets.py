"""What can be written: one row per framework on the command line, with its layouts and how its files are planned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..formats.base import ContainerPlan, Slot
from ..formats.dtypes import BF16, F16, F32, F64
from ..formats.errors import DtypeError, UsageError, printable
from ..model.config import PRESETS, GemmaConfig
from .keras_preset import preset_groups
from .layout import Layout, Variant
from .layouts import VARIANTS


@dataclass(frozen=True)
class PlanRequest:
    """What a container needs to lay out its files.

    Attributes:
        layout: the target's table, expanded.
        slots: foreign tensors in file order.
        max_shard_size: bytes per file, or None for one file.
        file_name: name of the weights file, or None for the format's usual one.
        kv: GGUF key-values.
    """

    layout: Layout
    slots: Sequence[Slot]
    max_shard_size: int | None
    file_name: str | None
    kv: Sequence[tuple[str, str, Any]] = ()


def _safetensors(r: PlanRequest) -> ContainerPlan:
    from ..formats.safetensors import plan

    stem = r.file_name.removesuffix(".safetensors") if r.file_name else "model"
    return plan(r.slots, max_shard_size=r.max_shard_size, stem=stem)


def _gemma_pytorch(r: PlanRequest) -> ContainerPlan:
    from ..formats.torch_pickle import plan

    if r.max_shard_size is not None:
        # the sharded release is a Hugging Face style index over bare state dicts
        return plan(
            r.slots,
            wrapper=None,
            max_shard_size=r.max_shard_size,
            stem="pytorch_model",
            suffix=".bin",
        )
    stem, dot, suffix = (r.file_name or "model.ckpt").rpartition(".")
    return plan(
        r.slots, wrapper="model_state_dict", max_shard_size=None, stem=stem, suffix=dot + suffix
    )


def _huggingface_bin(r: PlanRequest) -> ContainerPlan:
    from ..formats.torch_pickle import plan

    stem, dot, suffix = (r.file_name or "pytorch_model.bin").rpartition(".")
    return plan(
        r.slots, wrapper=None, max_shard_size=r.max_shard_size, stem=stem, suffix=dot + suffix
    )


def _gguf(r: PlanRequest) -> ContainerPlan:
    from ..formats.gguf import plan

    return plan(r.slots, r.kv, file_name=r.file_name or "model.gguf")


def _keras(r: PlanRequest) -> ContainerPlan:
    from ..formats.keras_h5 import plan

    return plan(
        r.slots,
        file_name=r.file_name or "model.weights.h5",
        groups=preset_groups(r.layout.config),
        max_shard_size=r.max_shard_size,
    )


def _orbax(r: PlanRequest) -> ContainerPlan:
    from ..formats.orbax import plan

    tree = ORBAX_TREES[r.layout.variant.name]
    chunks = {
        row.name: tuple(1 if k == row.layer_axis else n for k, n in enumerate(row.shape))
        for row in r.layout.rows.values()
        if row.layer_axis is not None
    }
    keys = {slot.name: tree.keys(slot.name) for slot in r.slots}
    return plan(r.slots, keys=keys, chunk_shapes=chunks, item=tree.item, constants=tree.constants)


def _nested_keys(name: str) -> tuple[str, ...]:
    return tuple(name.split("/"))


def _flat_keys(name: str) -> tuple[str, ...]:
    """FLAT trees have two levels: ``transformer/layer_0/attn/q_einsum`` and ``w``."""
    outer, _, leaf = name.rpartition("/")
    return outer, leaf


@dataclass(frozen=True)
class OrbaxTree:
    """How a layout's names become Orbax keys, where its item lies, and what else its tree must hold."""

    keys: Callable[[str], tuple[str, ...]]
    item: str | None = None
    constants: Mapping[tuple[str, ...], Any] | None = None


_EMPTY: dict[str, Any] = {}
ORBAX_TREES: dict[str, OrbaxTree] = {
    "flat": OrbaxTree(_flat_keys),
    "stacked": OrbaxTree(_flat_keys),
    "nested": OrbaxTree(_nested_keys),
    "wrapped": OrbaxTree(_nested_keys),
    "kauldron": OrbaxTree(
        _nested_keys,
        "default",
        {("collections",): _EMPTY, ("opt_state",): _EMPTY, ("step",): 0},
    ),
    "scanned": OrbaxTree(_nested_keys, "0/items", {("opt_state",): _EMPTY, ("step",): 0}),
    "unscanned": OrbaxTree(_nested_keys, "0/items", {("opt_state",): _EMPTY, ("step",): 0}),
}


@dataclass(frozen=True)
class Target:
    """One framework that can be written.

    Attributes:
        name: as in ``A-to-B``.
        layouts: layout names it offers, default first.
        containers: format modules its checkpoints come in.
        plan: layout name -> file planner.
        single_file: suffix of a destination that means one file rather than a directory.
        holds_padding: whether embedding rows past vocab_size belong to the format.
        shards: whether --max-shard-size applies.
        dtypes: element types it can hold.
    """

    name: str
    layouts: tuple[str, ...]
    container: str
    plan: Callable[[PlanRequest], ContainerPlan]
    single_file: tuple[str, ...] = ()
    holds_padding: bool = False
    shards: bool = False
    dtypes: tuple[Any, ...] = (BF16, F16, F32, F64)


def _torch(r: PlanRequest) -> ContainerPlan:
    return {"gemma_pytorch": _gemma_pytorch, "huggingface-bin": _huggingface_bin}[
        r.layout.variant.name
    ](r)


TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target(
            "flax", ("flat", "nested", "stacked", "kauldron", "wrapped"), "orbax", _orbax,
            holds_padding=True,
        ),
        Target(
            "torch", ("gemma_pytorch", "huggingface-bin"), "torch_pickle", _torch,
            (".ckpt", ".pt", ".pth", ".bin"), shards=True,
        ),
        Target(
            "safetensors", ("huggingface",), "safetensors", _safetensors, (".safetensors",),
            shards=True,
        ),
        Target("gguf", ("gguf",), "gguf", _gguf, (".gguf",), dtypes=(BF16, F16, F32)),
        Target("maxtext", ("scanned", "unscanned"), "orbax", _orbax, holds_padding=True),
        Target(
            "keras", ("keras",), "keras_h5", _keras, (".h5",), shards=True, dtypes=(BF16, F16, F32),
        ),
    )
}  # fmt: skip
# every layout name a framework may be read from
SOURCES: dict[str, frozenset[str]] = {
    "flax": frozenset(
        v.name for v in VARIANTS if v.container == "orbax" and "transposed" in v.options
    ),
    "maxtext": frozenset({"scanned", "unscanned"}),
    **{n: frozenset(TARGETS[n].layouts) for n in ("torch", "safetensors", "gguf", "keras")},
}


# suffixes of single files that g2kit does not write
_OTHER_FILES = frozenset({".keras", ".msgpack", ".npz", ".onnx"})


def single_file(dst: Path, target: Target) -> str | None:
    """The name of the one file that ``dst`` asks for by its suffix, None where it is a directory.

    Raises:
        UsageError: the suffix is another format's, so a directory of that name would mislead; or the name is no
            plain text, so the file could not be opened again.
    """
    suffix = dst.suffix
    if dst.is_dir():
        return None
    if suffix in target.single_file:
        if not dst.name.isprintable():
            raise UsageError(
                f"the destination's name {printable(dst.name)} is not UTF-8 text, or has control characters.",
                fix="choose a plain name.",
            )
        return dst.name
    owners = [t.name for t in TARGETS.values() if suffix.lower() in t.single_file]
    if not owners and suffix.lower() not in _OTHER_FILES:
        return None
    own = " or ".join(target.single_file)
    one = f", or one ending in {own} for a single file" if own else ""
    other = "".join(f"; to write {n}, convert with `--to {n}`" for n in owners if n != target.name)
    whose = f"belongs to a file of {owners[0]}" if other else "is no suffix g2kit knows"
    raise UsageError(
        f"the suffix {printable(suffix)} {whose}, and {target.name} is to be written.",
        where=dst,
        fix=f"pass a name without {printable(suffix)} for a directory{one}{other}.",
    )


def framework_of(layout_name: str) -> str:
    """The command-line name of the framework a layout belongs to."""
    return next(name for name, layouts in SOURCES.items() if layout_name in layouts)


def target_variant(
    target: Target, layout: str | None, config: GemmaConfig, gating: str | None
) -> Variant:
    """The table to write.

    Args:
        target: the framework.
        layout: ``--layout``, or None for its default.
        config: the model; decides fused attention and, for released sizes, the gating orientation.
        gating: ``df``, ``fd`` or None for what the released model of this shape uses, else ``df``.

    Raises:
        UsageError: the layout is not the target's, or does not suit the model.
    """
    name = layout or target.layouts[0]
    if name not in target.layouts:
        raise UsageError(
            f"--layout {name} is not a layout of {target.name}.",
            fix=f"use one of {', '.join(target.layouts)}.",
        )
    transposed = gating == "fd" if gating else _released_gating(config)
    fused = config.num_attention_heads == config.num_key_value_heads
    wanted = {"fused": fused, "transposed": transposed}
    variant = next(
        v
        for v in VARIANTS
        if v.name == name
        and v.container == target.container
        and (not v.options or v.options == wanted)
    )
    period = variant.periods.get(config.family, 1)
    if config.num_hidden_layers % period:
        fitting = _layouts_for(target, config)
        raise UsageError(
            f"--layout {name} groups layers by {period}, but the model has {config.num_hidden_layers}.",
            fix=f"pass --layout with one of {', '.join(fitting)}."
            if fitting
            else f"convert to another framework; every layout of {target.name} does so.",
        )
    return variant


def _layouts_for(target: Target, config: GemmaConfig) -> list[str]:
    """The target's layouts that can hold this number of layers."""
    periods = {
        v.name: v.periods.get(config.family, 1) for v in VARIANTS if v.container == target.container
    }
    return [n for n in target.layouts if config.num_hidden_layers % periods[n] == 0]


def _released_gating(config: GemmaConfig) -> bool:
    shape = (config.family, config.hidden_size, config.intermediate_size, config.num_hidden_layers)
    for p in PRESETS.values():
        c = p.config
        if (c.family, c.hidden_size, c.intermediate_size, c.num_hidden_layers) == shape:
            return p.gating_transposed
    return False


def check_dtype(target: Target, dtype: Any) -> None:
    """Raise DtypeError when the format cannot hold an element type."""
    if dtype not in target.dtypes:
        from ..formats.dtypes import short

        raise DtypeError(
            f"{target.name} cannot hold {short(dtype)}.",
            fix=f"pass --dtype with one of {', '.join(short(d) for d in target.dtypes if d != F64)}.",
        )
