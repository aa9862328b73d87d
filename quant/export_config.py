"""What each program's configuration says about quantized weights: pure functions from module names and schemes to JSON.

The commonest scheme is the default, every other module an override in the words of its format. Keys as in facts of
the readers: vLLM, transformers, GPTQModel, AutoAWQ, mlx-lm.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .. import __version__
from ..formats.errors import UsageError
from .scheme import Scheme

Schemes = Mapping[str, Scheme]  # module path (a weight's name without .weight) -> scheme
Settings = dict[str, Any]


def commonest(schemes: Schemes) -> Scheme:
    """The scheme of most modules, the first of them where several are as common."""
    return Counter(schemes.values()).most_common(1)[0][0]


def _ct_weights(scheme: Scheme) -> Settings:
    out: Settings = {
        "dynamic": False,
        "num_bits": scheme.bits,
        "strategy": "channel",
        "symmetric": scheme.symmetric,
        "type": "int",
    }
    if scheme.group_size != -1:
        out |= {"group_size": scheme.group_size, "strategy": "group"}
    return out


_W8A8_INPUT = {
    "dynamic": True,
    "num_bits": 8,
    "strategy": "token",
    "symmetric": True,
    "type": "int",
}


def _compressed_tensors(kind: str, schemes: Schemes, dense: Sequence[str]) -> Settings:
    members: dict[Scheme, list[str]] = {}
    for module, scheme in schemes.items():
        members.setdefault(scheme, []).append(module)
    groups = {
        f"group_{i}": {
            "input_activations": _W8A8_INPUT if kind == "int-quantized" else None,
            "output_activations": None,
            # one scheme: every linear layer but those ignored
            "targets": ["Linear"] if len(members) == 1 else modules,
            "weights": _ct_weights(scheme),
        }
        for i, (scheme, modules) in enumerate(members.items())
    }
    return {
        "config_groups": groups,
        "format": kind,
        "global_compression_ratio": None,
        "ignore": ["lm_head", *dense],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def compressed_tensors(schemes: Schemes, dense: Sequence[str]) -> dict[str, Settings]:
    """config.json keys for ``pack-quantized``: weights only."""
    return {"quantization_config": _compressed_tensors("pack-quantized", schemes, dense)}


def int_quantized(schemes: Schemes, dense: Sequence[str]) -> dict[str, Settings]:
    """config.json keys for ``int-quantized``: readers quantize activations per token too."""
    return {"quantization_config": _compressed_tensors("int-quantized", schemes, dense)}


# vLLM and SGLang look a merged matrix up under its own name
_MERGED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def _merged(schemes: Schemes) -> dict[str, Scheme]:
    """Names of matrices that servers merge -> the scheme of their parts, where these have one."""
    found = {}
    for name, parts in _MERGED.items():
        for module in schemes:
            if not module.endswith(parts[0]):
                continue
            layer = module.removesuffix(parts[0])
            have = {schemes.get(layer + p) for p in parts}
            if len(have) == 1:
                found[layer + name] = schemes[module]
    return found


def gptq(schemes: Schemes, dense: Sequence[str]) -> dict[str, Settings]:
    """config.json keys for GPTQ version 1; the first pattern of ``dynamic`` that matches a module wins."""
    default = commonest(schemes)
    dynamic: Settings = {
        f"+:^{re.escape(module)}$": {
            "bits": s.bits, "desc_act": False, "group_size": s.group_size, "sym": s.symmetric,
        }
        for module, s in {**schemes, **_merged(schemes)}.items()
        if s != default
    }  # fmt: skip
    dynamic |= {f"-:^{re.escape(module)}$": {} for module in dense}
    settings: Settings = {
        "bits": default.bits,
        "checkpoint_format": "gptq",
        "desc_act": False,
        "group_size": default.group_size,
        "lm_head": False,
        "meta": {"quantizer": [f"g2kit:{__version__}"]},
        "pack_dtype": "int32",
        "quant_method": "gptq",
        "sym": default.symmetric,
    }
    return {"quantization_config": settings | ({"dynamic": dynamic} if dynamic else {})}


def awq(schemes: Schemes, dense: Sequence[str]) -> dict[str, Settings]:
    """config.json keys for AWQ.

    Raises:
        UsageError: modules of different group sizes, for which the format has no words.
    """
    sizes = sorted({s.group_size for s in schemes.values()})
    if len(sizes) > 1:
        raise UsageError(
            f"awq has one group size for all modules, found {', '.join(map(str, sizes))}.",
            fix="use --format compressed-tensors, gptq or mlx, or one group size.",
        )
    settings: Settings = {
        "bits": 4,
        "group_size": sizes[0],
        "modules_to_not_convert": list(dense) or None,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }
    return {"quantization_config": settings}


def mlx(schemes: Schemes, dense: Sequence[str]) -> dict[str, Settings]:
    """config.json keys for MLX, which finds dense modules by their tensors."""
    default = commonest(schemes)
    settings: Settings = {"bits": default.bits, "group_size": default.group_size, "mode": "affine"}
    settings |= {
        module: {"bits": s.bits, "group_size": s.group_size}
        for module, s in schemes.items()
        if (s.bits, s.group_size) != (default.bits, default.group_size)
    }
    return {"quantization": settings, "quantization_config": settings}


def nothing(schemes: Schemes, dense: Sequence[str]) -> dict[str, Settings]:
    """gemma_pytorch is told by its ``quant`` option, not by a file."""
    return {}
