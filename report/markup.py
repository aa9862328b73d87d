"""HTML and SVG by construction: a plain string is always text, only :func:`tag` makes markup.

Token pieces, tensor names and paths come from files that anyone may have written, so escaping cannot be left to the
places that use them.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable

VOID = frozenset({"br", "col", "hr", "img", "input", "link", "meta"})
_NAMED = {"\n": "⏎", "\r": "␍", "\t": "⇥"}


class Html(str):
    """Markup that is complete and safe as it is."""

    __slots__ = ()


Child = str | int | float | None
Attribute = str | int | float | bool | None


def visible(text: str) -> str:
    """Text in which nothing is invisible or changes the direction of what follows.

    Control, format (bidirectional overrides, zero-width), private, unassigned characters and lone surrogates become
    ``‹U+202E›``; line ends ``⏎``, tabs ``⇥``; a combining mark in front gets a dotted circle to sit on.
    """
    if not text.isprintable():
        text = "".join(map(_seen, text))
    return f"◌{text}" if text and unicodedata.combining(text[0]) else text


def _seen(c: str) -> str:
    if c.isprintable() or unicodedata.category(c) == "Zs":
        return c
    return _NAMED.get(c) or f"‹U+{ord(c):04X}›"


def clip(text: str, limit: int) -> str:
    """Text of at most ``limit`` characters, ending in ``…`` where something was left out."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def escape(text: str) -> Html:
    """Text as markup."""
    return text if isinstance(text, Html) else Html(html.escape(visible(text)))


def join(parts: Iterable[Child], between: str = "") -> Html:
    """Several children as one piece of markup; None is left out."""
    return Html(escape(between).join(_child(p) for p in parts if p is not None))


def tag(name: str, /, *children: Child, **attributes: Attribute) -> Html:
    """An element.

    Args:
        name: of the element.
        children: markup (:class:`Html`), text (any other string, escaped), numbers, None (left out).
        attributes: ``cls`` is ``class``; a trailing ``_`` is dropped, other ``_`` become ``-``. None and False are left
            out, True is an attribute without value.
    """
    attrs = "".join(_attribute(k, v) for k, v in attributes.items() if v is not None)
    if name in VOID:
        return Html(f"<{name}{attrs}>")
    return Html(f"<{name}{attrs}>{join(children)}</{name}>")


def _child(child: Child) -> str:
    return escape(child if isinstance(child, str) else f"{child}")


def _attribute(key: str, value: Attribute) -> str:
    if value is False:
        return ""
    name = "class" if key == "cls" else key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    if isinstance(value, float):
        value = f"{value:.1f}".removesuffix(".0")
    return f' {name}="{html.escape(visible(f"{value}"))}"'
