"""What a recording is made of: its document, its arrays, its hashes. Shared by writer and reader, computes no model.

A recording is a directory with ``recording.json`` (who, what, how) and ``arrays.safetensors``; nothing in it can be
executed. Positions of all probes lie one after the other in every array, in the probes' order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ..formats.base import Slot
from ..formats.dtypes import BF16, F16, F32, F64
from ..model.config import GemmaConfig

Array = npt.NDArray[Any]

FAMILY, VERSION = "g2kit.recording/", 2
SCHEMA = f"{FAMILY}{VERSION}"
# without tokenizer and final norm: still read
FIRST = f"{FAMILY}1"
READABLE = (FIRST, SCHEMA)
DOCUMENT, ARRAYS, TOKENIZER = "recording.json", "arrays.safetensors", "tokenizer.model"
HIDDEN, TOP_K = "hidden", "top-k"
KINDS = (HIDDEN, TOP_K)
TOP, SAMPLED, DIMS = 256, 32, 16
PREFIX = "sha256:"
# left out of the id: differs between two runs that computed the same
UNIDENTIFIED = ("id", "run", "self_sha256")
WIDE: dict[str, np.dtype] = {"float32": F32, "bfloat16": F32, "float64": F64}
I32, I64 = np.dtype(np.int32), np.dtype(np.int64)
_ROWS = 512  # positions projected at a time
_TABLE_ROWS = 4096


@dataclass(frozen=True)
class Sizes:
    """What decides the arrays' shapes.

    Attributes:
        kind: ``hidden`` (everything, logits can be computed again) or ``top-k`` (from a runner that gives logits only).
        positions: of all probes.
        hidden, layers, vocab: the model's.
        dtype: compute type of the run.
        embedding: element type of the embedding carried along, None for none.
        final_norm: the final norm's weights are there; the first version had none.
    """

    kind: str
    positions: int
    hidden: int
    layers: int
    vocab: int
    dtype: str
    embedding: np.dtype | None = None
    final_norm: bool = True

    @property
    def top(self) -> int:
        """Recorded logits per position."""
        return min(TOP, self.vocab)

    @property
    def sampled(self) -> int:
        """Positions whose logits are recorded whole."""
        return min(SAMPLED, self.positions)

    @property
    def wide(self) -> np.dtype:
        """Element type of hidden states."""
        return np.dtype(WIDE[self.dtype])


def slots(s: Sizes) -> list[Slot]:
    """Every array of a recording of these sizes.

    ``tokens[n]``, ``lse[n]``; ``topk_id[n, 256]`` and ``topk_logit`` by descending logit, then ascending id;
    ``sample_at[m]`` positions, ``sample_logits[m, vocab]``; ``next_logit[n]`` of the token that follows in a scored probe,
    0 where none does. Kind ``hidden``: ``final_hidden[n, d]`` behind the final norm, ``projection[n, layers + 1, 16]`` and
    ``norm[n, layers + 1]`` (Euclidean) of the embedded tokens and every block's output; ``final_norm[d]``, the norm's weights
    as stored, which tie the last projection to the final states; maybe ``embedding[vocab, d]``.
    """
    n, d, points = s.positions, s.hidden, s.layers + 1
    every = [
        Slot("tokens", I32, (n,)),
        Slot("lse", F64, (n,)),
        Slot("topk_id", I32, (n, s.top)),
        Slot("topk_logit", F32, (n, s.top)),
        Slot("sample_at", I64, (s.sampled,)),
        Slot("sample_logits", s.wide, (s.sampled, s.vocab)),
        Slot("next_logit", F32, (n,)),
    ]
    if s.kind == TOP_K:
        return every
    every += [
        Slot("final_hidden", s.wide, (n, d)),
        Slot("projection", s.wide, (n, points, DIMS)),
        Slot("norm", s.wide, (n, points)),
    ]
    if s.final_norm:
        every.append(Slot("final_norm", F64, (d,)))
    return every if s.embedding is None else [*every, Slot("embedding", s.embedding, (s.vocab, d))]


def signs(hidden: int) -> npt.NDArray[np.float64]:
    """The projection ``[16, hidden]`` of +1 and -1: bits of SHAKE-128 of its own size, highest bit first, 1 is +1."""
    seed = b"g2kit projection v1\0" + hidden.to_bytes(8, "little")
    stream = hashlib.shake_128(seed).digest((DIMS * hidden + 7) // 8)
    bits = np.unpackbits(np.frombuffer(stream, np.uint8))[: DIMS * hidden]
    return bits.reshape(DIMS, hidden).astype(np.float64) * 2 - 1


def project(
    hidden: Array, matrix: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Projections and norms of hidden states.

    Args:
        hidden: ``[positions, hidden]``.
        matrix: of :func:`signs`.

    Returns:
        ``[positions, 16]`` and ``[positions]``. The mean square of a difference's projections is its squared norm,
        on average over matrices; with 16 of them within a factor of about 1.35 at one position.
    """
    projected = np.empty((len(hidden), DIMS))
    norms = np.empty(len(hidden))
    for start in range(0, len(hidden), _ROWS):
        part = slice(start, start + _ROWS)
        x = hidden[part].astype(np.float64)
        projected[part] = x @ matrix.T
        norms[part] = np.sqrt(np.einsum("pd,pd->p", x, x))
    return projected, norms


