"""``g2kit.manifest.json``: what an output holds, hashed, and what was lost on the way.

The file is written last, so its presence says that the output is complete; it carries its own hash and the
fingerprint of its tensors, so a changed byte in it shows. Same conversion, same bytes: no times, no host names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from . import strict_json
from .errors import ChecksumError, FileIOError, FormatError, G2Error, printable
from .files import InputFile
from .fingerprint import PREFIX, fingerprint, leaf
from .names import check_file_name, chosen
from .output_paths import tree

T = TypeVar("T")
NAME = "g2kit.manifest.json"
SCHEMA, VERSION = "g2kit.manifest", 1
_MAX_LISTED = 20
_MAX_CLIMB = 3  # 0/items of a training checkpoint
_READ = 8 << 20
_LATER = {"config", "gating"}  # the first manifests lack them
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class TensorEntry:
    """One canonical tensor: g2kit's short dtype, shape, sha256 of its canonical bytes in hex."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class FileEntry:
    """One output file: bytes and sha256 in hex, as ``sha256sum`` prints it."""

    size: int
    sha256: str


@dataclass(frozen=True)
class LossyStep:
    """One step that changed values: its name, and tensor -> how many elements it changed."""

    name: str
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Manifest:
    """Everything the manifest file says.

    Attributes:
        tool_version: of g2kit.
        format: container, such as ``safetensors``.
        layout: naming scheme, such as ``huggingface``.
        dtype: short name, or ``mixed``.
        source_fingerprint: of the input's weights.
        tensors: canonical name -> entry.
        files: name below the output (``/``-separated), or the single output file's own name -> entry.
        lossy: steps that changed values, in the order they ran.
        padding_rows: canonical name -> rows of zeros at the input tensor's end that the output does not hold.
        notes: findings, one sentence each.
        config: the model's hyper-parameters as plain JSON, or None; a single file has no other place for them.
        gating: ``df`` or ``fd`` where the layout leaves the orientation of gating matrices open, else None.
    """

    tool_version: str
    format: str
    layout: str
    dtype: str
    source_fingerprint: str
    tensors: Mapping[str, TensorEntry]
    files: Mapping[str, FileEntry]
    lossy: tuple[LossyStep, ...] = ()
    padding_rows: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    config: Mapping[str, Any] | None = None
    gating: str | None = None

    @property
    def fingerprint(self) -> str:
        """Of the weights this output holds."""
        return fingerprint(
            {n: leaf(n, t.dtype, t.shape, t.sha256) for n, t in self.tensors.items()}
        )

    def dumps(self) -> bytes:
        """The file's bytes; the same manifest gives the same bytes."""
        doc = asdict(self) | {
            "schema": SCHEMA,
            "version": VERSION,
            "fingerprint": self.fingerprint,
        }
        doc["self_sha256"] = _self_hash(doc)
        return json.dumps(doc, sort_keys=True, indent=1, ensure_ascii=False).encode() + b"\n"


