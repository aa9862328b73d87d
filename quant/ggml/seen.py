"""The importance matrix of the inputs that a run saw, as llama.cpp's tools read it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...formats import output_paths as paths
from ...formats.output_commit import exists_error
from ...model.config import GemmaConfig
from .imatrix import Floats, ImportanceMatrix, to_foreign, write

if TYPE_CHECKING:
    from ..calibration import Calibration
    from ..work import Work


def require_matrix_file(
    path: str | Path | None, *, overwrite: bool, apart: Sequence[Path] = ()
) -> None:
    """Refuse now what would fail after hours, or destroy something.

    Args:
        path: the file, or None.
        overwrite: whether it may be there.
        apart: what it must not be, nor lie in.

    Raises:
        ConflictError: it exists, is or lies in one of those, or there is no directory to put it into.
    """
    if path is None:
        return
    paths.check_apart([paths.normalise(Path(path))], apart)
    if paths.check_kind(Path(path), is_file=True) and not overwrite:
        raise exists_error(Path(path))
    paths.check_names(Path(path), {}, (".partial",))


def write_matrix(
    path: str | Path, work: Work, calibration: Calibration, config: GemmaConfig
) -> None:
    """Write mean squared inputs of every linear weight, behind the rounded blocks before it.

    Args:
        path: the file; the old form where it ends in ``.dat``, else GGUF.
        work: a finished run's.
        calibration: what it was run on.
        config: the model.
    """
    means: dict[str, Floats] = {}
    for layer in range(config.num_hidden_layers):
        means |= work.squares(layer)
    counts = dict.fromkeys(means, calibration.tokens)
    chunk = max((len(s) for s in calibration.train), default=0)
    found = ImportanceMatrix(means, counts, chunk, (Path(calibration.source).name,))
    write(to_foreign(found, config), path)
