"""A SentencePiece model file (``tokenizer.model``, ``vocabulary.spm``) as plain data.

SentencePiece's own Python class tells neither which pieces are user-defined nor how text is
normalised, and its protobuf classes need the protobuf package. The file is a protobuf message of
four fields, so it is read here, with every length bounded by the file (sentencepiece_model.proto;
Protocol Buffers "Encoding").
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from pathlib import Path

from .errors import LimitError, TokenizerError, printable

MAX_BYTES = 64 << 20  # Gemma's has 4.2 MB
MAX_PIECES = 1 << 21
BPE = 2  # TrainerSpec.ModelType
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_SKIP = {_FIXED64: 8, _FIXED32: 4}
_FLOAT = struct.Struct("<f")
# TrainerSpec field and default of the special pieces' texts
_NAMES = {"unk": (45, "<unk>"), "bos": (46, "<s>"), "eos": (47, "</s>"), "pad": (48, "<pad>")}
_DAMAGED = "download or copy the tokenizer file again."


class PieceType(IntEnum):
    """``SentencePiece.Type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class SentencePieceModel:
    """What a tokenizer.model says.

    Attributes:
        pieces: text of every id; a space is written ``▁`` (U+2581).
        scores: merge priority of every id, larger first.
        types: kind of every id.
        model_type: 2 for BPE.
        byte_fallback: whether characters outside the vocabulary become byte pieces.
        treat_whitespace_as_suffix: whether a word's ``▁`` stands behind it.
        add_dummy_prefix: whether a space is put before the text.
        remove_extra_whitespaces: whether runs of spaces are shortened.
        escape_whitespaces: whether a space becomes ``▁``.
        charsmap: compiled normalisation rules; empty for none.
        names: text of the unk, bos, eos and pad pieces.
    """

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[PieceType, ...]
    model_type: int = 1
    byte_fallback: bool = False
    treat_whitespace_as_suffix: bool = False
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    charsmap: bytes = b""
    names: dict[str, str] = field(
        default_factory=lambda: {name: text for name, (_, text) in _NAMES.items()}
    )

    @cached_property
    def ids(self) -> dict[str, int]:
        """Piece -> id."""
        return {piece: i for i, piece in enumerate(self.pieces)}

    def special_id(self, name: str) -> int | None:
        """Id of ``bos``, ``eos``, ``pad`` or ``unk``; None when the model has none (as SentencePiece decides it)."""
        wanted = PieceType.UNKNOWN if name == "unk" else PieceType.CONTROL
        found = self.ids.get(self.names[name])
        return found if found is not None and self.types[found] is wanted else None


def parse(data: bytes, where: str | Path = "tokenizer.model") -> SentencePieceModel:
    """Read a serialized model.

    Args:
        data: the whole file.
        where: file name for messages.

    Raises:
        TokenizerError: empty, a Git LFS pointer, damaged, or not a SentencePiece model.
        LimitError: larger than any real model.
    """
    if len(data) > MAX_BYTES:
        raise LimitError(f"{len(data)} bytes; at most {MAX_BYTES} are read.", where=where)
    if not data:
        raise TokenizerError("the file is empty.", where=where, fix=_DAMAGED)
    if data.startswith(b"version https://git-lfs"):
        raise TokenizerError(
            "this is a Git LFS pointer, not the tokenizer.", where=where, fix="run 'git lfs pull'."
        )
    reader = _Reader(data, where)
    pieces: list[str] = []
    scores: list[float] = []
    types: list[PieceType] = []
    spans = {2: (0, 0), 3: (0, 0)}
    for number, start, stop in reader.messages(0, len(data)):
        if number == 1:
            piece, score, kind = reader.piece(start, stop, len(pieces))
            pieces.append(piece)
            scores.append(score)
            types.append(kind)
            if len(pieces) > MAX_PIECES:
                raise LimitError(f"more than {MAX_PIECES} pieces.", where=where)
        elif number in spans:
            spans[number] = (start, stop)
    return _checked(reader, pieces, scores, types, spans)


def _checked(
    reader: _Reader,
    pieces: list[str],
    scores: list[float],
    types: list[PieceType],
    spans: dict[int, tuple[int, int]],
) -> SentencePieceModel:
    if not pieces:
        raise reader.damaged("it has no pieces", 0)
    if len(set(pieces)) != len(pieces):
        seen: set[str] = set()
        for i, piece in enumerate(pieces):
            if piece in seen:
                raise reader.damaged(
                    f"piece {printable(repr(piece), 60)} appears twice, again as {i}", 0
                )
            seen.add(piece)
    trainer = reader.values(*spans[2])
    normalizer = reader.values(*spans[3])
    return SentencePieceModel(
        tuple(pieces),
        tuple(scores),
        tuple(types),
        model_type=_number(trainer, 3, 1),
        byte_fallback=bool(_number(trainer, 35, 0)),
        treat_whitespace_as_suffix=bool(_number(trainer, 24, 0)),
        add_dummy_prefix=bool(_number(normalizer, 3, 1)),
        remove_extra_whitespaces=bool(_number(normalizer, 4, 1)),
        escape_whitespaces=bool(_number(normalizer, 5, 1)),
        charsmap=_bytes(normalizer, 2, b""),
        names={
            k: _bytes(trainer, n, text.encode()).decode("utf-8", "replace")
            for k, (n, text) in _NAMES.items()
        },
    )


