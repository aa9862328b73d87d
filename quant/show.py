"""g2quant's reports as text for people; ``--json`` prints the data itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..convert.show import table
from ..formats.errors import printable
from ..formats.names import listing
from ..terminal import count, seconds, size
from . import show_layers

Report = dict[str, Any]


def _targets(r: Report) -> str:
    return ", ".join(f"{n} x {t}" for t, n in r["targets"].items())


def plan(r: Report) -> str:
    """``--dry-run``."""
    need, c = r["resources"], r["calibration"]
    rows = [
        (
            "source",
            f"{printable(r['source']['path'])}, {count(r['source']['parameters'])} parameters",
        ),
        ("output", f"{printable(r['output']['path'])}, {r['output']['format']}"),
        ("weights", f"{_targets(r)}; {r['bits_per_weight']:.3f} bits per weight"),
        (
            "calibration",
            f"{c['sequences']} sequences of {c['seq_len']} tokens, {c['held_out_sequences']} more held out"
            if c["sequences"]
            else printable(c["source"]),
        ),
        ("size", f"about {size(need['output_bytes'])}"),
        (
            "disk",
            f"{size(need['work_bytes'])} more while it runs; {size(need['free_bytes'])} are free",
        ),
        ("memory", f"about {size(need['peak_bytes'])}"),
        ("time", f"about {seconds(need['seconds'])}"),
    ]
    if need["writing_seconds"]:
        rows.append((
            "text",
            f"about {seconds(need['writing_seconds'])} more for the model to write its calibration text, in "
            f"{size(need['writing_bytes'])}; less with fewer --samples, a smaller --seq-len or a text of yours",
        ))  # fmt: skip
    return "plan, nothing is written\n" + table(rows) + _allocation(r)


def result(r: Report) -> str:
    """What was done, and what it cost; of a run, or of a report that may lack what was not measured."""
    out, took = r["output"], (r.get("run") or {}).get("seconds")
    methods = Counter(x["method"] for x in r["linears"].values())
    rows = [
        ("written", f"{printable(out['path'])}, {r['format']}, {size(out['bytes'])}{_files(r)}"),
        ("weights", f"{_targets(r)}; {r['bits_per_weight']:.3f} bits per weight"),
        ("methods", ", ".join(f"{n} x {printable(m)}" for m, n in methods.items())),
        ("calibration", _calibration(r["calibration"])),
        *_quality(r["quality"]),
        ("loses most", _worst(r["linears"])),
        ("fingerprint", out.get("fingerprint")),
        ("time", None if took is None else seconds(took)),
    ]
    if r.get("recovery"):
        was = r["recovery"]["kl_before"]
        rows.insert(5, ("recovered", f"scales and norms tuned together; KL was {_number(was)}"))
    if r.get("resumed_blocks"):
        rows.append(("continued", f"{r['resumed_blocks']} blocks were done"))
    return table([(name, value) for name, value in rows if value is not None]) + _allocation(r)


def _files(r: Report) -> str:
    """How much of it is weights, where other files count."""
    weights = r["size"].get("weights_after")
    whole = r["output"]["bytes"]
    return f" ({size(weights)} of it weights)" if weights and size(weights) != size(whole) else ""


def _allocation(r: Report) -> str:
    """What a target size made of every weight, where there was one."""
    found = r.get("allocation")
    return f"\n\n{show_layers.allocation(found)}" if found else ""


def _calibration(c: Report | None) -> str:
    if c is None:
        return "none"
    source = printable(c["source"])
    return f"{c['tokens']} tokens from {source}" if c["tokens"] else source


def _quality(q: Report | None) -> list[tuple[str, str]]:
    if q is None or q["kl"] is None:
        return [("KL", "not measured")]
    pair = f"{_number(q['perplexity'])}, the original's {_number(q['perplexity_original'])}"
    return [
        ("KL", _with_interval(q["kl"], q.get("kl_interval"))),
        ("same first choice", _share(q["top1_agreement"])),
        ("perplexity", pair),
    ]


def compared(reports: Sequence[Report], names: Sequence[str]) -> str:
    """Several runs: a line each, by size."""
    rows = []
    for name, r in sorted(zip(names, reports, strict=True), key=lambda x: _weights(x[1])):
        q = r["quality"] or {}
        kl = _with_interval(q.get("kl"), q.get("kl_interval"))
        rows.append(
            (
                printable(name),
                f"{size(_weights(r))}, KL {kl}, {_share(q.get('top1_agreement'))} the same",
            )
        )
    return table(rows)


def _weights(r: Report) -> int:
    """Bytes of files of weights."""
    return int(r["size"].get("weights_after") or r["size"]["files_after"])


def exported(r: Report) -> str:
    """``g2quant export``."""
    rows = [
        ("written", f"{printable(r['path'])}, {r['format']}, {size(r['bytes'])}"),
        ("weights", ", ".join(f"{n} x {s}" for s, n in r["schemes"].items())),
        ("fingerprint", r["fingerprint"]),
    ]
    return table(rows)


def warnings(r: Report) -> list[str]:
    """For stderr: fallbacks, those of the same kind in one line, and notes."""
    told = set(r.get("fallbacks", ()))
    alike: dict[str, list[str]] = {}
    for x in r.get("fallbacks", ()):
        name, _, text = x.partition(": ")
        alike.setdefault(text, []).append(name)
    fallbacks = [f"note: {listing(n, 3)}: {printable(t, 1000)}" for t, n in alike.items()]
    notes = [f"note: {printable(x, 1000)}" for x in r.get("notes", ()) if x not in told]
    return [*fallbacks, *notes, *(f"warning: {printable(x, 1000)}" for x in r.get("warnings", ()))]


def _number(x: float | None) -> str:
    return "unknown" if x is None else f"{x:.4g}"


def _share(x: float | None) -> str:
    return "unknown" if x is None else f"{x:.2%}"


def _with_interval(x: float | None, ends: list[float] | None) -> str:
    return _number(x) + (f" ({_number(ends[0])} to {_number(ends[1])})" if ends else "")


def _worst(linears: dict[str, Any]) -> str | None:
    known = {n: x["error"] for n, x in linears.items() if x["error"] is not None}
    if not known:
        return None
    name = max(known, key=lambda n: float(known[n]))
    return f"{printable(name)}, {known[name] ** 0.5:.1%} of its output"


def gathered(r: Report) -> str:
    """``g2quant moments``."""
    rows = [
        ("written", printable(r["path"])),
        ("shard", f"{r['shard']} of {r['of']}"),
        ("tokens", f"{r['tokens']} from {printable(r['calibration']['source'])}"),
        ("of", r["source_fingerprint"]),
    ]
    return table(rows)
