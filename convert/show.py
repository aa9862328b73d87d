"""Reports as text for people. Plain data in, strings out; ``--json`` prints the data itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..formats.errors import printable
from ..terminal import seconds, size

Report = dict[str, Any]


def table(rows: Iterable[Sequence[str]], indent: str = "  ") -> str:
    """Columns aligned left, separated by two spaces."""
    listed = [tuple(r) for r in rows]
    if not listed:
        return ""
    widths = [max(len(r[k]) for r in listed) for k in range(len(listed[0]))]
    lines = ("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in listed)
    return "\n".join(f"{indent}{line}" for line in lines)


def _number(n: int) -> str:
    return f"{n:,}".replace(",", " ")


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def inspection(r: Report, *, tensors: bool = False) -> str:
    """``g2conv inspect``."""
    if r["config"] is None:
        return _without_config(r, tensors=tensors)
    c, origin = r["config"], r["origin"]
    out = [
        printable(r["path"]),
        table(
            [
                ("format", f"{r['format']}, {r['describe']} (--layout {r['layout']})"),
                ("model", f"{r['family']}, {_number(r['parameters'])} parameters{_like(r)}"),
                (
                    "stored",
                    f"{len(r['tensors'])} tensors, {size(r['bytes'])}, {_dtypes(r['dtypes'])}",
                ),
                ("embedding", _embedding(r["embedding"])),
                *_gating(r),
                ("beside it", ", ".join(r["sidecars"]) or "no tokenizer or configuration"),
            ]
        ),
        "configuration",
        table((k, _value(v), f"from {printable(origin.get(k, '?'))}") for k, v in c.items()),
    ]
    for title, lines in (("warnings", r["warnings"]), ("notes", r["notes"])):
        if lines:
            out += [title, *(f"  - {printable(line, 2000)}" for line in lines)]
    if tensors:
        out += ["tensors", table(_tensor_rows(r["tensors"]))]
    return "\n".join(out)


def _gating(r: Report) -> list[tuple[str, str]]:
    """How Flax stores gate and up, and what says so; no line for other formats."""
    if not r["gating"]:
        return []
    axes = {"df": "[2, d, f]", "fd": "[2, f, d]"}[r["gating"]]
    return [("gating", f"{axes} ({r['gating']}), from {r['gating_origin']}")]


def _without_config(r: Report, *, tensors: bool) -> str:
    names = " or ".join(f"{c['describe']} (--layout {c['layout']})" for c in r["candidates"])
    rows = [
        ("format", f"{r['format']}, {names}"),
        ("model", f"{r['family']}, {_number(r['elements'])} numbers stored"),
        ("stored", f"{len(r['tensors'])} tensors, {size(r['bytes'])}, {_dtypes(r['dtypes'])}"),
        ("embedding", f"{_number(r['embedding']['source_rows'] or 0)} rows"),
        ("beside it", ", ".join(r["sidecars"]) or "no tokenizer or configuration"),
    ]
    out = [
        printable(r["path"]),
        table(rows),
        "sizes, from the shapes",
        table((k, str(v)) for k, v in r["sizes"].items()),
        f"configuration: unknown, needs --config, because no released {r['family']} model has these sizes, and "
        f"{', '.join(r['unstored'])} are not stored",
        f"  Fix: {r['config_unknown']['fix']}",
    ]
    if r["notes"]:
        out += ["notes", *(f"  - {printable(n, 2000)}" for n in r["notes"])]
    if tensors:
        out += ["tensors", table(_tensor_rows(r["tensors"]))]
    return "\n".join(out)


def _like(r: Report) -> str:
    return f", the size of {r['size']}" if r["size"] else ""


def _value(v: Any) -> str:
    if isinstance(v, float):
        return f"{v:g}"
    if isinstance(v, list):
        return ", ".join(map(str, v))
    return "none" if v is None else str(v)


def _dtypes(d: dict[str, int]) -> str:
    return ", ".join(f"{n} {k}" for k, n in sorted(d.items()))


def _embedding(e: Report) -> str:
    rows, vocab = e["source_rows"], e["vocab_size"]
    extra = f", {rows - vocab} of them padding past the vocabulary" if rows > vocab else ""
    return f"{_number(rows)} rows{extra}"


def _tensor_rows(tensors: list[Report]) -> Iterable[Sequence[str]]:
    yield ("NAME", "DTYPE", "SHAPE", "CANONICAL")
    for t in tensors:
        yield (
            printable(t["name"]),
            t["dtype"],
            _shape(t["shape"]),
            ", ".join(t["canonical"]) or "-",
        )


def plan(r: Report) -> str:
    """``--dry-run``."""
    rows = [
        ("from", f"{printable(r['source']['path'])} ({r['source']['describe']})"),
        (
            "to",
            f"{printable(r['output']['path'])} ({r['output']['describe']}, {_written(r['output'])})",
        ),
        ("write", f"{size(r['output']['bytes'])} in {len(r['output']['files'])} files"),
        ("free", f"{size(r['resources']['free_bytes'])} on that file system"),
        ("memory", f"about {size(r['resources']['peak_bytes'])} above the interpreter's own"),
        ("time", _estimate(r["resources"])),
        ("steps", _steps(r["lossy_steps"])),
    ]
    out = ["plan (nothing was written)", table(rows)]
    files = [(f"{printable(f['name'])}", size(f["bytes"])) for f in r["output"]["files"][:40]]
    if len(r["output"]["files"]) > 40:
        files.append((f"and {len(r['output']['files']) - 40} more", ""))
    out += ["files", table(files)]
    if r["notes"]:
        out += ["notes", *(f"  - {printable(n, 2000)}" for n in r["notes"])]
    return "\n".join(out)


def _written(output: Report) -> str:
    """The element type, or how many tensors have which."""
    mixed = output["dtype"] == "mixed"
    return f"mixed: {_dtypes(output['dtypes'])}" if mixed else str(output["dtype"])


def _steps(steps: list[str]) -> str:
    if not steps:
        return "none: bit for bit"
    return f"{', '.join(steps)}; elements that do not come back exactly are counted when it runs"


def _estimate(resources: Report) -> str:
    low, high = resources["seconds"]
    return f"{seconds(low)} to {seconds(high)}, with the check, on a disk of 0.3 to 1.5 GB/s"


def result(r: Report) -> str:
    """A finished conversion."""
    rows = [
        ("from", f"{printable(r['source']['path'])} ({r['source']['describe']})"),
        (
            "to",
            f"{printable(r['output']['path'])} ({r['output']['describe']}, {_written(r['output'])})",
        ),
        ("wrote", _wrote(r)),
        ("source", r["source"]["fingerprint"]),
        ("output", f"{r['output']['fingerprint']}  {_verdict(r)}"),
        ("checked", _checked(r)),
    ]
    out = [table(rows, indent="")]
    out += [f"step     {_step(step)}" for step in r["lossy"]]
    out += [f"note     {printable(n, 2000)}" for n in r["notes"]]
    return "\n".join(out)


def _step(s: Report) -> str:
    """One step that does arithmetic, and what it changed."""
    tensors = f"{s['tensors']} tensor{'' if s['tensors'] == 1 else 's'}"
    if s["step"].startswith("reading "):
        return f"{s['step']}: {_number(s['changed'])} stored elements were rounded when read, in {tensors}"
    if not s["changed"]:
        return f"{s['step']}: {tensors}, every element comes back exactly"
    return (
        f"{s['step']}: {_number(s['changed'])} of {_number(s['elements'])} elements do not come "
        f"back exactly, in {tensors}"
    )


def _wrote(r: Report) -> str:
    t = r["timing"]
    rate = r["output"]["bytes"] / max(t["total"], 1e-9)
    resumed = (
        f", {r['resumed_tensors']} tensors of an interrupted run kept"
        if r["resumed_tensors"]
        else ""
    )
    return f"{size(r['output']['bytes'])} in {seconds(t['total'])} ({size(rate)}/s){resumed}"


def _verdict(r: Report) -> str:
    same = r["source"]["fingerprint"] == r["output"]["fingerprint"]
    changed = sum(s["changed"] for s in r["lossy"])
    if same:
        return (
            "equal to what was read: see the steps"
            if changed
            else "equal: the same weights, bit for bit"
        )
    return "differs: see the steps" if changed else "same values in another dtype"


def _checked(r: Report) -> str:
    n = r["checked_tensors"]
    return f"{n} tensors re-read from the output, all as written" if n else "no (--check none)"


def warnings(r: Report) -> list[str]:
    """Warnings for stderr."""
    return [f"warning: {printable(w, 2000)}" for w in r.get("warnings", [])]


def _files(n: int) -> str:
    return "1 file" if n == 1 else f"{n} files"


def checked(r: Report) -> str:
    """``g2conv check``."""
    ok = f"ok  {printable(r['path'])}: {_files(r['files'])} and {r['tensors']} tensors match the manifest"
    notes = [f"note     {printable(n, 2000)}" for n in r["notes"]]
    return "\n".join([ok, f"    {r['fingerprint']}", *notes])
