"""Rounding without running the model: nothing is known of the inputs, or only their mean squares (an importance matrix).

One pass over the weights. There is nothing to choose between methods by, and no held-out text that measures the result.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..convert.open import Checkpoint
from ..convert.progress import Tick
from . import ggml
from . import gptq as rounding
from .calibration import Calibration
from .choose import Rounded, Target, clipped
from .ggml import imatrix
from .weights import read
from .work import Work

NONE = "none"
NOTHING = Calibration(NONE, (), ())
# what a calibrated run measures on held-out sequences
UNMEASURED: dict[str, Any] = {
    "sequences": 0,
    "positions": 0,
    "kl_percentiles": {},
    **dict.fromkeys((
        "kl", "kl_interval", "top1_agreement", "top1_agreement_interval", "perplexity",
        "perplexity_original", "perplexity_ratio_interval",
    )),
}  # fmt: skip


def importance_of(path: str | Path, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Canonical name -> mean squares of a weight's inputs ``[in_features]``, from an importance matrix.

    Raises:
        G2Error: it cannot be read, or is of another model.
    """
    found = imatrix.to_canonical(imatrix.read(path), checkpoint.config)
    return {n: torch.from_numpy(x) for n, x in found.means.items()}


class Direct:
    """One run over all blocks, in place of :class:`.pipeline.Pipeline`.

    Args:
        checkpoint: what is quantized.
        targets: canonical name of a linear weight -> what it shall become.
        work: where results go, block by block.
        importance: of :func:`importance_of`, or None: every column counts alike.
        device: to compute on.
    """

    tuning_bytes = 0

    def __init__(
        self,
        checkpoint: Checkpoint,
        targets: Mapping[str, Target],
        work: Work,
        importance: Mapping[str, Tensor] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.checkpoint, self.targets, self.work = checkpoint, targets, work
        self._importance, self._device = importance, torch.device(device)

    @torch.no_grad()
    def run(self, meter: Tick) -> dict[str, Any]:
        """Do what is not done yet; the report's parts as of a calibrated run, without quality.

        Raises:
            NonFiniteError: NaN or infinity in a weight; names it.
        """
        layers = range(self.checkpoint.config.num_hidden_layers)
        for layer in layers[len(self.work.layers) :]:
            began = time.monotonic()
            values: dict[str, Rounded] = {}
            records: dict[str, Any] = {}
            for name in (n for n in self.targets if int(n.split(".")[2]) == layer):
                values[name], records[name] = self._round(name)
                out, columns = self.checkpoint.tensors[name].shape
                meter(4 * out * columns, name)
            block = {"error": None, "seconds": {"all": time.monotonic() - began}}
            self.work.finish_layer(layer, values, {"linears": records, "block": block})
        lines = [self.work.layers[i] for i in layers]
        linears = {n: r for line in lines for n, r in line["linears"].items()}
        return {
            "linears": {n: linears[n] for n in self.targets},
            "blocks": [{"layer": i, **line["block"]} for i, line in enumerate(lines)],
            "quality": dict(UNMEASURED),
        }

    def _round(self, name: str) -> tuple[Rounded, dict[str, Any]]:
        began = time.monotonic()
        target = self.targets[name]
        weight = read(self.checkpoint.tensors[name]).to(self._device)
        h = None if self._importance is None else self._importance[name].to(self._device)
        value = (
            ggml.encode(weight, target, importance=h)
            if isinstance(target, str)
            else rounding.rtn(weight, target, h)
        )
        back = value.dequantize()
        return value, {
            "method": "rtn",
            "scheme": str(target),
            "held_error": {},
            "error": None,
            "weight_error": float((weight - back).norm() / weight.norm().clamp_min(1e-30)),
            "clipped": clipped(weight, value, back),
            "damp": None,
            "factored_in": None,
            "dead_columns": 0 if h is None else int((h == 0).sum()),
            "fallbacks": [],
            "seconds": round(time.monotonic() - began, 4),
        }
