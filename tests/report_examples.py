"""Documents as the verifier writes them, made up: every kind and verdict, with figures in the ranges that were measured."""

# ruff: noqa: E501  (rows of made-up figures read better whole)

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

Document = dict[str, Any]
WINDOW, CONTEXT, LAYERS = 64, 512, 4
CATEGORIES = ("chat", "code", "documentation", "maths", "non-Latin", "special")
MATRICES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
SHAPES = {
    "q_proj": [512, 256], "k_proj": [256, 256], "v_proj": [256, 256], "o_proj": [256, 512], "gate_proj": [512, 256], "up_proj": [512, 256],
    "down_proj": [256, 512],
}  # fmt: skip
FLOOR = 4.1e-12
K = 10.0
PIECES = ["▁the", "▁of", "▁module", "▁function", "▁return", "▁a", "s", "ing", "<0x0A>", "▁object", "▁is", ".", ",", "▁\u202eevil", "</script>", "▁日本", "é", "\u0301", "<b>", "▁file", "▁value", "``", "▁class"]  # fmt: skip


def digest(*what: object) -> str:
    return hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()


def spread(values: list[float]) -> Document:
    ordered = sorted(values)
    at = {
        p: ordered[min(int(float(p) / 100 * len(ordered)), len(ordered) - 1)]
        for p in ("50", "90", "95", "99", "99.9", "100")
    }
    return {"mean": math.fsum(values) / len(values), "percentiles": at}


def group(
    name: str,
    documents: int,
    values: list[float],
    *,
    agreement: float,
    ratio: float,
    rng: random.Random,
) -> Document:
    n = len(values)
    flips = round((1 - agreement) * n)
    ref = 9 + 12 * rng.random()
    real = 0 if agreement > 0.99 else flips // 5
    return {
        "name": name, "positions": n, "documents": documents, "non_finite": 0,
        "metrics": {
            "kl": spread(values), "reverse_kl": spread([v * 1.03 for v in values]),
            "tv": spread([min(1.0, math.sqrt(v / 2)) for v in values]),
            "max_diff": spread([3 * math.sqrt(v) for v in values]), "rms_diff": spread([math.sqrt(v) for v in values]),
        },
        "agreement": agreement, "expected_flips": flips - real, "real_flips": real, "overlap5": 0.5 + agreement / 2, "overlap10": 0.5 + agreement / 2,
        "scored": n - documents, "perplexity_ref": ref, "perplexity_cand": ref * ratio, "delta_logp": -math.log(ratio),
    }  # fmt: skip


def series(rng: random.Random, typical: float, far: float = 1.0) -> list[Document]:
    """KL by position: log-normal around ``typical``, ``far`` times that from the window on."""
    points = []
    for p in range(CONTEXT):
        centre = (
            typical
            * (0.6 + 0.4 * min(p, 40) / 40)
            * (far if p >= WINDOW else 1.0)
            * math.exp(rng.gauss(0, 0.12))
        )
        p99 = centre * math.exp(1.4 + rng.random() * 0.5)
        points.append(
            {
                "position": p,
                "median": centre,
                "p99": p99,
                "max": p99 * (1.1 + rng.random()),
                "count": 70 - p // 9,
            }
        )
    return points


def metrics(rng: random.Random, typical: float, agreement: float, ratio: float) -> Document:
    def draw(n: int, scale: float = 1.0) -> list[float]:
        return [typical * scale * math.exp(rng.gauss(0, 1.1)) for _ in range(n)]

    def some(name: str, documents: int, n: int, scale: float = 1.0) -> Document:
        return group(name, documents, draw(n, scale), agreement=agreement, ratio=ratio, rng=rng)

    categories = [some(c, 12, 900 + 100 * i, 1 + i / 4) for i, c in enumerate(CATEGORIES)]
    interval = {
        "estimate": typical * 1.8,
        "low": typical * 1.6,
        "high": typical * 2.1,
        "level": 0.95,
        "documents": 72,
        "reason": None,
    }
    return {
        "overall": some("all", 72, 7000), "documents": [some(f"P2/{i:02d}", 1, 100) for i in range(72)], "categories": categories,
        "ranges": [some("0-64", 72, 3000), some("64-512", 70, 4000, 1.3)],
        "intervals": {name: interval for name in ("kl", "tv", "agreement", "perplexity_ratio")}, "worst": [], "first_non_finite": None,
        "tolerance": 1e-5, "version": 1,
    }  # fmt: skip


