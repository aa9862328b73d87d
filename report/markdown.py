"""A verification report as at most 40 lines of Markdown, for a comment or a terminal."""

from __future__ import annotations

import re

from .markup import clip, visible
from .numerals import NOTHING, count, number, percent
from .parts import Document, evaluated

LINES = 40
_WIDTH = 300
_ALIKE = str.maketrans("`|<>&", "ˋ¦‹›＆")
_MARKS = {"PASS": "✅", "FAIL": "❌", "INCONCLUSIVE": "❔", "ERROR": "⚠️"}


def plain(text: str, limit: int = _WIDTH) -> str:
    """Text that Markdown takes as text: one line, no markup, no link, no mention, no cell border."""
    shown = clip(visible(text), limit)
    escaped = re.sub(r"([\\*_{}\[\]#~!])|([<>&|`])", _escaped, shown)
    # a word joiner keeps @name and www./http: from becoming mentions and links
    return re.sub(r"@(?=\w)|(?<=http)(?=s?:)|(?<=www)(?=\.)", lambda m: m[0] + "\u2060", escaped)


def _escaped(found: re.Match[str]) -> str:
    """What could open HTML, a cell or code as an entity: not every reader of Markdown takes a backslash before it."""
    return f"\\{found[1]}" if found[1] else f"&#{ord(found[2])};"


def code(text: str, limit: int = 120) -> str:
    """Text as a code span, in which nothing can be escaped: what could be markup is put by a look-alike."""
    return f"`{clip(visible(text), limit).translate(_ALIKE)}`"


def markdown(document: Document) -> str:
    """The report in short: verdict, claims, figures, what was not verified.

    Returns:
        At most 40 lines, ending in a line end. What does not fit is counted.
    """
    verdict = document["verdict"]
    head = [f"## {_mark(verdict)} g2verify: {verdict}", "", plain(document["summary"]), ""]
    tail = [_identity(document), f"Report {code(document['content_id'])}"]
    claims = [
        f"| {_mark(c['verdict'])} {c['verdict']} | **{plain(c['id'])}** {plain(c['title'])} | {plain(c['sentence'])} |"
        for c in document["claims"]
    ]
    middle: list[str] = []
    if claims:
        middle += ["| | claim | |", "|---|---|---|", *_most(claims, 12, "| | {} | |"), ""]
    middle += [*_metrics(document), *_self_test(document), *_differences(document)]
    unverified = [f"- {plain(t)}" for t in document["not_verified"]]
    if unverified:
        middle += ["**Not verified**", "", *_most(unverified, 8, "- {}"), ""]
    lines = [*head, *middle, "", *tail]
    lines = [line for i, line in enumerate(lines) if line or (i and lines[i - 1])]
    return "\n".join(lines[:LINES]) + "\n"


def _mark(verdict: str) -> str:
    return _MARKS.get(verdict, "•")


def _most(lines: list[str], limit: int, rest: str) -> list[str]:
    if len(lines) <= limit:
        return lines
    return [*lines[: limit - 1], rest.format(f"and {len(lines) - limit + 1} more")]


def _metrics(document: Document) -> list[str]:
    metrics = document.get("metrics")
    if not metrics or not metrics["overall"]["metrics"]:
        return []
    o = metrics["overall"]
    kl = o["metrics"]["kl"]
    worst, floor = kl["percentiles"], (document.get("floor") or {}).get("kl_max")
    figures = (
        f"KL mean {number(kl['mean'])}, 99 % {number(worst['99'])}, max {number(worst['100'])} nats",
        f"noise floor {number(floor)}" if floor is not None else None,
        f"sampled tokens that differ {percent(o['metrics']['tv']['mean'])}",
        f"same top-1 {percent(o['agreement'])}{_flips(metrics)}",
        f"perplexity {number(o['perplexity_ref'], 5)} → {number(o['perplexity_cand'], 5)}"
        + (f" over {count(o['scored'], 'token')}" if o["non_finite"] else "")
        if o["perplexity_ref"]
        else None,
    )
    where = f"{evaluated(o)}; {count(o['documents'], 'sequence')}"
    return [
        f"**Figures** ({where}): {'; '.join(f for f in figures if f)}.",
        "",
        *_first(document),
    ]


def _flips(metrics: Document) -> str:
    """Flips beyond a near-tie; without a measured noise floor nobody knows which those are."""
    known = metrics["tolerance"] is not None
    return f" ({count(metrics['overall']['real_flips'], 'real flip')})" if known else ""


def _first(document: Document) -> list[str]:
    blocks = document.get("blocks") or {}
    first = blocks.get("first_divergent")
    if not first:
        return []
    where = f"block {first['layer']}" + (f", {plain(first['tap'])}" if first.get("tap") else "")
    position = "" if first.get("position") is None else f", position {first['position']}"
    why = "".join(f" {plain(h['text'])}." for h in blocks["hypotheses"][:2])
    return [f"**First divergence**: {where}{position}.{why}", ""]


def _self_test(document: Document) -> list[str]:
    test = document.get("self_test")
    if not test:
        return []
    missed = [plain(m["title"]) for m in test["mutants"] if not m["caught_by"]]
    tail = f"; missed: {clip(', '.join(missed), _WIDTH)}" if missed else ""
    return [f"**Self-test**: {test['caught']} of {test['of']} injected faults caught{tail}.", ""]


def _differences(document: Document) -> list[str]:
    fields = [plain(d["field"], 60) for d in document["differences"]]
    return (
        [f"**Configurations differ** in {clip(', '.join(fields), _WIDTH)}.", ""] if fields else []
    )


def _identity(document: Document) -> str:
    sides = [document["identity"].get(s) for s in ("reference", "candidate")]
    shown = [
        f"{code(s['path'] or NOTHING)} ({code(s['fingerprint'] or 'no fingerprint')})"
        for s in sides
        if s
    ]
    return " → ".join(shown)
