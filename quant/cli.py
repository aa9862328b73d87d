"""g2quant, the command. stdout is data, stderr is progress and messages; each command is one library call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click

from .. import __version__
from ..formats.errors import DependencyError, printable
from ..terminal import Meter, Terminated, dump_json, reporting, run_cli

_EPILOG = """\b
g2quant SRC DST quantizes; `g2quant quantize --help` lists the options. For example:
  g2quant ./gemma2-2b ./gemma2-2b-w4
  g2quant ./gemma2-2b ./gemma2-2b.gguf --format gguf-q4_k_m --calibration notes.txt
  g2quant ./gemma2-2b ./gemma2-2b-w8 --bits 8 --format gptq --dry-run
No download, no upload, no remote code.

\b
Exit codes: 0 done; 1 the written copy differs; 2 wrong usage; 3 bad input; 4 disk, memory or a missing package;
5 refused as unsafe; 7 the destination exists, overlaps the source, is locked or belongs to another interrupted
run; 70 a bug; 130, 143 stopped by a signal; 141 nobody reads standard output.
"""
FORMATS = (
    "compressed-tensors", "int-quantized", "gptq", "awq", "mlx", "torch-int8",
    *(f"gguf-{n}" for n in (
        "q8_0", "q4_0", "q4_1", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s",
        "q4_k_m", "q5_k_s", "q5_k_m",
    )),
)  # fmt: skip


class Commands(click.Group):
    """The commands; anything else is ``quantize``'s arguments."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the command in front where it was left out."""
        own = {"-h", "--help", "--version", "--debug", *self.commands}
        first = next((a for a in args if a != "--debug"), None)
        if first is not None and first not in own:
            at = args.index(first)
            args = [*args[:at], "quantize", *args[at:]]
        return super().parse_args(ctx, args)


@click.group(
    cls=Commands,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="g2quant")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def g2quant(debug: bool) -> None:
    """Quantize Gemma 1 and Gemma 2 checkpoints to 8, 4, 3 or 2 bits for the programs people run."""


def _options(*options: Callable[..., Any]) -> Callable[..., Any]:
    def add(f: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            f = option(f)
        return f

    return add


_config = click.option(
    "--config",
    metavar="PRESET|FILE",
    help="The model's configuration: a preset such as gemma2-2b, or a Hugging Face config.json. Wins over what the "
    "checkpoint says.",
)
_write = _options(
    click.option(
        "--dtype",
        type=click.Choice(["keep", "bf16", "f16", "f32"]),
        default="keep",
        show_default=True,
        help="Element type of what is not quantized.",
    ),
    click.option(
        "--max-shard-size", metavar="SIZE", help="Most bytes of weights in a file, such as 5GB."
    ),
    click.option(
        "--tokenizer",
        metavar="FILE|DIR|none",
        help="The tokenizer.model to put into the output, instead of the one beside the source; none leaves it out.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace DST once the new copy is complete."),
    _config,
    click.option(
        "--json",
        "as_json",
        is_flag=True,
        help="Print one JSON document to stdout, of a failure too.",
    ),
    click.option(
        "--quiet", "-q", is_flag=True, help="Print no progress, notes or report of success."
    ),
)


@g2quant.command(short_help="Quantize SRC to DST; the command itself may be left out.")
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path))
@click.option(
    "--bits",
    type=int,
    default=4,
    show_default=True,
    help="8, 4, 3 or 2; GGUF formats bring their own.",
)
@click.option(
    "--group-size", type=int, default=128, show_default=True,
    help="Columns that share a scale: 32, 64, 128, or -1 for whole rows.",
)  # fmt: skip
@click.option(
    "--sym/--asym",
    "symmetric",
    default=True,
    show_default=True,
    help="One zero for all, or one per group.",
)
@click.option(
    "--method",
    type=click.Choice(["gptq", "rtn"]),
    default="gptq",
    show_default=True,
    help="gptq takes, weight by weight, the better of it and rounding to nearest.",
)
@click.option(
    "--format",
    type=click.Choice(FORMATS),
    default="compressed-tensors",
    show_default=True,
    help="What to write.",
)
@click.option(
    "--calibration",
    metavar="self|FILE",
    default="self",
    show_default=True,
    help="Whose inputs decide: text the model writes itself, or a .txt, .jsonl (text, or messages of a chat) or .npy "
    "file of token ids.",
)
@click.option("--samples", type=int, default=128, show_default=True, help="Calibration sequences.")
@click.option("--seq-len", type=int, help="Tokens of each.  [default: 512, or the model's context]")
@click.option(
    "--held-out", type=float, default=0.125, show_default=True,
    help="Further sequences, as a share of --samples, that judge the result.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of what the model writes.")
