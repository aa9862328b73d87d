"""Tables layer x matrix for a terminal: sensitivities, and what an allocation made of every weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..convert.show import table
from ..formats.errors import printable
from ..model.canonical import DOWN, GATE, UP, K, O, Q, V
from ..terminal import count, seconds, size

Report = dict[str, Any]
_TEMPLATES = (Q, K, V, O, GATE, UP, DOWN)
_COLUMNS = [t.split(".")[-2].removesuffix("_proj") for t in _TEMPLATES]
_MOST = 5


def grid(names: Mapping[str, Any], cell: Callable[[str], str]) -> str:
    """A row per layer, a column per matrix."""
    layers = sorted({int(n.split(".")[2]) for n in names})
    rows = [("layer", *_COLUMNS)]
    rows += [(str(i), *(cell(t.format(i=i)) for t in _TEMPLATES)) for i in layers]
    widths = [max(len(r[k]) for r in rows) for k in range(len(rows[0]))]
    return "\n".join(
        "  ".join(text.rjust(w) for text, w in zip(r, widths, strict=True)) for r in rows
    )


def sensitivity(r: Report) -> str:
    """``g2quant sensitivity``."""
    linears, choices = r["linears"], r["choices"]
    head = [
        ("model", f"{printable(r['source']['path'])}, {count(r['source']['parameters'])} parameters"),
        ("measured", f"{r['tokens']} tokens{_of(r)}, {r['measure']}, rounded by {r['method']}"),
        ("shown", f"KL x 1000 with that weight alone as {r['anchor']}"),
    ]  # fmt: skip
    if "timing" in r:
        head.append(("time", seconds(r["timing"]["total"])))
    totals = [
        (c, f"{1000 * sum(e['choices'][c]['kl'] for e in linears.values()):.4g}") for c in choices
    ]
    cells = grid(linears, lambda n: f"{1000 * linears[n]['choices'][r['anchor']]['kl']:.3g}")
    return "\n\n".join(
        [
            table(head),
            cells,
            "all weights, KL x 1000 summed\n" + table(totals),
            f"most to gain per weight, from {r['anchor']}\n" + table(_worst(r)),
        ]
    )


def _of(r: Report) -> str:
    """What was asked for, where whole held-out sequences of no more tokens were there."""
    asked = r["tokens_asked"]
    return "" if r["tokens"] == asked else f" ({asked} asked for, whole held-out sequences only)"


def _worst(r: Report) -> list[tuple[str, str]]:
    """The weights that more bits help most, for their size."""

    def gain(name: str) -> float:
        entry = r["linears"][name]
        return float(entry["choices"][r["anchor"]]["kl"] / entry["weights"])

    most = sorted(r["linears"], key=gain, reverse=True)[:_MOST]
    return [
        (n, f"{1000 * r['linears'][n]['choices'][r['anchor']]['kl']:.3g} in all, "
         f"{1e9 * gain(n):.3g} per million weights") for n in most
    ]  # fmt: skip


def allocation(a: Report) -> str:
    """What every weight becomes."""
    rows = [
        ("asked for", a["budget"]),
        ("reached", f"{size(a['weights_bytes'])} of weights, {a['bits_per_weight']:.3f} bits per weight"),
        ("KL expected", f"{a['predicted_kl']:.4g}, the sum of what each weight costs alone"),
    ]  # fmt: skip
    return table(rows) + "\n\n" + grid(a["targets"], lambda n: short(a["targets"][n]))


def short(target: str) -> str:
    """A scheme in few letters: ``4g128`` for ``int4 g128 sym``, ``4g128a`` where asymmetric."""
    parts = target.split()
    if len(parts) != 3:
        return target
    return parts[0].removeprefix("int") + parts[1] + ("a" if parts[2] == "asym" else "")