def probes() -> list[Document]:
    lengths = {
        "P0": [4], "P1": [12, 18, 25, 31, 40, 44, 52, 60], "P2": [256] * 64, "P3": [63, 64, 65, 66, 80], "P4": [512], "P5": [96], "P6": [20, 48, 90],
        "P7": [40, 41], "P8": [96], "P9": [80], "P10": [512] * 6,
    }  # fmt: skip
    names = {"P0": "smoke", "P1": "snippet", "P2": "document", "P3": "boundary", "P4": "context", "P5": "soft-cap", "P6": "batch", "P7": "bos", "P8": "decode", "P9": "greedy", "P10": "vocabulary"}  # fmt: skip
    return [
        {"id": f"{g}/{i}", "group": g, "category": names[g], "tokens": n, "max_position": n - 1}
        for g, ns in lengths.items()
        for i, n in enumerate(ns)
    ]


def coverage(full: bool = True) -> Document:
    regimes = [
        ("positions before the window", True, 64, 1, None), ("positions beyond the window", full, 448 if full else 0, 1, "queries that lose a key, local blocks"),
        ("local attention", True, 2, 1, "blocks"), ("global attention", True, 2, 1, "blocks"), ("attention soft-cap", True, 1.06, 0.1, "largest score over the cap"),
        ("final soft-cap", True, 0.77, 0.1, "largest logit over the cap"), ("batch and padding", full, None, None, "alone, left, right, mixed lengths"),
        ("decoding with a cache", full, None, None, "step by step across the window"), ("every vocabulary row", full, 3072 if full else 411, 3072, "rows"),
    ]  # fmt: skip
    ran = probes() if full else [p for p in probes() if p["group"] in ("P0", "P1")]
    checks = [
        (
            "P6",
            "batch and padding change nothing",
            "PASS",
            2.2e-12,
            K * FLOOR,
            "largest KL of 12 arrangements",
        ),
        ("P7", "without BOS the model differs", "PASS", 1.4, 0.01, "negative control: KL"),
        (
            "P8",
            "decoding equals prefill",
            "PASS",
            3.0e-12,
            K * FLOOR,
            "across the window, 96 steps",
        ),
        ("P9", "greedy texts agree", "PASS", 64, 64, "tokens"),
    ]
    return {
        "probes": ran, "skipped": [] if full else [{"group": "P2", "why": "the candidate has no tokenizer, so texts cannot be encoded"}],
        "regimes": [dict(zip(("name", "exercised", "value", "needed", "detail"), r, strict=True)) for r in regimes],
        "softcap": [{"layer": i, "kind": kind(i), "utilisation": u} for i, u in enumerate((0.32, 0.97, 1.06, 0.08))], "final_softcap": 0.77,
        "checks": [dict(zip(("id", "title", "verdict", "value", "threshold", "detail"), c, strict=True)) for c in checks] if full else [],
    }  # fmt: skip


def kind(layer: int) -> str:
    return "global" if layer % 2 else "local"


def blocks(fault: int | None, size: float = 2.4e-1) -> Document:
    rng, layers = random.Random(5), []
    carried = 0.0
    for i in range(LAYERS):
        noise = 2e-7 * math.exp(rng.gauss(0, 0.15))
        far = size if i == fault else noise * 1.1
        carried = max(carried * 1.15, far, noise * (1 + i))
        near = noise * (1 + i)
        layers.append(
            {
                "layer": i,
                "kind": kind(i),
                "isolated": noise,
                "accumulated": near,
                "isolated_far": far,
                "accumulated_far": carried,
                "floor": 6e-7 * (1 + i / 2),
            }
        )
    if fault is None:
        return {"layers": layers, "first_divergent": None, "hypotheses": []}
    hypothesis = {
        "text": f"block {fault} attends beyond its sliding window",
        "because": "one local block, only from position 64 on, first at the attention scores",
    }
    return {
        "layers": layers,
        "first_divergent": {"layer": fault, "tap": "scores", "position": 64},
        "hypotheses": [hypothesis],
    }


def top(rng: random.Random, p: float) -> list[Document]:
    found = []
    for i in rng.sample(range(len(PIECES)), 5):
        found.append({"id": 473 + i, "piece": PIECES[i], "p": p})
        p *= 0.45
    return found


