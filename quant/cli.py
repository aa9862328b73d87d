"""g2quant, the command. stdout is data, stderr is progress and messages; each command is one library call."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from .. import commands
from ..commands import choice, flag, group, path, path_option, print_report, together, warn
from ..formats.errors import UsageError, printable
from ..outputs import Outputs
from ..sealed import dumps
from ..terminal import Meter, Terminated, reporting, run_cli
from . import cli_inputs, cli_report, options, show

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
    "gguf",
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


@group("g2quant", _EPILOG, Commands)
def g2quant(debug: bool) -> None:
    """Quantize Gemma 1 and Gemma 2 checkpoints to 8, 4, 3 or 2 bits for the programs people run."""


_write = together(
    commands.dtype("Element type of what is not quantized."),
    commands.max_shard_size,
    commands.tokenizer,
    commands.overwrite("DST once the new copy is complete"),
    commands.config(),
    commands.as_json(),
    commands.quiet("Print no progress, notes or report of success."),
)


@g2quant.command(short_help="Quantize SRC to DST; the command itself may be left out.")
@path("src")
@path("dst")
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
@cli_inputs.method
@choice("format", FORMATS, "compressed-tensors", "What to write.")
@click.option(
    "--exclude", multiple=True, metavar="PATTERN",
    help="Linear weights that stay as they are, such as '*.down_proj.weight'; may be given again. Programs that merge q, k, v or "
    "gate, up need all of them or none.",
)  # fmt: skip
@options.calibration
@cli_inputs.instead
@click.option(
    "--sequential/--no-sequential",
    default=True,
    show_default=True,
    help="Gather the inputs of a block's layers one stage after the other, each behind the rounded ones before it; "
    "without it in half the time.",
)
@choice(
    "recover",
    ("none", "scales", "codes"),
    "none",
    "Tune what was rounded to the original's output, on the calibration text: scales and norm gains, or in every block the "
    "codes too.",
)
@options.target
@commands.fix_config
@commands.gating
@cli_inputs.machine
@path_option("keep-codes", "Keep the codes, for `g2quant export`.", metavar="DIR")
@flag("allow-requantize", "Accept a checkpoint that is quantized already.")
@commands.dry_run
@commands.resume("run")
@cli_report.files
@_write
def quantize(src: Path, dst: Path, as_json: bool, quiet: bool, dry_run: bool, **given: Any) -> None:
    """Quantize the linear layers of SRC and write them to DST. Killed at any moment, the same command goes on."""
    if given["target_size"] or given["target_bpw"]:
        _refuse_beside_target(given["format"])
    else:
        _refuse_without_target()
        if given["format"].startswith("gguf-"):
            _refuse_given(given["format"])
    cli_inputs.require_torch()
    from .api import quantize as run

    paths = {name: given.pop(name) for name in cli_report.RENDERERS}
    if dry_run and any(paths.values()):
        raise UsageError("--dry-run makes no report.", fix="leave out --report, --html and --card.")
    inputs = (src, dst, _work(dst), *cli_inputs.named(given))
    outputs = Outputs(paths, inputs, {"imatrix-out": given["imatrix_out"]})
    with outputs as out, Meter(quiet=quiet or as_json) as meter, _resumable(dst):
        report = run(src, dst, dry_run=dry_run, progress=meter, **given)
        meter.stop()
        if not dry_run:
            report["run"]["command"] = shlex.join(["g2quant", *sys.argv[1:]])
            cli_report.write(out, report, dst)
    _print(report, show.plan if dry_run else show.result, dst, as_json, quiet, written=not dry_run)
    warn(show.warnings(report), quiet or as_json)


@g2quant.command(short_help="Write kept codes in another format; nothing is rounded again.")
@path("codes")
@path("dst")
@path_option(
    "source",
    "The checkpoint that was quantized, for the rest of it; not needed where CODES is a quantized checkpoint.",
    metavar="SRC",
)
@choice(
    "format",
    (*FORMATS[:6], "gguf-q4_0", "gguf-q4_1", "gguf-q8_0"),
    "compressed-tensors",
    "What to write; GGUF from groups of 32.",
)
@_write
def export(
    codes: Path, dst: Path, source: Path | None, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Write CODES (a --keep-codes directory, or a quantized checkpoint) as DST in another format."""
    cli_inputs.require_torch()
    from .export_codes import export_codes

    with Meter(quiet=quiet or as_json) as meter:
        report = export_codes(codes, source or codes, dst, progress=meter, **options)
    _print(report, show.exported, dst, as_json, quiet, written=True)
    warn(show.warnings(report), quiet or as_json)


