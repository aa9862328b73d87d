"""What quantizing the bundled sample costs: KL of original against quantized on held-out text, beside its peers.

    python bench/quant_quality.py                    # every table; about ten minutes on two slow cores
    python bench/quant_quality.py --quick            # a little of everything, figures too noisy to quote
    python bench/quant_quality.py --schemes 4g128,3g128,Q4_K --recover
    python bench/quant_quality.py --tables uniform --llm-compressor ~/venv/bin/python

Peers run in the same process on the same calibration tokens: rounding to nearest, GPTQ written from the paper
(textbook_gptq.py), llama.cpp's own encoders with an importance matrix; llm-compressor in an environment of its own, where
one is named. g2quant is measured through its files: quantized by the library call, opened again, dequantized. Linear
layers only; the embedding is the original's everywhere. Logits are float32, sums float64.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import llm_compressor
import numpy as np
import textbook_gptq as textbook
import torch
from llama_encoder import Encode, encoder
from quality_tables import Points, Table, Verdict
from torch import Tensor

from g2kit.convert.open import Checkpoint, open_checkpoint
from g2kit.convert.tokenizer import tokenizer_of
from g2kit.model import canonical
from g2kit.model import torch_gemma as tg
from g2kit.model.sample import heldout_text, sample_dir, training_text
from g2kit.quant import quantize
from g2kit.quant.ggml.types import block_format
from g2kit.quant.measure import sensitivity
from g2kit.quant.sampling import sample_sequences
from g2kit.quant.scheme import Scheme
from g2kit.quant.weights import Weights

BATCH = 8
GGML_GOAL, SELF_GOAL = 0.80, 1.3


@dataclass(frozen=True)
class Uniform:
    """A row of the first table: goals are of the textbook's KL, without and with recovery."""

    scheme: Scheme
    goal: float | None = None
    goal_recovered: float | None = None


UNIFORM = {
    "4g128": Uniform(Scheme(4, 128), 0.80, 0.74),
    "4g32": Uniform(Scheme(4, 32), 0.80, 0.74),
    "3g128": Uniform(Scheme(3, 128), 0.73, 0.66),
    "3g32": Uniform(Scheme(3, 32), 0.73, 0.66),
    "4g128a": Uniform(Scheme(4, 128, symmetric=False)),
    "4g32a": Uniform(Scheme(4, 32, symmetric=False)),
    "3g128a": Uniform(Scheme(3, 128, symmetric=False)),
}
GGML = {
    "Q4_0": GGML_GOAL, "Q4_K": GGML_GOAL, "IQ4_XS": GGML_GOAL, "Q3_K": GGML_GOAL, "Q5_K": None,
    "Q6_K": GGML_GOAL,
}  # fmt: skip
SELF = ("4g128", "3g128")
TABLES = ("uniform", "blocks", "own", "target")
TARGETS = (  # format, symmetric, bits per weight
    ("compressed-tensors", True, (3.5, 3.8, 4.125, 4.5)),
    ("compressed-tensors", False, (4.5,)),
    ("gguf", True, (4.0, 4.5, 5.0)),
)


@dataclass(frozen=True)
class Quality:
    """Figures of one model: per sequence mean KL, and over all positions agreement and perplexity."""

    kl: np.ndarray
    agreement: float
    perplexity: float

    @property
    def mean(self) -> float:
        """KL x 1000."""
        return 1000 * float(self.kl.mean())

    def over(self, other: Quality) -> tuple[float, float, float]:
        """Ratio of mean KLs with its 95 % interval; sequences are resampled together."""
        pick = np.random.default_rng(0).integers(0, len(self.kl), (2000, len(self.kl)))
        ratios = self.kl[pick].mean(1) / other.kl[pick].mean(1)
        low, high = np.quantile(ratios, (0.025, 0.975))
        return float(self.kl.mean() / other.kl.mean()), float(low), float(high)


