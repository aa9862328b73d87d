"""What was compared, down to the fingerprint, and how to do it again."""

from __future__ import annotations

from typing import Any

from ..markup import Child, Html, tag
from ..numerals import count, nbytes, number
from ..page import Section
from ..parts import Document, command, cost, more, note, stack
from ..tables import Column, facts, table

_ROWS = ("reference", "candidate")


def section(document: Document) -> Section | None:
    """See :data:`..sections.ORDER`."""
    sides = {s: document["identity"].get(s) for s in _ROWS}
    known = {name: side for name, side in sides.items() if side}
    if not known:
        return None
    described = [_describe(side) for side in known.values()]
    rows = [
        _row(cells) for cells in zip(*described, strict=True) if any(value for _, value in cells)
    ]
    heads = tag("tr", tag("td"), *(tag("th", name.capitalize(), scope="col") for name in known))
    body = stack(
        tag("table", tag("thead", heads), tag("tbody", *rows), cls="identity"),
        _same_pieces(known, document),
        _differences(document["differences"]),
        command(document.get("run")),
        more("Settings and content id", _settings(document)),
    )
    return Section("identity", "Identity", _lede(known), body)


def _lede(known: dict[str, Any]) -> str:
    prints = {side.get("fingerprint") for side in known.values()}
    if len(known) < 2 or None in prints:
        return ""
    if len(prints) == 1:
        return "Both sides have the same fingerprint: every weight is the same number, whatever the file format."
    return "The fingerprints differ: the two sides do not hold the same numbers."


def _describe(side: Document) -> list[tuple[str, str | None]]:
    runner = side.get("runner") or {}
    tokenizer = side.get("tokenizer")
    return [
        ("Path", side.get("path")),
        ("Kind", side.get("kind")),
        ("Format", _joined(side.get("format"), side.get("layout"))),
        ("Numbers", _dtypes(side)),
        ("Parameters", number(side["parameters"]) if side.get("parameters") is not None else None),
        ("Size", nbytes(side["bytes"]) if side.get("bytes") is not None else None),
        ("Fingerprint", side.get("fingerprint")),
        ("Configuration", side.get("config_from")),
        (
            "Tokenizer",
            f"{count(tokenizer['pieces'], 'piece')}, {tokenizer['sha256']}" if tokenizer else None,
        ),
        (
            "Run by",
            " · ".join(x for x in (_named(runner), runner.get("dtype"), runner.get("device")) if x)
            or None,
        ),
    ]


def _joined(*parts: str | None) -> str | None:
    """Parts that are there, each once."""
    return " · ".join(dict.fromkeys(x for x in parts if x)) or None


def _same_pieces(known: dict[str, Any], document: Document) -> Html | None:
    """Two files of tokenizers that were compared and are the same tokenizer."""
    files = {(side.get("tokenizer") or {}).get("sha256") for side in known.values()}
    found = any(d["field"].startswith("tokenizer") for d in document["differences"])
    if len(files) < 2 or None in files or found:
        return None
    return note(
        "The tokenizer files differ, the tokenizers do not: pieces, scores and the ids of test texts are the same."
    )


def _named(runner: Document) -> str | None:
    return " ".join(x for x in (runner.get("name"), runner.get("version")) if x) or None


def _dtypes(side: Document) -> str | None:
    return (
        ", ".join(f"{n} × {name}" for name, n in sorted((side.get("dtypes") or {}).items())) or None
    )


def _row(cells: tuple[tuple[str, str | None], ...]) -> Html:
    """A field of both sides; what is the same is said once."""
    values = [value for _, value in cells]
    if len(values) > 1 and len(set(values)) == 1:
        both = tag("td", values[0], tag("span", " both", cls="muted"), colspan=len(values))
        return tag("tr", tag("th", cells[0][0], scope="row"), both)
    return tag(
        "tr",
        tag("th", cells[0][0], scope="row"),
        *(tag("td", v or "–", cls="break") for v in values),
    )


def _differences(differences: list[Document]) -> Html | None:
    if not differences:
        return None
    columns = [Column("Field"), Column("Reference"), Column("Candidate")]
    rows = [[d["field"], _shown(d["reference"]), _shown(d["candidate"])] for d in differences]
    return stack(tag("h3", "Where configuration and tokenizer differ"), table(columns, rows))


def _shown(value: Any) -> Child:
    if isinstance(value, list):
        return ", ".join(str(v) for v in value)
    if isinstance(value, dict):
        return " · ".join(str(v) for v in value.values() if v is not None)
    return "none" if value is None else str(value)


def _settings(document: Document) -> Html:
    run = document.get("run") or {}
    settings = [
        (k.replace("_", " "), _shown(v))
        for k, v in sorted(document["settings"].items())
        if v is not None
    ]
    return facts(
        [
            ("content id", tag("span", document["content_id"], cls="mono")),
            ("started", run.get("started")),
            ("took", cost(run)),
            *settings,
        ]
    )
