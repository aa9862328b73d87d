"""What a comparison will take, before it runs: operations, bytes, time and memory, from sizes and two short measurements."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..machine import memory_limit
from ..model.config import GemmaConfig
from .batches import plan_batches
from .floor import BUDGET
from .lockstep import BLOCK_ROWS, SCRATCH
from .measure import probes_of
from .options import Options
from .side import Side

BASE_BYTES = 420 << 20  # interpreter, torch, sentencepiece, the report in the making
_SCORE_COPIES = 3  # of attention scores: as computed, capped and masked, softmax
READ_SAMPLE = 64 << 20
_SIDE = 768  # of the square matrices whose product is timed
# passes over the floor's tokens, in passes of the compute type: float64 (counted thrice) and four more pairs' runs
FLOOR_PASSES = 11
# passes over a short prompt: padding, BOS, decoding, greedy choice, masks
_CHECK_TOKENS = 4000


def estimate(ref: Side, cand: Side, options: Options) -> dict[str, Any]:
    """Time and memory of :func:`g2kit.verify.compare.compare` with these options on this machine.

    Returns:
        ``tokens``, ``documents``, ``batches``, ``flop``, ``gflop_per_second`` (measured), ``bytes_read``,
        ``bytes_per_second`` (measured), ``seconds``, ``memory_bytes``, ``memory_available``, ``shard``.
    """
    probes = probes_of(ref, cand, options)
    lengths = [len(p.tokens) for p in probes]
    batches = plan_batches(lengths, options.batch_tokens)
    config, share = ref.config, options.share[1]
    sides = 2 if ref.checkpoint is not None else 1
    runs = sides + (
        1 if sides == 2 else 0
    )  # the candidate's blocks run on the reference's input too
    flop = sum(forward_flop(config, n, runs, sides) for n in lengths) / share
    flop += forward_flop(config, BUDGET, FLOOR_PASSES, FLOOR_PASSES)
    flop += forward_flop(config, 256, 1, 1) * _CHECK_TOKENS / 256
    weights = sum(
        t.nbytes for s in (ref, cand) if s.checkpoint for t in s.checkpoint.tensors.values()
    )
    passes = math.ceil(len(batches) / share) + 1 + FLOOR_PASSES / 2
    rate, speed = matmul_rate(), read_rate(cand)
    read = int(weights * passes)
    return {
        "documents": len(lengths),
        "tokens": sum(lengths),
        "batches": len(batches),
        "shard": None if options.shard is None else list(options.shard),
        "flop": flop,
        "gflop_per_second": round(rate / 1e9, 1),
        "bytes_read": read,
        "bytes_per_second": round(speed),
        "seconds": round(flop / rate + read / speed, 1),
        "memory_bytes": memory(ref, cand, options, lengths),
        "memory_available": memory_limit(),
    }


def forward_flop(config: GemmaConfig, length: int, blocks: int, heads: int) -> float:
    """Operations of one sequence: ``blocks`` times through the layers, ``heads`` times through the unembedding."""
    c = config
    per_layer = c.hidden_size * c.head_dim * 2 * (c.num_attention_heads + c.num_key_value_heads)
    per_layer += 3 * c.hidden_size * c.intermediate_size
    window = c.sliding_window or length
    seen = sum(min(length, window) if c.is_local(i) else length for i in range(c.num_hidden_layers))
    attention = 2 * c.num_attention_heads * c.head_dim * seen
    through = 2.0 * length * (c.num_hidden_layers * per_layer + attention)
    return blocks * through + heads * 2.0 * length * c.vocab_size * c.hidden_size


def memory(ref: Side, cand: Side, options: Options, lengths: Sequence[int]) -> int:
    """Peak resident bytes of probes of these lengths, roughly.

    A block of each side, a batch's hidden states and attention scores, a tile of logits, all in float64: so runs the
    noise floor.
    """
    from .runners.torch_runner import SCORE_BYTES

    c, wide = ref.config, 8
    longest = max(lengths, default=1)
    tokens = max(min(options.batch_tokens, sum(lengths)), longest)
    block = 4 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads) // 2
    block = (block + 3 * c.hidden_size * c.intermediate_size) * wide
    largest = max(
        (t.nbytes for s in (ref, cand) if s.checkpoint for t in s.checkpoint.tensors.values()
         if not t.streams_rows), default=0,
    )  # fmt: skip
    states = tokens * (8 * c.hidden_size + 3 * c.intermediate_size) * wide
    logits = min(SCRATCH, 2 * tokens * c.vocab_size * wide) + 2 * BLOCK_ROWS * c.hidden_size * wide
    scores = _SCORE_COPIES * min(SCORE_BYTES, tokens * longest * c.num_attention_heads * wide)
    resident = 0
    if options.candidate.options or options.reference.options:  # a mesh holds all of the model
        resident = c.num_parameters * wide
    return int(BASE_BYTES + 2 * block + 2 * largest + states + scores + logits + resident)


def matmul_rate() -> float:
    """Operations per second of a float32 product on this machine's processor, the best of some."""
    import torch

    from .runners.torch_runner import exact_products

    a, b = torch.ones(_SIDE, _SIDE), torch.ones(_SIDE, _SIDE)
    best = math.inf
    with exact_products():
        for _ in range(5):
            began = time.perf_counter()
            torch.mm(a, b)
            best = min(best, time.perf_counter() - began)
    return 2.0 * _SIDE**3 / best


def read_rate(side: Side) -> float:
    """Bytes per second from the candidate's first file; a made-up gigabyte where it has none."""
    files = side.checkpoint.source.files if side.checkpoint is not None else ()
    if not files:
        return 1e9
    began, done = time.perf_counter(), 0
    with files[0].open("rb", buffering=0) as f:
        while done < READ_SAMPLE and (piece := os.read(f.fileno(), 8 << 20)):
            done += len(piece)
    spent = time.perf_counter() - began
    return max(done, 1) / max(spent, 1e-9) if done > 1 << 20 else 1e9


def lines(e: Mapping[str, Any]) -> list[str]:
    """For people."""
    return [
        f"tokens   {e['tokens']} in {e['documents']} sequences, {e['batches']} batches",
        *cost_lines(e),
    ]


def cost_lines(e: Mapping[str, Any]) -> list[str]:
    """What it takes, for people."""
    from ..terminal import seconds, size

    fits = "" if e["memory_bytes"] <= e["memory_available"] else "  more than this machine has"
    return [
        f"work     {e['flop'] / 1e9:.3g} GFLOP at {e['gflop_per_second']} GFLOP/s (measured)",
        f"read     {size(e['bytes_read'])} at {size(e['bytes_per_second'])}/s (measured)",
        f"time     about {seconds(e['seconds'])}, and some seconds to start and to write reports",
        f"memory   about {size(e['memory_bytes'])} of {size(e['memory_available'])}{fits}",
    ]
