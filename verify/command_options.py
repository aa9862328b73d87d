"""Options that several commands of g2verify share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from .runners import RUNNERS

Command = Callable[..., Any]
PROFILES = ("smoke", "ci", "full")
DTYPES = ("float32", "bfloat16", "float64")


def apply(f: Command, options: Sequence[Callable[[Any], Any]]) -> Command:
    """``f`` with the options, in their order."""
    for option in reversed(options):
        f = option(f)
    return f


def file(name: str, text: str) -> Callable[[Command], Command]:
    """An option that names a file to write."""
    return click.option(f"--{name}", metavar="FILE", type=click.Path(path_type=Path), help=text)


def report_options(*, shards: bool = False) -> Callable[[Command], Command]:
    """Where a report goes, or a part of one."""
    part = " (with --shard: the part)" if shards else ""

    def add(f: Command) -> Command:
        return apply(f, [
            click.option("--json", "as_json", is_flag=True, help="Print the one JSON document to stdout."),
            file("report", f"Write the JSON document{part}."),
            file("html", "Write one self-contained HTML page."),
            file("junit", "Write JUnit XML: a test case per claim and check."),
            file("markdown", "Write a summary of at most 40 lines."),
            click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors."),
        ])  # fmt: skip

    return add


def config_options(two: bool) -> Callable[[Command], Command]:
    """Configurations of one side or ``two``."""

    def add(f: Command) -> Command:
        options: list[Callable[[Any], Any]] = [
            click.option("--config", metavar="PRESET|FILE",
                         help="The configuration, for checkpoints that carry none; wins over what they say."),
            click.option("--fix-config", is_flag=True,
                         help="Correct values known to be wrong in published files."),
            click.option("--gating", type=click.Choice(["df", "fd"]),
                         help="Orientation of Flax gating matrices, [2, d, f] or [2, f, d], where sizes do not tell."),
        ]  # fmt: skip
        if two:
            options += [
                click.option("--ref-config", metavar="PRESET|FILE", help="The same for the reference only."),
                click.option("--cand-config", metavar="PRESET|FILE", help="The same for the candidate only."),
            ]  # fmt: skip
        return apply(f, options)

    return add


def engine_options(two: bool) -> Callable[[Command], Command]:
    """What runs one side or ``two``."""

    def add(f: Command) -> Command:
        both = " of both sides" if two else ""
        options: list[Callable[[Any], Any]] = [
            click.option("--runner", type=click.Choice(list(RUNNERS)), help=f"Implementation{both}; default torch."),
            click.option("--dtype", type=click.Choice(DTYPES), help=f"Compute type{both}; default float32."),
            click.option("--device", metavar="NAME", help=f"Device{both}: cpu, cuda, cuda:1, tpu, …"),
            click.option("--mesh", metavar="data=N,model=M", help="Devices of the jax runner."),
        ]  # fmt: skip
        if two:
            options += [
                click.option("--cand-runner", type=click.Choice(list(RUNNERS)), help="Implementation of the candidate."),
                click.option("--cand-dtype", type=click.Choice(DTYPES), help="Compute type of the candidate."),
                click.option("--cand-device", metavar="NAME", help="Device of the candidate."),
            ]  # fmt: skip
        return apply(f, options)

    return add


def probe_options(f: Command) -> Command:
    """What is run."""
    return apply(f, [
        click.option("--profile", type=click.Choice(PROFILES), default="ci", show_default=True, help="How much to run."),
        click.option("--text", metavar="FILE", type=click.Path(path_type=Path),
                     help="UTF-8 text whose pieces replace the built-in documents."),
        click.option("--tokens", metavar="FILE.npy", type=click.Path(path_type=Path),
                     help="Token ids, [n] or [documents, n], that replace them."),
        click.option("--seed", type=int, default=0, show_default=True, help="Of pseudo-random token ids."),
    ])  # fmt: skip


def path(name: str) -> Callable[[Command], Command]:
    """A path as argument."""
    return click.argument(name, type=click.Path(path_type=Path))
