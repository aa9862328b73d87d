"""g2verify against transformers: time to logits on CPU, and memory of whole comparisons.

    python bench/verify.py --size 2b                    # prefill of 512 tokens, float32 and bfloat16, both loaded before
    python bench/verify.py --size 2b --memory           # peak memory of comparing two checkpoints, block by block
    python bench/verify.py --size 9b --memory --layers 12

Checkpoints are random ones of real shapes (bench/synthetic.py). A prefill gives the logits of every position to whoever
asks (2.1 MB per position in float32 with the copy); each method runs in a process of its own, in alternation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from measure import idle, run
from sizes import PRESETS
from sources import make_source, random_ids

# load, warm up, then time; prints the seconds of each prefill
OURS = """
import json, sys, time, numpy as np, torch
from g2kit.verify.runners import open_runner
path, dtype, length, rounds, threads = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
torch.set_num_threads(threads)
runner = open_runner("torch", path, dtype=dtype, resident=True)
ids = np.random.default_rng(0).integers(0, runner.config.vocab_size, length)
runner.logits(ids[:8])
seconds = []
for _ in range(rounds):
    began = time.perf_counter()
    runner.start(ids)
    runner.finish()
    top = [tile.argmax(-1) for _, _, tile in runner.logit_tiles()]
    seconds.append(time.perf_counter() - began)
print(json.dumps(seconds))
"""
THEIRS = """
import json, sys, time, numpy as np, torch
from transformers import AutoModelForCausalLM
path, dtype, length, rounds, threads = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), attn_implementation="eager").eval()
ids = torch.from_numpy(np.random.default_rng(0).integers(0, model.config.vocab_size, length))[None]
seconds = []
with torch.no_grad():
    model(ids[:, :8], use_cache=False)
    for _ in range(rounds):
        began = time.perf_counter()
        top = model(ids, use_cache=False).logits.argmax(-1)
        seconds.append(time.perf_counter() - began)
print(json.dumps(seconds))
"""


def prefill(path: Path, length: int, rounds: int, threads: int) -> None:
    """Seconds per prefill, ours and transformers', in alternation."""
    print("| dtype | g2kit torch runner, s | transformers eager, s | ratio of speeds |")
    print("|---|---|---|---|")
    for dtype in ("float32", "bfloat16"):
        times: dict[str, list[float]] = {OURS: [], THEIRS: []}
        for _ in range(rounds):
            for script, found in times.items():
                command = [sys.executable, "-c", script, str(path), dtype, str(length), "2"]
                done = subprocess.run(
                    [*command, str(threads)], check=True, capture_output=True, text=True
                )
                found.append(min(json.loads(done.stdout)))
        ours, theirs = (statistics.median(times[s]) for s in (OURS, THEIRS))
        print(f"| {dtype} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.2f} |", flush=True)


def memory(reference: Path, candidate: Path, tokens: int) -> None:
    """One comparison of two checkpoints through the command line."""
    ids = random_ids(reference.parent / "tokens.npy", tokens)
    g2verify = str(Path(sys.executable).with_name("g2verify"))
    base = idle()
    for command in ("compare", "weights"):
        more = ["--tokens", str(ids), "--profile", "smoke"] if command == "compare" else []
        done = run(["sh", "-c", '"$@"; test $? -lt 2', "sh",
                    g2verify, command, str(reference), str(candidate), "--quiet",
                    "--config", str(reference), *more])  # fmt: skip
        print(
            f"{command}: {done.wall:.0f} s, {done.cpu:.0f} CPU s, peak {done.peak_mib - base:.0f} MiB above idle"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=PRESETS, default="2b")
    parser.add_argument("--dir", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--layers", type=int, help="this many layers instead of all")
    parser.add_argument("--length", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    root = args.dir.absolute() / (f"{args.size}-{args.layers}" if args.layers else args.size)
    make_source(args.size, root, args.layers, "safetensors")
    if args.memory:
        make_source(args.size, root, args.layers, "torch")
        memory(root / "hf", root / "torch", min(args.length, 256))
    else:
        prefill(root / "hf", args.length, args.rounds, args.threads)


if __name__ == "__main__":
    main()
