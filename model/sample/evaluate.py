"""How good the sample is: the figures in its README, printed again by

    python -m g2kit.model.sample.evaluate python3.11-doc_3.11.2-6+deb12u9_all.deb

Baselines: n-gram models of the same tokens and text (Witten-Bell smoothing), and general compressors.
"""  # noqa: D415

from __future__ import annotations

import bz2
import lzma
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..config import GemmaConfig
from ..torch_gemma import forward

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Evaluation:
    """Quality of the model on a text.

    Attributes:
        nats: surprise of every token, ``[tokens]`` float32, nats.
        score_use: largest attention score before its cap, over the cap, per layer.
        logit_use: largest logit before its cap, over the cap.
    """

    nats: Tensor
    score_use: tuple[float, ...]
    logit_use: float

    @property
    def perplexity(self) -> float:
        """Exponential of the mean surprise per token."""
        return math.exp(float(self.nats.double().mean()))

    def bits_per_byte(self, size: int) -> float:
        """Total surprise over ``size`` bytes of UTF-8."""
        return float(self.nats.double().sum()) / math.log(2) / size


@torch.no_grad()
def evaluate(weights: Mapping[str, Tensor], stream: Tensor, config: GemmaConfig) -> Evaluation:
    """Score ids ``[tokens]`` once each; where the text allows, with half a context or more before them."""
    attention_cap, logit_cap = config.attn_logit_softcapping, config.final_logit_softcapping
    if attention_cap is None or logit_cap is None:
        raise ValueError("this evaluation is for Gemma 2, which has both soft-caps.")
    score_use, logit_use, nats = [0.0] * config.num_hidden_layers, 0.0, []

    def tap(layer: int, name: str, value: Tensor) -> None:
        if name == "scores":
            future = torch.ones(value.shape[-2:]).triu(1).bool()
            use = float(value.abs().masked_fill(future, 0.0).max()) / attention_cap
            score_use[layer] = max(score_use[layer], use)

    half = config.max_position_embeddings // 2
    for start in range(0, len(stream), half):
        context = max(0, start - half)
        targets = stream[context : start + half]
        inputs = torch.cat((torch.tensor([config.bos_token_id]), targets[:-1]))
        logits = forward(inputs[None], weights, config, tap=tap)[0]
        logit_use = max(logit_use, float(torch.atanh(logits.double() / logit_cap).abs().max()))
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        nats.append(loss[start - context :])
    return Evaluation(torch.cat(nats), tuple(score_use), logit_use)


def ngram_nats(train: Ids, held: Ids, vocab: int, order: int) -> npt.NDArray[np.float64]:
    """Surprise of every held-out token under an n-gram model of ``train``, Witten-Bell smoothed, in nats."""
    p = np.full(len(held), 1.0 / vocab)
    for n in range(1, order + 1):
        seen, asked = (
            sum(
                np.concatenate((np.zeros(k, np.int64), ids[: len(ids) - k])) * vocab**k
                for k in range(n)
            )
            for ids in (train, held)
        )
        grams, counts = np.unique(seen, return_counts=True)
        contexts, first, kinds = np.unique(grams // vocab, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first)
        count, total, kind = (
            np.where(keys[at := np.minimum(keys.searchsorted(q), len(keys) - 1)] == q, value[at], 0)
            for keys, value, q in (
                (grams, counts, asked),
                (contexts, totals, asked // vocab),
                (contexts, kinds, asked // vocab),
            )
        )
        p = np.where(total > 0, (count + kind * p) / np.maximum(total + kind, 1), p)
    result: npt.NDArray[np.float64] = -np.log(p)
    return result


def _xz_bits(data: bytes) -> int:
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def main() -> None:
    """Print the README's figures for the shipped files."""
    import sentencepiece
    from safetensors.torch import load_file

    from . import sample_dir
    from .text import read_documents, split
    from .train import CONFIG, tokens_of

    train, held = split(read_documents(Path(sys.argv[1])))
    processor = sentencepiece.SentencePieceProcessor(str(sample_dir() / "tokenizer.model"))
    streams = tokens_of(train, processor), tokens_of(held, processor)
    text = "".join(held.values()).encode()
    weights = {n: w.float() for n, w in load_file(sample_dir() / "model.safetensors").items()}
    result = evaluate(weights, streams[1], CONFIG)
    print(f"{len(text)} bytes, {len(streams[1])} tokens held out; {len(streams[0])} of training")
    print(
        f"model    perplexity {result.perplexity:8.2f}  {result.bits_per_byte(len(text)):.3f} bit/byte"
    )
    for order in (1, 2, 3):
        nats = ngram_nats(streams[0].numpy(), streams[1].numpy(), CONFIG.vocab_size, order)
        bits = nats.sum() / math.log(2) / len(text)
        print(f"{order}-gram   perplexity {math.exp(nats.mean()):8.2f}  {bits:.3f} bit/byte")
    before = "".join(train.values()).encode()
    alone, with_text, only_text = (_xz_bits(t) for t in (text, before + text, before))
    print(f"xz -9e   {alone / len(text):.3f} bit/byte alone", end=", ")
    print(f"{(with_text - only_text) / len(text):.3f} after the training text")
    print(f"bzip2 -9 {8 * len(bz2.compress(text, 9)) / len(text):.3f} bit/byte")
    print("attention score / cap by layer", [round(u, 3) for u in result.score_use])
    print(f"logit / cap {result.logit_use:.3f}")


if __name__ == "__main__":
    main()
