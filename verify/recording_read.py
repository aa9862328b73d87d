"""Opening a recording, believing nothing: every hash, shape and number is checked before anything is compared with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ..formats import strict_json
from ..formats.base import Array, RowTensor, Tensor
from ..formats.errors import ChecksumError, FormatError, printable
from ..formats.files import InputFile
from ..formats.names import listing
from ..formats.sentencepiece_model import parse as parse_tokenizer
from ..model.config import GemmaConfig
from . import recording_schema as schema
from .floor import Floor
from .probes import Probe, ProbeSet
from .recording_arrays import check_file, open_arrays
from .recording_consistency import check_recording
from .recording_document import DAMAGED, parse

MAX_DOCUMENT = 64 << 20


class Recording:
    """An opened recording. Its arrays are read on demand; all of it was checked.

    Attributes:
        path: its directory.
        document: ``recording.json``.
        config: the model's.
        sizes: of the arrays; ``sizes.kind`` says whether logits can be computed again.
        probes: what was run; without texts, which a recording does not carry.
        offsets: row of every probe's first position, and one past the last.
        tokenizer_model: the model's SentencePiece file; None where it had none, and in recordings of the first version.
    """

    def __init__(
        self,
        path: Path,
        document: Mapping[str, Any],
        sizes: schema.Sizes,
        config: GemmaConfig,
        file: InputFile,
        tensors: Mapping[str, RowTensor],
        tokenizer_model: bytes | None = None,
    ) -> None:
        self.path, self.document, self.sizes, self.config = path, document, sizes, config
        self._file, self._tensors, self.tokenizer_model = file, tensors, tokenizer_model
        lengths = [row["length"] for row in document["probes"]["list"]]
        self.offsets: list[int] = [0, *np.cumsum(lengths, dtype=np.int64).tolist()]
        self.probes = self._probe_set()

    @property
    def id(self) -> str:
        """``sha256:…`` of what was computed; the run's time and place do not count."""
        return str(self.document["id"])

    @property
    def kind(self) -> str:
        """``hidden`` or ``top-k``."""
        return self.sizes.kind

    @property
    def dtype(self) -> str:
        """Compute type of the run."""
        return self.sizes.dtype

    @property
    def fingerprint(self) -> str:
        """Of the weights that ran."""
        return str(self.document["model"]["fingerprint"])

    @property
    def embedding_sha256(self) -> str:
        """Of the embedding's values; see :func:`.recording_schema.embedding_sha256`."""
        return str(self.document["model"]["embedding_sha256"])

    @property
    def floor(self) -> Floor | None:
        """The run's noise floor, None when none was measured."""
        found = self.document["floor"]
        return None if found is None else Floor.from_json(found)

    def describe(self) -> dict[str, Any]:
        """What a report's SIDE object says of it."""
        model = self.document["model"]
        return {
            "kind": "recording",
            "format": model["format"],
            "layout": model["layout"],
            "dtypes": model["dtypes"],
            "quantized": model["quantized"],
            "fingerprint": self.fingerprint,
            "parameters": self.config.num_parameters,
            "bytes": self._file.size,
            "config": model["config"],
            "config_from": "recording",
            "runner": dict(self.document["runner"]),
        }

    @property
    def tokenizer_rebuilt(self) -> bool:
        """Whether the tokenizer was made from another file, which keeps less."""
        found = self.document["model"].get("tokenizer")
        return found is not None and bool(found["rebuilt"])

    def require_weights(self, fingerprint: str) -> None:
        """Refuse a comparison that is to be of the same weights.

        Raises:
            ChecksumError: these are others.
        """
        if fingerprint != self.fingerprint:
            raise ChecksumError(
                f"the recording is of the weights {self.fingerprint}, these are {fingerprint}.",
                where=self.path,
                fix="compare with the checkpoint that was recorded, in any lossless format.",
            )

    @property
    def embedding(self) -> Table | None:
        """The embedding it carries along, or None."""
        tensor = self._tensors.get("embedding")
        return None if tensor is None else Table(tensor)

    def array(self, name: str, probe: int) -> Array:
        """A probe's rows of an array of :func:`.recording_schema.slots`."""
        return self.rows(name, self.offsets[probe], self.offsets[probe + 1])

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows ``start:stop`` of an array."""
        return self._tensors[name].read((slice(start, stop),))

    def place(self, row: int) -> tuple[int, int]:
        """Probe and position of a row."""
        probe = int(np.searchsorted(self.offsets, row, side="right")) - 1
        return probe, row - self.offsets[probe]

    def check_unchanged(self) -> None:
        """Raise FileIOError if the file was written to since it was opened."""
        self._file.check_unchanged()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _probe_set(self) -> ProbeSet:
        found = self.document["probes"]
        rows = [
            Probe(
                id=row["id"],
                group=row["group"],
                category=row["category"],
                document=row["document"],
                tokens=self.array("tokens", i).astype(np.int64),
                text=None,
                scored=row["scored"],
            )
            for i, row in enumerate(found["list"])
        ]
        return ProbeSet(
            probes=tuple(rows),
            profile=found["profile"],
            seed=found["seed"],
            skipped=list(found["skipped"]),
        )


@dataclass(frozen=True)
class Table:
    """An embedding in a recording, read by rows."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """``(vocab, hidden)``."""
        return self.tensor.shape

    def read_rows(self, start: int, stop: int) -> Array:
        """Rows ``[stop - start, hidden]``."""
        return self.tensor.read((slice(start, stop),))


def is_recording(path: str | Path) -> bool:
    """Whether ``path`` claims to be one: a directory with ``recording.json``, or that file."""
    path = Path(path)
    return path.name == schema.DOCUMENT or (path / schema.DOCUMENT).is_file()


def open_recording(path: str | Path) -> Recording:
    """Open a recording; reads all of it once.

    Args:
        path: its directory, or the ``recording.json`` in it.

    Raises:
        FileIOError: not there or not readable.
        FormatError: not a recording, of a newer version, or a field is not what it must be.
        ChecksumError: it was changed after it was written.
        TruncatedError, LayoutError, LimitError: the arrays' file is damaged.
        MissingTensorError, ExtraTensorError, DtypeError, ShapeError: its arrays are not those of its kind.
        NonFiniteError: a number is NaN or infinite.
        TokenizerError: a token is outside the vocabulary.
        ConfigError: the model's configuration contradicts itself.
    """
    path = Path(path)
    path = path.parent if path.name == schema.DOCUMENT else path
    where = path / schema.DOCUMENT
    document = strict_json.load_object(where, limit=MAX_DOCUMENT)
    sizes, config = parse(document, where)
    file = InputFile(path / schema.ARRAYS)
    try:
        tensors = open_arrays(file, document["files"][schema.ARRAYS], sizes)
        tokenizer = _tokenizer(path, document)
        recording = Recording(path, document, sizes, config, file, tensors, tokenizer)
        _check_probes(recording, where)
        check_recording(recording)
    except BaseException:
        file.close()
        raise
    return recording


def _check_probes(recording: Recording, where: Path) -> None:
    found = recording.document["probes"]
    for row, probe in zip(found["list"], recording.probes.probes, strict=True):
        if schema.tokens_sha256(probe.tokens) != row["tokens_sha256"]:
            raise ChecksumError(
                f"the tokens of probe {printable(probe.id, 60)} are not those it was recorded with.",
                where=where,
                fix=DAMAGED,
            )
    ids = [p.id for p in recording.probes.probes]
    if len(set(ids)) != len(ids):
        raise FormatError("two probes have one id.", where=where, fix=DAMAGED)
    if recording.probes.sha256 != found["sha256"]:
        raise ChecksumError(
            f"the probes' hash is {printable(str(found['sha256']), 100)}, they give "
            f"{recording.probes.sha256}.",
            where=where,
            fix=DAMAGED,
        )


def _tokenizer(path: Path, document: Mapping[str, Any]) -> bytes | None:
    """The tokenizer's file, its hash and its number of pieces checked."""
    entry = document["files"].get(schema.TOKENIZER)
    if entry is None:
        return None
    with InputFile(path / schema.TOKENIZER) as file:
        check_file(file, entry)
        content = file.read(0, file.size)
        found = len(parse_tokenizer(content, file.path).pieces)
    said = document["model"]["tokenizer"]["pieces"]
    if found != said:
        raise FormatError(
            f"the tokenizer has {found} pieces, {schema.DOCUMENT} says {said}.",
            where=file.path,
            fix=DAMAGED,
        )
    return content


def require_same_probes(a: Recording, b: Recording) -> None:
    """Raise FormatError unless two recordings are of the same tokens; names the first difference."""
    if a.probes.sha256 == b.probes.sha256:
        return
    one, two = (
        {row["id"]: row["tokens_sha256"] for row in r.document["probes"]["list"]} for r in (a, b)
    )
    odd: Sequence[str] = [n for n in {**one, **two} if one.get(n) != two.get(n)]
    what = f"{len(odd)} probes differ: {listing(odd)}" if odd else "their order or labels differ"
    raise FormatError(
        f"the recordings are of other probes than each other; {what}.",
        where=b.path,
        fix="record both with the same --profile, --text and --tokens.",
    )
