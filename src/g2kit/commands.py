"""What the commands share: how the group is made, the options that mean the same everywhere, printing a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from . import __version__
from .terminal import dump_json

Command = Callable[..., Any]
Option = Callable[[Command], Command]
_JSON = "Print one JSON document to stdout, of a failure too."


def group(
    name: str, epilog: str, cls: type[click.Group] = click.Group
) -> Callable[[Command], click.Group]:
    """The group of command ``name``, with --help, --version and --debug; the function's docstring describes it."""

    def make(f: Command) -> click.Group:
        f = click.option("--debug", is_flag=True, help="Show the traceback of an error.")(f)
        f = click.version_option(__version__, prog_name=name)(f)
        settings = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
        return click.group(cls=cls, epilog=epilog, context_settings=settings)(f)

    return make


def together(*options: Option) -> Option:
    """Several options or arguments as one, listed by --help in this order."""

    def add(f: Command) -> Command:
        for option in reversed(options):
            f = option(f)
        return f

    return add


def path(name: str) -> Option:
    """A path as argument."""
    return click.argument(name, type=click.Path(path_type=Path))


def path_option(name: str, text: str, *, metavar: str = "FILE", required: bool = False) -> Option:
    """An option that takes a path."""
    return click.option(
        f"--{name}", metavar=metavar, type=click.Path(path_type=Path), required=required, help=text
    )


def flag(name: str, text: str) -> Option:
    """An option without a value."""
    return click.option(f"--{name}", is_flag=True, help=text)


def choice(
    name: str, values: Sequence[str], default: str | None, text: str, shown: str | None = None
) -> Option:
    """An option with one of ``values``, the default shown; ``shown`` where that is None and means something."""
    return click.option(
        f"--{name}", type=click.Choice(values), default=default, show_default=shown or True, help=text
    )


def as_json(text: str = _JSON) -> Option:
    """``--json``."""
    return click.option("--json", "as_json", is_flag=True, help=text)


def quiet(text: str = "Print nothing but errors.") -> Option:
    """``--quiet``, ``-q``."""
    return click.option("--quiet", "-q", is_flag=True, help=text)


def dtype(text: str) -> Option:
    """``--dtype`` of the tensors that are written."""
    return choice("dtype", ("keep", "bf16", "f16", "f32"), "keep", text)


def overwrite(what: str) -> Option:
    """``--overwrite``."""
    return flag("overwrite", f"Replace {what}.")


def resume(what: str) -> Option:
    """``--resume/--no-resume`` of an interrupted run."""
    return click.option(
        "--resume/--no-resume",
        default=True,
        show_default=True,
        help=f"Continue an interrupted {what}, or start it afresh.",
    )


def config(
    text: str = "The model's configuration: a preset such as gemma2-2b, or a Hugging Face config.json. Wins over "
    "what the checkpoint says.",
    *,
    name: str = "config",
) -> Option:
    """``--config``, or the same for one side of two."""
    return click.option(f"--{name}", metavar="PRESET|FILE", help=text)


dry_run = flag("dry-run", "Print the plan, sizes, memory and time; write nothing.")
max_shard_size = click.option(
    "--max-shard-size", metavar="SIZE", help="Most bytes of weights in a file, such as 5GB."
)
tokenizer = click.option(
    "--tokenizer",
    metavar="FILE|DIR|none",
    help="The tokenizer.model to put into the output, instead of the one beside the source; none leaves it out.",
)
fix_config = flag(
    "fix-config",
    "Correct values known to be wrong in published files (such as query_pre_attn_scalar 224 in 9B).",
)
gating = click.option(
    "--gating",
    type=click.Choice(["df", "fd"]),
    help="Orientation of Flax gating matrices, [2, d, f] or [2, f, d], where sizes do not tell.",
)


def warn(lines: Sequence[str], quiet: bool) -> None:
    """Warnings, on stderr."""
    for line in lines if not quiet else ():
        click.echo(line, err=True)


def print_report(report: Mapping[str, Any], human: Callable[[Any], str], *, as_json: bool) -> None:
    """A report on stdout: JSON, or as ``human`` tells it."""
    click.echo(dump_json(report) if as_json else human(report))