def _number(values: dict[int, int | bytes], key: int, default: int) -> int:
    value = values.get(key, default)
    return value if isinstance(value, int) else default


def _bytes(values: dict[int, int | bytes], key: int, default: bytes) -> bytes:
    value = values.get(key, default)
    return value if isinstance(value, bytes) else default


class _Reader:
    """Protobuf wire format; every read stays inside the message it belongs to."""

    def __init__(self, data: bytes, where: str | Path) -> None:
        self.data = data
        self.where = where

    def damaged(self, what: str, at: int) -> TokenizerError:
        """The error that refuses the file."""
        return TokenizerError(
            f"not a SentencePiece model: {what} (byte {at}).", where=self.where, fix=_DAMAGED
        )

    def varint(self, at: int, stop: int) -> tuple[int, int]:
        """Value and the position behind it."""
        value = shift = 0
        begin = at
        while at < stop and shift < 70:
            byte = self.data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
            shift += 7
        raise self.damaged("a number does not end", begin)

    def fields(self, at: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """``(number, wire type, value or start, end)`` of every field in ``[at, stop)``."""
        while at < stop:
            begin = at
            tag, at = self.varint(at, stop)
            number, wire = tag >> 3, tag & 7
            if number == 0:
                raise self.damaged("field number 0", begin)
            if wire == _VARINT:
                value, at = self.varint(at, stop)
                yield number, wire, value, at
                continue
            size = _SKIP.get(wire)
            if wire == _BYTES:
                size, at = self.varint(at, stop)
            if size is None:
                raise self.damaged(f"wire type {wire}", begin)
            if size > stop - at:
                raise self.damaged(f"{size} bytes are announced, {stop - at} are left", begin)
            yield number, wire, at, at + size
            at += size

    def messages(self, at: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """``(number, start, stop)`` of the length-delimited fields."""
        for number, wire, start, end in self.fields(at, stop):
            if wire == _BYTES:
                yield number, start, end

    def piece(self, at: int, stop: int, index: int) -> tuple[str, float, PieceType]:
        """One ``SentencePiece`` message."""
        text, score, kind = b"", 0.0, 1
        for number, wire, value, end in self.fields(at, stop):
            if number == 1 and wire == _BYTES:
                text = self.data[value:end]
            elif number == 2 and wire == _FIXED32:
                (score,) = _FLOAT.unpack_from(self.data, value)
            elif number == 3 and wire == _VARINT:
                kind = value
        if not text:
            raise self.damaged(f"piece {index} has no text", at)
        if kind not in _KINDS:
            raise self.damaged(f"piece {index} has type {kind}", at)
        if not math.isfinite(score):
            raise self.damaged(f"piece {index} has score {score}", at)
        try:
            return text.decode("utf-8"), score, _KINDS[kind]
        except UnicodeDecodeError:
            raise self.damaged(f"piece {index} is not UTF-8", at) from None

    def values(self, at: int, stop: int) -> dict[int, int | bytes]:
        """Last value of every number and byte field of a message."""
        found: dict[int, int | bytes] = {}
        for number, wire, value, end in self.fields(at, stop):
            if wire == _VARINT:
                found[number] = value
            elif wire == _BYTES:
                found[number] = self.data[value:end]
        return found


_KINDS = {int(kind): kind for kind in PieceType}


def serialize(model: SentencePieceModel) -> bytes:
    """The model as a tokenizer.model file; :func:`parse` and SentencePiece read it back.

    For vocabularies that arrive in another container (GGUF). Training settings that do not change
    how text is encoded are not kept.
    """
    out = bytearray()
    for piece, score, kind in zip(model.pieces, model.scores, model.types, strict=True):
        text = piece.encode("utf-8")
        body = b"\x0a" + _varint(len(text)) + text + b"\x15" + _FLOAT.pack(score)
        if kind is not PieceType.NORMAL:
            body += b"\x18" + bytes([kind])
        out += b"\x0a" + _varint(len(body)) + body
    trainer = bytearray(_field(3, model.model_type) + _field(4, len(model.pieces)))
    trainer += _field(24, model.treat_whitespace_as_suffix) + _field(35, model.byte_fallback)
    for piece, kind in zip(model.pieces, model.types, strict=True):
        if kind is PieceType.USER_DEFINED:  # transformers takes its added tokens from this list
            trainer += _field(31, piece.encode("utf-8"))
    for number, name in ((40, "unk"), (41, "bos"), (42, "eos"), (43, "pad")):
        found = model.special_id(name)
        trainer += _field(number, -1 if found is None else found)
    for name, (number, _) in _NAMES.items():
        trainer += _field(number, model.names[name].encode("utf-8"))
    normalizer = _field(1, b"identity" if not model.charsmap else b"user_defined")
    normalizer += _field(2, model.charsmap) + _field(3, model.add_dummy_prefix)
    normalizer += _field(4, model.remove_extra_whitespaces) + _field(5, model.escape_whitespaces)
    return bytes(out) + _field(2, bytes(trainer)) + _field(3, normalizer)


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return _varint(number << 3 | _BYTES) + _varint(len(value)) + value
    return _varint(number << 3 | _VARINT) + _varint(int(value) & (1 << 64) - 1)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
