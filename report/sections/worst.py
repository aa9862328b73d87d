"""The tokens that diverge most, readable: context, and what either side would say next."""

from __future__ import annotations

import re

from ..bars import share_bar
from ..markup import Child, Html, clip, join, tag
from ..numerals import number, percent
from ..page import Section
from ..parts import Document, more, stack

_SHOWN = 5
_TOP = 5
_PIECE = 40
_CONTEXT = 240


def section(document: Document) -> Section | None:
    """See :data:`..sections.ORDER`."""
    found = document.get("worst") or []
    if not found:
        return None
    worst = [w for w in found if w["kl"] > 0]
    if not worst:
        return Section("worst", "Worst tokens", "There are none: no token diverges.", Html())
    lede = "Marked: the last token read. Underlined: the token that came next in the text. Below: what either side expects next."
    rest = worst[_SHOWN:]
    body = stack(
        *map(_token, worst[:_SHOWN]),
        more(f"{len(rest)} more", join(map(_token, rest))) if rest else None,
    )
    return Section("worst", "Worst tokens", lede, body)


def _token(w: Document) -> Html:
    return tag("article", _head(w), _context(w), _tops(w), cls="worst")


def _head(w: Document) -> Html:
    pairs = (
        ("KL", number(w["kl"])),
        ("total variation", percent(w["tv"])),
        ("largest logit difference", number(w["max_diff"])),
        ("margin", number(w["margin"])),
    )
    where = f"{clip(w['document'], 80)} · position {w['position']:,}"
    return tag(
        "header",
        tag("b", where),
        tag("span", w["category"]),
        *(tag("span", f"{name} {value}") for name, value in pairs),
    )


def _context(w: Document) -> Html:
    after = list(w["after"])
    before = _text(w["before"])
    following: list[Child] = (
        [tag("bdi", _text(after[:1]), cls="next"), tag("bdi", _text(after[1:]))] if after else []
    )
    return tag(
        "p",
        "… ",
        tag("bdi", before),
        tag("mark", tag("bdi", _text([w["token"]]))),
        *following,
        cls="context mono",
    )


def _text(pieces: list[str]) -> str:
    """Pieces as running text: the vocabulary's mark for a space becomes one."""
    text = "".join(clip(p, _PIECE) for p in pieces).replace("▁", " ")
    return clip(re.sub(r"(?:<0x[0-9A-F]{2}>)+", _bytes, text), _CONTEXT)


def _bytes(found: re.Match[str]) -> str:
    """Pieces that stand for one byte each, as the text they spell; as they are where they spell none."""
    try:
        return bytes.fromhex(found[0].replace("<0x", "").replace(">", "")).decode()
    except UnicodeDecodeError:
        return found[0]


def _tops(w: Document) -> Html:
    both = {t["id"] for t in w["reference_top"]} & {t["id"] for t in w["candidate_top"]}
    return tag(
        "div",
        _top("Reference", w["reference_top"], "f1", both),
        _top("Candidate", w["candidate_top"], "f2", both),
        cls="tops",
    )


def _top(name: str, entries: list[Document], cls: str, both: set[int]) -> Html:
    rows = (
        tag(
            "li",
            tag(
                "bdi",
                _piece(e),
                cls="mono" if e["id"] in both else "mono only",
                title=f"token {e['id']}",
            ),
            share_bar(e["p"] or 0.0, cls),
            tag("span", percent(e["p"]), cls="n"),
        )
        for e in entries[:_TOP]
    )
    return tag("div", tag("h4", name), tag("ol", *rows))


def _piece(e: Document) -> str:
    piece = e.get("piece")
    return f"#{e['id']}" if piece is None else clip(re.sub("[▁ ]", "␣", piece), _PIECE) or "(empty)"
