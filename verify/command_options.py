"""Options that several commands of g2verify share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from .. import commands
from ..commands import Option, choice, path_option, together
from .profiles import DEFAULT_PROFILE, PROFILES
from .runners import RUNNERS

DTYPES = ("float32", "bfloat16", "float64")


def report_options(*, shards: bool = False) -> Option:
    """Where a report goes, or a part of one."""
    part = " (with --shard: the part)" if shards else ""
    return together(
        commands.as_json("Print the one JSON document to stdout."),
        path_option("report", f"Write the JSON document{part}."),
        path_option("html", "Write one self-contained HTML page."),
        path_option("junit", "Write JUnit XML: a test case per claim and check."),
        path_option("markdown", "Write a summary of at most 40 lines."),
        commands.quiet(),
    )


def config_options(two: bool) -> Option:
    """Configurations of one side or ``two``."""
    sides = [
        commands.config(f"--config for the {side} only.", name=name)
        for name, side in (("ref-config", "reference"), ("cand-config", "candidate"))
    ]
    return together(
        commands.config(
            "The configuration, for checkpoints that carry none; wins over what they say."
        ),
        *(sides if two else []),
        commands.fix_config,
        commands.gating,
    )


def engine_options(two: bool) -> Option:
    """What runs one side or ``two``."""
    both = " of both sides" if two else ""
    options: list[Option] = [
        *_engine("", f"Implementation{both}; default torch.", f"Compute type{both}; default float32.",
                 f"Device{both}: cpu, cuda, cuda:1, tpu, …"),
        click.option("--mesh", metavar="data=N,model=M", help="Devices of the jax runner."),
    ]  # fmt: skip
    if two:
        options += _engine("cand-", "Implementation of the candidate.", "Compute type of the candidate.",
                           "Device of the candidate.")  # fmt: skip
    return together(*options)


def _engine(prefix: str, runner: str, dtype: str, device: str) -> list[Option]:
    return [
        click.option(f"--{prefix}runner", type=click.Choice(list(RUNNERS)), help=runner),
        click.option(f"--{prefix}dtype", type=click.Choice(DTYPES), help=dtype),
        click.option(f"--{prefix}device", metavar="NAME", help=device),
    ]


probe_options = together(
    choice("profile", tuple(PROFILES), None, "How much to run.", DEFAULT_PROFILE),
    path_option("text", "UTF-8 text whose pieces replace the built-in documents."),
    path_option(
        "tokens", "Token ids, [n] or [documents, n], that replace them.", metavar="FILE.npy"
    ),
    click.option("--seed", type=int, show_default="0", help="Of pseudo-random token ids."),
)


_READ = ("text", "tokens", "config", "ref_config", "cand_config")
_MODELS = ("reference_embedding", "candidate_embedding")


def option_files(o: Mapping[str, Any]) -> tuple[Path, ...]:
    """What options name to be read: no output may replace it. A preset's name is no file."""
    files = [Path(o[n]) for n in _READ if o.get(n)]
    return (*(f for f in files if f.is_file()), *(Path(o[n]) for n in _MODELS if o.get(n)))
