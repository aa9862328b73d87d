"""The small files and key-values that go with the weights into each target: configuration, tokenizer, generation settings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..formats import manifest
from ..formats.base import Slot
from ..formats.dtypes import BF16, F16, F32, names
from ..formats.errors import TokenizerError, printable
from ..formats.names import listing
from ..model.config import GemmaConfig
from ..model.config_formats import size_label, to_gguf
from ..model.config_gguf import own_keys
from . import keras_preset
from .config_passing import unheld_keys
from .gguf_beside import check_beside
from .gguf_vocab import TOKENS, gguf_vocab, sentencepiece_from_gguf
from .sidecar import Sidecars, find_sidecars, huggingface_files
from .sidecar_files import CONFIG, TEMPLATE, TOKENIZER_CONFIG, TOKENIZER_JSON, TOKENIZER_MODEL
from .tokenizer_rebuild import REBUILT as FROM_JSON
from .tokenizer_rebuild import sentencepiece_from_json

NO_TOKENIZER = "none"  # the value of --tokenizer that leaves it out
_FILE_TYPE = {F32: 0, F16: 1, BF16: 32}  # llama.cpp's LLAMA_FTYPE of unquantized files


# sidecars whose content a GGUF file holds in its key-values
_IN_GGUF = (CONFIG, TEMPLATE, TOKENIZER_CONFIG, TOKENIZER_MODEL)
REBUILT = (
    "tokenizer.model is rebuilt from the GGUF vocabulary: it encodes every text alike, but is not the "
    "original file byte for byte"
)


def travelling(
    path: Path, source_format: str, kv: dict[str, Any], tokenizer: str | None
) -> Sidecars:
    """What goes along with a checkpoint: the files beside it, or for GGUF what its metadata hold.

    Args:
        path: the checkpoint.
        source_format: its container.
        kv: GGUF key-values, or empty.
        tokenizer: ``--tokenizer``: a path, ``none``, or None.

    Raises:
        TokenizerError: a tokenizer.model beside a GGUF file has another vocabulary than the file; or one is damaged.
    """
    if tokenizer == NO_TOKENIZER:
        return find_sidecars(path, source_format).without_tokenizer()
    found = find_sidecars(path, source_format, None if tokenizer is None else Path(tokenizer))
    if TOKENS not in kv or tokenizer is not None:
        return found
    if TOKENIZER_MODEL not in found.names and kv.get("tokenizer.ggml.model") == "llama":
        with _in_file(path):
            rebuilt = sentencepiece_from_gguf(kv)
        found = found.with_content(TOKENIZER_MODEL, rebuilt, REBUILT, origin=path)
    elif found.tokenizer_model is not None and kv.get("tokenizer.ggml.model") == "llama":
        noted = check_beside(found.tokenizer_model, kv, found.where(TOKENIZER_MODEL))
        found = replace(found, notes=(*found.notes, *noted))
    template = kv.get("tokenizer.chat_template")
    if template and found.chat_template is None:
        found = found.with_content(TEMPLATE, str(template).encode(), origin=path)
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


def _no_keras_key(config: GemmaConfig) -> list[str]:
    """A KerasHub preset has no key for these; only values other than every Gemma's are worth a word."""
    usual = {f.name: f.default for f in fields(GemmaConfig)}
    names = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    odd = [f"{n} ({getattr(config, n)})" for n in names if getattr(config, n) != usual[n]]
    return [f"keras has no key for {', '.join(odd)}; only the manifest keeps it"] if odd else []


def with_sentencepiece(target: str, sidecars: Sidecars, notes: list[str]) -> Sidecars:
    """For targets that hold a SentencePiece vocabulary only: one rebuilt where nothing but tokenizer.json is there.

    Args:
        target: framework being written.
        sidecars: what travels along.
        notes: told why it cannot be rebuilt exactly.
    """
    raw = sidecars.read(TOKENIZER_JSON)
    if target not in ("gguf", "keras") or raw is None or TOKENIZER_MODEL in sidecars.names:
        return sidecars
    made, reason = sentencepiece_from_json(raw)
    if made is None:
        notes.append(
            f"tokenizer.json cannot be made a SentencePiece vocabulary exactly, so {target} gets no tokenizer: {reason}"
        )
        return sidecars
    origin = sidecars.where(TOKENIZER_JSON)
    return sidecars.with_content(TOKENIZER_MODEL, made, FROM_JSON, origin=origin)