# parameter -> how it is spelled
_UNIFORM_ONLY = {
    "bits": "--bits",
    "group_size": "--group-size",
    "symmetric": "--sym/--asym",
    "max_shard_size": "--max-shard-size",
}


def _refuse_given(format: str) -> None:
    """Options that a GGUF type has its own say about are not ignored.

    Raises:
        UsageError: one was given; ``--bits`` may say what the type has anyway.
    """
    context = click.get_current_context()
    bits = next(c for c in format.partition("q")[2] if c.isdigit())
    for name, spelled in _UNIFORM_ONLY.items():
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        if name != "bits" or str(context.params[name]) != bits:
            raise UsageError(
                f"{spelled} does not apply to {format}, which is one file whose type has its own bits and groups.",
                fix=f"leave out {spelled}, or use another --format.",
            )


def _refuse_beside_target(format: str) -> None:
    """Options that the allocation decides."""
    context = click.get_current_context()
    names = _UNIFORM_ONLY if format == "gguf" else ("bits", "group_size")
    for name in names:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UsageError(
                f"{_UNIFORM_ONLY[name]} does not go with a target size, which decides it.",
                fix=f"leave out {_UNIFORM_ONLY[name]}; --choices says what to choose from.",
            )


def _refuse_without_target() -> None:
    """Options about measuring for an allocation are not ignored where there is none."""
    context = click.get_current_context()
    for name in ("measure", "measure_tokens"):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UsageError(
                f"--{name.replace('_', '-')} without a size to reach.",
                fix="add --target-size or --target-bpw.",
            )


@g2quant.command(short_help="Measure how much each linear weight of SRC matters.")
@path("src")
@choice("format", (*FORMATS[:3:2], "mlx", "gguf"), "compressed-tensors", "Whose schemes are tried.")
@options.measuring
@click.option(
    "--sym/--asym", "symmetric", default=True, show_default=True, help="Of uniform schemes."
)
@choice("method", ("gptq", "rtn"), "gptq", "How weights are rounded for it.")
@options.calibration
@commands.fix_config
@commands.gating
@click.option(
    "--max-memory", metavar="SIZE", help="Memory to work in.  [default: half of what is free]"
)
@flag("allow-requantize", "Accept a checkpoint that is quantized already.")
@path_option("output", "Keep the measurement, for --sensitivity; an interrupted one is continued.")
@commands.resume("measurement")
@commands.config()
@commands.as_json()
@commands.quiet()
def sensitivity(src: Path, output: Path | None, as_json: bool, quiet: bool, **given: Any) -> None:
    """Measure what rounding each linear weight of SRC alone costs: KL of the original against the model with it."""
    cli_inputs.require_torch()
    from . import show_layers
    from .measure import measure_path
    from .measure import sensitivity as measured

    work = None if output is None else measure_path(output)
    inputs = (src, *cli_inputs.named(given))
    with Outputs({"output": output}, inputs) as out, Meter(quiet=quiet or as_json) as meter:
        report = measured(src, work=work, progress=meter, **given)
        meter.stop()
        if output is not None:
            out.write("output", dumps(report))
    with reporting(*out.paths.values()):
        if as_json or not quiet:
            print_report(report, show_layers.sensitivity, as_json=as_json)


def _work(dst: Path) -> Path:
    return Path(f"{dst}.quantizing")


@contextmanager
def _resumable(dst: Path) -> Iterator[None]:
    """A signal's message says what became of the work."""
    try:
        yield
    except (KeyboardInterrupt, Terminated) as e:
        work = _work(dst)
        if (work / "journal").is_file():
            where = printable(str(work))
            e.add_note(
                f"the destination is unchanged, finished blocks lie in {where}.\nrun the same command again to continue."
            )
        raise


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
        print_report(report, human, as_json=as_json)


g2quant.add_command(cli_inputs.moments)
g2quant.add_command(cli_report.report)


def main(argv: list[str] | None = None) -> None:
    """Entry point: errors become one line and an exit code."""
    sys.exit(run_cli(g2quant, argv))
