"""What a self-test will take, before it runs: from where each mistake can show, and over how many tokens it is looked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..machine import memory_limit
from ..model.config import GemmaConfig
from .branch import Change
from .estimate import FLOOR_PASSES, cost_lines, forward_flop, matmul_rate, memory, read_rate
from .floor import BUDGET, floor_probes
from .measure import probes_of
from .mutants import Mutant, mutants
from .options import Options
from .self_test import BUDGETS, crossing_probes, require_known
from .side import Side


def estimate_self_test(side: Side, options: Options, only: Sequence[str] = ()) -> dict[str, Any]:
    """Time and memory of :func:`.self_test.self_test` on this machine, every mistake showing over the fewest tokens.

    Args:
        side: the model.
        options: its engine and probes.
        only: ids of mistakes; default all.

    Returns:
        ``mutants``, ``tokens`` (the reference's), ``flop``, ``gflop_per_second`` (measured), ``bytes_read``,
        ``bytes_per_second`` (measured), ``seconds``, ``memory_bytes``, ``memory_available``.

    Raises:
        UsageError: no such mistake.
    """
    checkpoint, config = side.opened, side.config
    chosen = [m for m in mutants(checkpoint) if not only or m.id in only]
    require_known(checkpoint, only)
    probes = list(probes_of(side, side, options))
    few = [len(p.tokens) for p in floor_probes(probes, BUDGETS[0])]
    crossing = [len(p.tokens) for p in crossing_probes(probes, config)]
    used = {id(few): few} | ({id(crossing): crossing} if any(m.window for m in chosen) else {})
    flop = forward_flop(config, BUDGET, FLOOR_PASSES, FLOOR_PASSES)
    flop += sum(forward_flop(config, n, 1, 0) for lengths in used.values() for n in lengths)
    weights = sum(t.nbytes for t in checkpoint.tensors.values())
    read = weights * (FLOOR_PASSES / 2 + len(used))
    for m in chosen:
        change = Change.between(checkpoint, m.checkpoint, code=m.activation is not None)
        share = _share(m, change, config)
        for n in crossing if m.window and crossing else few:
            flop += _trial_flop(config, n, change, share)
        read += weights * (min(share, 1.0) + 2 * config.vocab_size * config.hidden_size / config.num_parameters)  # fmt: skip
    rate, speed = matmul_rate(), read_rate(side)
    lengths = [n for some in used.values() for n in some]
    return {
        "mutants": len(chosen),
        "tokens": sum(lengths),
        "flop": flop,
        "gflop_per_second": round(rate / 1e9, 1),
        "bytes_read": int(read),
        "bytes_per_second": round(speed),
        "seconds": round(flop / rate + read / speed, 1),
        "memory_bytes": memory(side, side, options, lengths) + _kept(config, sum(lengths)),
        "memory_available": memory_limit(),
    }


def _share(m: Mutant, change: Change, config: GemmaConfig) -> float:
    """Blocks run, replays included, as a share of the model's."""
    first = change.first
    if first is None:
        return 0.0
    return (config.num_hidden_layers - first + len(change.blocks - {first})) / config.num_hidden_layers  # fmt: skip


def _trial_flop(config: GemmaConfig, length: int, change: Change, share: float) -> float:
    """Blocks over the positions that can differ, keys and values of those before, both heads."""
    tail = max(1, length - change.start)
    whole = forward_flop(config, length, 1, 0) / length  # of a position
    heads = forward_flop(config, tail, 0, 2)
    before = 4.0 * config.num_key_value_heads * config.head_dim * config.hidden_size
    before *= config.num_hidden_layers * (length - tail)
    return share * (tail * whole + before) + heads


def _kept(config: GemmaConfig, tokens: int) -> int:
    """Hidden states of the reference behind every block."""
    return 4 * tokens * config.hidden_size * (config.num_hidden_layers + 2)


def lines(e: Mapping[str, Any]) -> list[str]:
    """For people."""
    return [
        f"mistakes {e['mutants']}, looked for over up to {e['tokens']} tokens",
        *cost_lines(e),
    ]
