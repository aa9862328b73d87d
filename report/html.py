"""A verification report as one HTML file."""

from __future__ import annotations

from .page import page
from .parts import Document
from .sections import sections
from .sections.verdict import hero, title


def html(document: Document) -> str:
    """The page of a ``g2kit.report/1`` document: self-contained, light and dark, works from file://.

    Args:
        document: as :func:`validate` accepts it; call that first on files from elsewhere.

    Returns:
        HTML, the same for the same document, always encodable as UTF-8. Nothing in the document can become markup.

    Raises:
        ValueError: the document has NaN or an infinity.
    """
    version = document["environment"].get("g2kit")
    footer = f"g2verify{f' {version}' if version else ''} · {document['schema']} · {document['content_id']}"
    return page(
        title=title(document),
        product="g2verify",
        hero=hero(document),
        sections=sections(document),
        footer=footer,
        data=document,
    )
