"""Train the bundled sample model from the Python documentation.

    python -m g2kit.model.sample.train python3.11-doc_3.11.2-6+deb12u9_all.deb --out run

The defaults are those that made the shipped files. Interrupted, the same command resumes from ``run/checkpoint.pt``.
Matrices are trained with Muon and everything else with AdamW, in bfloat16 autocast over float32 master weights; the
learning rate warms up, stays, then falls linearly to zero over the last part of the run.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from .. import canonical
from ..config import GemmaConfig
from ..torch_gemma import forward
from . import hf_config
from .evaluate import evaluate
from .text import read_documents, split, write_excerpts
from .tokenizer import train as train_tokenizer

CONFIG = GemmaConfig(
    family="gemma2",
    num_hidden_layers=4,
    hidden_size=256,
    intermediate_size=512,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=128,
    vocab_size=3072,
    query_pre_attn_scalar=128.0,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
    sliding_window=64,
    max_position_embeddings=512,
)


def tokens_of(documents: dict[str, str], tokenizer: sentencepiece.SentencePieceProcessor) -> Tensor:
    """All documents one after the other, each ended by EOS: int64 ``[tokens]``."""
    ids = [[*tokenizer.encode(text), CONFIG.eos_token_id[0]] for text in documents.values()]
    return torch.from_numpy(np.concatenate([np.array(i, dtype=np.int64) for i in ids]))


def batch(stream: Tensor, step: int, rows: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets ``[rows, length]`` of one step; a pure function, so that runs resume.

    Each epoch visits every window of the stream once, in a new order and with a new offset. Inputs start with BOS.
    """
    per_epoch = len(stream) // length - 1
    starts = []
    for index in range(step * rows, (step + 1) * rows):
        epoch, place = divmod(index, per_epoch)
        generator = torch.Generator().manual_seed(seed * 1000 + epoch)
        offset = int(torch.randint(length, (1,), generator=generator))
        order = torch.randperm(per_epoch, generator=generator)
        starts.append(int(order[place]) * length + offset)
    targets = torch.stack([stream[s : s + length] for s in starts])
    bos = torch.full((rows, 1), CONFIG.bos_token_id)
    return torch.cat((bos, targets[:, :-1]), dim=1), targets


def initial_weights(seed: int) -> dict[str, Tensor]:
    """Norms zero (a factor of one), matrices and embedding normal with deviation hidden_size ** -0.5."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in canonical.tensors(CONFIG).items():
        deviation = 0.0 if tensor.is_norm else CONFIG.hidden_size**-0.5
        weights[name] = torch.randn(tensor.shape, generator=generator) * deviation
    return weights


def rate(step: int, args: argparse.Namespace) -> float:
    """Factor on the learning rates: warm-up, constant, linear to zero."""
    decay = int(args.steps * args.decay)
    return float(min(1.0, (step + 1) / args.warmup, (args.steps - step) / decay))


def ship(out: Path, weights: dict[str, Tensor]) -> None:
    """Write ``model.safetensors`` (bfloat16) and ``config.json``."""
    from safetensors.torch import save_file

    rounded = {n: w.detach().to(torch.bfloat16).contiguous() for n, w in weights.items()}
    save_file(rounded, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(hf_config(CONFIG), indent=2) + "\n")


def main() -> None:
    """Train, evaluate, and write everything that ships."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "text", type=Path, help="the Debian package python3.11-doc, or its _sources directory"
    )
    parser.add_argument("--out", type=Path, default=Path("sample-run"))
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument(
        "--long-steps", type=float, default=0.2, help="part of the run at length 512, at the end"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="tokens in a step")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--warmup", type=int, default=60)
    parser.add_argument(
        "--decay", type=float, default=0.5, help="part of the run over which the rate falls"
    )
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.004)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"python {platform.python_version()} torch {torch.__version__} sentencepiece", end=" ")
    print(sentencepiece.__version__, vars(args), flush=True)
    train, held = split(read_documents(args.text))
    model = train_tokenizer(train.values(), CONFIG.vocab_size)
    (args.out / "tokenizer.model").write_bytes(model)
    write_excerpts(args.out, train, held)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    stream, held_stream = tokens_of(train, tokenizer), tokens_of(held, tokenizer)
    held_size = sum(len(t.encode()) for t in held.values())
    print(
        f"{len(train)} documents, {len(stream)} tokens; held out {len(held)}, {len(held_stream)}",
        flush=True,
    )

    weights = {n: w.requires_grad_() for n, w in initial_weights(args.seed).items()}
    matrices = [w for n, w in weights.items() if w.ndim == 2 and n != canonical.EMBED]
    others = [w for n, w in weights.items() if w.ndim == 1 or n == canonical.EMBED]
    optimizers = (
        torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    )
    base = (args.muon_lr, args.adam_lr)
    step, checkpoint = 0, args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint)
        step = state["step"]
        for name, w in weights.items():
            w.data.copy_(state["weights"][name])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    began, first, recent = time.monotonic(), step, []
    while step < args.steps:
        length = (
            CONFIG.max_position_embeddings
            if step >= args.steps * (1 - args.long_steps)
            else args.length
        )
        inputs, targets = batch(stream, step, args.tokens // length, length, args.seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.float32):
            logits = forward(inputs, weights, CONFIG)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        for optimizer, lr in zip(optimizers, base, strict=True):
            optimizer.param_groups[0]["lr"] = lr * rate(step, args)
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        recent.append(loss.item())
        if step % 10 == 0:
            speed = (step - first) * args.tokens / (time.monotonic() - began)
            print(f"{step} loss {np.mean(recent):.4f} {speed:.0f} tokens/s", flush=True)
            recent.clear()
        if step % 50 == 0 or step == args.steps:
            state = {"step": step, "weights": {n: w.detach() for n, w in weights.items()}}
            torch.save(state | {"optimizers": [o.state_dict() for o in optimizers]}, checkpoint)
            ship(args.out, weights)
    ship(args.out, weights)
    rounded = {n: w.detach().to(torch.bfloat16).float() for n, w in weights.items()}
    result = evaluate(rounded, held_stream, CONFIG)
    print(
        f"held out: perplexity {result.perplexity:.2f}, {result.bits_per_byte(held_size):.3f} bit/byte"
    )


if __name__ == "__main__":
    main()