def worst(rng: random.Random, typical: float, n: int = 12) -> list[Document]:
    found = []
    for i in range(n):
        reference = top(rng, 0.55)
        same = typical < 1e-6
        found.append({
            "document": f"P2/{rng.randrange(64):02d}", "category": CATEGORIES[i % 6], "position": 64 + rng.randrange(400), "before": rng.choices(PIECES, k=12),
            "token": PIECES[(i * 7 + 13) % len(PIECES)], "after": rng.choices(PIECES, k=6), "kl": typical * (n - i) * 3, "tv": min(0.9, math.sqrt(typical * (n - i))),
            "max_diff": 4 * math.sqrt(typical * (n - i)), "margin": rng.random(), "reference_top": reference, "candidate_top": reference if same else top(rng, 0.4),
        })  # fmt: skip
    return found


def names() -> list[tuple[str, list[int]]]:
    found = [("model.embed_tokens.weight", [3072, 256])]
    for i in range(LAYERS):
        found += [(f"model.layers.{i}.{m}.weight", SHAPES[m.split(".")[1]]) for m in MATRICES]
        found += [(f"model.layers.{i}.{m}.weight", [256]) for m in NORMS]
    return [*found, ("model.norm.weight", [256])]


def ledger(changed: dict[str, int] | None = None, bits: int | None = None) -> list[Document]:
    rng, rows = random.Random(3), []
    for name, shape in names():
        size = math.prod(shape)
        different = (changed or {}).get(name, 0)
        row: Document = {
            "name": name, "shape": shape, "reference_dtype": "bfloat16", "candidate_dtype": "bfloat16", "verdict": "FAIL" if different else "PASS",
            "equal": size - different, "different": different, "hash": f"sha256:{digest(name)}", "sqnr_db": None, "relative_error": None, "max_steps": None,
            "bound": None, "note": None,
        }  # fmt: skip
        if bits and "proj" in name:
            sqnr = 6.02 * bits - 4.5 + rng.gauss(0, 0.7) - (1.5 if "down" in name else 0)
            row |= {
                "candidate_dtype": f"int{bits} group 32", "sqnr_db": sqnr, "relative_error": 10 ** (-sqnr / 20), "max_steps": 0.5, "bound": 0.502,
                "equal": size // 40, "different": size - size // 40,
            }  # fmt: skip
        elif different:
            row["note"] = "one value doubled"
        rows.append(row)
    return rows


def side(path: str, **more: Any) -> Document:
    base = {
        "path": path, "kind": "checkpoint", "format": "safetensors", "layout": "huggingface", "dtypes": {"bfloat16": 46}, "quantized": 0,
        "fingerprint": f"g2:sha256:{digest('sample')}", "parameters": 3936512, "bytes": 7877560, "config": {"sliding_window": 64}, "config_from": "config.json",
        "tokenizer": {"sha256": digest("tokenizer"), "pieces": 3072}, "runner": {"name": "torch", "dtype": "float32", "device": "cpu", "version": "2.13.0"},
    }  # fmt: skip
    return base | more


def claim(
    id: str,
    title: str,
    verdict: str,
    sentence: str,
    evidence: list[Document] | None = None,
    missing: list[str] | None = None,
) -> Document:
    return {
        "id": id,
        "title": title,
        "verdict": verdict,
        "sentence": sentence,
        "evidence": evidence or [],
        "missing": missing or [],
    }


def evidence(
    metric: str,
    value: float,
    threshold: float | None,
    interval: list[float] | None = None,
    unit: str | None = "nats",
    source: str | None = None,
) -> Document:
    return {
        "metric": metric,
        "value": value,
        "interval": interval,
        "threshold": threshold,
        "unit": unit,
        "source": source,
    }


def document(kind: str, verdict: str, summary: str, **parts: Any) -> Document:
    base: Document = {
        "schema": "g2kit.report/1", "kind": kind, "verdict": verdict, "exit_code": {"PASS": 0, "FAIL": 1, "ERROR": 3, "INCONCLUSIVE": 6}[verdict], "summary": summary,
        "claims": [], "not_verified": [], "identity": {"reference": None, "candidate": None}, "differences": [],
        "settings": {"profile": "ci", "seed": 0, "k": K, "budget": None, "documents": 72, "tokens": 19840, "probes_sha256": digest("probes"), "shard": None},
        "coverage": None, "metrics": None, "series": None, "blocks": None, "agreement": None, "worst": None, "ledger": None, "floor": None, "self_test": None,
        "environment": {"g2kit": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "numpy": "2.3.4", "cpu": "x86_64, 2 cores", "platform": "Linux", "threads": 2, "tf32": False},
        "run": {"command": "g2verify compare gemma2-2b-flax gemma2-2b --html report.html", "started": "2026-11-22T10:00:00Z", "seconds": 184.2, "cpu_seconds": 350.0, "peak_rss_mib": 912.0},
    }  # fmt: skip
    base |= parts
    base["content_id"] = f"sha256:{digest({k: v for k, v in base.items() if k != 'run'})}"
    return base


