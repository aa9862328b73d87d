"""g2verify, the command. stdout is data, stderr is progress and messages; each command is one library call."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from .. import commands
from .. import report as reports
from ..commands import choice, flag, group, path, path_option
from ..formats import strict_json
from ..formats.errors import EXIT_FAIL, FormatError, G2Error, NotFoundError, UsageError
from ..formats.named_files import require_there
from ..machine import Stopwatch
from ..outputs import Outputs
from ..sealed import dumps, sealed
from ..terminal import Meter, dump_json, reporting, run_cli
from . import command_options, show
from .command_options import config_options, engine_options, probe_options, report_options
from .document import error_document
from .document_check import check_verdict
from .options import Options, engines, parse_shard
from .profiles import DEFAULT_PROFILE, PROFILES

# option -> how the file is made from a document
RENDERERS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "report": dumps,
    "html": lambda d: reports.html(dict(d)),
    "junit": lambda d: reports.junit(dict(d)),
    "markdown": lambda d: reports.markdown(dict(d)),
}
_EPILOG = """\b
Examples:
  g2verify compare ./gemma2-2b-flax ./gemma2-2b --html report.html
  g2verify compare ./gemma2-2b ./gemma2-2b.gguf --cand-runner llama_cpp
  g2verify record ./gemma2-2b ./gemma2-2b.rec       then, on another machine:
  g2verify compare ./gemma2-2b.rec ./gemma2-2b --device cuda

