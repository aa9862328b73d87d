"""Finding the small files beside the weights: tokenizer, configuration, chat template, manifest.

Every framework keeps them elsewhere. Kaggle's Flax and PyTorch downloads put ``tokenizer.model``
beside the checkpoint or one directory above it, Keras calls it ``assets/tokenizer/vocabulary.spm``,
gemma_pytorch ships an empty stub. Files are only listed here; they are read, and found to be good
or bad, when somebody asks for their content.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..formats import manifest, strict_json
from ..formats.errors import (
    FormatError,
    G2Error,
    LimitError,
    TokenizerError,
    printable,
)
from ..formats.files import InputFile
from ..formats.named_files import require_there
from ..formats.names import inside
from ..model.canonical import EMBED

TOKENIZER_MODEL, TOKENIZER_JSON = "tokenizer.model", "tokenizer.json"
TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
CONFIG, GENERATION, TEMPLATE = "config.json", "generation_config.json", "chat_template.jinja"
_TOKENIZER_FILES = (TOKENIZER_MODEL, TOKENIZER_JSON, TOKENIZER_CONFIG, SPECIAL_TOKENS, TEMPLATE)
NAMES = (*_TOKENIZER_FILES, CONFIG, GENERATION)
_KERAS_VOCABULARY = "assets/tokenizer/vocabulary.spm"
_MAX_BYTES = {TOKENIZER_MODEL: 64 << 20, TOKENIZER_JSON: 64 << 20}
_MAX_SMALL = 8 << 20
_OTHERS = ("orbax", "gguf")  # containers beside which a config.json may be anybody's
_IGNORED = "; ignored"
_LFS = b"version https://git-lfs"
# directories inside a training run; the tokenizer lies above them
_INNER = re.compile(r"items|default|\d+|ckpt_\d+|checkpoints")
_MAX_CLIMB = 4


@dataclass(frozen=True)
class Sidecars:
    """The files found beside a checkpoint.

    Attributes:
        directory: where the weights are.
        files: sidecar name -> path it was found at.
        notes: what was ignored or found in an unusual place, one sentence each.
        source_format: container module's name of the checkpoint.
        contents: sidecar name -> bytes that take the place of a file (a tokenizer rebuilt from GGUF
            metadata).
        path: the checkpoint itself.
        tokenizer_named: whether the user chose the tokenizer, or none (``--tokenizer``).
        origins: sidecar name -> the file that ``contents`` were made from.
    """

    directory: Path
    files: Mapping[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    source_format: str = ""
    contents: Mapping[str, bytes] = field(default_factory=dict)
    path: Path | None = None
    tokenizer_named: bool = False
    origins: Mapping[str, Path] = field(default_factory=dict)

    @property
    def ignored(self) -> list[str]:
        """What is there but was not read, and why: those of the notes that say so."""
        return [note for note in self.notes if note.endswith(_IGNORED)]

    @property
    def names(self) -> list[str]:
        """Names of what is there, for inventories."""
        return sorted({*self.files, *self.contents})

    def where(self, name: str) -> Path:
        """Path of a sidecar, or of the file it was made from, for messages."""
        return self.origins.get(name) or self.files.get(name, self.directory / name)

    def read(self, name: str) -> bytes | None:
        """Content of a sidecar; None when there is none.

        Raises:
            TokenizerError: a tokenizer file is a Git LFS pointer.
            FormatError: another file is.
            LimitError: it is larger than any real one.
            FileIOError: it cannot be read.
        """
        if name in self.contents:
            return self.contents[name]
        if name not in self.files:
            return None
        path, limit = self.files[name], _MAX_BYTES.get(name, _MAX_SMALL)
        with InputFile(path) as file:
            if file.size > limit:
                raise LimitError(f"{file.size} bytes; at most {limit} are read.", where=path)
            data = file.read(0, file.size)
        if data.startswith(_LFS):
            kind = TokenizerError if name in _TOKENIZER_FILES else FormatError
            raise kind(
                f"this is a Git LFS pointer, not {name} itself.",
                where=path,
                fix="run 'git lfs pull' in the repository it comes from, or download the file.",
            )
        return data

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON sidecar, parsed; None when there is none.

        Raises:
            FormatError: not JSON, or not an object.
        """
        data = self.read(name)
        if data is None:
            return None
        value = strict_json.loads(data, where=self.where(name))
        if not isinstance(value, dict):
            raise FormatError(
                f"the top level must be a JSON object, found {strict_json.type_name(value)}.",
                where=self.where(name),
            )
        return value

    @cached_property
    def tokenizer_model(self) -> bytes | None:
        """The SentencePiece file."""
        return self.read(TOKENIZER_MODEL)

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """Hugging Face's config.json, parsed; None where it is absent or plainly something else's."""
        found = self.json(CONFIG)
        if found is not None and self.source_format in _OTHERS and "model_type" not in found:
            return None
        return found

    @property
    def config_path(self) -> Path:
        """Where config.json is."""
        return self.where(CONFIG)

    @cached_property
    def tokenizer_config(self) -> dict[str, Any] | None:
        """tokenizer_config.json, parsed."""
        return self.json(TOKENIZER_CONFIG)

    @cached_property
    def generation_config(self) -> dict[str, Any] | None:
        """generation_config.json, parsed."""
        return self.json(GENERATION)

    @cached_property
    def chat_template(self) -> str | None:
        """The source's chat template: chat_template.jinja, else tokenizer_config.json's.

        Raises:
            FormatError: it is not UTF-8.
        """
        data = self.read(TEMPLATE)
        if data is not None:
            try:
                return data.decode("utf-8")
            except UnicodeDecodeError:
                raise FormatError("not UTF-8.", where=self.where(TEMPLATE)) from None
        found = (self.tokenizer_config or {}).get("chat_template")
        if isinstance(found, list):  # several, by name
            named = {str(t.get("name")): t.get("template") for t in found if isinstance(t, dict)}
            found = named.get("default")
        return found if isinstance(found, str) else None

    @cached_property
    def own_manifest(self) -> manifest.Manifest | None:
        """g2kit's manifest; None where it is absent or damaged (`g2conv check` judges that)."""
        path = self.files.get(manifest.NAME)
        if path is None:
            return None
        try:
            return manifest.load(path)
        except G2Error:
            return None

    @cached_property
    def manifest_fits(self) -> bool:
        """Whether the manifest can be that of the files which are here now."""
        path = self.files.get(manifest.NAME)
        return (
            path is not None
            and self.own_manifest is not None
            and manifest.describes(path, self.own_manifest, self.path or self.directory, NAMES)
        )

    @cached_property
    def manifest_config(self) -> Mapping[str, Any] | None:
        """The model's configuration as an earlier conversion noted it."""
        return self.own_manifest.config if self.own_manifest and self.manifest_fits else None

    @cached_property
    def manifest_tensors(self) -> Mapping[str, manifest.TensorEntry] | None:
        """Canonical name -> what the manifest of exactly these files says of the tensor; None without one."""
        return self.own_manifest.tensors if self.own_manifest and self.manifest_fits else None

    @property
    def has_own_manifest(self) -> bool:
        """Whether the manifest speaks of this single file, which a config.json beside it may not."""
        path = self.files.get(manifest.NAME)
        return path is not None and path.name != manifest.NAME

    @cached_property
    def manifest_embedding(self) -> dict[str, int]:
        """``source_rows``: embedding rows before an earlier conversion dropped padding, from g2kit's manifest."""
        found = self.own_manifest
        if found is None:
            return {}
        entry = found.tensors.get(EMBED)
        dropped = found.padding_rows.get(EMBED, 0)
        return (
            {"source_rows": entry.shape[0] + dropped} if entry and entry.shape and dropped else {}
        )

    def with_tokenizer(self, path: Path) -> Sidecars:
        """The same, but with the tokenizer the user names (``--tokenizer``).

        Args:
            path: a SentencePiece file, or a directory with tokenizer files; nothing of the old
                tokenizer is kept.

        Raises:
            NotFoundError: nothing there.
            TokenizerError: a directory without a tokenizer, or an empty file.
        """
        kept = {k: v for k, v in self.files.items() if k not in _TOKENIZER_FILES}
        found, notes = dict[str, Path](), list[str]()
        named = "pass the tokenizer.model of this model, or the directory it is in."
        require_there(path, fix=named)
        if path.is_dir():
            for name in _TOKENIZER_FILES:
                _look(path, name, found, notes)
            _look_for_keras(path, found, notes)
        elif path.is_file() and path.stat().st_size:
            found[TOKENIZER_JSON if path.suffix == ".json" else TOKENIZER_MODEL] = path
        if TOKENIZER_MODEL not in found and TOKENIZER_JSON not in found:
            raise TokenizerError(
                f"no tokenizer here{': ' + notes[0] if notes else ''}.",
                where=path,
                fix=named,
            )
        contents = {k: v for k, v in self.contents.items() if k not in _TOKENIZER_FILES}
        if TEMPLATE not in found and TOKENIZER_CONFIG not in found and self.chat_template:
            contents[TEMPLATE] = self.chat_template.encode(
                "utf-8"
            )  # the model's, not the tokenizer's
        return replace(
            self,
            files=kept | found,
            notes=(*self.notes, *notes),
            contents=contents,
            tokenizer_named=True,
        )

    def without_tokenizer(self) -> Sidecars:
        """The same, but with nothing of a tokenizer."""
        return replace(
            self,
            files={k: v for k, v in self.files.items() if k not in _TOKENIZER_FILES},
            contents={k: v for k, v in self.contents.items() if k not in _TOKENIZER_FILES},
            tokenizer_named=True,
        )

    def with_content(
        self, name: str, data: bytes, *notes: str, origin: Path | None = None
    ) -> Sidecars:
        """The same, but with a sidecar that is no file: it was made from ``origin``."""
        return replace(
            self,
            contents={**self.contents, name: data},
            origins={**self.origins, **({name: origin} if origin else {})},
            notes=(*self.notes, *notes),
        )


