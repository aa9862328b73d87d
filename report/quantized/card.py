"""A fragment for a model card: what was done, what it costs, how to load it, and the values for its front matter."""

from __future__ import annotations

import json

from ..markdown import code, plain
from ..model_card import base_name, model_index, quoted
from ..numerals import count, interval, nbytes, number, percent
from ..parts import Document
from . import consumers
from .words import METHODS, SELF, calibrated_on, methods, schemes

_LIBRARY = {
    "compressed-tensors": "transformers", "int-quantized": "transformers", "gptq": "transformers",
    "awq": "transformers", "mlx": "mlx", "torch-int8": "gemma_torch",
}  # fmt: skip
_METRICS = (
    ("KL divergence from the original, mean (nats)", "kl_mean", "kl"),
    ("Same most likely token as the original", "top1_agreement", "top1_agreement"),
    ("Perplexity", "perplexity", "perplexity"),
    ("Perplexity of the original", "perplexity_original", "perplexity_original"),
)


def card(document: Document) -> str:
    """Markdown: ``## Quantization``, ``## Quality``, ``## How to load it``, and front matter to merge.

    Figures that do not exist are left out.
    """
    lines = [
        "## Quantization",
        "",
        *_what(document),
        "",
        "## Quality",
        "",
        *_quality(document),
        "",
        "## How to load it",
        "",
        *_loading(document),
        *_front_matter(document),
    ]
    return "\n".join(lines) + "\n"


def _what(document: Document) -> list[str]:
    source, output, size = document["source"], document["output"], document["size"]
    version = document["environment"].get("g2kit")
    method = METHODS.get(document["method"], document["method"])
    pairs = [
        ("Made from", f"{code(base_name(source['path']))} ({code(source['fingerprint'] or 'no fingerprint')})"),
        ("With", plain(f"g2quant{f' {version}' if version else ''}, {method}; taken: {methods(document)}")),
        ("Scheme", plain(f"{schemes(document)}, {number(document['bits_per_weight'], 4)} bits per linear weight")),
        ("Format", plain(f"{document['format']}, {nbytes(output['bytes'])}; the weights were {nbytes(size['weights_before'])}")),
        ("Calibrated on", plain(calibrated_on(document) or "nothing")),
        ("Fingerprint", code(output["fingerprint"]) if output.get("fingerprint") else None),
        ("Report", code(document["content_id"])),
    ]  # fmt: skip
    tuned = document.get("recover")
    if tuned not in (None, "none"):
        pairs.insert(3, ("Tuned afterwards", plain(str(tuned))))
    return [f"- **{name}**: {value}" for name, value in pairs if value is not None]


def _quality(document: Document) -> list[str]:
    q = document["quality"]
    if q is None or q["kl"] is None:
        return ["Not measured: no text was held out."]
    bounds = interval(q.get("kl_interval"))
    over = "" if q.get("sequences") is None else f" in {count(q['sequences'], 'sequence')}"
    rows = [
        f"Against the original on {count(q['positions'], 'position')}{over} of held-out text, both in float32:",
        "",
        f"- mean KL {number(q['kl'])} nats{f', 95 % interval {bounds}' if bounds else ''}",
    ]
    if q["top1_agreement"] is not None:
        rows.append(f"- the same most likely token at {percent(q['top1_agreement'])} of positions")
    if q["perplexity"] is not None:
        rows.append(
            f"- perplexity {number(q['perplexity'], 4)}, the original's {number(q['perplexity_original'], 4)}"
        )
    return [line if line == "" else line.replace("[", "\\[").replace("]", "\\]") for line in rows]


def _loading(document: Document) -> list[str]:
    output = document["output"]
    found = consumers.of(document["format"])
    path = consumers.place(output["path"], output.get("files"), document["format"])
    out: list[str] = []
    for c in found:
        tested = "" if c.tested else " (not tested by g2kit)"
        text = c.lines.replace("{path}", path)
        out += [f"{plain(c.name)}{tested}:", "", f"```{c.language}", *text.split("\n"), "```", ""]
    if not found:
        out += [plain(output.get("readers") or "See the format's documentation."), ""]
    notes = [n for n in document["notes"] if n not in document["fallbacks"]]
    caveats = [f"- {plain(n)}" for n in dict.fromkeys([*document["warnings"], *notes])]
    return [*out, *(["To know:", "", *caveats, ""] if caveats else [])]


def _front_matter(document: Document) -> list[str]:
    """YAML; its strings are written as JSON, which YAML reads."""
    library = _LIBRARY.get(
        document["format"], "gguf" if document["format"].startswith("gguf") else None
    )
    q = document["quality"] or {}
    figures = [(name, kind, q.get(key)) for name, kind, key in _METRICS]
    known = [(name, kind, v) for name, kind, v in figures if v is not None]
    dataset = _dataset(document)
    return [
        "```yaml",
        f"base_model: {quoted(base_name(document['source']['path']))}",
        "base_model_relation: quantized",
        *([f"library_name: {library}"] if library else []),
        "tags:",
        *(f"- {json.dumps(t)}" for t in ("g2quant", document["format"].partition("-q")[0])),
        *model_index(base_name(document["output"]["path"]), dataset, known, kind="held-out"),
        "```",
    ]


def _dataset(document: Document) -> str:
    c = document["calibration"] or {}
    source = "self" if c.get("source", SELF) == SELF else base_name(c["source"])
    return (
        "held-out text, written by the original model"
        if source == SELF
        else f"held-out part of {source}"
    )
