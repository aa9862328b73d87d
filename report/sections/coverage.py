"""What the probes exercised: without it, agreement means little."""

from __future__ import annotations

from collections import defaultdict

from ..bars import Pillar, Strip, pillars, strips
from ..markup import Html, join, tag
from ..numerals import count, number
from ..page import Section
from ..parts import Document, badge, bullets, glyph, note, stack
from ..plots import HALF, WIDE, figure, legend, sample_area, sample_line
from ..scales import Axis
from ..tables import Column, table

# a cap changes a score by about a third of the squared utilisation: 0.3 % at 0.1
_SEEN = 0.1
_CAPS = (
    "A soft-cap bends values towards a limit. The bars are the largest value that met it, over the limit: at u "
    "the cap changes values by about u²/3. "
    "Where a bar stays low, a missing cap would not have been seen."
)


def section(document: Document) -> Section | None:
    """See :data:`..sections.ORDER`."""
    coverage = document.get("coverage")
    if not coverage:
        return None
    regimes = coverage["regimes"]
    said = {c["detail"] for c in coverage["checks"]}
    done = sum(1 for r in regimes if r["exercised"])
    lede = (
        f"{done} of {count(len(regimes), 'regime')} that a Gemma model has were exercised."
        if regimes
        else ""
    )
    body = stack(
        tag("ul", *(_regime(r, said) for r in regimes), cls="cells") if regimes else None,
        _probes(document),
        _caps(coverage),
        _checks(coverage["checks"]),
        _skipped(coverage["skipped"]),
    )
    return Section("coverage", "Coverage", lede, body)


def _regime(r: Document, said: set[str | None]) -> Html:
    """A regime; the figures of one that rests on a check stand in the table of checks."""
    mark = glyph("PASS" if r["exercised"] else "INCONCLUSIVE")
    value, needed = (
        number(v) if isinstance(v, int | float) else v for v in (r["value"], r["needed"])
    )
    figures = value if needed is None else f"{value or 'none'} (needs {needed})"
    figures = None if r.get("detail") in said else figures
    state = "exercised" if r["exercised"] else "not exercised"
    detail = " · ".join(x for x in (figures, r.get("detail")) if x) or state
    head = tag(
        "b",
        tag("span", mark, cls="pass" if r["exercised"] else "inconclusive", title=state),
        r["name"],
    )
    return tag("li", head, tag("span", detail, cls="muted"), cls=None if r["exercised"] else "off")


def _probes(document: Document) -> Html | None:
    groups: dict[str, list[Document]] = defaultdict(list)
    for probe in document["coverage"]["probes"]:
        groups[probe["group"]].append(probe)
    if not groups:
        return None
    names = sorted(groups, key=lambda g: (len(g), g))
    rows = [_reach(name, groups[name]) for name in names]
    window = (document.get("series") or {}).get("window")
    # a window that no probe reaches is the thing to see
    longest = max(*(v for r in rows for v in r.values), float(window or 1), 1.0)
    high = max(longest * 1.06, 2.0)
    ticks = [(float(2**k), f"{2**k:,}") for k in range(40) if 2**k <= high]
    axis = Axis("longest position (logarithmic)", 1.0, high, log=True, ticks=ticks)
    mark = (float(window), f"window {window:,}") if window else None
    drawing = figure(
        lambda w: strips(w, rows, axis, mark, alt="How far the probes of each group reach"),
        table=table(
            [
                Column("Probe"),
                Column("Category"),
                Column("Tokens", True),
                Column("Largest position", True),
            ],
            [
                [p["id"], p["category"], number(p["tokens"]), number(p["max_position"])]
                for p in document["coverage"]["probes"]
            ],
        ),
    )
    return stack(tag("h3", "How far the probes reach"), drawing)


def _reach(name: str, probes: list[Document]) -> Strip:
    tokens = sum(p["tokens"] for p in probes)
    categories = sorted({p["category"] for p in probes})
    note = f"{count(len(probes), 'probe')}, {count(tokens, 'token')}"
    tip = f"{name}: {note} | {', '.join(categories)}"
    return Strip(name, [float(max(p["max_position"], 1)) for p in probes], note, tip)


def _caps(coverage: Document) -> Html | None:
    layers = coverage["softcap"]
    if not layers and coverage.get("final_softcap") is None:
        return None
    rows = [
        Pillar(
            f"{r['layer']}|{r['kind'][:1].upper()}",
            r["utilisation"],
            "f1" if r["kind"] == "local" else "f2",
            _cap_tip(r),
        )
        for r in layers
    ]
    if coverage.get("final_softcap") is not None:
        value = coverage["final_softcap"]
        rows.append(Pillar("final", value, "f3", f"logits: {number(value)} of the cap"))
    top = max(1.0, *(r.value for r in rows))
    axis = Axis("largest value before the cap, over the cap", 0.0, top * 1.05)
    wide = HALF if len(rows) <= 12 else WIDE
    dashes = (f"{_SEEN}: a cap below hardly shows", sample_line("limit"))
    plot = figure(
        lambda w: pillars(w, rows, axis, _SEEN, alt="Utilisation of the soft-caps by block"),
        wide=wide,
        key=legend(
            ("local", sample_area("f1")),
            ("global", sample_area("f2")),
            ("logits", sample_area("f3")),
            dashes,
        ),
        table=table(
            [Column("Where"), Column("Utilisation", True)],
            [[r.tip.split(":")[0], number(r.value)] for r in rows],
        ),
    )
    both = tag("div", plot, note(_CAPS), cls="two") if wide == HALF else stack(plot, note(_CAPS))
    return stack(tag("h3", "Do the soft-caps matter on these probes?"), both)


def _cap_tip(row: Document) -> str:
    return f"block {row['layer']} ({row['kind']}): {number(row['utilisation'])} of the cap"


def _checks(checks: list[Document]) -> Html | None:
    if not checks:
        return None
    columns = [
        Column("Check"),
        Column("Verdict"),
        Column("Value", True),
        Column("Compared with", True),
        Column("Detail"),
    ]
    rows = [
        [
            join((tag("b", c["id"]), " ", c["title"])),
            badge(c["verdict"]),
            number(c["value"]),
            number(c["threshold"]),
            c["detail"],
        ]
        for c in checks
    ]
    return stack(tag("h3", "Checks of behaviour"), table(columns, rows, stacked=True))


def _skipped(skipped: list[Document]) -> Html | None:
    if not skipped:
        return None
    return stack(
        tag("h3", "Skipped"),
        bullets([join((tag("b", s["group"]), " ", s["why"])) for s in skipped]),
    )
