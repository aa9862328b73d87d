"""A tokenizer.model beside a GGUF file against the vocabulary in it: the file is what travels, so it must be the same one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..formats.errors import TokenizerError, printable
from ..formats.sentencepiece_model import PieceType, parse
from .gguf_vocab import SCORES, TOKENS, TYPES

_ORDINARY = (PieceType.NORMAL, PieceType.BYTE)
_SHOWN = 5


def check_beside(tokenizer_model: bytes, kv: Mapping[str, Any], where: Path) -> list[str]:
    """Compare ordinary pieces by id, the only ones that both keep: GGUF writers rename and retype the others.

    Args:
        tokenizer_model: the file beside.
        kv: GGUF key-values with a SentencePiece vocabulary.
        where: the file's path.

    Returns:
        Notes on harmless differences.

    Raises:
        TokenizerError: other texts, or more or fewer of them; or the file is damaged.
    """
    model = parse(tokenizer_model, where)
    texts, types = (list(kv.get(key, ())) for key in (TOKENS, TYPES))
    count = min(len(texts), len(model.pieces))
    ordinary = [i for i, kind in enumerate(model.types) if kind in _ORDINARY]
    wrong = [
        f"{i} is {_shown(texts[i]) if i < count else 'absent'} in the GGUF file, {_shown(model.pieces[i])} beside it"
        for i in ordinary
        if i >= count or texts[i] != model.pieces[i]
    ]
    wrong += [
        f"{i} is {_shown(texts[i])} in the GGUF file, absent beside it"
        for i in range(count, len(texts))
        if i < len(types) and types[i] in (int(PieceType.NORMAL), int(PieceType.BYTE))
    ]
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise TokenizerError(
            f"this tokenizer is not the one in the GGUF file beside it: token {'; '.join(wrong[:_SHOWN])}{more}.",
            where=where,
            fix="move away what does not belong to this model, or name the right one with --tokenizer where there is "
            "such an option.",
        )
    return _scores(model.scores, kv, [i for i in ordinary if model.types[i] is PieceType.NORMAL])


def _scores(scores: tuple[float, ...], kv: Mapping[str, Any], ids: list[int]) -> list[str]:
    """A note where scores, by which text is split, differ."""
    there = np.asarray(kv.get(SCORES, ()), np.float32)
    if not ids or len(there) <= ids[-1]:
        return [
            "the GGUF file has no scores to compare with those of the tokenizer.model beside it"
        ]
    here = np.array(scores, np.float32)[ids]
    other = np.flatnonzero(there[ids] != here)
    if not len(other):
        return []
    i = ids[int(other[0])]
    return [
        f"{len(other)} scores of the GGUF file's vocabulary differ from the tokenizer.model beside it, which is used: "
        f"token {i} has {there[i]:g} and {scores[i]:g}; texts may be split differently"
    ]


def _shown(text: object) -> str:
    return printable(repr(text), 40)