def floor() -> Document:
    rows = [
        ("float64 run", "float32", FLOOR, 3.9e-13, 1.1e-6, 2048),
        ("permuted weights", "float32", 3.4e-12, 3.6e-13, 1.0e-6, 2048),
        ("jax runner", "float32", 3.9e-12, 3.7e-13, 1.1e-6, 1024),
    ]
    fields = ("name", "dtype", "kl_max", "kl_mean", "rms_logit", "tokens")
    return {
        "estimators": [dict(zip(fields, r, strict=True)) for r in rows],
        "kl_max": FLOOR,
        "kl_mean": 3.9e-13,
        "rms_logit": 1.1e-6,
        "k": K,
    }


def measured(
    seed: int, typical: float, agreement: float, ratio: float, far: float = 1.0
) -> Document:
    """The parts every comparison of two running models has."""
    rng = random.Random(seed)
    points = series(rng, typical, far)
    values = sorted(p["median"] * math.exp(rng.gauss(0, 1)) for p in points)
    pct = (0.1, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9)
    skew = 1.0 if agreement > 0.999 else 1.6
    dp = [
        [
            p,
            (1 if p > 50 else -skew)
            * math.sqrt(typical * far)
            * abs(math.log(min(p, 100 - p) / 50))
            / 8,
        ]
        for p in pct
    ]
    edges = [0.0, 0.01, 0.05, 0.2, 0.5, 1.0, 2.0, None]
    bins = []
    for i, (low, high) in enumerate(pairwise(edges)):
        n = 600 + 350 * i
        bins.append(
            {
                "from": low,
                "to": high,
                "positions": n,
                "same": n - round(n * (1 - agreement) * 9 / (1 + 6 * i)),
            }
        )
    return {
        "metrics": metrics(rng, typical * far, agreement, ratio), "agreement": bins, "worst": worst(rng, typical * far), "floor": floor(),
        "series": {"kl_by_position": points, "window": WINDOW, "floor_kl": FLOOR, "kl_ecdf": [[v, (i + 1) / 64] for i, v in enumerate(values[::8])], "dp_percentiles": dp},
    }  # fmt: skip


def compare_pass() -> Document:
    l1 = [
        evidence("KL, maximum", 3.1e-12, K * FLOOR, source="10 × floor (float64 run)"),
        evidence(
            "KL, mean", 3.4e-13, 3.9e-12, [3.1e-13, 3.8e-13], source="10 × floor (float64 run)"
        ),
        evidence(
            "hidden states, relative RMS",
            8.1e-7,
            3.0e-6,
            unit=None,
            source="√10 × floor, worst block",
        ),
    ]
    claims = [
        claim(
            "W1",
            "Weights are the same bits",
            "PASS",
            "All 46 tensors are equal bit for bit in canonical form.",
            [evidence("tensors that differ", 0, 0, unit=None)],
        ),
        claim(
            "C0",
            "Configuration and tokenizer are the same",
            "PASS",
            "Every field and all 3,072 pieces are equal.",
        ),
        claim(
            "L1",
            "Same function in float32",
            "PASS",
            "The logits differ by no more than float32 rounding does, at 19,840 positions up to 511.",
            l1,
        ),
    ]
    return document(
        "compare", "PASS", "The candidate is the reference: the same weights, and the same function within float32 rounding.",
        claims=claims, not_verified=["The candidate in its own number format and on its own device (L2): not asked for.", "Positions beyond 511."],
        identity={"reference": side("checkpoints/gemma2-2b-flax", format="orbax", layout="flax"), "candidate": side("checkpoints/gemma2-2b")},
        coverage=coverage(), blocks=blocks(None), ledger=ledger(), **measured(1, 9e-13, 0.99995, 1.0),
    )  # fmt: skip