\b
Exit codes: 0 PASS; 1 FAIL; 2 wrong usage; 3 ERROR, bad input; 4 disk, memory or a missing package;
5 refused as unsafe; 6 INCONCLUSIVE, the evidence does not decide; 7 the output exists; 70 a bug;
141 nobody reads standard output.
"""

_COMPARE_EPILOG = """\b
What is run: P0 BOS and three tokens; P1 snippets in many scripts; P2 documents;
P3 lengths around the sliding window; P4 a long sequence, up to the full context;
P10 every vocabulary row as input. Checks on them: P5 soft-caps; P6 batch and
padding; P7 BOS; P8 decoding; P9 greedy choice. Profiles differ in how much of
each: smoke the least, full all.
"""


@group("g2verify", _EPILOG)
def g2verify(debug: bool) -> None:
    """Run two Gemma checkpoints, in any formats and by any runners, and say whether they are the same model."""


# ---------------------------------------------------------------- commands


@g2verify.command(
    short_help="Run two models and judge how far apart they are.", epilog=_COMPARE_EPILOG
)
@path("ref")
@path("cand")
@engine_options(two=True)
@config_options(two=True)
@probe_options
@click.option(
    "--budget", type=float, metavar="KL", help="Mean KL in nats that changed weights may cost (Q1)."
)
@click.option(
    "--k",
    type=float,
    default=10.0,
    show_default=True,
    help="Thresholds are this many noise floors.",
)
@path_option(
    "reference-embedding",
    "Checkpoint with the embedding of a recording that does not carry it.",
    metavar="MODEL",
)
@path_option("candidate-embedding", "The candidate's, if that is a recording too.", metavar="MODEL")
@click.option("--shard", metavar="i/N", help="Do this share only; write the part with --report.")
@click.option("--estimate", "only_estimate", is_flag=True, help="Say time and memory; run nothing.")
@report_options(shards=True)
def compare(ref: Path, cand: Path, **o: Any) -> None:
    """Run REF and CAND over the same tokens, block by block, and judge how far apart they are.

    REF may be a recording, made by `g2verify record` on another machine.
    """
    _refuse_files_of_an_estimate(o)
    with _work("compare", o, (ref, cand)) as work:
        options = _options(o)
        configs = (o["ref_config"] or o["config"], o["cand_config"] or o["config"])
        fix = {n: o[n] for n in ("fix_config", "gating")}
        if o["only_estimate"]:
            work.data(*_estimated(ref, cand, options, configs, fix))
        elif options.shard is not None:
            from .compare import part_of

            part = part_of(ref, cand, options, configs, progress=work.meter, **fix)
            work.part(part)
        else:
            from .compare import document_of

            work.document(document_of(ref, cand, options, configs, progress=work.meter, **fix))


@g2verify.command(short_help="Compare weights and configuration only.")
@path("ref")
@path("cand")
@config_options(two=True)
@report_options()
def weights(ref: Path, cand: Path, **o: Any) -> None:
    """Compare the weights (bit for bit, or within the bounds of their formats) and configuration of REF and CAND."""
    with _work("weights", o, (ref, cand)) as work:
        from .compare import compare_weights

        names = ("config", "ref_config", "cand_config", "fix_config", "gating")
        work.document(compare_weights(ref, cand, progress=work.meter, **{n: o[n] for n in names}))


@g2verify.command(short_help="Keep a run, to compare with on another machine.")
@path("model")
@path("out")
@engine_options(two=False)
@config_options(two=False)
@probe_options
@flag("with-embedding", "Carry the embedding along, so that the reader needs none.")
@flag("no-floor", "Do not measure the noise floor (X1 is INCONCLUSIVE without).")
@commands.overwrite("a recording at OUT")
@commands.as_json("Print the recording's document.")
@commands.quiet()
def record(model: Path, out: Path, **o: Any) -> None:
    """Run MODEL and write the directory OUT: hidden states, largest logits, fingerprints, noise floor."""
    from .compare import record_model

    names = (
        "runner", "dtype", "device", "mesh", "config", "fix_config", "gating", "profile", "text",
        "tokens", "seed", "with_embedding", "overwrite",
    )  # fmt: skip
    with Meter(quiet=o["quiet"] or o["as_json"]) as meter:
        document = record_model(
            model, out, floor=not o["no_floor"], command=_command_line(), progress=meter,
            **{n: o[n] for n in names},
        )  # fmt: skip
    if o["as_json"]:
        click.echo(dump_json(document))
    elif not o["quiet"]:
        tokens = sum(p["length"] for p in document["probes"]["list"])
        click.echo(
            f"recorded  {tokens} tokens in {len(document['probes']['list'])} sequences to {out}"
        )
        click.echo(f"          {document['model']['fingerprint']}")


@g2verify.command(short_help="Put the parts of all shards together.")
@click.argument("parts", nargs=-1, required=True, type=click.Path(path_type=Path))
@report_options()
def merge(parts: tuple[Path, ...], **o: Any) -> None:
    """Put the parts that `compare --shard i/N --report PART` wrote together: one report, the same for any N."""
    with _work("compare", o, parts) as work:
        from .compare import merge as merge_parts

        work.document(merge_parts(parts), run=False)


@g2verify.command("self-test", short_help="Make known mistakes in a model; see which are noticed.")
@path("model")
@config_options(two=False)
@click.option("--device", metavar="NAME", help="torch's name of the device.")
@choice("profile", tuple(PROFILES), DEFAULT_PROFILE, "Probes to choose from.")
@click.option("--mutants", "--only", "only", metavar="NAME,…",
              help="Only these mistakes, by their ids; default all.")  # fmt: skip
@click.option("--estimate", "only_estimate", is_flag=True, help="Say time and memory; run nothing.")
@report_options()
def self_test(model: Path, **o: Any) -> None:
    """Make every known mistake in MODEL, one at a time, and print which claims noticed it and where."""
    _refuse_files_of_an_estimate(o)
    with _work("self-test", o, (model,)) as work:
        from .compare import self_test_document, self_test_estimate

        only = [x.strip() for x in o["only"].split(",")] if o["only"] else []
        names = ("config", "fix_config", "gating", "device", "profile")
        options = {n: o[n] for n in names}
        if o["only_estimate"]:
            work.data(*self_test_estimate(model, only=only, **options))
            return
        work.document(self_test_document(model, only=only, progress=work.meter, **options))


@g2verify.command(short_help="Write a model's logits to a .npy file.")
@path("model")
@path_option("tokens", "Token ids, [n] or [batch, n].", metavar="FILE.npy", required=True)
@path_option(
    "out",
    "Written, or replaced: float32 [batch, n, vocabulary].",
    metavar="FILE.npy",
    required=True,
)
@engine_options(two=False)
@config_options(two=False)
@commands.as_json("Print shape and place as JSON.")
@commands.quiet()
def logits(model: Path, tokens: Path, out: Path, **o: Any) -> None:
    """Run MODEL over token ids and write every logit, tile by tile."""
    from .compare import logits_to_file

    names = ("runner", "dtype", "device", "mesh", "config", "fix_config", "gating")
    inputs = (model, tokens, *command_options.option_files(o))
    with Outputs({"out": out}, inputs), Meter(quiet=o["quiet"] or o["as_json"]) as meter:
        found = logits_to_file(model, tokens, out, progress=meter, **{n: o[n] for n in names})
    if o["as_json"]:
        click.echo(dump_json({"out": str(out), **found}))
    elif not o["quiet"]:
        click.echo(f"wrote  {out}  float32 {found['shape']}")
    commands.warn([f"note: {n}" for n in found["notes"]], o["quiet"] or o["as_json"])
    if found["non_finite"] is not None:
        b, p, i = found["non_finite"]
        click.echo(
            f"FAIL: a logit is NaN or infinite, first in sequence {b}, position {p}, token {i}.",
            err=True,
        )
        click.get_current_context().exit(EXIT_FAIL)


@g2verify.command("report", short_help="Make HTML, JUnit or Markdown from a JSON report.")
@path("document")
@commands.as_json("Print the document.")
@path_option("html", "Write one self-contained HTML page.")
@path_option("junit", "Write JUnit XML.")
@path_option("markdown", "Write a summary of at most 40 lines.")
@path_option("model-card", "Write a fragment for a model card.")
@commands.quiet()
def render(document: Path, **o: Any) -> None:
    """Render DOCUMENT, a report.json, again. The exit code is 0 whatever its verdict."""
    makers = {**RENDERERS, "model_card": _model_card}
    with Outputs({n: o.get(n) for n in makers}, (document,)) as out:
        loaded = _read_report(document)
        _check_seal(loaded, document)
        check_verdict(loaded, document)
        for kind in out.paths:
            out.write(kind, makers[kind](loaded))
    if o["as_json"]:
        click.echo(dumps(loaded), nl=False)
    elif not o["quiet"]:
        click.echo(show.report(loaded))


def _model_card(document: Mapping[str, Any]) -> str:
    return reports.model_card(dict(document))


# ---------------------------------------------------------------- around commands


class _Work:
    """A command that ends with a document: its outputs, progress, exit code."""

    def __init__(self, o: Mapping[str, Any], out: Outputs, meter: Meter) -> None:
        self.o, self.out, self.meter = o, out, meter
        self.watch = Stopwatch()

    def document(self, document: Mapping[str, Any], *, run: bool = True) -> None:
        """Write it wherever it was asked for, and exit as it says."""
        said = self._run() if run else None
        document = sealed(document, said)
        self.meter.stop()
        for kind in list(self.out.paths):
            self.out.write(kind, RENDERERS[kind](document))
        with reporting(*self.out.paths.values()):
            if self.o["as_json"]:
                click.echo(dumps(document), nl=False)
            elif not self.o["quiet"]:
                click.echo(show.report(document))
        click.get_current_context().exit(int(document["exit_code"]))

    def part(self, part: Mapping[str, Any]) -> None:
        """Write a shard's part."""
        from .shards import dumps_part

        text = dumps_part(part)
        if "report" in self.out.paths:
            self.out.write("report", text)
        if self.o["as_json"]:
            click.echo(text, nl=False)
        elif not self.o["quiet"]:
            i, n = part["shard"]
            click.echo(
                f"part {i + 1} of {n} written to {self.o['report']}; put all together with `g2verify merge`"
            )

    def data(self, value: Mapping[str, Any], lines: list[str]) -> None:
        """Print plain data."""
        click.echo(dump_json(value) if self.o["as_json"] else "\n".join(lines))

    def failed(self, e: G2Error, kind: str) -> None:
        """A document with verdict ERROR where one was asked for, the message on stderr, the error's exit code."""
        self.meter.stop()
        document = sealed(error_document(e, kind), self._run())
        for name in self.out.pending:  # not what was written, nor where writing failed
            with suppress(G2Error):  # the first error is the one to tell
                self.out.write(name, RENDERERS[name](document))
        if self.o["as_json"]:
            click.echo(dumps(document), nl=False)
        click.echo(f"error[{e.code}]: {e}", err=True)
        click.get_current_context().exit(e.exit_code)

    def _run(self) -> dict[str, Any]:
        return self.watch.run(_command_line())


