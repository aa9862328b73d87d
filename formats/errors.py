"""Every error g2kit raises on purpose, with its stable code and exit status.

One table; the CLI prints ``error[CODE]: message`` and exits with the class's status. A message says what,
where (file, tensor), found against expected, and how to fix it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

EXIT_OK, EXIT_FAIL, EXIT_USAGE, EXIT_INPUT = 0, 1, 2, 3
EXIT_RESOURCE, EXIT_UNSAFE, EXIT_INCONCLUSIVE, EXIT_CONFLICT, EXIT_INTERNAL = 4, 5, 6, 7, 70


class G2Error(Exception):
    """Base class. ``code`` is stable and documented; ``exit_code`` is the process status.

    Args:
        what: the failure, one sentence, found against expected.
        where: file the failure is in.
        tensor: tensor the failure is in.
        fix: what the user can do about it.
        found: the value found, where it is one value; JSON-ready.
        expected: the value expected, likewise.
    """

    code = "E_INTERNAL"
    exit_code = EXIT_INTERNAL

    def __init__(
        self,
        what: str,
        *,
        where: str | Path | None = None,
        tensor: str | None = None,
        fix: str | None = None,
        found: Any = None,
        expected: Any = None,
    ) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.tensor = tensor
        self.fix = fix
        self.found = found
        self.expected = expected
        super().__init__(what)

    def __str__(self) -> str:
        place = ": ".join(printable(p) for p in (self.where, self.tensor) if p)
        text = f"{place}: {self.what}" if place else self.what
        return f"{text} Fix: {self.fix}" if self.fix else text

    def as_dict(self) -> dict[str, Any]:
        """The error as data, for ``--json``: every key always, null where there is nothing to say."""
        return {
            "code": self.code,
            "message": self.what,
            "file": self.where,
            "tensor": self.tensor,
            "found": self.found,
            "expected": self.expected,
            "fix": self.fix,
        }

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), {k: getattr(self, k) for k in _FIELDS})


_FIELDS = ("what", "where", "tensor", "fix", "found", "expected")


def _rebuild(cls: type[G2Error], state: dict[str, Any]) -> G2Error:
    return cls(**state)


def printable(text: str, limit: int = 300) -> str:
    """Text from a file made safe for one terminal line: control characters escaped, length bounded."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= limit else f"{shown[:limit]}… ({len(shown)} characters)"


class UsageError(G2Error):
    """The command's options are wrong or do not fit each other."""

    code, exit_code = "E_USAGE", EXIT_USAGE


class InputError(G2Error):
    """Base of all complaints about the input's content."""

    code, exit_code = "E_FORMAT", EXIT_INPUT


class NotFoundError(InputError):
    """The input the user named is not there."""

    code = "E_NOT_FOUND"


class FormatError(InputError):
    """The bytes are not what the format says they must be."""


class TruncatedError(InputError):
    """The file ends before its own header says it does."""

    code = "E_TRUNCATED"


class LimitError(InputError):
    """A length or count in the file is larger than any real checkpoint's; refused before allocation."""

    code = "E_LIMIT"


class LayoutError(InputError):
    """Byte ranges overlap, leave holes, or do not fit shape times item size."""

    code = "E_LAYOUT"


class DtypeError(InputError):
    """A dtype is unknown or cannot be held by the target."""

    code = "E_DTYPE"


class ShapeError(InputError):
    """A tensor's shape is not what the model's configuration says."""

    code = "E_SHAPE"


class MissingTensorError(InputError):
    """A tensor or the shard that holds it is absent."""

    code = "E_MISSING_TENSOR"


class ExtraTensorError(InputError):
    """A tensor is present that the architecture does not have."""

    code = "E_EXTRA_TENSOR"


class ConfigError(InputError):
    """The model configuration is missing, contradictory or known to be wrong."""

    code = "E_CONFIG"


class UnknownConfigError(ConfigError):
    """Nothing says what the hyper-parameters are: no configuration, and the shapes are no released model's."""


class TokenizerError(InputError):
    """The tokenizer is missing, damaged or does not fit the vocabulary."""

    code = "E_TOKENIZER"


class ChecksumError(InputError):
    """Stored and computed checksums differ."""

    code = "E_CHECKSUM"


class NonFiniteError(InputError):
    """NaN or infinity where a finite weight is needed."""

    code = "E_NONFINITE"


class LossyError(InputError):
    """The target cannot hold the weights exactly and the loss was not asked for."""

    code = "E_LOSSY"


class ResourceError(G2Error):
    """Base of failures of this machine, not of the input."""

    code, exit_code = "E_IO", EXIT_RESOURCE


class FileIOError(ResourceError):
    """The operating system refused a read, write, sync or rename."""


class SpaceError(ResourceError):
    """Not enough disk space, or a file larger than the file system allows."""

    code = "E_SPACE"


class MemoryLimitError(ResourceError):
    """Not enough memory."""

    code = "E_MEMORY"


class DependencyError(ResourceError):
    """An optional package is missing."""

    code = "E_DEP"


class UnsafeError(G2Error):
    """The input tries to run code."""

    code, exit_code = "E_UNSAFE", EXIT_UNSAFE


class UnsafePathError(UnsafeError):
    """The input names a file outside its own directory."""

    code = "E_PATH"


class ConflictError(G2Error):
    """The destination exists, or is, contains or lies in the input."""

    code, exit_code = "E_EXISTS", EXIT_CONFLICT


class LockedError(ConflictError):
    """Another process is writing the same destination."""

    code = "E_LOCKED"


class ResumeError(ConflictError):
    """A partial output exists that belongs to another input or to other options."""

    code = "E_RESUME"


class ParityError(G2Error):
    """The written checkpoint does not hold what was read."""

    code, exit_code = "E_PARITY", EXIT_FAIL


_DAMAGED = (
    "get the file again from where it came from; it is damaged, incomplete or not what it says."
)
_SYSTEM = "look at the path, its permissions and the disk, and run the command again."
# what a command advises where an error has no advice of its own
LAST_RESORT = {
    "E_USAGE": "see the command's --help.",
    "E_LIMIT": _DAMAGED,
    "E_FORMAT": _DAMAGED,
    "E_TRUNCATED": _DAMAGED,
    "E_LAYOUT": _DAMAGED,
    "E_CHECKSUM": _DAMAGED,
    "E_MISSING_TENSOR": "get the complete checkpoint.",
    "E_SHAPE": "check that the files and the configuration are of one model.",
    "E_DTYPE": "convert the model's bf16, f16 or f32 checkpoint.",
    "E_CONFIG": "pass the model's configuration with --config PRESET|FILE.",
    "E_TOKENIZER": "pass this model's tokenizer.model with --tokenizer, or leave it out with --tokenizer none.",
    "E_IO": _SYSTEM,
}
