"""What tests of reports share: a page taken apart, and documents changed place by place."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import jsonschema

from g2kit import report
from g2kit.formats.errors import FormatError
from g2kit.report import markup

VOID = markup.VOID
EVIL = "</script><img src=x onerror=alert(1)>'\"`\u202e\x00\x1b[31m\ud800&lt;"
WRONG: tuple[Any, ...] = ("x", -1, 1.5, True, None, [], {})


class Page(HTMLParser):
    """Well-formedness, elements with their attributes, text by element; fails on the first wrong nesting."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [n for n, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.texts.append(data)

    def has(self, tag: str) -> int:
        return sum(1 for t, _ in self.elements if t == tag)


def strings(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Every string of a document and where it is."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for k, v in value.items():
            yield from strings(v, (*path, k))
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from strings(v, (*path, i))


def put(document: Any, path: tuple[Any, ...], value: Any) -> None:
    """Set what is at a place."""
    for step in path[:-1]:
        document = document[step]
    document[path[-1]] = value


def poisoned(document: dict[str, Any], spare: set[str]) -> dict[str, Any]:
    """The document with an attack in every string but those under a key in ``spare``, which the program branches on."""
    document = copy.deepcopy(document)
    for path, text in strings(document):
        if not spare & {path[-1], *path[-2:-1]}:
            put(document, path, text + EVIL)
    return document


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a document; of lists the first two items."""
    yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:2])
        if isinstance(value, list)
        else ()
    )
    for k, v in items:
        yield from leaves(v, (*path, k))


def check_self_contained(text: str) -> None:
    """The page loads nothing and allows little."""
    found = Page(text)
    policy = next(str(a["content"]) for t, a in found.elements if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert not [a for _, a in found.elements if {"src", "style", "onclick"} & set(a)]
    assert not [a for t, a in found.elements if t in ("link", "iframe", "object", "base")]
    assert not re.search(
        r"url\(|@import|https?://", re.sub(r"<script.*?</script>", "", text, flags=re.S)
    )
    script = found.scripts[1]
    assert len(script.encode()) < 6000
    assert not re.search(r"https?:|eval|innerHTML|fetch|XMLHttp", script)


def check_whole(text: str) -> None:
    """Well-formed, ids unique, links lead somewhere."""
    text.encode("utf-8")
    found = Page(text)
    assert found.has("html") == found.has("body") == found.has("main") == found.has("h1") == 1
    ids = [a["id"] for _, a in found.elements if "id" in a]
    assert len(ids) == len(set(ids))
    links = [a["href"] for t, a in found.elements if t == "a"]
    assert {str(h)[1:] for h in links} <= set(ids)


def check_same_markup(clean: str, dirty: str) -> None:
    """What was made of a poisoned document has no element, attribute or script more."""
    dirty.encode("utf-8")
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x09\x0b-\x1f\ud800-\udfff]", dirty)
    one, two = Page(clean), Page(dirty)
    assert two.has("img") == 0
    assert {t for t, _ in two.elements} == {t for t, _ in one.elements}
    assert {n for _, a in two.elements for n in a} == {n for _, a in one.elements for n in a}
    assert len(two.scripts) == 2
    assert any("onerror" in t for t in two.texts), "the attack must have been shown"


def check_figures(text: str, least: int) -> None:
    """Every plot has both forms and its numbers."""
    figures = text.split("<figure>")[1:]
    assert len(figures) >= least
    for f in figures:
        body = f.split("</figure>")[0]
        assert "<details>" in body
        assert "<table" in body
        assert 'class="wide"' in body
        assert 'class="small"' in body


def accepted(document: dict[str, Any], *schema: str) -> bool:
    """Whether a document is valid."""
    try:
        report.validate(document, *schema)
    except FormatError:
        return False
    return True


def validators_agree(document: dict[str, Any], turn: int, *schema: str) -> None:
    """On a document wrong in one place, at every place: own validator and the library have one opinion."""
    reference = jsonschema.Draft202012Validator(report.schema(*schema))
    refused = 0
    for i, path in enumerate(leaves(document)):
        if path and path != ("schema",):
            changed = copy.deepcopy(document)
            put(changed, path, WRONG[(i + turn) % len(WRONG)])
            ours = accepted(changed, *schema)
            assert ours == reference.is_valid(changed), path
            refused += not ours
    assert refused > 50, "most places must refuse most values"
