"""llm-compressor's GPTQ as a peer: run by a Python that has it, whose transformers is older than this project's.

    python bench/llm_compressor.py MODEL IDS.npy OUT BITS GROUP_SIZE sym|asym

Its defaults (activation order inside static groups, 1 % damping) on the sequences given, in float32, into a
compressed-tensors checkpoint.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np


def main() -> None:
    """In llm-compressor's environment."""
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    source, ids, out, bits, group_size, symmetric = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    rows = torch.from_numpy(np.load(ids))
    every = [{"input_ids": r, "attention_mask": torch.ones_like(r)} for r in rows]
    weights = {
        "num_bits": int(bits),
        "type": "int",
        "symmetric": symmetric == "sym",
        "strategy": "group",
        "group_size": int(group_size),
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    oneshot(
        model=model,
        dataset=DataLoader(every, batch_size=8),  # type: ignore[arg-type]
        processor=object(),  # one is asked for, and not used on ids
        recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"]),
        max_seq_length=rows.shape[1],
        num_calibration_samples=len(rows),
    )
    model.save_pretrained(out, save_compressed=True)


def quantized(
    python: str, model: Path, ids: np.ndarray, work: Path, bits: int, group_size: int, symmetric: bool
) -> Path:  # fmt: skip
    """The checkpoint that llm-compressor of another Python makes, in ``work``."""
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.save(file, ids)
        file.flush()
        out = work / "llm-compressor"
        kind = "sym" if symmetric else "asym"
        args = [str(model), file.name, str(out), str(bits), str(group_size), kind]
        done = subprocess.run([python, __file__, *args], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"llm-compressor failed:\n{done.stderr[-2000:]}")
    return out


if __name__ == "__main__":
    main()
