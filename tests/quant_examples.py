"""Quantization reports as g2quant writes them, made up: schemes, formats, and what may be missing."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from g2kit.quant.document import exclude, seal

Document = dict[str, Any]
SHAPES = {
    "self_attn.q_proj": (256, 256), "self_attn.k_proj": (128, 256), "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256), "mlp.gate_proj": (768, 256), "mlp.up_proj": (768, 256),
    "mlp.down_proj": (256, 768),
}  # fmt: skip
LAYERS = 4


def linear(rng: random.Random, shape: tuple[int, int], scheme: str, bits: float) -> Document:
    rtn = 10 ** rng.uniform(-2.4, -1.6)
    gptq = rtn * rng.uniform(0.3, 1.1)
    method = "gptq" if gptq < rtn else "rtn"
    lost = "rounding to nearest loses less on held-out inputs than GPTQ"
    return {
        "method": method, "scheme": scheme, "held_error": {"rtn": rtn, "gptq": gptq},
        "error": min(rtn, gptq), "weight_error": rng.uniform(0.08, 0.12),
        "clipped": rng.uniform(0, 0.004), "damp": 0.01, "factored_in": "float32", "dead_columns": 0,
        "fallbacks": [] if method == "gptq" else [lost], "seconds": rng.uniform(0.05, 0.4),
        "shape": list(shape), "bytes": round(shape[0] * shape[1] * bits / 8),
        "source_bytes": shape[0] * shape[1] * 2,
    }  # fmt: skip


def run(
    scheme: str = "int4 g128 sym", format: str = "compressed-tensors", bits: float = 4.125,
    kl: float = 0.0096, seed: int = 0,
) -> Document:  # fmt: skip
    """A run of the bundled sample's shape."""
    rng = random.Random(seed)
    linears = {
        f"model.layers.{i}.{n}.weight": linear(rng, s, scheme, bits)
        for i in range(LAYERS)
        for n, s in SHAPES.items()
    }
    before = sum(x["source_bytes"] for x in linears.values())
    after = sum(x["bytes"] for x in linears.values())
    rest = 1_600_000
    errors = [0.031, 0.048, 0.061, 0.059]
    document: Document = {
        "schema": "g2kit.quant-report/1", "kind": "quantize",
        "source": {"path": "models/sample", "fingerprint": f"g2:sha256:{'2d' * 32}", "layout": "huggingface",
                   "parameters": 3_936_512, "config": {"family": "gemma2"}},
        "output": {"path": "models/sample-w4", "format": format, "container": "safetensors", "readers": "vLLM",
                   "bytes": after + rest + 400_000, "packed_bytes": after, "bits_per_weight": bits, "quantized": 28,
                   "fingerprint": f"g2:sha256:{'ab' * 32}",
                   "files": {"model.safetensors": {"size": after + rest, "sha256": "0" * 64}}},
        "format": format, "targets": {scheme: 28}, "bits_per_weight": bits, "method": "gptq", "sequential": True,
        "recover": "none",
        "calibration": {"source": "self", "sequences": 64, "tokens": 32768, "held_out_sequences": 8,
                        "held_out_tokens": 4096, "sha256": "c" * 64},
        "size": {"weights_before": before + rest, "weights_after": after + rest, "linears_before": before,
                 "linears_after": after, "files_after": after + rest + 400_000,
                 "bits_per_parameter": 8 * (after + rest) / 3_936_512},
        "linears": linears,
        "blocks": [{"layer": i, "error": e * (kl / 0.0096) ** 0.5, "kind": ("local", "global")[i % 2],
                    "seconds": {"gather": 1.0, "round": 0.7, "forward": 0.4, "all": 2.1}} for i, e in enumerate(errors)],
        "quality": {"sequences": 8, "positions": 4088, "kl": kl, "kl_interval": [0.88 * kl, 1.1 * kl],
                    "kl_percentiles": {"50": 0.4 * kl, "90": 2 * kl, "95": 3 * kl, "99": 8 * kl, "99.9": 20 * kl, "100": 60 * kl},
                    "top1_agreement": 0.944, "top1_agreement_interval": [0.938, 0.95],
                    "perplexity": 11.97, "perplexity_original": 11.81, "perplexity_ratio_interval": [1.009, 1.018]},
        "fallbacks": [f"{n}: {t}" for n, x in linears.items() for t in x["fallbacks"]],
        "resumed_blocks": 0, "warnings": [],
        "notes": ["2 and 3 bits: codes are packed densely"],
        "timing": {"total": 93.1},
        "environment": {"g2kit": "0.1.0", "python": "3.12.1", "cpu": "A processor", "torch": "2.13.0", "threads": 2},
        "run": {"command": "g2quant models/sample models/sample-w4", "started": "2026-11-22T09:00:00+00:00",
                "seconds": 93.1, "cpu_seconds": 120.0, "peak_rss_mib": 611.0},
    }  # fmt: skip
    return seal(document | {"exclude": exclude(document)})


