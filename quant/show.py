"""g2quant's reports as text for people; ``--json`` prints the data itself."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..convert.show import table
from ..formats.errors import printable
from ..terminal import seconds, size

Report = dict[str, Any]


def _targets(r: Report) -> str:
    return ", ".join(f"{n} x {t}" for t, n in r["targets"].items())


def plan(r: Report) -> str:
    """``--dry-run``."""
    need, c = r["resources"], r["calibration"]
    rows = [
        (
            "source",
            f"{printable(r['source']['path'])}, {r['source']['parameters'] / 1e9:.2f} B parameters",
        ),
        ("output", f"{printable(r['output']['path'])}, {r['output']['format']}"),
        ("weights", f"{_targets(r)}; {r['bits_per_weight']:.3f} bits per weight"),
        (
            "calibration",
            f"{c['sequences']} sequences of {c['seq_len']} tokens, {c['held_out_sequences']} more held out",
        ),
        ("size", f"about {size(need['output_bytes'])}"),
        (
            "disk",
            f"{size(need['work_bytes'])} more while it runs; {size(need['free_bytes'])} are free",
        ),
        ("memory", f"about {size(need['peak_bytes'])}"),
        ("time", f"about {seconds(need['seconds'])}, and what the calibration takes to be written"),
    ]
    return "plan, nothing is written\n" + table(rows)


def result(r: Report) -> str:
    """What was done, and what it cost."""
    out, q = r["output"], r["quality"]
    methods = Counter(x["method"] for x in r["linears"].values())
    rows = [
        ("written", f"{printable(out['path'])}, {r['format']}, {size(out['bytes'])}"),
        ("weights", f"{_targets(r)}; {r['bits_per_weight']:.3f} bits per weight"),
        ("methods", ", ".join(f"{n} x {m}" for m, n in methods.items())),
        (
            "calibration",
            f"{r['calibration']['tokens']} tokens from {printable(r['calibration']['source'])}",
        ),
        ("KL", _with_interval(q["kl"], q["kl_interval"])),
        ("same first choice", _share(q["top1_agreement"])),
        (
            "perplexity",
            f"{_number(q['perplexity'])}, the original's {_number(q['perplexity_original'])}",
        ),
        ("loses most", _worst(r["linears"])),
        ("fingerprint", out["fingerprint"]),
        ("time", seconds(r["timing"]["total"])),
    ]
    if r["resumed_blocks"]:
        rows.append(("continued", f"{r['resumed_blocks']} blocks were done"))
    return table(rows)


def exported(r: Report) -> str:
    """``g2quant export``."""
    rows = [
        ("written", f"{printable(r['path'])}, {r['format']}, {size(r['bytes'])}"),
        ("weights", ", ".join(f"{n} x {s}" for s, n in r["schemes"].items())),
        ("fingerprint", r["fingerprint"]),
    ]
    return table(rows)


def warnings(r: Report) -> list[str]:
    """For stderr: fallbacks and notes."""
    fallbacks = [f"note: {printable(x, 1000)}" for x in r.get("fallbacks", ())]
    told = set(r.get("fallbacks", ()))
    notes = [f"note: {printable(x, 1000)}" for x in r.get("notes", ()) if x not in told]
    return [*fallbacks, *notes, *(f"warning: {printable(x, 1000)}" for x in r.get("warnings", ()))]


def _number(x: float | None) -> str:
    return "unknown" if x is None else f"{x:.4g}"


def _share(x: float | None) -> str:
    return "unknown" if x is None else f"{x:.2%}"


def _with_interval(x: float | None, ends: list[float] | None) -> str:
    return _number(x) + (f" ({_number(ends[0])} to {_number(ends[1])})" if ends else "")


def _worst(linears: dict[str, Any]) -> str:
    name = max(linears, key=lambda n: linears[n]["error"])
    return f"{name}, {linears[name]['error'] ** 0.5:.1%} of its output"
