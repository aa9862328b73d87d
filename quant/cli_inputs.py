"""g2quant's options about what is known of the layers' inputs, and the command that gathers it in shares."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ..commands import (
    as_json,
    config,
    fix_config,
    gating,
    path,
    path_option,
    print_report,
    quiet,
    together,
)
from ..formats.errors import DependencyError
from ..formats.named_files import existing
from ..terminal import Meter, reporting
from . import options, show

METHODS = ("gptq", "gptq+", "rtn")
method = click.option(
    "--method",
    type=click.Choice(METHODS),
    help="gptq takes, weight by weight, the better of it and rounding to nearest; gptq+ also tries to make up for what "
    "earlier rounding did to a layer's inputs.  [default: gptq; rtn where the model is not run]",
)
instead = together(
    click.option(
        "--moments",
        multiple=True,
        metavar="DIR",
        type=click.Path(path_type=Path),
        help="What `g2quant moments` gathered, in place of calibration sequences; once for each shard.",
    ),
    path_option("imatrix", "An importance matrix in place of calibration; the model is not run."),
    path_option(
        "imatrix-out",
        "Write the importance matrix of the inputs seen, for llama.cpp's tools; .dat for its old form.",
    ),
)
machine = together(
    click.option(
        "--max-memory", metavar="SIZE",
        help="Memory to work in, such as 4GB: what does not fit stays on disk.  [default: half of what is free]",
    ),
    click.option(
        "--device", default="cpu", show_default=True, metavar="cpu|cuda|cuda:N",
        help="Where blocks run and weights are rounded.",
    ),
)  # fmt: skip


def named(given: Mapping[str, Any]) -> tuple[Path, ...]:
    """What options name to be read: no report may replace it. A preset's name or ``self`` is no file."""
    options = ("calibration", "config", "imatrix", "sensitivity", "tokenizer")
    codes = given.get("keep_codes")
    return (
        *existing(*(given.get(n) for n in options)),
        *given.get("moments", ()),
        *([codes] if codes else ()),
    )


def require_torch() -> None:
    """Say what is missing before anything imports it.

    Raises:
        DependencyError: there is no torch.
    """
    try:
        import torch  # noqa: F401
    except ImportError as e:
        raise DependencyError(
            f"quantizing needs torch ({e}).", fix='install it: pip install "g2kit[torch]".'
        ) from e


@click.command(short_help="Gather what --moments needs, all of it or a share.")
@path("src")
@path("dst")
@click.option(
    "--shard", default="0/1", show_default=True, metavar="i/N",
    help="Every N-th batch of sequences from the i-th on. The sum of all shards is the same for any N.",
)  # fmt: skip
@options.calibration
@machine
@config()
@fix_config
@gating
@as_json()
@quiet("Print no progress and no report of success.")
def moments(src: Path, dst: Path, as_json: bool, quiet: bool, **given: Any) -> None:
    """Gather second moments of the inputs of SRC's linear layers in DST, for `g2quant SRC OUT --moments DST`.

    All inputs are those of the original model, in one pass: shards need nothing of each other. Run them on the same kind of
    machine with as many threads. Not resumable: a shard that was stopped begins again.
    """
    require_torch()
    from .gather import gather_moments

    with Meter(quiet=quiet or as_json) as meter:
        report = gather_moments(src, dst, progress=meter, **given)
    if as_json or not quiet:
        with reporting(dst):
            print_report(report, show.gathered, as_json=as_json)
