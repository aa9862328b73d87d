"""Files that tell of a run: the options that name them, and `g2quant report`, which makes them again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from .. import commands
from .. import report as reports
from ..commands import path_option, print_report, together
from ..formats import strict_json
from ..formats.errors import FormatError, G2Error, UsageError, printable
from ..outputs import Outputs
from ..sealed import dumps
from ..terminal import reporting
from . import show
from .document import check_seal, with_sensitivity

# option -> how the file is made from a run's document
RENDERERS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "report": dumps,
    "html": lambda d: reports.quantized.html(dict(d)),
    "card": lambda d: reports.quantized.card(dict(d)),
}
files = together(
    path_option("report", "Write the run's report as one JSON document."),
    path_option("html", "Write the report as one self-contained HTML page."),
    path_option("card", "Write a fragment for a model card."),
)


@click.command("report", short_help="Make pages and model cards from reports; several in one plot.")
@click.argument("documents", nargs=-1, required=True, type=click.Path(path_type=Path))
@path_option(
    "sensitivity",
    "Sensitivities that `g2quant sensitivity` kept, of the same model: what to exclude is ranked by them.",
)
@files
@commands.as_json("Print the document, or all of them.")
@commands.quiet()
def report(
    documents: tuple[Path, ...],
    sensitivity: Path | None,
    as_json: bool,
    quiet: bool,
    **paths: Path | None,
) -> None:
    """Render DOCUMENTS, reports that --report wrote: one as a page and a model card, several as one plot of size and quality."""
    if len(documents) > 1 and (other := [n for n in ("report", "card") if paths[n]]):
        raise UsageError(
            f"--{other[0]} is about one report, {len(documents)} are given.",
            fix="give one of them.",
        )
    inputs = (*documents, *([sensitivity] if sensitivity else ()))
    with Outputs(paths, inputs) as out:
        loaded = [_read(file) for file in documents]
        if sensitivity is not None:
            measured = _measured(sensitivity)
            loaded = [with_sensitivity(d, measured) for d in loaded]
        if len(loaded) == 1:
            write(out, loaded[0])
        elif "html" in out.paths:
            out.write("html", reports.quantized.comparison(loaded))
    with reporting(*out.paths.values()):
        if as_json:
            print_report(loaded[0] if len(loaded) == 1 else {"reports": loaded}, str, as_json=True)
        elif not quiet:
            names = reports.quantized.names_of(loaded)
            click.echo(show.result(loaded[0]) if len(loaded) == 1 else show.compared(loaded, names))


def write(out: Outputs, report: Mapping[str, Any], complete: Path | None = None) -> None:
    """Every file that was asked for; ``complete`` is in place whatever becomes of them."""
    try:
        for kind in list(out.paths):
            out.write(kind, RENDERERS[kind](report))
    except G2Error as e:
        if complete is not None:
            e.what = f"{e.what} {printable(str(complete))} is complete all the same."
        raise


def _read(path: Path) -> dict[str, Any]:
    """A run's document."""
    loaded = _object(path, "name the JSON document that --report or --json wrote.")
    try:
        reports.validate(loaded, reports.QUANT)
    except FormatError as e:
        raise FormatError(e.what, where=path, fix=e.fix) from e
    check_seal(loaded, path)
    return loaded


def _measured(path: Path) -> dict[str, Any]:
    """What ``sensitivity`` printed."""
    fix = "name the JSON document that `g2quant sensitivity --output` wrote."
    loaded = _object(path, fix)
    found: dict[str, Any] = loaded.get("sensitivity", loaded)
    part = reports.schema(reports.QUANT)["$defs"]["sensitivity"]
    if wrong := reports.mistakes(found, part, "sensitivity"):
        raise FormatError(f"not sensitivities: {wrong[0]}.", where=path, fix=fix)
    return found


def _object(path: Path, fix: str) -> dict[str, Any]:
    try:
        return strict_json.load_object(path, limit=1 << 28)
    except FormatError as e:
        raise FormatError(f"not a report: {e.what}", where=path, fix=fix) from e
