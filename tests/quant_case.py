"""What tests of quantization block by block share: a small checkpoint's calibration, and results compared by bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from g2kit.convert.open import Checkpoint
from g2kit.quant.calibration import Calibration
from g2kit.quant.scheme import Codes

DATA = Path(__file__).parent / "data" / "hf_sharded"
Result = tuple[dict[str, Any], dict[str, Any]]  # report, canonical name -> codes


def sequences(seed: int, lengths: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Random ids of these lengths behind a BOS."""
    rng = np.random.default_rng(seed)
    return tuple(np.concatenate([[2], rng.integers(3, 500, n - 1)]) for n in lengths)


CALIBRATION = Calibration("test", sequences(1, (24,) * 9 + (16, 16)), sequences(2, (24, 24, 16)))


def bytes_of(value: Any) -> tuple[bytes, ...]:
    """Codes, blocks or a plain tensor, to be compared."""
    if isinstance(value, Codes):
        parts = [value.codes, value.scales, *([] if value.zeros is None else [value.zeros])]
    else:
        parts = [value if isinstance(value, Tensor) else value.data]
    return tuple(p.numpy().tobytes() for p in parts)


def dense(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every tensor in float32."""
    return {n: torch.from_numpy(t.read().astype(np.float32)) for n, t in checkpoint.tensors.items()}
