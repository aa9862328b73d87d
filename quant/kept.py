"""The codes that a run keeps beside its output: their place is judged before any work, and taken up again by the same run.

The manifest of a codes directory carries a mark of everything that decided the codes. Where the mark is the run's own, the
codes are those it would write; so a run that was killed between its codes and its output goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..convert.open import Checkpoint
from ..formats import manifest as manifests
from ..formats import output_paths as paths
from ..formats.errors import G2Error
from ..formats.output_commit import exists_error
from .codes_file import write_codes
from .plan import sources_of
from .work import work_path


class Keeper:
    """Writes a run's codes once.

    Args:
        place: directory to make.
        dst: the run's output.
        checkpoint: what is quantized.
        overwrite: replace a directory of codes that is there.
        inputs: what else is read.

    Raises:
        ConflictError: the place is, holds or lies in an input or the output.
        FileIOError: there is no directory to put it into.
    """

    def __init__(
        self, place: str | Path, dst: Path, checkpoint: Checkpoint, *, overwrite: bool,
        inputs: Sequence[Path] = (),
    ) -> None:  # fmt: skip
        self.place = paths.normalise(Path(place))
        self._checkpoint, self._overwrite = checkpoint, overwrite
        self._mark, self._done = "", False
        read = (*sources_of(checkpoint), *inputs)
        paths.check_apart([self.place], (*read, dst, work_path(dst)))
        paths.check_kind(self.place, is_file=False)

    def begin(self, settings: Mapping[str, str]) -> None:
        """Settle what decides the codes.

        Raises:
            ConflictError: other codes, or something else, are there and may not be replaced.
        """
        text = json.dumps(dict(settings), sort_keys=True)
        self._mark = f"run: sha256 {hashlib.sha256(text.encode()).hexdigest()}"
        self._done = self._is_there()
        if not self._done and self.place.exists() and not self._overwrite:
            raise exists_error(self.place)

    def _is_there(self) -> bool:
        """Whether the codes of this very run lie there already, whole."""
        with suppress(G2Error):
            manifest = manifests.load(manifests.path_for(self.place))
            if self._mark in manifest.notes:
                manifests.check_files(self.place, manifest)
                return True
        return False

    def write(self, codes: Any, source_fingerprint: str) -> None:
        """Write them, unless they are there."""
        if not self._done:
            write_codes(
                self.place, codes, self._checkpoint, source_fingerprint=source_fingerprint,
                overwrite=self._overwrite, resume=False, notes=(self._mark,),
            )  # fmt: skip
