"""Everything but the weights that a Hugging Face directory needs, from what travelled along.

Files of the source are kept as they are where they are right, mended where they are known to go
wrong (BOS off), and made from tokenizer.model where they are absent. Nothing that asks a reader to
run code is passed on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..formats import strict_json
from ..formats.errors import TokenizerError, printable
from ..model.config import END_OF_TURN, GemmaConfig
from ..model.config_huggingface import one_or_list, to_huggingface
from . import sidecar_files as names
from .chat_template import END, GEMMA_TEMPLATE, START, tuned_for_chat
from .config_passing import passed_on
from .sidecar_files import Sidecars
from .tokenizer_check import (
    RELEASED_TOKENS,
    TokenizerInfo,
    check_tokenizer,
    check_tokenizer_json,
    token_ids,
)
from .tokenizer_json import added_tokens, tokenizer_json

_NO_LIMIT = 1000000000000000019884624838656  # what transformers writes for "no maximum length"
_REMOTE_CODE = "auto_map"
_NOT_KEPT = (_REMOTE_CODE, "_from_model_config")


@dataclass(frozen=True)
class _Tokenizer:
    """The tokenizer files that go into the output."""

    files: dict[str, bytes]
    info: TokenizerInfo | None
    end_of_turn: int | None


def huggingface_files(
    sidecars: Sidecars,
    config: GemmaConfig,
    dtype: np.dtype | None,
    *,
    instruction_tuned: bool | None = None,
    build_tokenizer_json: bool = True,
    notes: list[str] | None = None,
) -> dict[str, bytes]:
    """The files beside the weights, by name.

    config.json and generation_config.json always; with a tokenizer, tokenizer.model as it is,
    tokenizer_config.json with BOS on, special_tokens_map.json, and tokenizer.json: the source's,
    else one built and proven equal to SentencePiece.

    Args:
        sidecars: what was found beside the source.
        config: the model.
        dtype: element type of the weights.
        instruction_tuned: whether the model is; None to tell by the signs in :mod:`.chat_template`.
        build_tokenizer_json: whether to make a missing tokenizer.json (ten seconds for 256,000
            pieces); False for targets that have no use for it.
        notes: receives what was left out, mended or assumed, one sentence each.

    Raises:
        TokenizerError: the tokenizer is damaged or another model's.
        FormatError: a JSON file is damaged.
        ConfigError: Hugging Face cannot express the model.
    """
    notes = [] if notes is None else notes
    notes += [note for note in sidecars.notes if note not in notes]
    tokenizer = _tokenizer_files(sidecars, config, build_tokenizer_json, notes)
    source = _sound_ids(sidecars.generation_config or {}, config, notes)
    eos = config.eos_token_id + _ids(source.get("eos_token_id"))
    tuned, sign = tuned_for_chat(
        instruction_tuned, eos, tokenizer.end_of_turn, sidecars.chat_template, sidecars.directory
    )
    if tuned and tokenizer.end_of_turn is not None:
        eos += (tokenizer.end_of_turn,)
        if tokenizer.end_of_turn not in config.eos_token_id:
            notes.append(
                f"taken for an instruction-tuned model ({sign}): generation stops at {END} too"
            )
    files = {
        names.CONFIG: _json(passed_on(to_huggingface(config, dtype), sidecars.config or {}, notes)),
        names.GENERATION: _json(_generation(source, config, tuple(dict.fromkeys(eos)), notes)),
        **tokenizer.files,
    }
    _add_tokenizer_config(files, sidecars, tokenizer.info, tuned, notes)
    template = sidecars.read(names.TEMPLATE)
    if template is not None:
        files[names.TEMPLATE] = template
    return dict(sorted(files.items()))


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode("utf-8") + b"\n"


def _ids(value: Any) -> tuple[int, ...]:
    found = value if isinstance(value, list) else [value]
    return tuple(i for i in found if type(i) is int and i >= 0)


def _sound_ids(source: dict[str, Any], config: GemmaConfig, notes: list[str]) -> dict[str, Any]:
    """A generation_config.json without token ids that the model does not have."""
    out = dict(source)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = source.get(key)
        given = value if isinstance(value, list) else [] if value is None else [value]
        sound = [i for i in given if type(i) is int and 0 <= i < config.vocab_size]
        if bad := [i for i in given if i not in sound]:
            notes.append(
                f"left out of generation_config.json: {key} {printable(str(bad[0]), 60)}, which is none of the "
                f"{config.vocab_size} token ids"
            )
            del out[key]
            if sound:
                out[key] = sound
    return out


def _generation(
    source: dict[str, Any], config: GemmaConfig, eos: tuple[int, ...], notes: list[str]
) -> dict[str, Any]:
    made = {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}
    if dropped := sorted(source.keys() & set(_NOT_KEPT)):
        notes.append(f"left out of generation_config.json: {', '.join(dropped)}")
    kept = {k: v for k, v in source.items() if k not in _NOT_KEPT}
    return made | kept | {"eos_token_id": one_or_list(eos)}


def _tokenizer_files(
    sidecars: Sidecars, config: GemmaConfig, build: bool, notes: list[str]
) -> _Tokenizer:
    raw, built = sidecars.tokenizer_model, sidecars.read(names.TOKENIZER_JSON)
    if raw is None and built is None:
        notes.append(
            "the tokenizer is left out (--tokenizer none)"
            if sidecars.tokenizer_named
            else "there is no tokenizer beside the weights, so the output has none; pass --tokenizer FILE to add it"
        )
        known = END_OF_TURN if config.vocab_size == RELEASED_TOKENS else None
        return _Tokenizer({}, None, known)
    where = sidecars.where(names.TOKENIZER_JSON)
    fix = _tokenizer_fix(sidecars)
    tree = None if built is None else _object(built, where, fix)
    ids = {} if tree is None else token_ids(tree, where, fix)
    files: dict[str, bytes] = {}
    info = None
    if raw is None:
        notes.append(
            "there is no tokenizer.model beside the weights, only tokenizer.json; llama.cpp's and Google's tools "
            "need tokenizer.model (pass --tokenizer FILE)"
        )
    else:
        files[names.TOKENIZER_MODEL] = raw
        info = _checked(raw, sidecars, config, ids)
        notes += info.notes
    if tree is not None and built is not None:
        notes += check_tokenizer_json(tree, info.model if info else None, config, where)
        files[names.TOKENIZER_JSON] = built
    elif build and raw is not None and info is not None:
        made, reason = tokenizer_json(raw, info.model)
        if made is None:
            notes.append(
                f"tokenizer.json is left out, transformers will read tokenizer.model: {reason}"
            )
        else:
            files[names.TOKENIZER_JSON] = made
    end_of_turn = info.end_of_turn_id if info else ids.get(END)
    return _Tokenizer(files, info, end_of_turn)


def _checked(
    raw: bytes, sidecars: Sidecars, config: GemmaConfig, ids: dict[str, int]
) -> TokenizerInfo:
    """check_tokenizer, counting the ids that tokenizer.json or tokenizer_config.json add behind the pieces."""
    decoder = (sidecars.tokenizer_config or {}).get("added_tokens_decoder")
    listed = (
        [int(i) for i in decoder if i.isdecimal() and len(i) < 10]
        if isinstance(decoder, dict)
        else []
    )
    highest = max([*ids.values(), *listed], default=-1)
    return check_tokenizer(
        raw, config, where=sidecars.where(names.TOKENIZER_MODEL), highest_id=highest
    )


def _tokenizer_fix(sidecars: Sidecars) -> str:
    """What to do about a bad tokenizer.json: it depends on whose choice it was, and what is beside it."""
    if sidecars.tokenizer_named:
        return "pass this model's tokenizer.model (or its tokenizer.json) with --tokenizer."
    if sidecars.tokenizer_model is not None:
        return "remove it; it is built again from tokenizer.model."
    return "get it from its source again, or pass this model's tokenizer.model with --tokenizer."


def _object(data: bytes, where: Any, fix: str) -> dict[str, Any]:
    value = strict_json.loads(data, where=where)
    if not isinstance(value, dict):
        raise TokenizerError("this is no tokenizer.json.", where=where, fix=fix)
    return value


def _add_tokenizer_config(
    files: dict[str, bytes],
    sidecars: Sidecars,
    info: TokenizerInfo | None,
    tuned: bool,
    notes: list[str],
) -> None:
    """tokenizer_config.json and special_tokens_map.json, kept and mended or made."""
    config = sidecars.tokenizer_config
    if config is not None:
        config = _mended(config, notes)
    elif info is not None:
        config = built_tokenizer_config(info)
    if config is None:
        return
    if tuned and sidecars.chat_template is None:
        config["chat_template"] = GEMMA_TEMPLATE
    files[names.TOKENIZER_CONFIG] = _json(config)
    special = sidecars.read(names.SPECIAL_TOKENS)
    if special is not None:
        sidecars.json(names.SPECIAL_TOKENS)  # refuses damage
        files[names.SPECIAL_TOKENS] = special
    elif info is not None:
        files[names.SPECIAL_TOKENS] = _json(_special_tokens(info))


def _mended(config: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    if _REMOTE_CODE in config:
        notes.append("tokenizer_config.json's auto_map, which loads code, is left out")
    if config.get("add_bos_token") is False:
        notes.append(
            "tokenizer_config.json had add_bos_token false; Gemma needs <bos>, so it is true now"
        )
    kept = {k: v for k, v in config.items() if k != _REMOTE_CODE}
    return {"tokenizer_class": "GemmaTokenizer"} | kept | {"add_bos_token": True}


def built_tokenizer_config(info: TokenizerInfo) -> dict[str, Any]:
    """A tokenizer_config.json with the keys of the official Gemma releases.

    Every control and user-defined piece is listed: llama.cpp's converter and transformers take
    their kinds from here.
    """
    flags = {
        str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added_tokens(info.model)
    }
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": flags,
        "additional_special_tokens": _turns(info),
        **_named(info),
        "clean_up_tokenization_spaces": False,
        "model_max_length": _NO_LIMIT,
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
        "use_default_system_prompt": False,
    }


def _named(info: TokenizerInfo) -> dict[str, str]:
    return {
        f"{name}_token": info.model.names[name]
        for name in ("bos", "eos", "pad", "unk")
        if info.model.special_id(name) is not None
    }


def _turns(info: TokenizerInfo) -> list[str]:
    return [piece for piece in (START, END) if piece in info.model.ids]


def _special_tokens(info: TokenizerInfo) -> dict[str, Any]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    named = {key: {"content": text} | plain for key, text in _named(info).items()}
    return named | {"additional_special_tokens": _turns(info)}