def compare_fail() -> Document:
    l1 = [
        evidence("KL, maximum", 2.04, K * FLOOR, source="10 × floor (float64 run)"),
        evidence("KL, mean", 0.14, 3.9e-12, [0.12, 0.17], source="10 × floor (float64 run)"),
        evidence(
            "hidden states, relative RMS", 0.24, 3.0e-6, unit=None, source="√10 × floor, block 2"
        ),
    ]
    claims = [
        claim(
            "W1",
            "Weights are the same bits",
            "FAIL",
            "1 of 46 tensors differs: model.layers.2.self_attn.q_proj.weight, 1 of 131,072 values.",
            [evidence("tensors that differ", 1, 0, unit=None)],
        ),
        claim(
            "C0",
            "Configuration and tokenizer are the same",
            "FAIL",
            "1 field differs: layer_types of block 2.",
        ),
        claim(
            "L1",
            "Same function in float32",
            "FAIL",
            "The models part in block 2 at position 64: at worst the KL is 2.04 nats, 5 × 10¹⁰ times the limit.",
            l1,
        ),
        claim(
            "L2",
            "Same as deployed",
            "INCONCLUSIVE",
            "Not judged, as the function differs already in float32.",
            missing=["A candidate that passes L1."],
        ),
    ]
    return document(
        "compare", "FAIL", "The models part in block 2, from position 64 on: its sliding window is not applied.",
        claims=claims, not_verified=["Positions beyond 511."],
        identity={"reference": side("checkpoints/gemma2-2b-flax", format="orbax", layout="flax"), "candidate": side("checkpoints/gemma2-2b-broken", fingerprint=f"g2:sha256:{digest('broken')}")},
        differences=[{"field": "layer_types", "reference": ["local", "global", "local", "global"], "candidate": ["local", "global", "global", "global"]}],
        coverage=coverage(), blocks=blocks(2), ledger=ledger({"model.layers.2.self_attn.q_proj.weight": 1}), **measured(2, 2e-12, 0.93, 1.14, far=3e10),
    )  # fmt: skip


def quantized() -> Document:
    q1 = [
        evidence("KL, mean", 0.031, 0.05, [0.028, 0.035], source="budget “4-bit”"),
        evidence("KL, 99th percentile", 0.29, 0.6, [0.25, 0.34], source="budget “4-bit”"),
        evidence(
            "perplexity, candidate over reference",
            1.021,
            1.05,
            [1.014, 1.029],
            unit=None,
            source="budget “4-bit”",
        ),
        evidence("top-1 agreement", 0.93, 0.9, [0.92, 0.94], unit=None, source="budget “4-bit”")
        | {"better": "higher"},
    ]
    claims = [
        claim(
            "W2",
            "Rounding is within its bounds",
            "PASS",
            "28 quantized tensors are within half a step; the worst has 16.7 dB.",
            [evidence("largest error in steps", 0.5, 0.502, unit=None)],
        ),
        claim(
            "C0",
            "Configuration and tokenizer are the same",
            "PASS",
            "Every field and all 3,072 pieces are equal.",
        ),
        claim(
            "Q1",
            "Quantization costs no more than its budget",
            "PASS",
            "int4 changes 9.8 % [9.1, 10.6] of sampled tokens and costs 2.1 % of perplexity.",
            q1,
        ),
    ]
    return document(
        "compare", "PASS", "Quantization to 4 bits costs 0.031 nats per token, within its budget of 0.05.",
        claims=claims, not_verified=["The kernel that will serve these weights (Q2)."],
        identity={"reference": side("checkpoints/gemma2-2b"), "candidate": side("checkpoints/gemma2-2b-w4", quantized=28, layout="compressed-tensors", dtypes={"bfloat16": 18, "int4 group 32": 28}, bytes=2911000, fingerprint=f"g2:sha256:{digest('w4')}")},
        coverage=coverage(), blocks=blocks(None) | {"layers": [b | {k: b[k] and b[k] * 2e5 for k in ("isolated", "accumulated", "isolated_far", "accumulated_far")} for b in blocks(None)["layers"]]},
        ledger=ledger(bits=4), **measured(3, 0.02, 0.93, 1.021),
    )  # fmt: skip


