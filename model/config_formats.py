"""GemmaConfig from and to every framework's own configuration, in one place.

Nothing here touches files: configurations arrive parsed. Every reader returns a
:class:`ConfigReading`, which says where each value came from and which values look wrong;
:func:`fix` puts those right.
"""

from .config_gguf import from_gguf, llama_cpp_query_scalar, size_label, to_gguf
from .config_huggingface import from_huggingface, to_huggingface
from .config_keras import from_keras, keras_caveats, to_keras
from .config_maxtext import from_maxtext, to_maxtext
from .config_plain import completed, from_plain, to_plain
from .config_reading import ConfigReading, ConfigWarning, fix
from .config_shapes import (
    PADDING_ROWS,
    axis_sizes,
    check_shapes,
    closest_preset,
    from_preset,
    from_shapes,
    shape_differences,
)

__all__ = [
    "PADDING_ROWS",
    "ConfigReading",
    "ConfigWarning",
    "axis_sizes",
    "check_shapes",
    "closest_preset",
    "completed",
    "fix",
    "from_gguf",
    "from_huggingface",
    "from_keras",
    "from_maxtext",
    "from_plain",
    "from_preset",
    "from_shapes",
    "keras_caveats",
    "llama_cpp_query_scalar",
    "shape_differences",
    "size_label",
    "to_gguf",
    "to_huggingface",
    "to_keras",
    "to_maxtext",
    "to_plain",
]