def without_room(
    target: str, single: str | None, sidecars: Sidecars, config: GemmaConfig, written: Iterable[str]
) -> list[str]:
    """Notes on what travelled with the source and has no place in the output.

    Args:
        target: framework being written.
        single: name of the one output file, or None for a directory.
        sidecars: what travels along.
        config: the model.
        written: side files of the output.
    """
    held = {*written, *(_IN_GGUF if target == "gguf" else ()), manifest.NAME}
    notes = []
    if target == "keras" and not single:
        # its own config.json and tokenizer.json are other things; the vocabulary has another name
        held = {CONFIG, TOKENIZER_MODEL, manifest.NAME}
        notes += _no_keras_key(config)
    if lost := [name for name in sidecars.names if name not in held]:
        into = f"{printable(single)} is one file and has" if single else f"{target} has"
        kept = " (the manifest keeps the model's configuration)" if CONFIG in lost else ""
        fix = "; name a directory to keep them" if single and target != "keras" else ""
        notes.append(f"{into} no room for {', '.join(lost)}{kept}{fix}")
    if CONFIG not in written or target == "keras":
        keys = unheld_keys(sidecars.config or {})
        if keys:
            notes.append(f"left out of config.json, the output has no key for: {', '.join(keys)}")
    return notes


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".index.json")
_LISTED = (
    "safetensors",
    "torch_pickle",
    "gguf",
)  # containers whose other files are known to be no part of them


def staying_behind(path: Path, source_format: str, sidecars: Sidecars) -> list[str]:
    """Notes on files beside the weights that no conversion carries along.

    Args:
        path: the source; only a directory is looked at.
        source_format: container module's name.
        sidecars: what travels.
    """
    if source_format not in _LISTED or not path.is_dir():
        return []
    known = {*sidecars.names, manifest.NAME, CONFIG}
    others = sorted(
        f"{printable(p.name)}{'/' if p.is_dir() else ''}"
        for p in path.iterdir()
        if p.name not in known and not p.name.startswith(".") and not p.name.endswith(_WEIGHTS)
    )
    notes = [f"not taken along: {listing(others)}"] if others else []
    if "adapter_config.json" in others:
        notes.append(
            "adapter_config.json: an adapter (LoRA) lies beside the weights and is not in them; merge it first "
            "if it belongs to this model"
        )
    return notes


def gguf_kv(
    sidecars: Sidecars, config: Any, slots: Sequence[Slot], notes: list[str]
) -> list[tuple[str, str, Any]]:
    """Every key-value of a GGUF file: architecture, vocabulary, and what llama.cpp has no key for."""
    dtype = next(s.dtype for s in slots if len(s.shape) == 2)
    kv = to_gguf(config, f"{config.family} {size_label(config.num_parameters)}", _FILE_TYPE[dtype])
    last = kv.pop()  # llama.cpp's converter ends with general.quantization_version
    files = huggingface_files(sidecars, config, dtype, build_tokenizer_json=False, notes=notes)
    if TOKENIZER_MODEL in files:
        vocabulary = _vocabulary(sidecars, files, config, slots)
    else:
        notes.append("llama.cpp loads no GGUF without a vocabulary")
        # otherwise only the length of the vocabulary says it
        vocabulary = [(f"{config.family}.vocab_size", "u32", config.vocab_size)]
    own = own_keys(config, [*kv, *vocabulary])
    notes += _not_llama_cpps(config, own)
    return [*kv, *own, *vocabulary, last]


def _vocabulary(
    sidecars: Sidecars, files: dict[str, bytes], config: Any, slots: Sequence[Slot]
) -> list[tuple[str, str, Any]]:
    settings = json.loads(files.get(TOKENIZER_CONFIG, b"{}"))
    if TEMPLATE in files:
        settings.setdefault("chat_template", files[TEMPLATE].decode())
    rows = next(s.shape[0] for s in slots if s.name == "token_embd.weight")
    with _in_file(sidecars.where(TOKENIZER_MODEL)):
        return gguf_vocab(files[TOKENIZER_MODEL], rows, settings, config.family)


def _not_llama_cpps(config: GemmaConfig, own: Iterable[tuple[str, str, Any]]) -> list[str]:
    """Notes on token ids that only g2kit reads back; llama.cpp goes by the tokenizer's special pieces."""
    ids = [key for key, _, _ in own if key.endswith("_token_id")]
    if not ids:
        return []
    said = ", ".join(
        f"{k.removeprefix('g2kit.')} {getattr(config, k.removeprefix('g2kit.'))}" for k in ids
    )
    return [
        f"llama.cpp takes its special tokens from the tokenizer, not the configuration's {said}; only g2kit reads "
        f"{', '.join(ids)}"
    ]


@contextmanager
def _in_file(path: Path) -> Iterator[None]:
    """Name the file that a tokenizer's bytes came from where they are refused."""
    try:
        yield
    except TokenizerError as e:
        e.where = str(path)
        raise


__all__ = [
    "extra_files",
    "gguf_kv",
    "travelling",
    "with_sentencepiece",
    "without_room",
]
