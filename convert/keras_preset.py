"""What a KerasHub preset directory holds besides its weights, as KerasHub 0.32's ``save_to_preset`` writes it.

Sources: keras_hub/src/utils/preset_utils.py (KerasPresetSaver), models/gemma/gemma_backbone.py and
gemma_tokenizer.py; names of layers: gemma_decoder_block.py and gemma_attention.py.
"""

from __future__ import annotations

import json
from typing import Any

from ..formats.errors import DtypeError
from ..model.config import GemmaConfig
from ..model.config_formats import keras_caveats, to_keras

CONFIG, METADATA, TOKENIZER = "config.json", "metadata.json", "tokenizer.json"
VOCABULARY = "assets/tokenizer/vocabulary.spm"
# nobody reads it; a real one would make equal inputs give different files
_DATE = "1970-01-01@00:00:00"
# the releases whose format this is
_VERSIONS = {"keras_version": "3.15.1", "keras_hub_version": "0.32.0"}
_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64"}
_EPSILON = 1e-6
# sublayer of a decoder block -> the name KerasHub gives the layer; {n}: numbered as in Keras
_BLOCK = {
    "attention": "attention",
    "attention/dropout_layer": "dropout{n}",
    "attention/key_dense": "key",
    "attention/output_dense": "attention_output",
    "attention/query_dense": "query",
    "attention/rope_layer": "rotary_embedding{n}",
    "attention/softmax": "softmax{n}",
    "attention/value_dense": "value",
    "ffw_linear": "ffw_linear",
    "gating_ffw": "ffw_gating",
    "gating_ffw_2": "ffw_gating_2",
    "pre_attention_norm": "pre_attention_norm",
    "pre_ffw_norm": "pre_ffw_norm",
}
_POST_NORMS = {"post_attention_norm": "post_attention_norm", "post_ffw_norm": "post_ffw_norm"}
_MODEL = {
    "input_layer": "token_ids",
    "input_layer_1": "padding_mask",
    "reversible_embedding": "token_embedding",
    "rms_normalization": "final_normalization",
}


def preset_files(
    config: GemmaConfig, dtype: str, tokenizer_model: bytes | None
) -> dict[str, bytes]:
    """The preset's files but the weights: path in the directory -> content. Same arguments, same bytes.

    KerasHub has no file for what tells an instruction-tuned model apart; :func:`preset_notes` says what its user
    must do instead.

    Args:
        config: the model; ``vocab_size`` must be the rows of the embedding written.
        dtype: of the weights, ``bf16``, ``f16``, ``f32`` or ``f64``.
        tokenizer_model: the SentencePiece file, or None to write a preset without tokenizer.

    Raises:
        ConfigError: KerasHub cannot express the model.
        DtypeError: not one of these types.
    """
    backbone = keras_config(config, dtype)
    metadata = {
        **_VERSIONS,
        "parameter_count": config.num_parameters,
        "date_saved": _DATE,
        "tasks": ["CausalLM"],
    }
    files = {CONFIG: _json(backbone), METADATA: _json(metadata)}
    if tokenizer_model is not None:
        files[TOKENIZER] = _json(_TOKENIZER_CONFIG)
        files[VOCABULARY] = tokenizer_model
    return files


def keras_config(config: GemmaConfig, dtype: str) -> dict[str, Any]:
    """Content of config.json: a serialized GemmaBackbone.

    Raises:
        ConfigError: KerasHub cannot express the model.
        DtypeError: not a type Keras computes in.
    """
    if dtype not in _DTYPES:
        raise DtypeError(
            f"Keras has no dtype policy {dtype!r}; supported are {', '.join(_DTYPES)}."
        )
    own = {"name": "gemma_backbone", "trainable": True, "dtype": _policy(_DTYPES[dtype])}
    return _serialized(
        "keras_hub.src.models.gemma.gemma_backbone", "GemmaBackbone", own | to_keras(config)
    )


def _policy(name: str) -> dict[str, Any]:
    return {
        "module": "keras",
        "class_name": "DTypePolicy",
        "config": {"name": name},
        "registered_name": None,
    }


def _serialized(module: str, name: str, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "module": module,
        "class_name": name,
        "config": config,
        "registered_name": f"keras_hub>{name}",
    }


_TOKENIZER_CONFIG = _serialized(
    "keras_hub.src.models.gemma.gemma_tokenizer",
    "GemmaTokenizer",
    {
        "name": "gemma_tokenizer",
        "trainable": True,
        "dtype": _policy("int32"),
        "config_file": TOKENIZER,
        "proto": None,
        "sequence_length": None,
        "add_bos": False,
        "add_eos": False,
    },
)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=4).encode("ascii")


def preset_groups(config: GemmaConfig) -> dict[str, dict[str, str]]:
    """The groups of model.weights.h5 that carry a layer's name, for :func:`.keras_h5.plan`.

    Those of layers without variables (dropout, softmax, RoPE, inputs) are there too, as Keras writes them.
    """
    leaves = _BLOCK | (_POST_NORMS if config.has_post_norms else {})
    names = {f"layers/{layer}/vars": name for layer, name in _MODEL.items()} | {
        "vars": "gemma_backbone"
    }
    for i in range(config.num_hidden_layers):
        n = f"_{i}" if i else ""
        block = f"layers/gemma_decoder_block{n}"
        names[f"{block}/vars"] = f"decoder_block_{i}"
        names |= {f"{block}/{leaf}/vars": name.format(n=n) for leaf, name in leaves.items()}
    return {group: {"name": name} for group, name in sorted(names.items())}


def preset_notes(config: GemmaConfig, instruction_tuned: bool) -> list[str]:
    """What a user of the preset in KerasHub must know, one sentence each."""
    notes = keras_caveats(config)
    if config.rms_norm_eps != _EPSILON:
        notes.append(
            f"keras-hub up to 0.32 ignores layer_norm_epsilon in its decoder blocks: they use {_EPSILON:g} instead of "
            f"{config.rms_norm_eps:g}."
        )
    if instruction_tuned:
        notes.append(
            "a KerasHub preset has neither chat template nor <end_of_turn> as stop token: write the turns into the "
            "prompt and pass stop_token_ids to generate()."
        )
    return notes