FAULTS = (
    ("window-off", "Sliding window off", 2.0, 0.14, None, 0), ("window-plus-one", "Window off by one", 0.35, 5.4e-3, None, 0), ("parity", "Local and global swapped", 2.9, 0.18, [0], 0),
    ("no-attn-cap", "Attention soft-cap missing", 1.4e-3, 9e-5, None, 0), ("no-final-cap", "Final soft-cap missing", 1.8e-2, 7e-3, [], None), ("qpas", "query_pre_attn_scalar is head_dim", 7e-2, 4e-3, None, 0),
    ("rope-theta", "RoPE base 500,000", 3.0, 0.23, None, 0), ("norm-twice", "Norm + 1 twice", 8.4, 1.4, None, 0), ("norms-swapped", "Post-attention and pre-feedforward norms swapped", 2.9, 0.19, [2], 2),
    ("gate-up", "Gate and up swapped", 3.4, 0.28, [2], 2), ("gelu", "GELU by erf", 4e-7, 2e-8, None, 0), ("eps", "RMS epsilon 1e-5", 5e-9, 3e-10, None, 0), ("one-weight", "One weight doubled", 4e-5, 1e-6, [2], 2),
    ("exponent", "One exponent bit", 0.6, 7e-2, [2], 2), ("v-row", "One value row zeroed", 0.1, 7e-3, [1], 1), ("q-k", "Query and key swapped", 1.1, 9e-2, [3], 3), ("layers", "Two layers swapped", 2.2, 0.3, [1, 3], 1),
)  # fmt: skip


def self_test() -> Document:
    mutants = []
    for id, title, top_kl, mean, expected, found in FAULTS:
        in_config = expected is None or expected == []
        by = ["C0", "L1"] if in_config else ["W1", "L1"]
        claims = {
            "W1": "PASS" if in_config else "FAIL",
            "C0": "FAIL" if in_config else "PASS",
            "L1": "FAIL",
            "L2": "FAIL" if mean > 1e-2 else "PASS",
        }
        if id == "eps":
            claims["L1"], by = "INCONCLUSIVE", ["C0"]
        mutants.append({
            "id": id, "title": title, "caught_by": by, "claims": claims, "kl_max": top_kl, "kl_mean": mean, "expected_layers": expected, "found_layer": found,
            "right_place": None if expected is None else (found in expected if expected else found is None), "hypothesis": "a global hyper-parameter: every block differs" if expected is None else None,
        })  # fmt: skip
    return document(
        "self-test", "PASS", "All 17 injected faults were caught.",
        claims=[claim("S1", "Known faults are caught", "PASS", "17 of 17 faults were caught by at least one claim.", [evidence("faults caught", 17, 17, unit=None) | {"better": "higher"}])],
        identity={"reference": side("checkpoints/gemma2-2b"), "candidate": None}, coverage=coverage(), floor=floor(), self_test={"mutants": mutants, "caught": 17, "of": 17},
    )  # fmt: skip


def weights() -> Document:
    return document(
        "weights", "PASS", "All 46 tensors are equal bit for bit; the models were not run.",
        claims=[claim("W1", "Weights are the same bits", "PASS", "All 46 tensors are equal bit for bit in canonical form.", [evidence("tensors that differ", 0, 0, unit=None)])],
        not_verified=["That either side computes the right function: no model was run."],
        identity={"reference": side("a.gguf", format="gguf", layout="gguf"), "candidate": side("b")}, ledger=ledger(), run=None,
    )  # fmt: skip


def inconclusive() -> Document:
    claims = [
        claim(
            "L1",
            "Same function in float32",
            "INCONCLUSIVE",
            "The logits agree, but no position beyond the window was compared.",
            [evidence("KL, maximum", 0.0, K * FLOOR)],
            ["A probe of more than 64 tokens: --profile ci."],
        )
    ]
    zero = [{"position": p, "median": 0.0, "p99": 0.0, "max": 0.0, "count": 9} for p in range(60)]
    return document(
        "compare", "INCONCLUSIVE", "Nothing differs, but too little was exercised to say that nothing can.", claims=claims,
        identity={"reference": side("a"), "candidate": side("b", tokenizer=None, runner=None)}, coverage=coverage(full=False),
        series={"kl_by_position": zero, "window": WINDOW, "floor_kl": FLOOR, "kl_ecdf": [[0.0, 1.0]], "dp_percentiles": [[1, 0.0], [99, 0.0]]},
    )  # fmt: skip


def error() -> Document:
    return document(
        "compare", "ERROR", "The vocabularies differ: 256,000 rows against 3,072. Compare checkpoints of one model.",
        identity={"reference": side("a"), "candidate": side("b", fingerprint=f"g2:sha256:{digest(1)}")}, error={"code": "E_CONFIG", "message": "The vocabularies differ."}, differences=[{"field": "vocab_size", "reference": 256000, "candidate": 3072}],
    )  # fmt: skip


EXAMPLES: dict[str, Callable[[], Document]] = {
    "compare-pass": compare_pass, "compare-fail": compare_fail, "quantized": quantized, "self-test": self_test, "weights": weights,
    "inconclusive": inconclusive, "error": error,
}  # fmt: skip
