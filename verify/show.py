"""Reports on a terminal: a verdict, a line per claim, what is missing."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import click

from ..formats.errors import printable

COLOURS = {"PASS": "green", "FAIL": "red", "INCONCLUSIVE": "yellow", "ERROR": "red"}
WIDTH = 110
_LISTED = 8
_LONGEST = 4000  # characters of a sentence


def report(document: Mapping[str, Any]) -> str:
    """A document as some lines."""
    return "\n".join(_lines(document))


def claims(document: Mapping[str, Any]) -> str:
    """Claims and verdict only, for commands with a report of their own."""
    return "\n".join(_judged(document))


def _judged(d: Mapping[str, Any]) -> Iterator[str]:
    for claim in d["claims"]:
        yield from _wrapped(
            f"{_verdict(claim['verdict'])}  {_text(claim['id'])}  ", claim["sentence"]
        )
        for missing in claim["missing"]:
            yield from _wrapped(" " * 18 + "missing: ", missing)
    yield from _where(d)


def _lines(d: Mapping[str, Any]) -> Iterator[str]:
    for name in ("reference", "candidate"):
        side = d["identity"][name]
        if side is not None:
            yield _side(name, side)
    yield from _judged(d)
    if d["self_test"]:
        yield from _self_test(d["self_test"])
    for text in d["not_verified"][:_LISTED]:
        yield from _wrapped("not verified  ", text)
    if len(d["not_verified"]) > _LISTED:
        yield f"not verified  and {len(d['not_verified']) - _LISTED} more, see the report"
    yield from _wrapped(
        f"{_verdict(d['verdict'])}  ", d["summary"] if not d["claims"] else _scope(d)
    )


def _side(name: str, side: Mapping[str, Any]) -> str:
    what = side["format"] or side["kind"]
    types = ", ".join(f"{n} {t}" for t, n in (side["dtypes"] or {}).items())
    types = f": {types}" if types else ""
    runner = side["runner"]
    by = f"; run by {runner['name']} in {runner['dtype']}" if runner else ""
    mark = f"\n{'':14}{_text(side['fingerprint'])}" if side["fingerprint"] else ""
    path = printable(str(side["path"]), _LONGEST)  # spaces as they are
    about = _text(f"{what}{types}{by}")
    return f"{name:12}  {path} ({about}){mark}"


def _scope(d: Mapping[str, Any]) -> str:
    s = d["settings"]
    if d["kind"] != "compare" or "tokens" not in s:
        only = "weights and configuration only; nothing was run"
        return only if d["kind"] == "weights" else str(d["summary"])
    text = f"{s['tokens']} tokens in {s['documents']} sequences, profile {s['profile']}"
    left = d["metrics"]["overall"]["non_finite"] if d["metrics"] else 0
    return f"{text}; figures leave out {left} positions: not finite" if left else text


def _where(d: Mapping[str, Any]) -> Iterator[str]:
    blocks = d["blocks"]
    if not blocks or d["verdict"] == "PASS":
        return
    place = blocks["first_divergent"] or blocks.get("outside_blocks")
    if place:
        text = place.get("text") or f"block {place.get('layer')}"  # documents of others may lack it
        yield f"parts at      {_text(text)}"
    for h in blocks["hypotheses"]:
        yield from _wrapped("perhaps       ", f"{h['text']} ({h['because']})")


def _self_test(found: Mapping[str, Any]) -> Iterator[str]:
    names = [(_text(m["id"]), _text(m["title"])) for m in found["mutants"]]
    wide, width = (max(map(len, column)) for column in zip(*names, strict=True))
    for m, (id, title) in zip(found["mutants"], names, strict=True):
        by = _text(", ".join(m["caught_by"])) or "nothing"
        place = "at the right place" if m["right_place"] else "at the wrong place"
        verdict = "PASS" if m["caught_by"] and m["right_place"] else "FAIL"
        yield f"{_verdict(verdict)}  {id:{wide}}  {title:{width}}  caught by {by}, {place}"


def _text(text: str) -> str:
    """Text from a document, which may be anybody's: nothing in it steers the terminal or hides."""
    return printable(" ".join(text.split()), _LONGEST)


def _verdict(verdict: str) -> str:
    return click.style(f"{verdict:12}", fg=COLOURS[verdict], bold=True)


def _wrapped(head: str, text: str) -> Iterator[str]:
    width = len(click.unstyle(head))
    lines = textwrap.wrap(_text(text), WIDTH - width) or [""]
    yield head + lines[0]
    yield from (" " * width + line for line in lines[1:])