@contextmanager
def _work(kind: str, o: Mapping[str, Any], inputs: tuple[Path, ...]) -> Iterator[_Work]:
    paths = {name: o.get(name) for name in RENDERERS}
    if o.get("shard"):
        _check_shard_outputs(o)
    quiet = o["quiet"] or o["as_json"]
    with (
        Outputs(paths, (*inputs, *command_options.option_files(o))) as out,
        Meter(quiet=quiet) as meter,
    ):
        work = _Work(o, out, meter)
        try:
            yield work
        except G2Error as e:
            if not (o["as_json"] or out.paths):
                raise
            work.failed(e, kind)


def _refuse_files_of_an_estimate(o: Mapping[str, Any]) -> None:
    given = [n for n in RENDERERS if o["only_estimate"] and o[n] is not None]
    if given:
        raise UsageError(
            f"--estimate runs nothing, so there is nothing for --{given[0]}.",
            fix="leave out one of them; --json prints the estimate as data.",
        )


def _check_shard_outputs(o: Mapping[str, Any]) -> None:
    parse_shard(o["shard"])
    other = [n for n in ("html", "junit", "markdown") if o[n] is not None]
    if other:
        raise UsageError(
            f"--{other[0]} is for whole reports, a shard is a part of one.",
            fix="write parts with --report and give --html and the like to `g2verify merge`.",
        )
    if o["report"] is None and not o["as_json"]:
        raise UsageError("a shard needs a place for its part.", fix="add --report PART.json.")


