"""Cost of comparing two logit streams, as a multiple of the two unembedding products it contains.

    python bench/logits.py [--positions 512] [--vocab 256000] [--hidden 2304] [--threads 2] [--rounds 5]

Products and comparison alternate, so that a busy machine slows both; the median ratio is what counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from g2kit.model.logits import BLOCK_ROWS, SCRATCH, compare


def seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    began = clock()
    work()
    return clock() - began


def products(pairs: list[tuple[torch.Tensor, torch.Tensor]], rows: int) -> None:
    """The two products alone, over blocks of rows: logits of all positions at once would not fit."""
    for hidden, table in pairs:
        for start in range(0, len(table), rows):
            block = table[start : start + rows].to(hidden.dtype)
            torch.mm(hidden, block.T)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (
        ("positions", 512),
        ("vocab", 256_000),
        ("hidden", 2304),
        ("threads", 2),
        ("rounds", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--block-rows", type=int, default=BLOCK_ROWS)
    parser.add_argument("--scratch", type=int, default=SCRATCH // 2**20, help="MiB")
    parser.add_argument("--table", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--cpu", action="store_true", help="CPU seconds: for a busy machine, with --threads 1"
    )
    args = parser.parse_args()
    clock = time.process_time if args.cpu else time.perf_counter
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    table = torch.empty(args.vocab, args.hidden, dtype=getattr(torch, args.table))
    table.normal_(std=0.1)
    hidden = torch.randn(args.positions, args.hidden)
    targets = torch.randint(0, args.vocab, (args.positions,))
    other = table.clone()
    other[::BLOCK_ROWS] *= 1.01  # no block is equal
    cases = {
        "one table, nearly equal": (None, 1e-6),
        "one table, quantized": (None, 3e-2),
        "two tables, nearly equal": (other, 1e-6),
        "two tables, quantized": (other, 3e-2),
    }
    print(f"{args.positions} x {args.vocab}, hidden {args.hidden}, {args.table} table")
    print(f"{'':26} {'products':>9} {'compare':>9} {'ratio':>6}  (medians of {args.rounds})")
    for name, (second, noise) in cases.items():
        cand = hidden + noise * torch.randn_like(hidden)
        alone, whole, ratio = [], [], []
        for _ in range(args.rounds):
            pairs = [(hidden, table), (cand, table if second is None else second)]
            alone.append(seconds(lambda p=pairs: products(p, args.block_rows), clock))
            whole.append(
                seconds(
                    lambda c=cand, s=second: compare(
                        hidden,
                        c,
                        table,
                        s,
                        cap=30.0,
                        targets=targets,
                        block_rows=args.block_rows,
                        scratch=args.scratch * 2**20,
                    ),
                    clock,
                )
            )
            ratio.append(whole[-1] / alone[-1])
        a, w, r = map(statistics.median, (alone, whole, ratio))
        print(f"{name:26} {a:7.2f} s {w:7.2f} s {r:6.2f}")


if __name__ == "__main__":
    main()
