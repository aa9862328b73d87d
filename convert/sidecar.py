"""The files that travel beside the weights: found, checked, and made for a Hugging Face directory.

One place to import from; see the modules for what each does.
"""

from .chat_template import GEMMA_TEMPLATE, tuned_for_chat
from .huggingface_files import built_tokenizer_config, huggingface_files
from .sidecar_files import Sidecars, find_sidecars
from .tokenizer_check import TokenizerInfo, check_tokenizer, check_tokenizer_json
from .tokenizer_json import tokenizer_json

__all__ = [
    "GEMMA_TEMPLATE",
    "Sidecars",
    "TokenizerInfo",
    "built_tokenizer_config",
    "check_tokenizer",
    "check_tokenizer_json",
    "find_sidecars",
    "huggingface_files",
    "tokenizer_json",
    "tuned_for_chat",
]