def sensitive() -> Document:
    """With the KL of every weight alone."""
    document, rng = run(), random.Random(5)
    document["sensitivity"] = {
        "tokens": 1024, "anchor": "int4 g128 sym",
        "linears": {n: {"weights": 65536, "choices": {"int4 g128 sym": {
            "kl": 10 ** rng.uniform(-4.5, -2.8), "measured": True, "error": x["error"]}}}
            for n, x in document["linears"].items()},
    }  # fmt: skip
    return seal(document | {"exclude": exclude(document)})


def uncalibrated() -> Document:
    """Rounded without a single input: nothing is known of outputs, nothing was measured."""
    document = run()
    for x in document["linears"].values():
        x |= {
            "method": "rtn", "held_error": {}, "error": None, "damp": None, "factored_in": None,
            "dead_columns": None, "fallbacks": [],
        }  # fmt: skip
    document |= {
        "method": "rtn", "quality": None, "blocks": [], "fallbacks": [], "notes": [], "sequential": None,
        "calibration": {"source": "none", "sequences": 0, "tokens": 0, "held_out_sequences": 0, "held_out_tokens": 0},
    }  # fmt: skip
    return seal(document | {"exclude": exclude(document)})


def mixed() -> Document:
    """llama.cpp's types, tuned, with warnings."""
    document = run("Q4_K", "gguf-q4_k_m", 4.85, 0.004, 2)
    for name, x in document["linears"].items():
        x["clipped"] = None
        if "v_proj" in name:
            x["scheme"] = "Q6_K"
    document |= {
        "targets": {"Q4_K": 24, "Q6_K": 4}, "recover": "scales",
        "recovery": {"kl_before": 0.0061, "end_to_end": {"steps": 96, "before": 0.0061, "after": 0.004}},
        "blocks": [b | {"error_before": 1.2 * b["error"]} for b in document["blocks"]],
        "warnings": ["config.json: query_pre_attn_scalar is 224, expected 256"], "resumed_blocks": 2,
    }  # fmt: skip
    document["output"] |= {"path": "models/sample-q4.gguf", "readers": "llama.cpp"}
    return seal(document)


def from_matrix() -> Document:
    """Weighted by an importance matrix; the measurement's place is there, and empty."""
    document = uncalibrated()
    document["calibration"]["source"] = "imatrix.gguf"
    document["blocks"] = [{"layer": i, "error": None} for i in range(LAYERS)]
    document["quality"] = {
        "sequences": 0, "positions": 0, "kl": None, "kl_interval": None, "kl_percentiles": {}, "top1_agreement": None,
        "top1_agreement_interval": None, "perplexity": None, "perplexity_original": None,
        "perplexity_ratio_interval": None,
    }  # fmt: skip
    return seal(document)


def allocated() -> Document:
    """Schemes chosen for a size."""
    document = sensitive()
    choices = {
        n: x["choices"]["int4 g128 sym"]["kl"]
        for n, x in document["sensitivity"]["linears"].items()
    }
    for name, x in document["linears"].items():
        if "down_proj" in name:
            x["scheme"] = "int8 g128 sym"
            choice = {"kl": choices[name] / 200, "measured": False, "error": x["error"]}
            document["sensitivity"]["linears"][name]["choices"]["int8 g128 sym"] = choice
    document |= {
        "targets": {"int4 g128 sym": 24, "int8 g128 sym": 4}, "bits_per_weight": 5.0,
        "allocation": {"budget": "3.5 MiB", "predicted_kl": 0.0051, "weights_bytes": 3_600_000},
    }  # fmt: skip
    return seal(document | {"exclude": exclude(document)})


def nothing_lost() -> Document:
    """8 bits that change nothing to speak of."""
    document = run("int8 row sym", "torch-int8", 8.01, 0.0, 3)
    for x in document["linears"].values():
        x |= {"error": 0.0, "held_error": {"rtn": 0.0}}
    document["blocks"] = [b | {"error": 0.0} for b in document["blocks"]]
    return seal(document | {"exclude": exclude(document)})


EXAMPLES: dict[str, Callable[[], Document]] = {
    "run": run,
    "sensitive": sensitive,
    "uncalibrated": uncalibrated,
    "mixed": mixed,
    "nothing-lost": nothing_lost,
    "from-matrix": from_matrix,
    "allocated": allocated,
}