def _options(o: Mapping[str, Any]) -> Options:
    names = ("runner", "cand_runner", "dtype", "cand_dtype", "device", "cand_device", "mesh")
    one, two = engines(**{n: o[n] for n in names})
    options = Options(
        o["profile"], one, two, o["text"], o["tokens"], o["budget"], o["k"], o["seed"],
        reference_embedding=o["reference_embedding"], candidate_embedding=o["candidate_embedding"],
    )  # fmt: skip
    return options if o["shard"] is None else replace(options, shard=parse_shard(o["shard"]))


def _estimated(
    ref: Path, cand: Path, options: Options, configs: tuple[Any, Any], fix: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    from .estimate import estimate, lines
    from .side import open_side

    with open_side(ref, configs[0], **fix) as one, open_side(cand, configs[1], **fix) as two:
        found = estimate(one, two, options)
    return found, lines(found)


def _read_report(path: Path) -> dict[str, Any]:
    """A report's document; of a file that is no JSON at all, the advice is to name the report."""
    named = "name the JSON document that --report or --json wrote."
    require_there(path, fix=named)
    if not path.is_file():
        raise NotFoundError("this is no file.", where=path, fix=named)
    try:
        loaded = strict_json.load_object(path, limit=1 << 31)
    except FormatError as e:
        raise FormatError(
            f"not a report: {e.what}", where=path,
            fix=named,
        ) from e  # fmt: skip
    reports.validate(loaded)
    return loaded


def _check_seal(document: Mapping[str, Any], where: Path) -> None:
    if sealed(document)["content_id"] != document["content_id"]:
        raise FormatError(
            "the report was changed after it was written: its content_id does not fit.",
            where=where,
            fix="run the comparison again.",
        )


def _command_line() -> str:
    return shlex.join(["g2verify", *sys.argv[1:]])


def main(argv: list[str] | None = None) -> None:
    """Entry point: errors become one line and an exit code."""
    sys.exit(run_cli(g2verify, argv))


__all__ = ["g2verify", "main"]
