"""A part before anything is run: both sides, how they are to be run, and what shards of one comparison have in common."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ..convert.progress import Progress
from ..formats.fingerprint import PREFIX
from .identity import Identity
from .machine import environment
from .options import DEQUANTIZING, Options
from .side import Engine, Side

Part = dict[str, Any]
SCHEMA = "g2kit.part/1"
COMMON = (
    "kind", "settings", "reference", "candidate", "identity", "environment", "bits", "probes", "weights",
)  # fmt: skip


def frame_of(ref: Side, cand: Side, options: Options, identity: Identity, run: bool) -> Part:
    """Everything that is known before the weights are read; the rest is None."""
    kernel = kernel_of(cand, options)
    served = Engine() if kernel else options.candidate
    return {
        "schema": SCHEMA,
        "shard": None if options.shard is None else list(options.shard),
        "kind": "compare" if run else "weights",
        "settings": {**options.describe(), "candidate_run_by": served.describe()},
        "reference": ref.describe(options.reference if run and ref.checkpoint else None),
        "candidate": cand.describe(options.candidate if run and cand.checkpoint else None),
        "bits": _bits(cand),
        "rounds_inputs": rounds_inputs(cand, served),
        "identity": {
            "differences": [d.to_json() for d in identity.differences],
            "fields": identity.fields,
            "pieces": identity.pieces,
            "untested": list(identity.untested),
        },
        "environment": environment((options.reference, options.candidate) if run else ()),
        "window": ref.config.sliding_window,
        "weights": None,  # of both sides, hashed; only of shards, to tell that all ran the same
        "ledger": None,
        "fingerprint": None,
        "probes": None,
        "lockstep": None,
        "kernel": None,
        "kernel_name": kernel.runner if kernel else None,
        "floor": None,
        "kernel_floor": None,
        "floor_reason": None,
        "let_pass": None,  # known mistakes that wide thresholds do not notice
        "coverage": None,
        "contexts": {},
        "pieces": {},
        "inside": None,
        "likely": {},
    }


def kernel_of(cand: Side, options: Options) -> Engine | None:
    """The engine that serves packed weights itself, None where none was named."""
    packed = bool(cand.quantized) and options.candidate.runner not in DEQUANTIZING
    return options.candidate if packed else None


def rounds_inputs(side: Side, engine: Engine) -> bool:
    """Whether the candidate's runner computes in less than its compute type says, because of what is stored."""
    if engine.runner != "llama_cpp" or side.checkpoint is None:
        return False
    from .kernel_floor import is_exact

    return not is_exact(side.checkpoint)


def _bits(side: Side) -> float:
    """Stored bits per weight of the narrowest matrices."""
    if side.checkpoint is None:
        return 16.0
    packed = [
        t.source.quantized.bits
        for t in side.checkpoint.tensors.values()
        if t.source.quantized is not None
    ]
    return float(min(packed, default=16.0))


def hashed(side: Side, meter: Progress) -> str:
    """Fingerprint of a side's weights."""
    from ..convert import digest

    meter.start(sum(t.nbytes for t in side.opened.tensors.values()), "weights")
    return digest.root(digest.digests(side.opened, meter))


def key_of(part: Part) -> str:
    """What all shards of one comparison have in common, hashed."""
    text = json.dumps({n: part[n] for n in COMMON}, sort_keys=True, allow_nan=False)
    return PREFIX + hashlib.sha256(text.encode()).hexdigest()
