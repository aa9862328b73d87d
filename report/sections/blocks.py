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


def section(document: Document) -> Section | None:
    """See :data:`..sections.ORDER`."""
    blocks = document.get("blocks")
    if not blocks or not blocks["layers"]:
        return None
    hypotheses = [
        call(f"{h['text'][:1].upper()}{h['text'][1:]}", f"Why: {h['because']}")
        for h in blocks["hypotheses"]
    ]
    body = stack(_plot(blocks), *hypotheses)
    return Section("blocks", "Error by block", _lede(blocks), body)


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
    used = {f: c for f, c in _CURVES.items() if any(b[f] is not None for b in layers)}
    y = Axis.logarithmic(
        "relative error of hidden states (RMS)",
        [b.get(f) for b in layers for f in (*used, "floor", "threshold")],
    )
    ticks = [(float(b["layer"]), f"{b['layer']}|{b['kind'][:1].upper()}") for b in layers]
    x = Axis(
        "block (L local, G global attention)",
        layers[0]["layer"] - 0.5,
        layers[-1]["layer"] + 0.5,
        ticks=ticks,
    )
    drawn: list[Layer] = []
    if any(b["floor"] is not None for b in layers):
        drawn.append(Steps([(b["layer"], b["floor"]) for b in layers], 0.5))
    if any(b.get("threshold") is not None for b in layers):
        drawn.append(Caps([(b["layer"], b.get("threshold")) for b in layers], 0.5))
    first = blocks["first_divergent"]
    if first is not None:
        drawn.append(Upright(first["layer"], "first to diverge", span=0.5))
    drawn += [
        Line([(b["layer"], b[f]) for b in layers], curve, dots=dot)
        for f, (_, curve, dot) in used.items()
    ]
    drawn.append(Hover([(b["layer"], _tip(b, used)) for b in layers]))
    heads = [
        Column("Block", True),
        Column("Attention"),
        *(Column(name.capitalize(), True) for name, _, _ in used.values()),
        Column("Floor", True),
    ]
    rows = [
        [number(b["layer"]), b["kind"], *(number(b[f]) for f in used), number(b["floor"])]
        for b in layers
    ]
    return figure(
        lambda w: chart(
            w,
            360 if w > 600 else 320,
            x,
            y,
            drawn,
            alt=f"Relative error of {count(len(layers), 'block')}",
            head=46,
        ),
        key=legend(
            *((name, sample_line(curve, dot)) for name, curve, dot in used.values()),
            ("noise floor", sample_area("floor")),
        ),
        table=table(heads, rows),
    )


def _tip(b: Document, used: dict[str, tuple[str, str, str]]) -> str:
    lines = [f"{name}: {number(b[f])}" for f, (name, _, _) in used.items() if b[f] is not None]
    return " | ".join([f"block {b['layer']} ({b['kind']})", *lines, f"floor: {number(b['floor'])}"])
