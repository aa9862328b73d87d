"""The formats quantized checkpoints are written in: one row each, and what a user should know about their readers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..formats.base import ContainerPlan, Slot
from ..formats.errors import UsageError, printable
from . import export_config as config
from .scheme import Scheme

Planner = Callable[[Sequence[Slot], int | None, str | None], ContainerPlan]


def _safetensors(metadata: Mapping[str, str]) -> Planner:
    def plan(
        slots: Sequence[Slot], max_shard_size: int | None, file_name: str | None
    ) -> ContainerPlan:
        from ..formats.safetensors import plan

        if file_name is not None:
            raise UsageError(
                f"{printable(file_name)} is one file, but readers need the config.json beside it.",
                fix="name a directory as the destination.",
            )
        return plan(slots, max_shard_size=max_shard_size, metadata=metadata)

    return plan


def _gemma_pytorch(
    slots: Sequence[Slot], max_shard_size: int | None, file_name: str | None
) -> ContainerPlan:
    from ..formats.torch_pickle import plan

    if max_shard_size is not None:
        return plan(
            slots, wrapper=None, max_shard_size=max_shard_size, stem="pytorch_model", suffix=".bin"
        )
    stem, dot, suffix = (file_name or "model.ckpt").rpartition(".")
    return plan(
        slots, wrapper="model_state_dict", max_shard_size=None, stem=stem, suffix=dot + suffix
    )


@dataclass(frozen=True)
class Target:
    """One format.

    Attributes:
        name: ``--format``, and the name of its layout in :data:`g2kit.formats.packed.table.FORMATS`.
        framework: converter's framework that writes everything else.
        layout: and its layout.
        plan: slots, bytes per file, single file's name -> files.
        settings: module -> scheme, modules left dense -> keys of config.json.
        embedding: ``dense`` (must stay so), ``any``, or ``quantized`` (the reader wants it so, with every linear layer).
        repeated_in: files that hold the quantization's settings again.
        readers: who loads it.
    """

    name: str
    framework: str
    layout: str
    plan: Planner
    settings: Callable[[Mapping[str, Scheme], Sequence[str]], dict[str, dict[str, Any]]]
    embedding: str = "dense"
    repeated_in: tuple[str, ...] = ()
    readers: str = ""


_PT = {"format": "pt"}
TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target(
            "compressed-tensors", "safetensors", "huggingface", _safetensors(_PT),
            config.compressed_tensors, readers="vLLM, SGLang, transformers with compressed-tensors",
        ),
        Target(
            "int-quantized", "safetensors", "huggingface", _safetensors(_PT), config.int_quantized,
            readers="vLLM, SGLang, transformers with compressed-tensors",
        ),
        Target(
            "gptq", "safetensors", "huggingface", _safetensors(_PT), config.gptq,
            repeated_in=("quantize_config.json",), readers="vLLM, SGLang, GPTQModel",
        ),
        Target(
            "awq", "safetensors", "huggingface", _safetensors(_PT), config.awq,
            readers="vLLM, SGLang, AutoAWQ, CTranslate2, TensorRT-LLM",
        ),
        Target(
            "mlx", "safetensors", "huggingface", _safetensors({"format": "mlx"}), config.mlx,
            embedding="any", readers="mlx-lm",
        ),
        Target(
            "torch-int8", "torch", "gemma_pytorch", _gemma_pytorch, config.nothing,
            embedding="quantized", readers="gemma_pytorch with quant=True",
        ),
    )
}  # fmt: skip


def target_of(format: str) -> Target:
    """The format of that name.

    Raises:
        UsageError: there is none; names those there are.
    """
    if format not in TARGETS:
        raise UsageError(
            f"{printable(format, 60)} is not a format this export writes.",
            fix=f"use one of {', '.join(TARGETS)}.",
        )
    return TARGETS[format]


def _served_by_marlin(s: Scheme) -> bool:
    return s.bits in (4, 8)


# format, which schemes it concerns, what to know
_CAVEATS: tuple[tuple[str, Callable[[Scheme], bool], str], ...] = (
    (
        "compressed-tensors",
        lambda s: not s.symmetric,
        "asymmetric: transformers loads it with quantization_config=CompressedTensorsConfig(dequantize=True) only; vLLM "
        "and SGLang read it",
    ),
    (
        "compressed-tensors",
        lambda s: not _served_by_marlin(s),
        "2 and 3 bits: codes are packed densely, as compressed-tensors does since 2026; older vLLM releases misread them",
    ),
    (
        "int-quantized",
        lambda s: True,
        "readers quantize the inputs of every linear layer to 8 bits too, per token",
    ),
    (
        "gptq",
        lambda s: not s.symmetric or not _served_by_marlin(s),
        "vLLM's bfloat16 GPTQ kernel (gptq_marlin) takes symmetric 4 and 8 bits; Gemma 2 cannot run on its float16-only "
        "kernel. For this scheme compressed-tensors or awq has more readers",
    ),
    (
        "awq",
        lambda s: True,
        "Gemma 2 needs bfloat16: vLLM must pick awq_marlin, its plain awq kernel is float16 only",
    ),
    (
        "mlx",
        lambda s: not s.symmetric,
        "asymmetric: scales and biases are float32, for zero times scale is exact in no shorter type; MLX then computes "
        "in float32",
    ),
)


def caveats(target: Target, schemes: Mapping[str, Scheme]) -> list[str]:
    """What a user should know about reading these schemes in this format."""
    return [
        text
        for name, concerns, text in _CAVEATS
        if name == target.name and any(concerns(s) for s in schemes.values())
    ]
