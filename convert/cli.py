"""g2conv, the command. stdout is data, stderr is progress and messages; each command is one library call."""

from __future__ import annotations

import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from .. import commands
from ..commands import choice, flag, group, path, print_report, together, warn
from ..formats.errors import printable
from ..terminal import Meter, reporting, resumable, run_cli
from . import api, show
from .targets import SOURCES, TARGETS

FRAMEWORKS = tuple(TARGETS)
_PAIR = re.compile(r"([a-z_]+)-to-([a-z_]+)")

_EPILOG = f"""\b
Conversions: g2conv A-to-B SRC DST, with A and B one of {", ".join(FRAMEWORKS)}. For example:
  g2conv flax-to-safetensors ./gemma2-2b-flax ./gemma2-2b
  g2conv safetensors-to-gguf ./gemma2-2b ./gemma2-2b.gguf --dtype bf16
  g2conv safetensors-to-safetensors ./gemma2-2b ./resharded --max-shard-size 2GB
`g2conv A-to-B --help` lists the options. No download, no upload, no remote code.

\b
Exit codes: 0 done; 1 the written copy differs, or `--check parity` says FAIL; 2 wrong usage; 3 bad input;
4 disk, memory or a missing package; 5 refused as unsafe; 6 `--check parity` is INCONCLUSIVE; 7 the destination
exists, overlaps the source, is locked or belongs to another interrupted run; 70 a bug; 130, 143 stopped by a
signal; 141 nobody reads standard output.
"""


class Commands(click.Group):
    """The commands, plus every ``A-to-B`` without listing all of them."""

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """``A-to-B`` for known A and B, else an ordinary command."""
        pair = _PAIR.fullmatch(name)
        if pair and pair[1] in TARGETS and pair[2] in TARGETS:
            return _pair_command(pair[1], pair[2])
        return super().get_command(ctx, name)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The commands, and every ``A-to-B`` once its first letter is there."""
        pairs = [f"{a}-to-{b}" for a in FRAMEWORKS for b in FRAMEWORKS] if incomplete else []
        found = [CompletionItem(p) for p in pairs if p.startswith(incomplete)]
        return super().shell_complete(ctx, incomplete) + found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Say what A and B may be when only they are wrong."""
        pair = _PAIR.fullmatch(args[0]) if args else None
        if pair and self.get_command(ctx, args[0]) is None:
            wrong = pair[1] if pair[1] not in TARGETS else pair[2]
            raise click.UsageError(
                f"{wrong!r} is not a framework; use one of {', '.join(FRAMEWORKS)}."
            )
        return super().resolve_command(ctx, args)


@group("g2conv", _EPILOG, Commands)
def g2conv(debug: bool) -> None:
    """Convert Gemma 1 and Gemma 2 checkpoints between frameworks, bit for bit, in bounded memory."""


_config = together(commands.config(), commands.fix_config, commands.gating)
_output = together(
    commands.as_json(),
    commands.quiet(
        "Print no progress, warnings, notes or report of success; what inspect and fingerprint answer stays."
    ),
)
_convert_options = together(
    path("src"),
    path("dst"),
    click.option(
        "--layout",
        metavar="NAME",
        help="Layout of the output; `g2conv A-to-B --help` names those of B, the usual one first.",
    ),
    commands.dtype("Element type to write. Narrowing is counted and recorded in the manifest."),
    commands.max_shard_size,
    commands.tokenizer,
    choice(
        "check",
        ("none", "weights", "parity"),
        "weights",
        "Re-open the output and compare every tensor's hash with what was read; parity runs both "
        "models too, as `g2verify compare` does, once the output is in place (needs torch).",
    ),
    flag("drop-padding", "Leave out embedding rows past vocab_size though they are not all zero."),
    flag(
        "fold-query-scale",
        "GGUF: scale the query projection for llama.cpp although that rounds.",
    ),
    commands.dry_run,
    commands.resume("run of the same conversion"),
    commands.overwrite("DST once the new copy is complete"),
    _config,
    _output,
)


def _pair_command(a: str, b: str) -> click.Command:
    layouts = ", ".join(TARGETS[b].layouts)

    @click.command(f"{a}-to-{b}", help=f"Convert SRC ({a}) to DST ({b}; layouts: {layouts}).")
    @_convert_options
    def command(**options: Any) -> None:
        _convert(source=a, to=b, **options)

    return command


