"""A quantization report as one HTML file: what it cost on top, where it was lost and why below."""

from __future__ import annotations

from collections.abc import Callable

from ..markup import Html, join, tag
from ..numerals import nbytes, number, percent
from ..page import Section, page
from ..parts import Document, sentences, tile
from . import blocks, exclude, linears, made, matrices, quality, remarks, size
from .words import schemes, title

Builder = Callable[[Document], Section | None]
ORDER: tuple[tuple[str, Builder], ...] = (
    ("What was done", made.section),
    ("Quality", quality.section),
    ("Size", size.section),
    ("Error by block", blocks.section),
    ("Where the error is", matrices.section),
    ("What to exclude", exclude.section),
    ("Linear weights", linears.section),
    ("Warnings and notes", remarks.section),
)


def html(document: Document) -> str:
    """The page of a ``g2kit.quant-report/1`` document: self-contained, light and dark, works from file://.

    Args:
        document: as :func:`..validate` accepts it; call that first on files from elsewhere.

    Returns:
        HTML, the same for the same document, always encodable as UTF-8. Nothing in the document can become markup.

    Raises:
        ValueError: the document has NaN or an infinity.
    """
    built = [(name, build(document)) for name, build in ORDER]
    absent = [name for name, s in built if s is None]
    sections = [s for _, s in built if s is not None]
    version = document["environment"].get("g2kit")
    return page(
        title=title(document),
        product="g2quant",
        hero=_hero(document),
        sections=[*sections, remarks.environment(document, absent)],
        footer=f"g2quant{f' {version}' if version else ''} · {document['schema']} · {document['content_id']}",
        data=document,
    )


def _hero(document: Document) -> Html:
    paths = [tag("span", document[side]["path"], cls="mono") for side in ("source", "output")]
    return join(
        (
            tag("h1", tag("span", f"{number(document['bits_per_weight'], 4)} bits per weight"), cls="verdict"),
            tag("p", _summary(document), cls="summary"),
            tag("p", join(paths, " → "), cls="pair"),
            tag("dl", *_tiles(document), cls="tiles"),
        )
    )  # fmt: skip


def _summary(document: Document) -> str:
    q, size = document["quality"], document["size"]
    what = f"{schemes(document)} in {document['format']}."
    after = size.get("weights_after") or size["files_after"]
    small = f"{nbytes(size['weights_before'])} became {nbytes(after)}."
    if q is None or q["kl"] is None:
        return f"{what} {small} What that costs was not measured: no text was held out."
    changed = None if q["top1_agreement"] is None else 1 - q["top1_agreement"]
    return sentences(
        what,
        small,
        None
        if changed is None
        else f"On held-out text the most likely token is another one at {percent(changed, 1)} of positions.",
    )


def _tiles(document: Document) -> list[Html]:
    q, size = document["quality"] or {}, document["size"]
    ratio = (size.get("weights_after") or size["files_after"]) / max(1, size["weights_before"])
    tiles = [tile("Size of the weights", percent(ratio, 1), "of the original's")]
    if q.get("kl") is not None:
        tiles.append(tile("Divergence (KL), mean", number(q["kl"]), "nats"))
    if q.get("top1_agreement") is not None:
        tiles.append(tile("Same most likely token", percent(q["top1_agreement"])))
    if q.get("perplexity") is not None and q.get("perplexity_original"):
        pair = f"{number(q['perplexity_original'], 4)} → {number(q['perplexity'], 4)}"
        change = q["perplexity"] / q["perplexity_original"] - 1
        tiles.append(tile("Perplexity", pair, f"{100 * change:+.1f} %".replace("-", "−")))
    return tiles
