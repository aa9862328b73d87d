"""A verification report as JUnit XML, so that continuous integration shows which claim failed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

from .markup import visible
from .numerals import ascii_number
from .parts import Document

# JUnit has no third outcome: what is not proven must not look green, so it is an error
_ELEMENT = {"PASS": None, "FAIL": "failure"}


@dataclass(frozen=True)
class Case:
    """A test case: what was checked, how it went, why, and its figures."""

    group: str
    name: str
    verdict: str
    message: str
    figures: str = ""


def junit(document: Document) -> str:
    """One test case per claim, per check of behaviour and per injected fault.

    FAIL becomes ``<failure>``; INCONCLUSIVE and ERROR become ``<error>``, which is red too. A document without any case
    has one for its verdict.
    """
    cases = [*_claims(document), *_checks(document), *_mutants(document)]
    if not cases or (document["verdict"] != "PASS" and all(c.verdict == "PASS" for c in cases)):
        cases.append(Case("report", "verdict", document["verdict"], document["summary"]))
    failures = sum(1 for c in cases if _ELEMENT.get(c.verdict, "error") == "failure")
    errors = sum(1 for c in cases if _ELEMENT.get(c.verdict, "error") == "error")
    run = document.get("run") or {}
    time = f' time="{run["seconds"]:.3f}"' if run.get("seconds") is not None else ""
    counts = f'tests="{len(cases)}" failures="{failures}" errors="{errors}" skipped="0"{time}'
    body = "".join(map(_case, cases))
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<testsuites {counts}>\n<testsuite name="g2verify {document["kind"]}" {counts}>\n{body}</testsuite>\n</testsuites>\n'
    )


def _case(c: Case) -> str:
    head = f"<testcase classname={_quoted(f'g2verify.{c.group}')} name={_quoted(c.name)}"
    element = _ELEMENT.get(c.verdict, "error")
    inner = (
        f"<{element} type={_quoted(c.verdict)} message={_quoted(c.message)}/>" if element else ""
    )
    inner += f"<system-out>{escape(visible(c.figures))}</system-out>" if c.figures else ""
    return f"{head}>{inner}</testcase>\n" if inner else f"{head}/>\n"


def _quoted(text: str) -> str:
    """XML 1.0 has no way to write control characters, so they are made visible."""
    return quoteattr(visible(text))


def _claims(document: Document) -> Iterator[Case]:
    for c in document["claims"]:
        missing = "".join(f" To settle it: {m}" for m in c["missing"])
        figures = "; ".join(map(_figure, c["evidence"]))
        yield Case(
            "claims", f"{c['id']} {c['title']}", c["verdict"], c["sentence"] + missing, figures
        )


def _figure(e: Document) -> str:
    sign = ">=" if e.get("better") == "higher" else "<="
    limit = "" if e["threshold"] is None else f" (limit {sign} {ascii_number(e['threshold'])})"
    return f"{e['metric']} = {ascii_number(e['value'])}{limit}"


def _checks(document: Document) -> Iterator[Case]:
    for c in (document.get("coverage") or {}).get("checks", ()):
        yield Case("checks", f"{c['id']} {c['title']}", c["verdict"], c["detail"] or "")


def _mutants(document: Document) -> Iterator[Case]:
    for m in (document.get("self_test") or {}).get("mutants", ()):
        caught = ", ".join(m["caught_by"])
        verdict, message = (
            ("PASS", "") if caught else ("FAIL", "this injected fault was not caught")
        )
        yield Case(
            "self-test",
            f"{m['id']} {m['title']}",
            verdict,
            message,
            f"caught by {caught}" if caught else "",
        )