def find_sidecars(path: Path, source_format: str, tokenizer: Path | None = None) -> Sidecars:
    """List the sidecars of a checkpoint.

    Args:
        path: the checkpoint, a file or directory.
        source_format: container module's name, such as ``safetensors`` or ``keras_h5``.
        tokenizer: what to use instead of the tokenizer found.

    Raises:
        UnsafePathError: a sidecar is a symbolic link that leaves its directory.
        NotFoundError: ``tokenizer`` is not there.
        TokenizerError: ``tokenizer`` is none.
    """
    directory = path if path.is_dir() else path.parent
    files: dict[str, Path] = {}
    notes: list[str] = []
    if source_format == "keras_h5":
        # a preset's tokenizer.json and config.json are Keras's own
        _look_for_keras(directory, files, notes)
        _look(directory, TOKENIZER_MODEL, files, notes)
    else:
        for name in NAMES:
            _look(directory, name, files, notes)
        _look_for_keras(directory, files, notes)
    covering = manifest.covering(path)
    if covering is not None:
        files[manifest.NAME] = covering
    # in its metadata, or named: then nothing above is taken, nor said to be
    has_own = source_format == "gguf" or tokenizer is not None
    if not has_own and TOKENIZER_MODEL not in files and TOKENIZER_JSON not in files:
        _look_above(directory, files, notes)
    found = Sidecars(directory, files, tuple(notes), source_format, path=path)
    return found if tokenizer is None else found.with_tokenizer(tokenizer)


