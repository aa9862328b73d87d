"""llama.cpp's own encoders (``ggml_quantize_chunk``), from the library that llama-cpp-python brings."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

Encode = Callable[[Tensor, str, "Tensor | None"], Tensor]


def encoder() -> Encode | None:
    """``encode(weight [out, in], type, importance [in] or None)`` -> dequantized weight; None without the library."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    found = sorted((Path(spec.origin).parent / "lib").glob("libggml-base.*"))
    if not found:
        return None
    call = ctypes.CDLL(str(found[0])).ggml_quantize_chunk
    call.restype = ctypes.c_size_t
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    call.argtypes = [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer]

    def encode(weight: Tensor, name: str, importance: Tensor | None) -> Tensor:
        kind = gguf.GGMLQuantizationType[name]
        weights, nbytes = gguf.GGML_QUANT_SIZES[kind]
        w = np.ascontiguousarray(weight.numpy(), np.float32)
        h = None if importance is None else np.ascontiguousarray(importance.numpy(), np.float32)
        out = np.zeros((len(w), w.shape[1] // weights * nbytes), np.uint8)
        at = None if h is None else h.ctypes.data
        call(kind.value, w.ctypes.data, out.ctypes.data, 0, *w.shape, at)
        return torch.from_numpy(gguf.quants.dequantize(out, kind))

    return encode
