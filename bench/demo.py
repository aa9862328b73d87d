"""The demo: the bundled model through every container and back, transformers generating from it, a parity report, and the
model at 4 bits with what that cost.

Runs the installed commands as a user would and prints them; every step's fingerprint must be the first one's.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

CHAIN = (
    # command, destination
    ("sample {dst} --to flax", "1-flax"),
    ("flax-to-safetensors {src} {dst}", "2-safetensors"),
    ("safetensors-to-torch {src} {dst}", "3-torch"),
    ("torch-to-gguf {src} {dst}", "4-gguf"),
    ("gguf-to-safetensors {src} {dst}", "5-safetensors"),
    ("safetensors-to-flax {src} {dst}", "6-flax"),
)
PROMPT = "The function returns"
# a quick look; a run to keep takes the defaults, 128 sequences of 512 tokens
QUICK = ("--bits", "4", "--samples", "16", "--seq-len", "128", "--held-out", "0.75")


def command(*words: str) -> str:
    """Run a command, show it, return its stdout."""
    print(f"$ {' '.join(words)}", flush=True)
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}exit code {done.returncode}")
    return done.stdout


def g2conv(*args: str) -> str:
    """See :func:`command`."""
    return command("g2conv", *args)


def main(root: Path) -> None:
    if root.exists():
        shutil.rmtree(root)
    root.mkdir(parents=True)
    src, prints = "", {}
    for words, name in CHAIN:
        dst = str(root / name)
        print(g2conv(*words.format(src=src, dst=dst).split()))
        src = dst
        line = g2conv("fingerprint", dst)
        prints[name] = line.split()[0]
        print(line)
    print(g2conv("inspect", str(root / "2-safetensors")))
    if len(set(prints.values())) != 1:
        sys.exit(f"the fingerprints differ: {prints}")
    print(f"all {len(prints)} checkpoints have the fingerprint {next(iter(prints.values()))}\n")
    generate(root / "2-safetensors")
    verify(root)
    quantize(root)


def generate(directory: Path) -> None:
    """transformers loads our directory, tokenizer included, and continues a prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(f"transformers, from {directory}:")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    batch = tokenizer(PROMPT, return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=40, do_sample=False)
    print(f"  {tokenizer.decode(out[0], skip_special_tokens=True)!r}")


def verify(root: Path) -> None:
    """The model that was written first, against transformers running what was converted from it."""
    page = root / "parity.html"
    models = (str(root / "1-flax"), str(root / "2-safetensors"))
    print()
    print(
        command(
            "g2verify", "compare", *models, "--cand-runner", "transformers", "--html", str(page)
        )
    )
    print(f"the report: {page}")


def quantize(root: Path) -> None:
    """To 4 bits, calibrated on what the model writes; then transformers running that, against the original."""
    source, packed, page = root / "2-safetensors", root / "7-int4", root / "quantized.html"
    reports = ("--html", str(page), "--report", str(root / "quantized.json"))
    print()
    print(command("g2quant", str(source), str(packed), *QUICK, *reports))
    print(f"the report: {page}\n")
    options = ("--profile", "smoke", "--cand-runner", "transformers")
    print(command("g2verify", "compare", str(source), str(packed), *options))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