@click.option(
    "--sequential/--no-sequential",
    default=True,
    show_default=True,
    help="Gather the inputs of a block's layers one stage after the other, each behind the rounded ones before it; "
    "without it in half the time.",
)
@click.option(
    "--fix-config", is_flag=True, help="Correct values known to be wrong in published files."
)
@click.option(
    "--gating", type=click.Choice(["df", "fd"]), help="Orientation of Flax gating matrices."
)
@click.option(
    "--max-memory", metavar="SIZE",
    help="Memory to work in, such as 4GB: what does not fit stays on disk.  [default: half of what is free]",
)  # fmt: skip
@click.option(
    "--keep-codes",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Keep the codes, for `g2quant export`.",
)
@click.option(
    "--allow-requantize", is_flag=True, help="Accept a checkpoint that is quantized already."
)
@click.option(
    "--dry-run", is_flag=True, help="Print the plan, sizes, memory and time; write nothing."
)
@click.option(
    "--resume/--no-resume",
    default=True,
    show_default=True,
    help="Continue an interrupted run, or start it afresh.",
)
@_write
def quantize(
    src: Path, dst: Path, as_json: bool, quiet: bool, dry_run: bool, **options: Any
) -> None:
    """Quantize the linear layers of SRC and write them to DST. Killed at any moment, the same command goes on."""
    api, show = _library()
    with Meter(quiet=quiet or as_json) as meter, _resumable(dst):
        report = api.quantize(src, dst, dry_run=dry_run, progress=meter, **options)
    _print(report, show.plan if dry_run else show.result, dst, as_json, quiet, written=not dry_run)
    _warn(show.warnings(report), quiet or as_json)


@g2quant.command(short_help="Write kept codes in another format; nothing is rounded again.")
@click.argument("codes", type=click.Path(path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path))
@click.option(
    "--source", metavar="SRC", type=click.Path(path_type=Path),
    help="The checkpoint that was quantized, for the rest of it; not needed where CODES is a quantized checkpoint.",
)  # fmt: skip
@click.option(
    "--format",
    type=click.Choice(FORMATS[:6]),
    default="compressed-tensors",
    show_default=True,
    help="What to write.",
)
@_write
def export(
    codes: Path, dst: Path, source: Path | None, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Write CODES (a --keep-codes directory, or a quantized checkpoint) as DST in another format."""
    api, show = _library()
    with Meter(quiet=quiet or as_json) as meter:
        report = api.export_codes(codes, source or codes, dst, progress=meter, **options)
    _print(report, show.exported, dst, as_json, quiet, written=True)
    _warn(show.warnings(report), quiet or as_json)


def _library() -> tuple[Any, Any]:
    """The modules that need torch."""
    try:
        import torch  # noqa: F401
    except ImportError as e:
        raise DependencyError(
            f"quantizing needs torch ({e}).", fix='install it: pip install "g2kit[torch]".'
        ) from e
    from . import api, show

    return api, show


@contextmanager
def _resumable(dst: Path) -> Iterator[None]:
    """A signal's message says what became of the work."""
    try:
        yield
    except (KeyboardInterrupt, Terminated) as e:
        work = dst.with_name(dst.name + ".quantizing")
        if (work / "journal").is_file():
            where = printable(str(work))
            e.add_note(
                f"the destination is unchanged, finished blocks lie in {where}.\nrun the same command again to continue."
            )
        raise


def _warn(lines: list[str], quiet: bool) -> None:
    for line in lines if not quiet else ():
        click.echo(line, err=True)


def _print(
    report: dict[str, Any],
    human: Callable[[dict[str, Any]], str],
    dst: Path,
    as_json: bool,
    quiet: bool,
    *,
    written: bool,
) -> None:
    if quiet and written and not as_json:
        return
    with reporting(dst) if written else nullcontext():
        click.echo(dump_json(report) if as_json else human(report))


def main(argv: list[str] | None = None) -> None:
    """Entry point: errors become one line and an exit code."""
    sys.exit(run_cli(g2quant, argv))
