"""Token sequences whose activations decide how weights are rounded, and those kept apart to judge it.

Every sequence begins with exactly one BOS, as Gemma was trained: without it, or with two, activations are those of a broken
model. Nothing is padded. What is given (text, conversations, ids) is cut into sequences spread evenly over all of it;
without anything the model writes its own (:mod:`.sampling`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..convert.chat_template import END, START
from ..convert.open import Checkpoint
from ..convert.tokenizer import Tokenizer, tokenizer_of
from ..formats import strict_json
from ..formats.errors import FormatError, TokenizerError, UsageError
from ..formats.named_files import read_text, require_file, token_ids
from ..model.config import GemmaConfig

Ids = npt.NDArray[np.int64]
SELF = "self"
SAMPLES, SEQ_LEN = 128, 512
HELD_OUT = 0.125
SHORTEST = 8  # tokens that a sequence must have to say anything


@dataclass(frozen=True, eq=False)
class Calibration:
    """Sequences in the order they are computed: longest first.

    Attributes:
        source: where they come from, for reports.
        train: ids ``[length]`` of each sequence that Hessians are gathered from.
        held: those kept apart: they choose between methods and measure the result.
    """

    source: str
    train: tuple[Ids, ...]
    held: tuple[Ids, ...]

    @property
    def tokens(self) -> int:
        """Tokens in ``train``."""
        return sum(map(len, self.train))

    @property
    def held_tokens(self) -> int:
        """Tokens in ``held``."""
        return sum(map(len, self.held))

    @cached_property
    def sha256(self) -> str:
        """Of every id, its place and part."""
        digest = hashlib.sha256(b"g2kit calibration v1\0")
        for part in (self.train, self.held):
            digest.update(f"{len(part)}\0".encode())
            for ids in part:
                digest.update(f"{len(ids)}\0".encode() + ids.astype("<i8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Wanted:
    """How much of it.

    Attributes:
        samples: sequences for the Hessians.
        seq_len: tokens of each, BOS included.
        held_out: further sequences kept apart, as a share of ``samples``; at least one.

    Raises:
        UsageError: out of range.
    """

    samples: int = SAMPLES
    seq_len: int = SEQ_LEN
    held_out: float = HELD_OUT

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError(f"--samples is {self.samples}.", fix="use at least 1.")
        if self.seq_len < SHORTEST:
            raise UsageError(f"--seq-len is {self.seq_len}.", fix=f"use at least {SHORTEST}.")
        if not 0 < self.held_out <= 1:
            raise UsageError(
                f"the held-out share is {self.held_out}.",
                fix="use more than 0 and at most 1: held-out sequences decide between methods.",
            )

    @property
    def held(self) -> int:
        """Sequences kept apart."""
        return max(1, round(self.samples * self.held_out))

    @property
    def total(self) -> int:
        """All of them."""
        return self.samples + self.held


def read_calibration(
    what: str | Path | npt.ArrayLike, checkpoint: Checkpoint, wanted: Wanted
) -> Calibration:
    """Sequences from a file or an array.

    Args:
        what: ``.txt`` (or any other text), ``.jsonl`` with ``{"text": …}`` or
            ``{"messages": [{"role", "content"}, …]}`` per line, ``.npy`` or array of ids: ``[length]`` is a stream that is
            cut (a BOS in it only marks a document's begin), ``[sequences, length]`` are sequences as they are.
        checkpoint: gives tokenizer, vocabulary and context.
        wanted: how much.

    Raises:
        UsageError: too little, padded, ids outside of the vocabulary, or a BOS in the wrong place.
        TokenizerError: text, but the checkpoint has no tokenizer.
        NotFoundError, FileIOError, FormatError, LimitError: the file cannot be read.
    """
    config = checkpoint.config
    if wanted.seq_len > config.max_position_embeddings:
        raise UsageError(
            f"--seq-len is {wanted.seq_len}, the model's context {config.max_position_embeddings}.",
            fix=f"use at most {config.max_position_embeddings}.",
        )
    if not isinstance(what, str | Path):
        return _from_array(token_ids(what, "sequences"), "array", config, wanted)
    path = Path(what)
    _require_file(path)
    if path.suffix == ".npy":
        return _from_array(token_ids(path, "sequences"), str(path), config, wanted)
    tokenizer = _tokenizer(checkpoint)
    if path.suffix in (".jsonl", ".ndjson"):
        documents, chat = _read_jsonl(path)
        encoded = _encode(documents, tokenizer, config)
        if chat:
            return divide([_begin(ids[: wanted.seq_len - 1], config) for ids in encoded],
                          str(path), config, wanted)  # fmt: skip
    else:
        encoded = _encode([_read_text(path)], tokenizer, config)
    return divide(_cut(np.concatenate(encoded), config, wanted, path), str(path), config, wanted)


def require_sound(
    sequences: Sequence[Ids], config: GemmaConfig, where: Path | str | None = None
) -> None:
    """Exactly one BOS, at the front; no padding; ids of the model; something behind the BOS.

    Raises:
        UsageError: says which sequence is wrong and how.
    """
    for row, ids in enumerate(sequences):
        at = f"sequence {row}"
        if len(ids) < SHORTEST:
            raise UsageError(
                f"{at} has {len(ids)} tokens, fewer than {SHORTEST}.", where=where,
                fix="leave it out, or give longer ones.",
            )  # fmt: skip
        if len(ids) > config.max_position_embeddings:
            raise UsageError(
                f"{at} has {len(ids)} tokens, the model's context is {config.max_position_embeddings}.",
                where=where, fix="give shorter sequences.",
            )  # fmt: skip
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= config.vocab_size:
            raise UsageError(
                f"{at} has token id {low if low < 0 else high}; the vocabulary has {config.vocab_size}.",
                where=where, fix="use ids of this model's tokenizer.",
            )  # fmt: skip
        begins = np.flatnonzero(ids == config.bos_token_id)
        if list(begins) != [0]:
            found = f"at positions {begins[:4].tolist()}" if len(begins) else "nowhere"
            raise UsageError(
                f"{at} has BOS (id {config.bos_token_id}) {found}; it must be at position 0 only.",
                where=where, fix="put one BOS in front of every sequence, or none anywhere.",
            )  # fmt: skip
        if config.pad_token_id != config.bos_token_id and (ids == config.pad_token_id).any():
            raise UsageError(
                f"{at} is padded (id {config.pad_token_id}).", where=where,
                fix="give sequences without padding; they may be of different lengths in .jsonl.",
            )  # fmt: skip


def divide(
    sequences: Sequence[Ids], source: str, config: GemmaConfig, wanted: Wanted
) -> Calibration:
    """As many sequences as wanted, evenly spread, a share of them kept apart as evenly.

    Raises:
        UsageError: fewer than two, or one that is not sound.
    """
    require_sound(sequences, config, source)
    if len(sequences) < 2:
        raise UsageError(
            f"{len(sequences)} calibration sequence of {wanted.seq_len} tokens; at least 2 are needed, one of them "
            "to be kept apart.",
            where=source, fix="give more text, or a smaller --seq-len.",
        )  # fmt: skip
    n = len(sequences)
    total = min(wanted.total, n)
    held = min(max(1, round(total * wanted.held / wanted.total)), total - 1)
    chosen = [sequences[i * n // total] for i in range(total)]
    apart = {(2 * j + 1) * total // (2 * held) for j in range(held)}
    train = [s for i, s in enumerate(chosen) if i not in apart]
    kept = [s for i, s in enumerate(chosen) if i in apart]
    longest_first: Callable[[Ids], int] = lambda s: -len(s)  # noqa: E731
    return Calibration(
        source, tuple(sorted(train, key=longest_first)), tuple(sorted(kept, key=longest_first))
    )


def _begin(ids: Ids, config: GemmaConfig) -> Ids:
    return np.concatenate([np.array([config.bos_token_id], np.int64), ids])


def _cut(stream: Ids, config: GemmaConfig, wanted: Wanted, where: Path | str) -> list[Ids]:
    """A stream in pieces of one length, each behind a BOS."""
    body = wanted.seq_len - 1
    count = len(stream) // body
    if count < 2:
        longest = len(stream) // 2 + 1
        raise UsageError(
            f"{len(stream)} tokens are too few for two sequences of {wanted.seq_len}.",
            where=where,
            fix=f"use --seq-len {longest} or less, or give more text."
            if longest >= SHORTEST
            else "give more text.",
        )
    return [_begin(stream[k * body : (k + 1) * body], config) for k in range(count)]


# ---------------------------------------------------------------- ids


def _from_array(ids: Ids, source: str, config: GemmaConfig, wanted: Wanted) -> Calibration:
    if int(ids.max()) >= config.vocab_size or int(ids.min()) < 0:
        raise UsageError(
            f"token ids run from {int(ids.min())} to {int(ids.max())}; the vocabulary has {config.vocab_size}.",
            where=source, fix="use ids of this model's tokenizer.",
        )  # fmt: skip
    if ids.ndim == 1:
        stream = ids[ids != config.bos_token_id]
        return divide(_cut(stream, config, wanted, source), source, config, wanted)
    rows = list(ids)
    if not (ids == config.bos_token_id).any():
        rows = [_begin(row, config) for row in rows]
    return divide(rows, source, config, wanted)


# ---------------------------------------------------------------- text


def _require_file(path: Path) -> None:
    if not require_file(path, fix=f"name a file, or use --calibration {SELF}."):
        raise UsageError(
            "it is empty.",
            where=path,
            fix=f"name a file with text or ids, or use --calibration {SELF}.",
        )


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    tokenizer = tokenizer_of(checkpoint)
    if tokenizer is None:
        raise TokenizerError(
            "there is no tokenizer.model beside the checkpoint, so text cannot be used.",
            where=checkpoint.path,
            fix=f"put it there, give token ids (.npy), or use --calibration {SELF}.",
        )
    return tokenizer


def _encode(documents: Iterable[str], tokenizer: Tokenizer, config: GemmaConfig) -> list[Ids]:
    special = (config.bos_token_id, config.pad_token_id)
    return [
        np.array([i for i in tokenizer.encode(text) if i not in special], np.int64)
        for text in documents
    ]


def _read_text(path: Path) -> str:
    text = read_text(path)
    if not text.strip():
        raise UsageError("there is no text in it.", where=path)
    return text


def _read_jsonl(path: Path) -> tuple[list[str], bool]:
    """Documents, and whether they are conversations."""
    documents: list[str] = []
    kinds: set[str] = set()
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        at = f"{path}:{number}"
        kind, text = _document(strict_json.loads(line.encode(), where=at), at)
        kinds.add(kind)
        documents.append(text)
    if len(kinds) > 1:
        raise UsageError(
            "some lines have text, others messages.", where=path, fix="put them into two files."
        )
    return documents, "messages" in kinds


def _document(entry: Any, where: str) -> tuple[str, str]:
    if isinstance(entry, dict):
        if isinstance(entry.get("text"), str):
            return "text", str(entry["text"])
        if isinstance(entry.get("messages"), list):
            return "messages", render_chat(entry["messages"], where)
    raise FormatError(
        "the line is neither an object with text nor one with messages.",
        where=where,
        fix='write {"text": "…"} or {"messages": [{"role": "user", "content": "…"}, …]} per line.',
    )


def render_chat(messages: Sequence[Any], where: str | None = None) -> str:
    """A conversation in Gemma's chat format, without its BOS; the same text as the chat template gives.

    Raises:
        FormatError: not messages, a system turn, or turns that do not alternate.
    """
    out = []
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise FormatError(f"message {i} has no role and content of text.", where=where)
        name = "model" if role == "assistant" else role
        if name != ("user", "model")[i % 2]:
            raise FormatError(
                f"message {i} is of {role!r}, expected {('user', 'assistant')[i % 2]!r}.",
                where=where,
                fix="turns alternate, beginning with the user; Gemma has no system turn.",
            )
        out.append(f"{START}{name}\n{content.strip()}{END}\n")
    if not out:
        raise FormatError("a conversation without messages.", where=where)
    return "".join(out)
