"""How far a correct kernel may be from the weights it serves: some round what they multiply with them.

llama.cpp rounds by the weights' type. ggml's matrix product converts its input to the type its kernel takes with the weights
(``vec_dot_type``): bfloat16 with bfloat16, float16 with float16, 8-bit blocks with quantized ones (Q8_0: 32 values and a
float16 scale; Q8_K: 256 and a float32 scale). Imitated in torch, the same on every processor; what is left is the order of
sums, which a floor has anyway. Source: ggml-cpu.c, ``type_traits_cpu``, and ggml-quants.c, ``quantize_row_q8_0_ref``,
``quantize_row_q8_K_ref``.

compressed-tensors' int-quantized weights come with a scheme for inputs: 8 bits, one scale per token, ``max / 127.5``. Source:
compressed_tensors/quantization/utils/helpers.py, ``calculate_qparams``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..convert.open import Checkpoint, LazyTensor
from ..convert.progress import SILENT, Tick
from ..formats.dtypes import BF16, F16
from ..model import canonical
from .batches import BATCH_TOKENS, ProbeLike
from .floor import estimate, floor_probes
from .lockstep import run_lockstep
from .noise import Estimate
from .rounding import table_gelu
from .runners.torch_runner import TorchRunner

Rounding = Callable[[Tensor], Tensor]
LLAMA_CPP = "llama_cpp"
NAMES = {
    LLAMA_CPP: "llama.cpp's rounding of inputs",
    "transformers": "compressed-tensors' rounding of inputs",
}
_SMALL_BLOCK, _LARGE_BLOCK = 32, 256


def input_rounding(tensor: LazyTensor, runner: str = LLAMA_CPP) -> Rounding | None:
    """What a runner's kernel does to its input before it multiplies it with this weight; None for nothing."""
    packed = tensor.source.quantized
    if runner != LLAMA_CPP:
        rounds = runner in NAMES and packed is not None and packed.kind == "int-quantized"
        return _per_token if rounds else None
    if packed is None:
        return {BF16: _to(torch.bfloat16), F16: _to(torch.float16)}.get(tensor.source.dtype)
    weights = getattr(getattr(packed, "block", None), "weights", _SMALL_BLOCK)
    return _blocks_of_256 if weights == _LARGE_BLOCK else _blocks_of_32


def _to(dtype: torch.dtype) -> Rounding:
    return lambda x: x.to(dtype).to(x.dtype)


def _blocks_of_32(x: Tensor) -> Tensor:
    return _eight_bits(x, _SMALL_BLOCK, torch.float16)


def _blocks_of_256(x: Tensor) -> Tensor:
    return _eight_bits(x, _LARGE_BLOCK, torch.float32)


def _per_token(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return torch.where(scale > 0, x / scale, 0).round().clamp(-128, 127) * scale


def _eight_bits(x: Tensor, block: int, scale_type: torch.dtype) -> Tensor:
    """Blocks along the last axis rounded to a scale times -127 to 127."""
    parts = x.reshape(*x.shape[:-1], -1, block)
    scale = parts.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, parts / scale, 0).round()
    return torch.mul(codes, scale.to(scale_type).to(x.dtype)).reshape(x.shape)


class KernelLinear:
    """Matrix products as a kernel makes them; ``table`` for llama.cpp's, which has a table of GELU."""

    def __init__(self, roundings: Mapping[str, Rounding], *, table: bool = True) -> None:
        self._roundings, self._table = roundings, table
        self._gate: Tensor | None = None
        self._up: Tensor | None = None

    def __call__(self, name: str, x: Tensor, weight: Tensor) -> Tensor:
        """See :data:`g2kit.model.torch_gemma.Linear`."""
        part = name.rpartition(".mlp.")[2]
        if part == "down_proj.weight" and self._gate is not None and self._up is not None:
            x = table_gelu(self._gate) * self._up
            self._gate = self._up = None
        rounding = self._roundings.get(name)
        y = torch.nn.functional.linear(x if rounding is None else rounding(x), weight)
        if part == "gate_proj.weight" and self._table:
            self._gate = y
        elif part == "up_proj.weight":
            self._up = y
        return y


class KernelRunner(TorchRunner):
    """The torch runner with :class:`KernelLinear`, its head included."""

    def __init__(self, checkpoint: Checkpoint, runner: str = LLAMA_CPP) -> None:
        found = {n: input_rounding(t, runner) for n, t in checkpoint.tensors.items()}
        roundings = {n: r for n, r in found.items() if r is not None}
        super().__init__(checkpoint, linear=KernelLinear(roundings, table=runner == LLAMA_CPP))
        self._head = roundings.get(canonical.EMBED)

    def _unembed(self, hidden: Tensor, table: Tensor) -> Tensor:
        return super()._unembed(hidden if self._head is None else self._head(hidden), table)


def is_exact(checkpoint: Checkpoint, runner: str = LLAMA_CPP) -> bool:
    """Whether a runner rounds no input of any matrix of this checkpoint, but to its compute type."""
    matrices = [t for t in checkpoint.tensors.values() if len(t.shape) == 2]
    return all(input_rounding(t, runner) is None for t in matrices)


def kernel_estimate(
    checkpoint: Checkpoint,
    probes: Sequence[ProbeLike],
    runner: str = LLAMA_CPP,
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Tick = SILENT,
) -> Estimate:
    """A checkpoint run in float32 against the same with a kernel's rounding.

    Args:
        checkpoint: what the kernel serves.
        probes: of which :func:`.floor.floor_probes` takes some.
        runner: whose kernel.
        batch_tokens: largest padded batch.
        progress: as in :func:`.lockstep.run_lockstep`.

    Raises:
        UsageError: no position is finite.
    """
    options: dict[str, Any] = {"batch_tokens": batch_tokens, "progress": progress}
    with TorchRunner(checkpoint) as one, KernelRunner(checkpoint, runner) as two:
        result = run_lockstep(one, two, floor_probes(probes), tiles=True, **options)
    return estimate(NAMES[runner], "float32", result, sum(len(p.tokens) for p in probes))


__all__ = ["KernelLinear", "KernelRunner", "input_rounding", "is_exact", "kernel_estimate"]
