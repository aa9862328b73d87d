"""Several quantizations of one model in one plot: size against what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..markup import Html, clip, join, tag
from ..numerals import count, interval, nbytes, number, percent
from ..page import Section, page
from ..parts import Document, bullets, call, stack, tile
from ..plots import Hover, Layer, Line, chart, figure, legend, sample_line
from ..scales import Axis
from ..tables import Cell, Column, table
from .frontier import Mark, Marks, best, unit_of
from .words import calibrated_on, methods, schemes

_CURVES = ("1", "2", "3", "0")  # colours that keep apart
SCHEMA = "g2kit.quant-reports/1"


def comparison(documents: Sequence[Document]) -> str:
    """One page about several runs: a plot of size and quality, a table, and the errors behind every block.

    Args:
        documents: ``g2kit.quant-report/1`` documents, at least one, as :func:`..validate` accepts them.

    Returns:
        HTML as :func:`..quantized.html` makes it.
    """
    names = names_of(documents)
    measured = [d for d in documents if _kl(d) is not None]
    sections = [
        _frontier(documents, names),
        _runs(documents, names),
        _blocks(documents, names),
    ]
    versions = sorted({str(d["environment"].get("g2kit")) for d in documents})
    return page(
        title=f"{count(len(documents), 'quantization')} compared",
        product="g2quant",
        hero=_hero(documents, names, measured),
        sections=[s for s in sections if s is not None],
        footer=f"g2quant {', '.join(versions)} · {SCHEMA}",
        data={"schema": SCHEMA, "reports": list(documents)},
    )


def _kl(d: Document) -> float | None:
    found = (d["quality"] or {}).get("kl")
    return None if found is None else float(found)


def _bytes(d: Document) -> int:
    s = d["size"]
    return int(s.get("weights_after") or s["files_after"])


def names_of(documents: Sequence[Document]) -> list[str]:
    """Scheme and format, and what else it takes to tell them apart."""

    def distinct(names: list[str]) -> bool:
        return len(set(names)) == len(names)

    same_format = len({d["format"] for d in documents}) == 1
    names = [schemes(d) if same_format else d["format"] if len(d["targets"]) > 1 or
             d["format"].startswith("gguf") else f"{d['format']} {schemes(d)}" for d in documents]  # fmt: skip
    adders = (
        lambda d: d["method"],
        lambda d: f"tuned {d['recover']}" if d.get("recover") not in (None, "none") else "",
        lambda d: d["output"]["path"].rstrip("/").rpartition("/")[2],
    )
    for add in adders:
        if distinct(names):
            break
        names = [f"{n} {add(d)}".strip() for n, d in zip(names, documents, strict=True)]
    names = [clip(n, 60) for n in names]
    return names if distinct(names) else [f"{n} ({i})" for i, n in enumerate(names, 1)]


# ---------------------------------------------------------------- head


def _hero(
    documents: Sequence[Document], names: Sequence[str], measured: Sequence[Document]
) -> Html:
    sources = list(dict.fromkeys(d["source"]["path"] for d in documents))
    paths = [tag("span", s, cls="mono") for s in sources]
    return join(
        (
            tag("h1", tag("span", count(len(documents), "quantization")), cls="verdict"),
            tag("p", _summary(documents, measured), cls="summary"),
            tag("p", join(paths, ", "), cls="pair"),
            tag("dl", *_tiles(documents, names), cls="tiles"),
            *(call("These figures are not of the same thing", t) for t in _differences(documents)),
        )
    )


def _summary(documents: Sequence[Document], measured: Sequence[Document]) -> str:
    if len(measured) < 2:
        return "Divergence was measured of fewer than two of them, so there is nothing to compare."
    front = best([(_bytes(d), _kl(d) or 0.0) for d in measured])
    beaten = len(measured) - len(front)
    tail = (
        f"; {beaten} of {len(measured)} {'is' if beaten == 1 else 'are'} beaten by another that is neither larger nor worse"
        if beaten
        else ""
    )
    return f"From {nbytes(min(map(_bytes, documents)))} to {nbytes(max(map(_bytes, documents)))} of weights{tail}."


def _tiles(documents: Sequence[Document], names: Sequence[str]) -> list[Html]:
    known = [(n, d) for n, d in zip(names, documents, strict=True) if _kl(d) is not None]
    if not known:
        return []
    least = min(known, key=lambda x: _kl(x[1]) or 0.0)
    small = min(known, key=lambda x: _bytes(x[1]))
    return [
        tile(
            "Least divergence (KL)",
            number(_kl(least[1])),
            f"{least[0]}, {nbytes(_bytes(least[1]))}",
        ),
        tile("Smallest", nbytes(_bytes(small[1])), f"{small[0]}, KL {number(_kl(small[1]))}"),
    ]


def _differences(documents: Sequence[Document]) -> list[str]:
    """Why figures of two reports may not be held against each other."""
    said = []
    if len({d["source"]["fingerprint"] for d in documents}) > 1:
        said.append("They were made from different weights: their fingerprints differ.")
    texts = {(d["calibration"] or {}).get("sha256") for d in documents if d["quality"]}
    if len(texts) > 1:
        said.append("They were not measured on the same held-out text.")
    return said


# ---------------------------------------------------------------- sections


def _frontier(documents: Sequence[Document], names: Sequence[str]) -> Section | None:
    known = [
        (n, d, kl) for n, d in zip(names, documents, strict=True) if (kl := _kl(d)) is not None
    ]
    if not known:
        return None
    unit, factor = unit_of(max(_bytes(d) for _, d, _ in known))
    front = best([(_bytes(d), kl) for _, d, kl in known])
    marks = []
    for i, (name, d, kl) in enumerate(known):
        low, high = d["quality"].get("kl_interval") or (None, None)
        cls = "f1" if i in front else "f0"
        text = f"{name} | {nbytes(_bytes(d))} | KL {number(kl)} nats"
        if low is not None and high is not None:
            text += f" | 95 % {interval([low, high])}"
        marks.append(Mark(_bytes(d) / factor, kl, low, high, name, cls, text))
    sizes = [m.x for m in marks]
    room = 0.12 * (max(sizes) - min(sizes)) or 0.1 * max(sizes)
    x = Axis(f"weights ({unit})", min(sizes) - room, max(sizes) + room)
    y = Axis.logarithmic("KL, mean (nats)", [v for m in marks for v in (m.y, m.low, m.high)])
    line = Line(
        [(m.x, m.y) for m in sorted((marks[i] for i in front), key=lambda m: m.x)], "s1 thin dash"
    )
    drawn: list[Layer] = [line, Marks(marks)]
    plot = figure(
        lambda w: chart(
            w, 400 if w > 600 else 360, x, y, drawn, alt="Size and divergence of every run"
        ),
        key=legend(("no other is smaller and better", _dot("f1")), ("another is", _dot("f0"))),
        table=_points(marks, factor),
    )
    lede = "Down and left is better. Whiskers: 95 % intervals, whole sequences resampled."
    missing = [n for n, d in zip(names, documents, strict=True) if _kl(d) is None]
    remark = (
        bullets([f"{n}: its divergence was not measured" for n in missing]) if missing else None
    )
    return Section("frontier", "Size and quality", lede, stack(plot, remark))


def _points(marks: Sequence[Mark], factor: int) -> Html:
    columns = [
        Column("Run"),
        Column("Weights", True),
        Column("KL, mean", True),
        Column("95 % interval"),
    ]
    rows = []
    for m in marks:
        known = m.low is not None and m.high is not None
        bounds = interval([m.low or 0.0, m.high or 0.0]) if known else ""
        rows.append([m.name, nbytes(m.x * factor), number(m.y), bounds])
    return table(columns, rows)


def _dot(cls: str) -> Html:
    return tag("circle", cx=11, cy=6, r=5, cls=cls)


def _runs(documents: Sequence[Document], names: Sequence[str]) -> Section:
    columns = [
        Column("Run", cls="nowrap"), Column("Weights", True), Column("Bits", True),
        Column("KL, mean", True), Column("95 % interval", cls="nowrap"), Column("Same top-1", True), Column("Perplexity", True),
        Column("Methods", cls="nowrap"), Column("Calibrated on", cls="nowrap"), Column("Time", True),
    ]  # fmt: skip
    rows = [_row(n, d) for n, d in zip(names, documents, strict=True)]
    formats = {d["format"] for d in documents}
    lede = f"All are {formats.pop()}. " if len(formats) == 1 else ""
    lede += "Bits are per linear weight, scales included."
    return Section("runs", "Runs", lede, table(columns, rows, sortable=True, stacked=True))


def _row(name: str, d: Document) -> list[Any]:
    q = d["quality"] or {}
    took = (d["run"] or {}).get("seconds")
    return [
        name, Cell(nbytes(_bytes(d)), float(_bytes(d))),
        Cell(number(d["bits_per_weight"], 4), d["bits_per_weight"]), Cell(number(q.get("kl")), q.get("kl")),
        interval(q.get("kl_interval")) or "", Cell(percent(q.get("top1_agreement")), q.get("top1_agreement")),
        Cell(number(q.get("perplexity"), 4), q.get("perplexity")), methods(d), _calibration(d),
        Cell("" if took is None else f"{took:,.0f} s", took),
    ]  # fmt: skip


def _calibration(d: Document) -> str:
    c = d["calibration"]
    if c is None or calibrated_on(d) is None:
        return "nothing"
    source = clip(c["source"].rstrip("/").rpartition("/")[2], 24)
    return f"{source}, {c['tokens']:,} tokens" if c["tokens"] else source


def _blocks(documents: Sequence[Document], names: Sequence[str]) -> Section | None:
    known = [
        (n, d["blocks"])
        for n, d in zip(names, documents, strict=True)
        if any(b["error"] is not None for b in d["blocks"])
    ]
    if len(known) < 2:
        return None
    drawn = known[: len(_CURVES)]
    layers = sorted({b["layer"] for _, blocks in known for b in blocks})
    x = Axis("block", layers[0] - 0.5, layers[-1] + 0.5, ticks=[(float(i), str(i)) for i in layers])
    y = Axis.logarithmic(
        "relative error (RMS)", [b["error"] for _, blocks in drawn for b in blocks]
    )
    curves: list[Layer] = [
        Line([(b["layer"], b["error"]) for b in blocks], f"s{c}", dots=f"f{c}")
        for c, (_, blocks) in zip(_CURVES, drawn, strict=False)
    ]
    at = [{b["layer"]: b["error"] for b in blocks} for _, blocks in known]
    tips = [
        (
            i,
            " | ".join(
                [
                    f"block {i}",
                    *(f"{n}: {percent(e.get(i))}" for (n, _), e in zip(known, at, strict=True)),
                ]
            ),
        )
        for i in layers
    ]
    rows = [[number(i), *(percent(e.get(i)) for e in at)] for i in layers]
    plot = figure(
        lambda w: chart(w, 320, x, y, [*curves, Hover(tips)], alt="Error behind every block, by run"),
        key=legend(*((n, sample_line(f"s{c}", f"f{c}")) for c, (n, _) in zip(_CURVES, drawn, strict=False))),
        table=table([Column("Block"), *(Column(n, True) for n, _ in known)], rows),
    )  # fmt: skip
    rest = len(known) - len(drawn)
    lede = (
        "How far the hidden states behind a block are from the original model's on held-out text."
    )
    return Section(
        "blocks",
        "Error by block",
        lede + (f" The first {len(drawn)} are drawn, the table has all." if rest else ""),
        plot,
    )