class Sample:
    """The bundled model, calibration sequences of its training text, and held-out text to judge on."""

    def __init__(self, checkpoint: Checkpoint, count: int, length: int, judged: int) -> None:
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.weights = _floats(checkpoint)
        self.length, self.count = length, count
        self.linears = canonical.linears(self.weights)
        self.ids = self._sequences(training_text(), count)
        self.test = self._sequences(heldout_text(), judged)

    def _sequences(self, text: str, most: int) -> Tensor:
        tokenizer = tokenizer_of(self.checkpoint)
        assert tokenizer is not None
        bos = self.config.bos_token_id
        ids = [i for i in tokenizer.encode(text) if i != bos]
        body = self.length - 1
        rows = min(most, len(ids) // body)
        return torch.tensor([[bos, *ids[k * body : (k + 1) * body]] for k in range(rows)])

    @cached_property
    def own(self) -> Tensor:
        """As many sequences that the model wrote itself."""
        written = sample_sequences(Weights(self.checkpoint, 1 << 30), self.count, self.length)
        return torch.from_numpy(np.stack(written))

    @torch.no_grad()
    def _logits(self, weights: Mapping[str, Tensor]) -> Iterable[Tensor]:
        for part in self.test.split(BATCH):
            yield tg.forward(part, weights, self.config)

    @cached_property
    def reference(self) -> list[Tensor]:
        """The original's logits."""
        return list(self._logits(self.weights))

    def measure(self, weights: Mapping[str, Tensor]) -> Quality:
        """Compare a model with the original."""
        kl, agree, loss = [], [], []
        batches = zip(self.test.split(BATCH), self.reference, self._logits(weights), strict=True)
        for ids, a, b in batches:
            p, q = (torch.log_softmax(x.double(), -1) for x in (a, b))
            kl.append((p.exp() * (p - q)).sum(-1).mean(1))
            agree.append((a.argmax(-1) == b.argmax(-1)).double().mean(1))
            loss.append(-q[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].mean(1))
        return Quality(
            torch.cat(kl).numpy(),
            float(torch.cat(agree).mean()),
            float(torch.cat(loss).mean().exp()),
        )

    def peer(self, rounder: textbook.Rounder, *, propagate: bool) -> Quality:
        """A model rounded by one of the peers."""
        done = textbook.quantize(self.weights, self.config, self.ids, rounder, propagate=propagate)
        return self.measure(done)

    def llm_compressor(self, python: str, scheme: Scheme) -> Quality:
        """What llm-compressor of that environment makes of it, read back from its files."""
        how = (scheme.bits, scheme.group_size, scheme.symmetric)
        with tempfile.TemporaryDirectory() as d:
            out = llm_compressor.quantized(python, sample_dir(), self.ids.numpy(), Path(d), *how)
            with open_checkpoint(out, config=self.config) as back:
                return self.measure(_floats(back))

    def ours(self, ids: Tensor | None = None, **options: Any) -> tuple[Quality, dict[str, Any]]:
        """A model quantized by g2quant, read back from its files, and the report."""
        ids = self.ids if ids is None else ids
        kept = max(1, round(len(ids) / 9))  # of the same sequences: they choose between methods
        given = {"samples": len(ids) - kept, "held_out": kept / (len(ids) - kept)}
        with tempfile.TemporaryDirectory() as d:
            report = quantize(
                sample_dir(), Path(d) / "out", calibration=ids.numpy(), **(given | options)
            )
            with open_checkpoint(Path(d) / "out", config=self.config) as back:
                found = _floats(back)
        found[canonical.EMBED] = self.weights[canonical.EMBED]
        return self.measure(found), report


def _floats(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {n: torch.from_numpy(t.read().astype(np.float32)) for n, t in checkpoint.tensors.items()}


def _ratio(found: tuple[float, float, float]) -> str:
    return "{:.3f} ({:.3f}–{:.3f})".format(*found)


def uniform(
    sample: Sample, names: Iterable[str], recover: bool, verdict: Verdict, points: Points,
    other: str | None,
) -> None:  # fmt: skip
    """The first table."""
    more: tuple[str, ...] = ("llm-compressor GPTQ",) if other else ()
    more += ("recovered", "/ textbook", "goal") if recover else ()
    table = Table(
        "Uniform schemes, KL x 1000", "scheme", "bits per weight", "RTN", "textbook GPTQ", "g2quant",
        "/ textbook (95 %)", "goal", *more, "same first choice: textbook, g2quant",
        "perplexity: textbook, g2quant",
    )  # fmt: skip
    for name in names:
        row = UNIFORM[name]
        s = row.scheme
        how = (s.bits, s.group_size, s.symmetric)
        plain = sample.peer(lambda n, w, h, how=how: textbook.rtn(w, *how), propagate=False)
        paper = sample.peer(lambda n, w, h, how=how: textbook.gptq(w, h, *how), propagate=True)
        options = {"bits": s.bits, "group_size": s.group_size, "symmetric": s.symmetric}
        ours, report = sample.ours(**options)
        if s.symmetric:
            points.add("compressed-tensors", report["bits_per_weight"], ours.mean)
        ratio = ours.over(paper)
        verdict.check(f"{s} against textbook GPTQ", ratio[0], row.goal)
        cells: list[object] = [
            s, report["bits_per_weight"], plain.mean, paper.mean, ours.mean, _ratio(ratio), row.goal
        ]  # fmt: skip
        if other:
            cells.append(sample.llm_compressor(other, s).mean)
        if recover:
            tuned, _ = sample.ours(**options, recover="scales")
            gain = tuned.over(paper)
            verdict.check(f"{s} recovered, against textbook GPTQ", gain[0], row.goal_recovered)
            cells += [tuned.mean, _ratio(gain), row.goal_recovered]
            ours = tuned
        cells += [f"{paper.agreement:.2%}, {ours.agreement:.2%}"]
        table.row(*cells, f"{paper.perplexity:.2f}, {ours.perplexity:.2f}")


def blocks(
    sample: Sample, names: Iterable[str], encode: Encode, recover: bool, verdict: Verdict,
    points: Points,
) -> None:  # fmt: skip
    """The second table."""
    more = ("recovered", "/ imatrix") if recover else ()
    table = Table(
        "ggml's block types, KL x 1000", "type", "bits per weight", "llama.cpp", "llama.cpp, imatrix",
        "g2quant", "/ imatrix (95 %)", "goal", *more, "same first choice: imatrix, g2quant",
        "perplexity: imatrix, g2quant",
    )  # fmt: skip
    for name in names:
        # an importance matrix is gathered from the original model, as llama-imatrix does
        plain = sample.peer(lambda n, w, h, t=name: encode(w, t, None), propagate=False)
        imatrix = sample.peer(lambda n, w, h, t=name: encode(w, t, h.diagonal()), propagate=False)
        ours, _ = sample.ours(format=f"gguf-{name.lower()}")
        if name != "Q4_0":  # the allocation has Q4_K in its size
            points.add("gguf", block_format(name).bits, ours.mean)
        ratio = ours.over(imatrix)
        verdict.check(f"{name} against llama.cpp with imatrix", ratio[0], GGML[name])
        cells: list[object] = [
            name, block_format(name).bits, plain.mean, imatrix.mean, ours.mean, _ratio(ratio),
            GGML[name],
        ]  # fmt: skip
        if recover:
            tuned, _ = sample.ours(format=f"gguf-{name.lower()}", recover="scales")
            cells += [tuned.mean, _ratio(tuned.over(imatrix))]
        cells += [f"{imatrix.agreement:.2%}, {ours.agreement:.2%}"]
        table.row(*cells, f"{imatrix.perplexity:.2f}, {ours.perplexity:.2f}")


def own_text(sample: Sample, names: Iterable[str], verdict: Verdict) -> None:
    """The third table."""
    table = Table(
        "Calibration on text the model writes itself, KL x 1000", "scheme", "its kind of text",
        "own text", "/ its kind (95 %)", "goal",
    )  # fmt: skip
    for name in names:
        s = UNIFORM[name].scheme
        options = {"bits": s.bits, "group_size": s.group_size, "symmetric": s.symmetric}
        given, _ = sample.ours(**options)
        own, _ = sample.ours(sample.own, **options)
        ratio = own.over(given)
        verdict.check(f"{s} calibrated on own text", ratio[0], SELF_GOAL)
        table.row(s, given.mean, own.mean, _ratio(ratio), SELF_GOAL)


def allocated(sample: Sample, verdict: Verdict, points: Points) -> None:
    """The fourth table."""
    table = Table(
        "Schemes allocated to a size, KL x 1000", "format", "bits per weight", "expected", "found",
        "uniform, interpolated", "/ uniform", "goal",
    )  # fmt: skip
    for format, symmetric, targets in TARGETS:
        label = format if symmetric else f"{format}, asymmetric"
        low, high = points.span(format)
        wanted = [t for t in targets if low <= t <= high]
        if not wanted:
            continue
        with tempfile.TemporaryDirectory() as d:
            file = Path(d) / "sensitivity.json"
            ids, count = sample.ids.numpy(), len(sample.ids)
            found = sensitivity(
                sample_dir(), format=format, calibration=ids, samples=count - count // 9,
                held_out=1 / 8, tokens=2048, symmetric=symmetric,
            )  # fmt: skip
            file.write_text(json.dumps(found))
            for bits in wanted:
                ours, report = sample.ours(
                    format=format, symmetric=symmetric, target_bpw=bits, sensitivity=file
                )
                size = report["bits_per_weight"]
                plain = points.at(format, size)
                verdict.check(f"{label} at {bits} bits, against uniform", ours.mean / plain, 1.0)
                expected = 1000 * report["allocation"]["predicted_kl"]
                table.row(label, size, expected, ours.mean, plain, ours.mean / plain, 1.0)


def missing(encode: Encode | None) -> None:
    """Peers that are not here."""
    if encode is None:
        print(
            "\nllama.cpp's library is not installed (pip install llama-cpp-python): no such peer."
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    every = [*UNIFORM, *GGML]
    parser.add_argument("--schemes", metavar="A,B,…", help=f"of {', '.join(every)}")
    parser.add_argument("--tables", default=",".join(TABLES), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="few tokens and two schemes")
    parser.add_argument("--recover", action="store_true", help="also with recover='scales'")
    parser.add_argument(
        "--llm-compressor", metavar="PYTHON", help="an interpreter that has llm-compressor"
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    names = args.schemes.split(",") if args.schemes else ["4g128", "Q4_K"] if args.quick else every
    if odd := [n for n in names if n not in every]:
        parser.error(f"no such scheme: {', '.join(odd)}; there are {', '.join(every)}")
    tables = args.tables.split(",")
    if odd := [t for t in tables if t not in TABLES]:
        parser.error(f"no such table: {', '.join(odd)}; there are {', '.join(TABLES)}")
    torch.set_num_threads(args.threads)
    began = time.monotonic()
    count, length, judged = (18, 128, 8) if args.quick else (72, 256, 64)
    with open_checkpoint(sample_dir()) as checkpoint:
        run(
            Sample(checkpoint, count, length, judged),
            names,
            args.recover,
            tables,
            args.llm_compressor,
        )
    print(f"\n{time.monotonic() - began:.0f} s", file=sys.stderr)


def run(
    sample: Sample, names: list[str], recover: bool, tables: list[str], other: str | None
) -> None:
    """All that was asked for."""
    quality = sample.measure(sample.weights)
    print(
        f"{len(sample.ids)} x {sample.length} calibration tokens, {len(sample.test)} held-out "
        f"sequences, original's perplexity {quality.perplexity:.2f}"
    )
    encode, verdict, points = encoder(), Verdict(), Points()
    missing(encode)
    if "uniform" in tables and (chosen := [n for n in names if n in UNIFORM]):
        uniform(sample, chosen, recover, verdict, points, other)
    if "blocks" in tables and encode is not None and (chosen := [n for n in names if n in GGML]):
        blocks(sample, chosen, encode, recover, verdict, points)
    if "own" in tables and (chosen := [n for n in SELF if n in names]):
        own_text(sample, chosen, verdict)
    if "target" in tables:
        allocated(sample, verdict, points)
    verdict.print()


if __name__ == "__main__":
    main()