@g2conv.command(short_help="Convert SRC, whatever it is, to DST.")
@_convert_options
@click.option("--to", type=click.Choice(FRAMEWORKS), required=True, help="Framework to write.")
def convert(**options: Any) -> None:
    """Convert SRC, whatever it is, to DST."""
    _convert(source=None, **options)


def _convert(
    *, as_json: bool, quiet: bool, dry_run: bool, src: Path, dst: Path, **options: Any
) -> None:
    run = options["check"] == "parity"
    if run:
        from ..verify.parity import require_runner

        options["check"] = "weights"
        require_runner()
    with Meter(quiet=quiet or as_json) as meter, resumable(dst):
        result = api.convert(src, dst, dry_run=dry_run, progress=meter, **options)
    parity = None
    if run and not dry_run:
        with reporting(dst):
            parity = _parity(src, dst, options, quiet or as_json)
        result["parity"] = parity
    if as_json or not quiet:
        with nullcontext() if dry_run else reporting(dst):
            print_report(result, show.plan if dry_run else _converted, as_json=as_json)
    warn(show.warnings(result), quiet or as_json)
    if parity is not None:
        click.get_current_context().exit(int(parity["exit_code"]))


def _parity(src: Path, dst: Path, options: dict[str, Any], quiet: bool) -> dict[str, Any]:
    """The report of running both models; the conversion is complete whatever it says."""
    from ..verify.parity import check_conversion

    names = ("to", "source", "config", "fix_config", "gating")
    with Meter(quiet=quiet) as meter:
        return check_conversion(src, dst, progress=meter, **{n: options[n] for n in names})


def _converted(result: dict[str, Any]) -> str:
    """A conversion, and how the models compare where they were run."""
    if "parity" not in result:
        return show.result(result)
    from ..verify import show as parity

    return f"{show.result(result)}\n{parity.claims(result['parity'])}"


@g2conv.command(short_help="Show format, layout, configuration and anything odd.")
@path("path")
@flag("tensors", "List every tensor.")
@_config
@_output
def inspect(path: Path, tensors: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Show format, layout, configuration and its origins, tensors, and anything odd."""
    report = api.inspect(path, **options)
    if quiet and not as_json:
        report |= {"warnings": [], "notes": []}
    print_report(report, lambda r: show.inspection(r, tensors=tensors), as_json=as_json)


@g2conv.command(short_help="Print the fingerprint: equal for equal weights.")
@path("path")
@_config
@_output
def fingerprint(path: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Print the format-independent fingerprint: equal weights, equal fingerprint."""
    with Meter(quiet=quiet or as_json) as meter:
        report = api.fingerprint_report(path, progress=meter, **options)
    print_report(
        report, lambda r: f"{r['fingerprint']}  {printable(r['path'], 5000)}", as_json=as_json
    )


@g2conv.command(short_help="Verify an output against its manifest.")
@path("dst")
@_config
@_output
def check(dst: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Verify an output of g2conv against its manifest: every file and every tensor."""
    with Meter(quiet=quiet or as_json) as meter:
        report = api.check(dst, progress=meter, **options)
    if as_json or not quiet:
        print_report(report, show.checked, as_json=as_json)


@g2conv.command(short_help="Write the bundled model, a small trained Gemma 2.")
@path("directory")
@choice("to", FRAMEWORKS, "safetensors", "Format to write.")
@click.option("--layout", metavar="NAME", help="Layout of that format.")
@commands.overwrite("DIRECTORY")
@_output
def sample(
    directory: Path, to: str, layout: str | None, overwrite: bool, as_json: bool, quiet: bool
) -> None:
    """Write the bundled model: a small trained Gemma 2 with its tokenizer."""
    with Meter(quiet=quiet or as_json) as meter, resumable(directory):
        report = api.sample(directory, to=to, layout=layout, overwrite=overwrite, progress=meter)
    if as_json or not quiet:
        with reporting(directory):
            print_report(report, show.result, as_json=as_json)
    warn(show.warnings(report), quiet or as_json)


def main(argv: list[str] | None = None) -> None:
    """Entry point: errors become one line and an exit code."""
    sys.exit(run_cli(g2conv, argv))


__all__ = ["SOURCES", "g2conv", "main"]
