"""How each program loads what was written: one row per program and format."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Consumer:
    """A program.

    Attributes:
        name: of it.
        formats: that it takes, by the beginning of ``--format``.
        language: of the lines, for the code block.
        lines: to load and run ``{path}``.
        tested: g2kit's own tests load the format with it.
    """

    name: str
    formats: tuple[str, ...]
    language: str
    lines: str
    tested: bool


CONSUMERS = (
    Consumer(
        "transformers (with compressed-tensors)", ("compressed-tensors", "int-quantized"), "python",
        """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{path}")
model = AutoModelForCausalLM.from_pretrained("{path}", dtype="bfloat16", attn_implementation="eager")
batch = tokenizer("Hello", return_tensors="pt")
print(tokenizer.decode(model.generate(**batch, max_new_tokens=40)[0]))""",
        True,
    ),
    Consumer(
        "vLLM", ("compressed-tensors", "int-quantized", "gptq", "awq"), "sh",
        "vllm serve {path} --dtype bfloat16", False,
    ),
    Consumer("SGLang", ("compressed-tensors", "int-quantized", "gptq", "awq"), "sh",
             "python -m sglang.launch_server --model-path {path} --dtype bfloat16", False),
    Consumer("mlx-lm", ("mlx",), "sh", 'mlx_lm.generate --model {path} --prompt "Hello"', True),
    Consumer("gemma_pytorch", ("torch-int8",), "sh",
             'python scripts/run.py --ckpt={path} --variant=VARIANT --prompt="Hello" --quant', False),
    Consumer("llama.cpp", ("gguf",), "sh", 'llama-cli -m {path} -p "Hello"', True),
    Consumer(
        "llama-cpp-python", ("gguf",), "python",
        """from llama_cpp import Llama

print(Llama("{path}")("Hello", max_tokens=40))""",
        True,
    ),
)  # fmt: skip


def of(format: str) -> list[Consumer]:
    """Those that take a format."""
    return [c for c in CONSUMERS if format.startswith(c.formats)]


def place(path: str, files: object, format: str) -> str:
    """What to write for ``{path}``: the output's own name where a shell and Python take it as it is."""
    name = path.rstrip("/").rpartition("/")[2]
    inside = [f for f in files if str(f).endswith(".gguf")] if isinstance(files, dict) else []
    if format.startswith("gguf") and not name.endswith(".gguf") and len(inside) == 1:
        name = f"{name}/{inside[0]}"
    return f"./{name}" if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII) else "PATH"
