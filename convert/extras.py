"""The small files and key-values that go with the weights into each target: configuration, tokenizer, generation settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..formats.base import Slot
from ..formats.dtypes import BF16, F16, F32, names
from ..model.config_formats import llama_cpp_query_scalar, size_label, to_gguf
from . import keras_preset
from .gguf_vocab import TOKENS, gguf_vocab, sentencepiece_from_gguf
from .sidecar import Sidecars, find_sidecars, huggingface_files
from .sidecar_files import TEMPLATE, TOKENIZER_CONFIG, TOKENIZER_MODEL

KV_QUERY_SCALAR = "g2kit.query_pre_attn_scalar"
_FILE_TYPE = {F32: 0, F16: 1, BF16: 32}  # llama.cpp's LLAMA_FTYPE of unquantized files


def travelling(
    path: Path, source_format: str, kv: dict[str, Any], tokenizer: str | None
) -> Sidecars:
    """What goes along with a checkpoint: the files beside it, or for GGUF what its metadata hold.

    Args:
        path: the checkpoint.
        source_format: its container.
        kv: GGUF key-values, or empty.
        tokenizer: ``--tokenizer``.
    """
    found = find_sidecars(path, source_format, None if tokenizer is None else Path(tokenizer))
    if TOKENS not in kv or tokenizer is not None:
        return found
    if TOKENIZER_MODEL not in found.names and kv.get("tokenizer.ggml.model") == "llama":
        found = found.with_content(TOKENIZER_MODEL, sentencepiece_from_gguf(kv))
    template = kv.get("tokenizer.chat_template")
    if template and found.chat_template is None:
        found = found.with_content(TEMPLATE, str(template).encode())
    return found


def extra_files(
    target: str, sidecars: Sidecars, config: Any, dtype: Any, notes: list[str]
) -> dict[str, bytes]:
    """Name -> bytes of every small file beside the weights.

    Args:
        target: framework being written.
        sidecars: what travels along.
        config: the model.
        dtype: element type of the weights.
        notes: findings are appended.
    """
    # KerasHub and llama.cpp read tokenizer.model; tokenizer.json takes seconds to build and prove
    build = target not in ("keras", "gguf")
    files = huggingface_files(sidecars, config, dtype, build_tokenizer_json=build, notes=notes)
    if target != "keras":
        return files
    # a preset directory has its own config.json and tokenizer.json
    preset = keras_preset.preset_files(config, names(dtype).short, files.get(TOKENIZER_MODEL))
    notes += keras_preset.preset_notes(config, len(config.eos_token_id) > 1)
    return preset


def gguf_kv(
    sidecars: Sidecars, config: Any, slots: Sequence[Slot], notes: list[str]
) -> list[tuple[str, str, Any]]:
    """Every key-value of a GGUF file: architecture, vocabulary, and what llama.cpp has no key for."""
    dtype = next(s.dtype for s in slots if len(s.shape) == 2)
    kv = to_gguf(config, f"{config.family} {size_label(config.num_parameters)}", _FILE_TYPE[dtype])
    last = kv.pop()  # llama.cpp's converter ends with general.quantization_version
    if config.query_pre_attn_scalar != llama_cpp_query_scalar(config):
        kv.append((KV_QUERY_SCALAR, "f32", config.query_pre_attn_scalar))
    files = huggingface_files(sidecars, config, dtype, build_tokenizer_json=False, notes=notes)
    if TOKENIZER_MODEL not in files:
        notes.append("llama.cpp loads no GGUF without a vocabulary")
        return [*kv, last]
    settings = json.loads(files.get(TOKENIZER_CONFIG, b"{}"))
    if TEMPLATE in files:
        settings.setdefault("chat_template", files[TEMPLATE].decode())
    rows = next(s.shape[0] for s in slots if s.name == "token_embd.weight")
    return [*kv, *gguf_vocab(files[TOKENIZER_MODEL], rows, settings, config.family), last]


__all__ = ["KV_QUERY_SCALAR", "extra_files", "gguf_kv", "travelling"]