def sampled_positions(positions: int, probes_sha256: str) -> npt.NDArray[np.int64]:
    """Positions whose logits are kept whole, ascending: one from each of up to 32 equal stretches, drawn by SHAKE-128."""
    count = min(SAMPLED, positions)
    seed = b"g2kit sampled rows v1\0" + probes_sha256.encode()
    drawn = np.frombuffer(hashlib.shake_128(seed).digest(8 * SAMPLED), "<u8")
    edges = [i * positions // count for i in range(count + 1)] if count else []
    return np.array(
        [a + int(drawn[i]) % (b - a) for i, (a, b) in enumerate(pairwise(edges))],
        np.int64,
    )  # fmt: skip


def embedding_sha256(blocks: Iterable[tuple[int, int, Array]]) -> str:
    """sha256 of an embedding's values as float32 (float64 where stored so), whatever type of the two or below holds them.

    Equal for a bfloat16 table and the same table widened, so that a candidate of another format can serve its rows.
    """
    found = hashlib.sha256()
    for _, _, rows in blocks:
        exact = rows.dtype if rows.dtype == F64 else F32
        found.update(
            np.ascontiguousarray(rows.astype(exact, copy=False)).reshape(-1).view(np.uint8).data
        )
    return found.hexdigest()


def table_blocks(table: Any) -> Iterable[tuple[int, int, Array]]:
    """``(start, stop, rows)`` of anything with ``shape`` and ``read_rows``; its own ``blocks`` where it has them."""
    if hasattr(table, "blocks"):
        yield from table.blocks()
        return
    for start in range(0, table.shape[0], _TABLE_ROWS):
        stop = min(start + _TABLE_ROWS, table.shape[0])
        yield start, stop, table.read_rows(start, stop)


def carried(dtype: np.dtype) -> np.dtype:
    """Element type an embedding is carried along in."""
    return dtype if dtype in (BF16, F16, F32, F64) else F32


def config_to_json(config: GemmaConfig) -> dict[str, Any]:
    """Field -> value."""
    return {**asdict(config), "eos_token_id": list(config.eos_token_id)}


def tokens_sha256(tokens: Array) -> str:
    """sha256 of token ids as little-endian int64."""
    return hashlib.sha256(np.ascontiguousarray(tokens, "<i8").tobytes()).hexdigest()


def content_id(document: Mapping[str, Any]) -> str:
    """``sha256:…`` over the document but for :data:`UNIDENTIFIED`; equal for two recordings of the same numbers."""
    return PREFIX + _hash(document, UNIDENTIFIED)


def self_sha256(document: Mapping[str, Any]) -> str:
    """sha256 over everything but itself."""
    return _hash(document, ("self_sha256",))


def _hash(document: Mapping[str, Any], without: Iterable[str]) -> str:
    rest = {k: v for k, v in document.items() if k not in set(without)}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def dumps(document: Mapping[str, Any]) -> bytes:
    """The file's bytes, with ``id`` and ``self_sha256`` filled in."""
    document = {**document, "id": content_id(document)}
    document["self_sha256"] = self_sha256(document)
    text = json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"
