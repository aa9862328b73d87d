"""A small real Gemma 2 that ships with the package, so that demos, tests and quantization need no download.

See README.md beside this file for its text, licence and figures. Importing this module imports no framework.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from ..config import GemmaConfig


def sample_dir() -> Path:
    """The directory with ``config.json``, ``model.safetensors`` and ``tokenizer.model`` (Hugging Face layout)."""
    return Path(str(files(__package__)))


def heldout_text() -> str:
    """English text the model was not trained on (whole documents), about 100 kB."""
    return (sample_dir() / "heldout.txt").read_text(encoding="utf-8")


def training_text() -> str:
    """An excerpt of the training text, about 100 kB, for calibration."""
    return (sample_dir() / "train_excerpt.txt").read_text(encoding="utf-8")


def hf_config(config: GemmaConfig) -> dict[str, Any]:
    """``config.json`` of a bfloat16 Gemma 2 with the keys of transformers 4 and 5 together."""
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "bos_token_id": config.bos_token_id,
        "cache_implementation": "hybrid",
        "dtype": "bfloat16",
        "eos_token_id": config.eos_token_id[0],
        "final_logit_softcapping": config.final_logit_softcapping,
        "head_dim": config.head_dim,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "layer_types": list(config.layer_types),
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "gemma2",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pad_token_id": config.pad_token_id,
        "query_pre_attn_scalar": int(config.query_pre_attn_scalar),
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rope_theta": config.rope_theta,
        "sliding_window": config.sliding_window,
        "sliding_window_size": config.sliding_window,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
