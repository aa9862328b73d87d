"""g2quant's time and memory on models of real shapes with random weights, and its rounding against the textbook's loop.

    python bench/quant_speed.py --size 2b                # two blocks, 32 x 512 tokens: seconds by part, extrapolated
    python bench/quant_speed.py --size 9b --layers 1     # peak memory of wider blocks
    python bench/quant_speed.py --rounding               # LDLQ against textbook GPTQ as a column loop in torch
    python bench/quant_speed.py --writing                # calibration text that a 2B writes itself

Weights are generated as they are read (bench/synthetic.py, which keeps 128 MiB of random numbers in memory).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sizes import PRESETS, model_config
from synthetic import checkpoint
from textbook_gptq import gptq as textbook

from g2kit.convert import digest
from g2kit.convert.progress import SILENT
from g2kit.machine import peak_rss
from g2kit.quant import export, hessian, judge, pipeline, plan, work
from g2kit.quant.calibration import Calibration, Wanted
from g2kit.quant.columns import ldlq_columns
from g2kit.quant.factor import factor
from g2kit.quant.gptq import UniformGrid
from g2kit.quant.grid import plain_grid
from g2kit.quant.own_text import Share
from g2kit.quant.sampling import sample_sequences
from g2kit.quant.scheme import Scheme
from g2kit.quant.weights import Weights

SCHEME = Scheme(4, 128, True)
TOKENS = 4096  # inputs behind the Hessians of --rounding
DRAWN = 24  # positions that --writing writes


class Clock:
    """Seconds spent in functions, by what they are called here."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def watch(self, owner: Any, name: str, what: str) -> None:
        """Time a function or method wherever it is called."""
        inner = getattr(owner, name)

        def timed(*args: Any, **kw: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*args, **kw)
            finally:
                self.seconds[what] += time.perf_counter() - began

        setattr(owner, name, timed)


