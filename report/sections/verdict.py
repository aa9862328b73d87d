"""What is seen first: the verdict, one sentence per claim, and what was not verified."""

from __future__ import annotations

from ..markup import Html, join, tag
from ..numerals import number, percent
from ..parts import Document, badge, bullets, css, evaluated, glyph, sentences, tile

_NAMES = {
    "compare": "Comparison",
    "weights": "Comparison of weights",
    "self-test": "Self-test of the verifier",
}


def title(document: Document) -> str:
    """Of the window."""
    return f"{document['verdict']}: {_NAMES.get(document['kind'], document['kind'])}"


def hero(document: Document) -> Html:
    """The top of the page."""
    verdict = document["verdict"]
    error = document.get("error")
    code = tag("code", error["code"]) if error else None
    return join(
        (
            tag("h1", glyph(verdict), tag("span", verdict), code, cls=f"verdict {css(verdict)}"),
            tag("p", document["summary"], cls="summary"),
            _pair(document),
            _tiles(document),
            tag("ul", *map(_claim, document["claims"]), cls="claims")
            if document["claims"]
            else None,
            _unverified(document["not_verified"]),
        )
    )


def _pair(document: Document) -> Html | None:
    sides = [document["identity"].get(s) for s in ("reference", "candidate")]
    paths = [tag("span", s["path"], cls="mono") for s in sides if s and s.get("path")]
    return tag("p", join(paths, " → "), cls="pair") if paths else None


def _tiles(document: Document) -> Html | None:
    """The few figures that most readers want."""
    metrics = document.get("metrics")
    if not metrics or not metrics["overall"]["metrics"]:
        return None
    overall = metrics["overall"]
    kl, tv = overall["metrics"]["kl"], overall["metrics"]["tv"]
    tiles = (
        ("Largest divergence (KL)", number(kl["percentiles"]["100"]), "nats"),
        ("Mean divergence (KL)", number(kl["mean"]), "nats"),
        ("Sampled tokens that differ", percent(tv["mean"]), None),
        (
            "Same most likely token",
            percent(overall["agreement"]),
            f"of {evaluated(overall)}",
        ),
    )
    return tag("dl", *(tile(*t) for t in tiles), cls="tiles")


def _claim(claim: Document) -> Html:
    missing = sentences(*claim["missing"])
    return tag(
        "li",
        tag("span", claim["id"], cls="id"),
        tag(
            "div",
            tag("b", claim["title"]),
            tag("p", claim["sentence"]),
            tag("p", f"To settle it: {missing}", cls="missing") if missing else None,
        ),
        tag("span", badge(claim["verdict"])),
    )


def _unverified(texts: list[str]) -> Html | None:
    if not texts:
        return None
    return tag("div", tag("h3", "Not verified"), bullets(texts), cls="unverified")
