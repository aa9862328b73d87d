"""The shell of a page: one self-contained HTML file that works from file:// and loads nothing.

Knows nothing of what is shown: a page is a head part, sections, and the data it was made from.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from .markup import Html, tag
from .theme import variables


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        id: anchor.
        title: heading, also in the contents.
        lede: what is to be seen, in a sentence or two; "" for none.
        body: markup.
    """

    id: str
    title: str
    lede: str
    body: Html


def page(
    *,
    title: str,
    product: str,
    hero: Html,
    sections: Sequence[Section],
    footer: str,
    data: Mapping[str, Any],
) -> str:
    """An HTML document.

    Args:
        title: of the window.
        product: name of the tool, top left.
        hero: what is seen first, full width.
        sections: in order.
        footer: last line.
        data: embedded as JSON in ``<script type="application/json" id="document">``.

    Returns:
        The file's text; the same for the same arguments. It can always be encoded as UTF-8.

    Raises:
        ValueError: ``data`` has a number that JSON has no word for.
    """
    style = variables() + "\n" + _own("page.css")
    script = _own("page.js")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        tag("style", Html(style)),
    )
    contents = tag(
        "nav",
        *(tag("a", s.title, href=f"#{s.id}") for s in sections),
        cls="toc",
        aria_label="Contents",
    )
    top = tag(
        "div",
        tag("strong", product),
        tag("span", title),
        tag("button", "Save JSON", id="save", type="button"),
        tag("button", "Theme: auto", id="theme", type="button"),
        cls="top",
    )
    frame = tag(
        "div",
        tag("header", hero, cls="hero"),
        contents,
        tag("main", *map(_section, sections)),
        tag("footer", footer),
        cls="frame",
    )
    body = tag(
        "body",
        top,
        frame,
        tag("div", id="tip", role="tooltip"),
        tag("script", embedded(data), type="application/json", id="document"),
        tag("script", Html(script)),
    )
    return "<!DOCTYPE html>\n" + tag("html", head, body, lang="en") + "\n"


def _section(s: Section) -> Html:
    lede = tag("p", s.lede, cls="lede") if s.lede else None
    return tag("section", tag("h2", s.title), lede, s.body, id=s.id)


def embedded(data: Mapping[str, Any]) -> Html:
    """JSON that cannot end the script element it stands in, nor open a comment in it; ASCII only."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    for c in "<>&":
        text = text.replace(c, f"\\u{ord(c):04x}")
    return Html(text)


def _own(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