def _self_hash(doc: Mapping[str, Any]) -> str:
    """sha256 of the compact, sorted, ASCII JSON of everything but the hash itself."""
    rest = {k: v for k, v in doc.items() if k != "self_sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def path_for(output: Path) -> Path:
    """Where an output's manifest is: inside a directory, beside a single file."""
    return output / NAME if output.is_dir() else output.with_name(f"{output.name}.{NAME}")


def covering(path: Path) -> Path | None:
    """The manifest that speaks of ``path``: its own, or that of the output which ``path`` is a part of.

    Args:
        path: an output, or a file or directory inside one (a shard, an Orbax item).

    Returns:
        The manifest file; None where there is none. A directory above counts only if its manifest can be read and
        lists this very file, or files in this very directory.
    """
    if (own := path_for(path)).is_file():
        return own
    here = path.absolute()
    for above in list(here.parents)[:_MAX_CLIMB]:
        at = above / NAME
        if not at.is_file():
            continue
        try:
            listed = load(at).files
        except G2Error:
            return None
        inner = here.relative_to(above).as_posix()
        return at if any(n == inner or n.startswith(f"{inner}/") for n in listed) else None
    return None


def describes(
    at: Path, manifest: Manifest, path: Path, beside: Collection[str] = frozenset()
) -> bool:
    """Whether the files an output has now can be those its manifest tells of: all there, of the same sizes.

    Args:
        at: where the manifest is, as :func:`covering` gives it.
        manifest: its content.
        path: the output, or a part of it.
        beside: names of files that may have been edited since without another model coming of it.
    """
    if at.name == NAME:
        found = {n: at.parent / n for n in manifest.files}
    elif len(manifest.files) == 1:
        found = dict.fromkeys(manifest.files, path)  # it may have been renamed
    else:
        return False
    try:
        return all(
            found[n].stat().st_size == f.size for n, f in manifest.files.items() if n not in beside
        )
    except OSError:
        return False


def load(path: Path) -> Manifest:
    """Read a manifest, believing nothing.

    Args:
        path: the manifest file itself.

    Raises:
        FileIOError: not there or not readable.
        FormatError: not a manifest, or written by a newer g2kit.
        ChecksumError: it was changed after it was written.
        UnsafePathError: inside an output directory, it is a symbolic link out of that.
    """
    if path.name == NAME:
        path = chosen(path.parent, NAME)
    return parse(strict_json.load_object(path), path)


def parse(doc: Mapping[str, Any], where: Path) -> Manifest:
    """:func:`load` for a parsed document."""
    check = _Checker(where)
    if doc.get("schema") != SCHEMA:
        raise FormatError(f"this is not a g2kit manifest (schema {SCHEMA}).", where=where)
    if check.count(doc.get("version"), "version") != VERSION:
        raise FormatError(
            f"manifest version {doc['version']}; this g2kit reads version {VERSION}.",
            where=where,
            fix="install a newer g2kit.",
        )
    own = {f.name for f in fields(Manifest)}
    wanted = own | {"schema", "version", "fingerprint", "self_sha256"}
    if odd := sorted((wanted ^ doc.keys()) - (_LATER - doc.keys())):
        raise FormatError(f"missing or unknown keys: {printable(', '.join(odd))}.", where=where)
    check.same("self_sha256", doc["self_sha256"], _self_hash(doc))
    manifest = Manifest(
        **{k: check.text(doc[k], k) for k in ("tool_version", "format", "layout", "dtype")},
        source_fingerprint=check.fingerprint(doc["source_fingerprint"], "source_fingerprint"),
        tensors={n: check.tensor(t, f"tensors.{n}") for n, t in check.table(doc, "tensors")},
        files={check.path(n): check.file(f, f"files.{n}") for n, f in check.table(doc, "files")},
        lossy=tuple(check.step(s, "lossy") for s in check.array(doc["lossy"], "lossy")),
        padding_rows=check.counts(doc["padding_rows"], "padding_rows"),
        notes=tuple(check.text(n, "notes") for n in check.array(doc["notes"], "notes")),
        config=check.optional(doc.get("config"), "config", check.object),
        gating=check.optional(doc.get("gating"), "gating", check.gating),
    )
    check.same("fingerprint", doc["fingerprint"], manifest.fingerprint)
    return manifest


class _Checker:
    """Types and ranges of a manifest's values; every complaint is a FormatError that names the place."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def _require(self, good: bool, place: str, wanted: str) -> None:
        if not good:
            raise FormatError(f"{printable(place, 100)} must be {wanted}.", where=self.where)

    def text(self, value: Any, place: str) -> str:
        self._require(isinstance(value, str), place, "a string")
        return str(value)

    def optional(self, value: Any, place: str, read: Callable[[Any, str], T]) -> T | None:
        return None if value is None else read(value, place)

    def gating(self, value: Any, place: str) -> str:
        self._require(value in ("df", "fd"), place, "df, fd or null")
        return str(value)

    def count(self, value: Any, place: str) -> int:
        good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
        self._require(good, place, "a whole number, not negative")
        return int(value)

    def array(self, value: Any, place: str) -> list[Any]:
        self._require(isinstance(value, list), place, "an array")
        return list(value)

    def object(self, value: Any, place: str) -> dict[str, Any]:
        self._require(isinstance(value, dict), place, "an object")
        return dict(value)

    def table(self, doc: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
        return list(self.object(doc[key], key).items())

    def record(self, value: Any, place: str, keys: set[str]) -> dict[str, Any]:
        found = self.object(value, place)
        self._require(found.keys() == keys, place, f"an object with {', '.join(sorted(keys))}")
        return found

    def digest(self, value: Any, place: str) -> str:
        good = isinstance(value, str) and len(value) == 64 and _HEX.issuperset(value)
        self._require(good, place, "64 lower-case hex digits")
        return str(value)

    def fingerprint(self, value: Any, place: str) -> str:
        text = self.text(value, place)
        self._require(text.startswith(PREFIX), place, f"a fingerprint, {PREFIX}…")
        return PREFIX + self.digest(text.removeprefix(PREFIX), place)

    def counts(self, value: Any, place: str) -> dict[str, int]:
        return {k: self.count(v, f"{place}.{k}") for k, v in self.object(value, place).items()}

    def tensor(self, value: Any, place: str) -> TensorEntry:
        row = self.record(value, place, {"dtype", "shape", "sha256"})
        shape = tuple(self.count(n, place) for n in self.array(row["shape"], place))
        return TensorEntry(self.text(row["dtype"], place), shape, self.digest(row["sha256"], place))

    def file(self, value: Any, place: str) -> FileEntry:
        row = self.record(value, place, {"size", "sha256"})
        return FileEntry(self.count(row["size"], place), self.digest(row["sha256"], place))

    def step(self, value: Any, place: str) -> LossyStep:
        row = self.record(value, place, {"name", "counts"})
        return LossyStep(self.text(row["name"], place), self.counts(row["counts"], place))

    def path(self, name: str) -> str:
        for part in name.split("/"):
            check_file_name(part, self.where)
        return name

    def same(self, what: str, stored: Any, computed: str) -> None:
        if stored != computed:
            raise ChecksumError(
                f"{what} is {printable(str(stored), 100)}, its content gives {computed}.",
                where=self.where,
                fix="the manifest was changed or damaged; get the output again.",
            )


def check_files(
    output: Path, manifest: Manifest, progress: Callable[[int], None] | None = None
) -> list[str]:
    """Compare an output's files with its manifest, byte for byte.

    Args:
        output: the output directory, or the single output file, whatever it is called now.
        manifest: what :func:`load` gave for it.
        progress: called with the bytes read since the last call.

    Returns:
        Files of the directory that the manifest does not know, such as a README added later.

    Raises:
        ChecksumError: lists every missing and different file at once.
        UnsafePathError: a file is a symbolic link out of the directory.
        FileIOError: a file cannot be read.
    """
    if output.is_dir():
        present = {
            name: chosen(output, name) if name in manifest.files else output / name
            for name in _listed(output)
        }
    else:
        # one file is told by its bytes, so renaming it changes nothing
        named = next(iter(manifest.files)) if len(manifest.files) == 1 else output.name
        present = {named: output} if output.exists() else {}
    wrong = []
    for name, entry in manifest.files.items():
        if name not in present:
            wrong.append(f"{name} is missing")
        elif fault := _file_fault(present[name], entry, progress):
            wrong.append(f"{name} {fault}")
    surplus = sorted(present.keys() - manifest.files.keys())
    if wrong:
        wrong = sorted(wrong) + [f"{n} is not in the manifest" for n in surplus]
        more = [f"and {len(wrong) - _MAX_LISTED} more"] if len(wrong) > _MAX_LISTED else []
        raise ChecksumError(
            f"{len(wrong)} differences to the manifest: "
            f"{'; '.join(printable(w) for w in wrong[:_MAX_LISTED] + more)}.",
            where=output,
            fix="copy or convert it again.",
        )
    return surplus


def _listed(root: Path) -> list[str]:
    try:
        files, _ = tree(root)
    except OSError as e:
        raise FileIOError(f"cannot list: {e.strerror}.", where=root) from e
    return [name for name in files if name != NAME]


def _file_fault(path: Path, entry: FileEntry, progress: Callable[[int], None] | None) -> str | None:
    with InputFile(path) as file:
        if file.size != entry.size:
            return f"has {file.size} bytes, expected {entry.size}"
        found = file_digest(file, progress)
    return None if found == entry.sha256 else f"has sha256 {found}, expected {entry.sha256}"


def file_digest(file: InputFile, progress: Callable[[int], None] | None = None) -> str:
    """sha256 in hex of a whole file."""
    digest, buffer = hashlib.sha256(), bytearray(min(_READ, file.size))
    for offset in range(0, file.size, _READ):
        part = memoryview(buffer)[: min(_READ, file.size - offset)]
        file.read_into(offset, part)
        digest.update(part)
        if progress:
            progress(len(part))
    return digest.hexdigest()
