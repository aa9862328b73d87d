"""Error by block: alone on the reference's input, and as it adds up; where the two models part, and what that suggests."""

from __future__ import annotations

from ..markup import Html
from ..numerals import count, number
from ..page import Section
from ..parts import Document, call, sentences, stack
from ..plots import (
    Caps,
    Hover,
    Layer,
    Line,
    Steps,
    Upright,
    chart,
    figure,
    legend,
    sample_area,
    sample_line,
)
from ..scales import Axis
from ..tables import Column, table

# field -> name in legend, curve class, dot class
_CURVES = {
    "isolated": ("alone, on the reference's input", "s1", "f1"),
    "isolated_far": ("alone, beyond the window", "s1 dash", "none"),
    "accumulated": ("accumulated", "s2", "f2"),
    "accumulated_far": ("accumulated, beyond the window", "s2 dash", "none"),
}

_NOISE = {"floor": "noise floor", "threshold": "limit"}
Curves = dict[str, tuple[str, str, str]]


def section(document: Document) -> Section | None:
    """See :data:`..sections.ORDER`."""
    blocks = document.get("blocks")
    if not blocks or not blocks["layers"]:
        return None
    hypotheses = [call(_capital(h["text"]), f"Why: {h['because']}") for h in blocks["hypotheses"]]
    body = stack(_plot(blocks), *hypotheses)
    return Section("blocks", "Error by block", _lede(blocks), body)


def _capital(text: str) -> str:
    """A sentence's beginning; a tensor's name stays as it is."""
    name = "." in text.partition(" ")[0]
    return text if name else f"{text[:1].upper()}{text[1:]}"


def _lede(blocks: Document) -> str:
    first = blocks["first_divergent"] or blocks.get("outside_blocks")
    if first is None:
        worst = max(
            (b["isolated"] for b in blocks["layers"] if b["isolated"] is not None), default=None
        )
        return sentences(
            "No block was found to diverge.",
            f"The largest error of a block alone is {number(worst)} of its output."
            if worst is not None
            else None,
        )
    if first.get("text"):
        return f"The models part in {first['text']}."
    where = [f"first in block {first['layer']}"]
    where += [f"at “{first['tap']}”"] if first.get("tap") else []
    where += (
        [f"from position {first['position']:,} on"] if first.get("position") is not None else []
    )
    return f"The models part {', '.join(where)}."


def _plot(blocks: Document) -> Html:
    layers = blocks["layers"]
    used = {f: c for f, c in _CURVES.items() if _known(layers, f)}
    y = Axis.logarithmic(
        "relative error of hidden states (RMS)",
        [b.get(f) for b in layers for f in (*used, *_NOISE)],
    )
    ticks = [(float(b["layer"]), f"{b['layer']}|{b['kind'][:1].upper()}") for b in layers]
    ends = layers[0]["layer"] - 0.5, layers[-1]["layer"] + 0.5
    x = Axis("block (L local, G global attention)", *ends, ticks=ticks)
    drawn = _drawn(blocks, used)
    alt = f"Relative error of {count(len(layers), 'block')}"
    samples = [(name, sample_line(curve, dot)) for name, curve, dot in used.values()]
    noise = {"floor": sample_area("floor"), "threshold": sample_line("limit")}
    samples += [(_NOISE[f], sample) for f, sample in noise.items() if _known(layers, f)]
    return figure(
        lambda w: chart(w, 360 if w > 600 else 320, x, y, drawn, alt=alt, head=46),
        key=legend(*samples),
        table=_table(layers, used),
    )


def _known(layers: list[Document], field: str) -> bool:
    return any(b.get(field) is not None for b in layers)


def _drawn(blocks: Document, used: Curves) -> list[Layer]:
    layers, first = blocks["layers"], blocks["first_divergent"]
    drawn: list[Layer] = [
        Steps([(b["layer"], b["floor"]) for b in layers], 0.5),
        Caps([(b["layer"], b.get("threshold")) for b in layers], 0.5),
    ]
    if first is not None:
        drawn.append(Upright(first["layer"], "first to diverge", span=0.5))
    for f, (_, curve, dot) in used.items():
        drawn.append(Line([(b["layer"], b[f]) for b in layers], curve, dots=dot))
    return [*drawn, Hover([(b["layer"], _tip(b, used)) for b in layers])]


def _table(layers: list[Document], used: Curves) -> Html:
    names = {
        **{f: c[0] for f, c in used.items()},
        **{f: n for f, n in _NOISE.items() if _known(layers, f)},
    }
    heads = [
        Column("Block", True),
        Column("Attention"),
        *(Column(n.capitalize(), True) for n in names.values()),
    ]
    rows = [[number(b["layer"]), b["kind"], *(number(b.get(f)) for f in names)] for b in layers]
    return table(heads, rows)


def _tip(b: Document, used: Curves) -> str:
    names = {**{f: c[0] for f, c in used.items()}, **_NOISE}
    lines = (f"{name}: {number(b[f])}" for f, name in names.items() if b.get(f) is not None)
    return " | ".join((f"block {b['layer']} ({b['kind']})", *lines))