def _look(directory: Path, name: str, files: dict[str, Path], notes: list[str]) -> bool:
    """Put ``directory / name`` into ``files`` if it is a file with something in it."""
    path = inside(directory, name)
    if path is None:
        return False
    if not path.is_file():
        notes.append(f"{printable(str(path))} is not a regular file{_IGNORED}")
        return False
    if not path.stat().st_size:
        notes.append(f"{printable(str(path))} is empty (gemma_pytorch ships such a stub){_IGNORED}")
        return False
    files[name] = path
    return True


def _look_for_keras(directory: Path, files: dict[str, Path], notes: list[str]) -> None:
    folder, _, name = _KERAS_VOCABULARY.rpartition("/")
    found: dict[str, Path] = {}
    if (directory / folder).is_dir() and _look(directory / folder, name, found, notes):
        files[TOKENIZER_MODEL] = found[name]


def _look_above(directory: Path, files: dict[str, Path], notes: list[str]) -> None:
    for above in _parents(directory):
        if _look(above, TOKENIZER_MODEL, files, notes):
            notes.append(
                f"tokenizer.model is taken from {printable(str(above))}, above the weights"
            )
            return


def _parents(directory: Path) -> Iterator[Path]:
    """The directory above, and those above it while they only structure a training run."""
    here = directory.absolute()
    for _ in range(_MAX_CLIMB):
        inner = _INNER.fullmatch(here.name)
        if here.parent == here:
            return
        here = here.parent
        yield here
        if not inner:
            return