def calibration(vocab: int, count: int, length: int) -> Calibration:
    """Random sequences, an eighth more held out."""
    ids = np.random.default_rng(0).integers(3, vocab, (count + max(1, count // 8), length))
    ids[:, 0] = 2
    rows = tuple(ids.astype(np.int64))
    return Calibration("random", rows[:count], rows[count:])


def blocks(size: str, layers: int, count: int, length: int, method: str) -> None:
    """Quantize some blocks as g2quant does, and say where the time went."""
    clock, whole = Clock(), model_config(size, None).num_hidden_layers
    clock.watch(hessian.Moments, "add", "Hessian")
    clock.watch(pipeline, "inputs_of", "factor")
    clock.watch(pipeline, "choose", "rounding")
    clock.watch(work.Work, "finish_layer", "packing")
    clock.watch(pipeline.Pipeline, "_layer", "block")
    clock.watch(judge.Judge, "quality", "evaluation")
    model = checkpoint(model_config(size, layers))
    found = calibration(model.config.vocab_size, count, length)
    goal = plan.goal_of(model, "compressed-tensors", SCHEME)
    rows = found.tokens + 2 * found.held_tokens
    states = 8 * rows * model.config.hidden_size
    options = pipeline.Options(method, keep_states=plan.keeps_states(model.config, rows, 2 << 30))
    print(f"{size}, {layers} of {whole} blocks, {count} x {length} tokens, {method}, "
          f"hidden states {states >> 20} MiB, {torch.get_num_threads()} threads")  # fmt: skip
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as there:
        place = Path(there)
        with work.Work(place / "work", {}) as kept:
            done = pipeline.Pipeline(model, goal.targets, found, kept, options)
            done.run(SILENT)
            quantizing = peak_rss()
            print(f"quantized, peak {quantizing:.0f} MiB", flush=True)
            began = time.perf_counter()
            fingerprint = digest.root(digest.digests(model, SILENT))
            reading = time.perf_counter() - began
            codes = work.WorkCodes(kept, goal.targets, fingerprint, layers)
            began = time.perf_counter()
            export.export(codes, model, place / "out", goal.format)
            exporting = time.perf_counter() - began
    report(clock.seconds, layers, whole, reading + exporting, quantizing)


def report(
    seconds: dict[str, float], layers: int, whole: int, exporting: float, peak: float
) -> None:
    """A table, and the whole model by it."""
    parts = {n: seconds[n] / layers for n in ("Hessian", "factor", "rounding", "packing", "block")}
    forward = 2 * parts["block"] - sum(parts.values())
    print("\n| per block | seconds |\n|---|---|")
    print(f"| forward | {forward:.1f} |")
    for name, value in parts.items():
        print(f"| {'all of it' if name == 'block' else name} | {value:.1f} |")
    total = whole * parts["block"] + seconds["evaluation"] + exporting * whole / layers
    print(
        f"\nonce: evaluation on held-out text {seconds['evaluation']:.1f} s; "
        f"fingerprint and export of these blocks {exporting:.1f} s"
    )
    print(f"all {whole} blocks: {total / 60:.1f} minutes")
    print(f"peak resident memory: {peak:.0f} MiB quantizing, {peak_rss():.0f} MiB in all")


# ---------------------------------------------------------------- rounding against the textbook


def inputs(width: int, tokens: int) -> torch.Tensor:
    """Correlated inputs of uneven size, as activations are."""
    g = torch.Generator().manual_seed(width)
    x = torch.randn(tokens, width, generator=g)
    low = torch.randn(tokens, 64, generator=g) @ torch.randn(64, width, generator=g)
    return (x + 0.3 * low) * torch.exp(torch.randn(width, generator=g))


def ours(weight: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """Factor and LDLQ on the textbook's grid."""
    f = factor(moments, ladder=(0.01,))
    assert f is not None
    scales, _ = plain_grid(weight.float(), SCHEME)
    grid = UniformGrid(weight.shape[1], scales, None, SCHEME, f.dtype)
    return (ldlq_columns(weight, grid, f).float() - SCHEME.middle) * scales.repeat_interleave(
        SCHEME.group_size, 1
    )


def timed(run: Callable[[], torch.Tensor]) -> tuple[np.ndarray, torch.Tensor]:
    """Wall and CPU seconds, and what came out."""
    clocks = (time.perf_counter, time.process_time)
    began = np.array([clock() for clock in clocks])
    found = run()
    return np.array([clock() for clock in clocks]) - began, found


def rounding() -> None:
    """Seconds and equal codes, both in float32; and in float64 on a small shape."""
    config = model_config("2b", None)
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    shapes = {"q_proj": (heads * config.head_dim, d), "gate_proj": (f, d), "down_proj": (d, f)}
    print("Wall seconds, and CPU seconds in brackets.\n")
    print("| weight | shape | textbook | g2quant | times as fast | equal codes |")
    print("|---|---|---|---|---|---|")
    sums = np.zeros((2, 2))
    for name, (out, n) in shapes.items():
        x = inputs(n, TOKENS)
        h, w = x.T @ x / TOKENS, torch.randn(out, n) * 0.02
        del x
        two, found = timed(lambda: ours(w, h))  # noqa: B023
        one, want = timed(lambda: textbook(w, h, 4, 128, dtype=torch.float32))  # noqa: B023
        same = float((found == want).float().mean())
        print(f"| {name} | {out} x {n} | {_compared(one, two)} | {same:.3%} |", flush=True)
        sums += (one, two)
    print(f"| together | | {_compared(*sums)} | |")
    x = inputs(1024, TOKENS).double()
    h, w = x.T @ x / TOKENS, torch.randn(256, 1024).double() * 0.02
    same = (ours64(w, h) == textbook(w, h, 4, 128)).double().mean()
    print(f"\n256 x 1024, both in float64: {float(same):.4%} of the weights equal")


def _compared(one: np.ndarray, two: np.ndarray) -> str:
    ratio = one / two
    return f"{one[0]:.2f} ({one[1]:.2f}) | {two[0]:.2f} ({two[1]:.2f}) | {ratio[0]:.1f} ({ratio[1]:.1f})"


def ours64(weight: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """:func:`ours`, in float64."""
    f = factor(moments, ladder=(0.01,), dtypes=(torch.float64,))
    assert f is not None
    scales, _ = plain_grid(weight.float(), SCHEME)
    grid = UniformGrid(weight.shape[1], scales, None, SCHEME, f.dtype)
    codes = ldlq_columns(weight, grid, f).double() - SCHEME.middle
    return codes * scales.double().repeat_interleave(SCHEME.group_size, 1)


# ---------------------------------------------------------------- calibration text


def writing(size: str, count: int, length: int) -> None:
    """Seconds per position of sequences that a model writes, extrapolated."""
    model = checkpoint(model_config(size, None))
    share = Share.of(model.config, "bfloat16", Wanted(count, length), plan.memory_limit(None))
    weights = Weights(model, share.weights, dtype=share.dtype)
    sample_sequences(weights, share.at_once, 3, memory=share.cache)  # reads them
    began = time.perf_counter()
    sample_sequences(weights, share.at_once, DRAWN, memory=share.cache)
    step = (time.perf_counter() - began) / (DRAWN - 1)
    rounds = -(-Wanted(count, length).total // share.at_once)
    print(f"{size}: {share.at_once} sequences at once in {share.dtype}, {share.missing >> 20} MiB of weights read again for "
          f"every position, {step:.2f} s per position; {count} x {length} tokens and an eighth more: "
          f"{step * (length - 1) * rounds / 60:.1f} minutes; peak {peak_rss():.0f} MiB")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=PRESETS, default="2b")
    parser.add_argument("--layers", type=int, default=2, help="blocks to run")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounding", action="store_true")
    parser.add_argument("--writing", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.rounding:
        rounding()
    elif args.writing:
        writing(args.size, args.samples, args.length)
    else:
        blocks(args.size, args.layers, args.samples, args.length, args.method)


if __name__ == "__main__":
    main()
