"""What was done, with what, and how to do it again."""

from __future__ import annotations

from ..markup import Html, tag
from ..numerals import count, nbytes, number
from ..page import Section
from ..parts import Document, command, cost, more, stack
from ..tables import facts
from .words import METHODS, SELF, calibrated_on, methods, schemes


def section(document: Document) -> Section:
    """See :data:`.html.ORDER`."""
    source, output = document["source"], document["output"]
    run = document["run"] or {}
    scheme = f"{schemes(document)}; {number(document['bits_per_weight'], 4)} bits per weight, scales included"
    body = stack(
        facts(
            [
                ("Source", tag("span", source["path"], cls="mono")),
                ("", _source(source)),
                ("Fingerprint", tag("span", source["fingerprint"], cls="mono") if source["fingerprint"] else None),
                ("Output", tag("span", output["path"], cls="mono")),
                ("Format", f"{document['format']}, {nbytes(output['bytes'])} in all"),
                ("Loaded by", output.get("readers")),
                ("Scheme", scheme),
                ("Allocated", _allocated(document.get("allocation"))),
                ("Method", _method(document)),
                ("Taken in the end", methods(document)),
                ("Tuned afterwards", document.get("recover") if document.get("recover") != "none" else None),
                ("Calibrated on", calibrated_on(document) or "nothing: weights were rounded without inputs"),
                ("Held out", _held_out(document)),
                ("Took", cost(run)),
                ("Continued", _continued(document.get("resumed_blocks"))),
            ]
        ),
        command(run),
        more("Fingerprints and ids", _ids(document)),
    )  # fmt: skip
    return Section("made", "What was done", "", body)


def _source(source: Document) -> str | None:
    parts = [
        source.get("layout"),
        f"{source['parameters']:,} parameters" if source.get("parameters") is not None else None,
    ]
    return ", ".join(p for p in parts if p) or None


def _method(document: Document) -> str:
    name = document["method"]
    stages = {True: "stage after stage within a block", False: "all of a block at once", None: None}
    parts = [METHODS.get(name, name), stages[document.get("sequential")]]
    return ", ".join(p for p in parts if p)


def _allocated(found: Document | None) -> str | None:
    if not found or not found.get("budget"):
        return None
    predicted = found.get("predicted_kl")
    known = isinstance(predicted, int | float)
    return f"to {found['budget']}" + (f"; KL {number(predicted)} nats predicted" if known else "")


def _held_out(document: Document) -> str | None:
    c = document["calibration"]
    if c is None or not c.get("held_out_tokens"):
        return None
    kind = "of the same kind" if c["source"] == SELF else "of the same source"
    both = "one half chose between methods, the other measures the result"
    if c.get("held_out_sequences") == 1:
        both = "one sequence, for choosing between methods and for measuring the result"
    return f"{c['held_out_tokens']:,} tokens {kind}: {both}"


def _continued(blocks: int | None) -> str | None:
    return f"{count(blocks, 'block')} were done by an interrupted run" if blocks else None


def _ids(document: Document) -> Html:
    calibration = document["calibration"] or {}
    output = document["output"]
    run = document["run"] or {}
    rows = [
        ("output's fingerprint", output.get("fingerprint")),
        ("calibration's ids, sha256", calibration.get("sha256")),
        ("report", document["content_id"]),
        ("started", run.get("started")),
    ]
    return facts([(name, tag("span", v, cls="mono") if v else None) for name, v in rows])
