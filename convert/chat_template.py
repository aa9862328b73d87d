r"""Gemma's chat format as a Jinja template, and how to tell that a model was tuned for it.

The format: ``<bos><start_of_turn>user\n…<end_of_turn>\n<start_of_turn>model\n…<end_of_turn>\n``;
turns alternate, beginning with the user; there is no system turn.

Nothing in a checkpoint of arrays tells an instruction-tuned model from a base model. The signs, in
this order: what the user says; an end of sequence that includes ``<end_of_turn>``; a chat template
beside the weights; ``it`` or ``instruct`` as a word of the directory's or file's name, as in
``gemma2-2b-it``.
"""

from __future__ import annotations

import re
from pathlib import Path

START, END = "<start_of_turn>", "<end_of_turn>"
_NAME = re.compile(r"(?:^|[-_.])(?:it|instruct)(?=$|[-_.])", re.IGNORECASE)

# every tag trims its surroundings, so it renders alike under any whitespace setting
GEMMA_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{{- raise_exception('Gemma has no system role: put the instruction into the first user turn.') -}}"
    "{%- endif -%}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{%- if role != ('user' if loop.index0 % 2 == 0 else 'model') -%}"
    "{{- raise_exception('Turns must alternate user, assistant, user, ..., beginning with user.') -}}"
    "{%- endif -%}"
    f"{{{{- '{START}' + role + '\\n' + message['content'] | trim + '{END}\\n' -}}}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    f"{{{{- '{START}model\\n' -}}}}"
    "{%- endif -%}"
)


def tuned_for_chat(
    stated: bool | None,
    eos: tuple[int, ...],
    end_of_turn: int | None,
    template: str | None,
    path: Path,
) -> tuple[bool, str]:
    """Whether a model is instruction-tuned, and by what sign.

    Args:
        stated: what the user says, or None.
        eos: end of sequence ids of the configuration and the generation configuration.
        end_of_turn: id of ``<end_of_turn>``, or None where the vocabulary lacks it.
        template: the source's chat template, or None.
        path: the checkpoint.
    """
    if stated is not None:
        return stated, "as stated"
    if end_of_turn is None:
        return False, f"the vocabulary has no {END}"
    if end_of_turn in eos:
        return True, f"{END} ends its output"
    if template is not None and END in template:
        return True, "a chat template lies beside the weights"
    for name in (path.name, path.stem, path.absolute().parent.name if path.is_file() else ""):
        if _NAME.search(name):
            return True, f"its name is {name}"
    return False, "nothing says that it is"
