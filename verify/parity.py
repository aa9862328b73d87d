"""``g2conv … --check parity``: the converted checkpoint is run beside its source before anybody relies on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..convert.open import open_checkpoint
from ..convert.progress import Progress
from ..convert.targets import TARGETS
from ..model.config import GemmaConfig
from .compare import compare
from .runners import runner_class
from .side import DEFAULT_RUNNER


def require_runner() -> None:
    """Raise DependencyError, before anything is converted, where the models could not be run afterwards."""
    runner_class(DEFAULT_RUNNER)


def check_conversion(
    src: str | Path,
    dst: str | Path,
    *,
    to: str,
    source: str | None = None,
    config: str | Path | GemmaConfig | None = None,
    fix_config: bool = False,
    gating: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare a conversion with its source: the ci profile, both run by torch in float32.

    Args:
        src: what was converted.
        dst: what came out.
        to: framework of ``dst``.
        source: framework of ``src``, None for any.
        config: as the conversion had it.
        fix_config: as the conversion had it.
        gating: as the conversion had it.
        progress: told of bytes and tokens.

    Returns:
        A ``g2kit.report/1`` document.

    Raises:
        G2Error: one of them cannot be opened or run.
    """
    container = TARGETS[source].container if source else None
    with (
        open_checkpoint(
            src, config=config, container=container, gating=gating, fix_config=fix_config
        ) as one,
        open_checkpoint(dst, config=config and one.config, container=TARGETS[to].container) as two,
    ):
        return compare(one, two, progress=progress)
