"""A fragment for a model card: the section to paste, and the figures in the model-index form of its front matter."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from .markdown import code, plain
from .numerals import count
from .parts import Document

# name in the model index, type, where it is in the summary
_METRICS = (
    ("KL divergence, mean (nats)", "kl_mean", ("metrics", "kl", "mean")),
    ("KL divergence, max (nats)", "kl_max", ("metrics", "kl", "percentiles", "100")),
    ("Total variation, mean", "total_variation", ("metrics", "tv", "mean")),
    ("Same most likely token", "top1_agreement", ("agreement",)),
    ("Perplexity", "perplexity", ("perplexity_cand",)),
)


def model_card(document: Document) -> str:
    """Markdown: ``## Conversion & verification`` with its figures, ended by the front matter to merge.

    Figures that do not exist are left out.
    """
    claims = [
        f"- **{plain(c['id'])}** {plain(c['title'])}: {c['verdict']}. {plain(c['sentence'])}"
        for c in document["claims"]
    ]
    unverified = [f"- {plain(t)}" for t in document["not_verified"]]
    reference = document["identity"].get("reference") or {}
    lines = [
        "## Conversion & verification",
        "",
        f"Verdict of `g2verify`: **{document['verdict']}**. {plain(document['summary'])}",
        "",
        *claims,
        "",
        *(["Not verified:", "", *unverified, ""] if unverified else []),
        *_reference(reference),
        f"Report: {code(document['content_id'])}",
        "",
        *_front_matter(document),
    ]
    return "\n".join(lines) + "\n"


def _reference(side: Document) -> list[str]:
    if not side.get("fingerprint"):
        return []
    parameters = (
        f", {count(side['parameters'], 'parameter')}" if side.get("parameters") is not None else ""
    )
    return [f"Reference: {code(side['fingerprint'])}{parameters}", ""]


def _front_matter(document: Document) -> list[str]:
    """YAML; its strings are written as JSON, which YAML reads."""
    overall = (document.get("metrics") or {}).get("overall")
    if not overall:
        return []
    found = [(name, kind, _at(overall, path)) for name, kind, path in _METRICS]
    metrics = [(name, kind, v) for name, kind, v in found if v is not None]
    name = base_name((document["identity"].get("candidate") or {}).get("path") or "")
    return ["```yaml", *model_index(name, _probes(document), metrics), "```"] if metrics else []


def base_name(path: str) -> str:
    """The last part of a path."""
    return path.rstrip("/").rpartition("/")[2] or path


def model_index(
    name: str, dataset: str, metrics: Sequence[tuple[str, str, float]], *, kind: str = "probes"
) -> list[str]:
    """Lines of the ``model-index`` of a front matter; none without metrics.

    Args:
        name: the model's.
        dataset: what they were measured on.
        metrics: name, type and value of each.
        kind: of the data set.
    """
    if not metrics:
        return []
    return [
        "model-index:",
        f"  - name: {quoted(name)}",
        "    results:",
        "    - task: {type: text-generation}",
        f"      dataset: {{name: {quoted(dataset)}, type: {kind}}}",
        "      metrics:",
        *(
            f"        - name: {json.dumps(metric)}\n          type: {figure}\n          value: {value!r}"
            for metric, figure, value in metrics
        ),
    ]


def quoted(text: str) -> str:
    """A YAML string without anything that is markup where the fragment is shown as it is."""
    return re.sub(r"[<>&`]", lambda m: f"\\u{ord(m[0]):04x}", json.dumps(text))


def _probes(document: Document) -> str:
    settings = document["settings"]
    return f"g2verify probes, profile {settings.get('profile') or 'unknown'}"


def _at(data: Document, path: tuple[str, ...]) -> float | None:
    value: object = data
    for step in path:
        value = value.get(step) if isinstance(value, dict) else None
    return value if isinstance(value, int | float) else None
