"""The artefact as its users run it: loaded by transformers from its own directory, eager attention.

transformers holds the whole model and runs it whole; :meth:`TransformersRunner.advance` hands out what hooks saw after
each block. Nothing of this package computes anything here.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from torch import Tensor

from ...convert.open import Checkpoint, open_checkpoint
from ...formats.errors import FileIOError, FormatError, MissingTensorError, UsageError, printable
from ...formats.names import listing
from ...model.config import GemmaConfig
from .base import Array, Decoder, DecodeState, Runner, Tap, Tokens, tile_edges
from .torch_runner import as_numpy, exact_products, torch_device

# what its code raises on values of config.json that it did not expect; running out of memory is none of them
_REFUSALS = (TypeError, ValueError, AttributeError, LookupError, AssertionError, ArithmeticError)


class TransformersRunner(Runner):
    """See :class:`.base.Runner`.

    Args:
        checkpoint: a Hugging Face directory (a checkpoint's path is taken).
        dtype: ``float32`` or ``bfloat16`` (transformers computes norms and RoPE in float32 whatever is asked).
        device: as in torch.
        config: not taken: what transformers makes of the directory is what is looked at.

    Raises:
        G2Error: transformers cannot load it, or leaves a weight at random.
    """

    name: ClassVar[str] = "transformers"
    gives: ClassVar[frozenset[str]] = frozenset({"logits", "blocks", "decode"})
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")

    def __init__(
        self,
        checkpoint: str | Path | Checkpoint,
        *,
        dtype: str = "float32",
        device: str | None = None,
        config: str | Path | GemmaConfig | None = None,
    ) -> None:
        if config is not None:
            raise UsageError(
                "the transformers runner takes no config: it uses the config.json beside the weights."
            )
        path = checkpoint.path if isinstance(checkpoint, Checkpoint) else Path(checkpoint)
        self.dtype, self._path = dtype, path
        self._device = torch_device(device)
        if not (path / "config.json").is_file():
            raise FileIOError(
                "transformers needs a directory with config.json and weights.",
                where=path,
                fix="convert the checkpoint with `g2conv convert SRC DIR --to safetensors`.",
            )
        with open_checkpoint(path) as opened:
            if opened.layout.variant.name not in ("huggingface", "huggingface-bin"):
                raise FormatError(
                    f"transformers reads Hugging Face's layout, this is {opened.layout.variant.name}.",
                    where=path,
                    fix="convert it with `g2conv convert SRC DIR --to safetensors`.",
                )
            self.config = opened.config
        self._model = _load(path, getattr(torch, dtype)).to(self._device)
        self._states: list[Tensor] = []
        for module in (*self._model.model.layers, self._model.model.norm):
            module.register_forward_hook(self._keep)
        self._model.model.layers[0].register_forward_pre_hook(self._keep_input, with_kwargs=True)
        self._logits: Tensor | None = None

    def start(self, tokens: Tokens, padding: Any = None) -> Array:
        """See :meth:`.base.Runner.start`. Runs the whole model."""
        batch = self._begin(tokens, padding)
        self._logits = self._forward(batch.tokens, batch.real, batch.positions).logits
        return as_numpy(self._states[0])

    def advance(self, tap: Tap | None = None) -> Array:
        """See :meth:`.base.Runner.advance`."""
        layer = self._next_layer()
        if tap is not None:
            raise self._cannot("taps")
        self.layer = layer + 1
        return as_numpy(self._states[self.layer])

    def final_hidden(self) -> Array:
        """See :meth:`.base.Runner.final_hidden`."""
        self._all_ran()
        return as_numpy(self._states[-1])

    def logit_tiles(
        self, rows: int | None = None, positions: slice = slice(None)
    ) -> Iterator[tuple[int, int, Array]]:
        """See :meth:`.base.Runner.logit_tiles`. Pieces of the logits transformers made, which are in memory whole."""
        self._all_ran()
        assert self._logits is not None
        for start, stop in tile_edges(self.config.vocab_size, rows):
            yield start, stop, as_numpy(self._logits[:, positions, start:stop])

    def decoder(self, batch: int = 1, capacity: int | None = None) -> Decoder:
        """See :meth:`.base.Runner.decoder`."""
        return TransformersDecoder(self, DecodeState(self.config, batch, capacity))

    def close(self) -> None:
        """See :meth:`.base.Runner.close`."""
        self._model, self._states, self._logits = None, [], None

    def _forward(self, tokens: Array, real: Array, positions: Array, **options: Any) -> Any:
        """One call of the model; ``real`` covers all keys.

        Raises:
            FormatError: transformers loaded the model but cannot run it; its first line is quoted.
        """
        self._states = []
        try:
            with exact_products():
                return self._model(
                    input_ids=torch.from_numpy(tokens).to(self._device),
                    attention_mask=torch.from_numpy(real.astype(np.int64)).to(self._device),
                    position_ids=torch.from_numpy(positions).to(self._device),
                    **options,
                )
        except _REFUSALS as e:
            raise FormatError(
                f"transformers {transformers.__version__} cannot run it: {_first_line(e)}",
                where=self._path,
                fix="look at the values of config.json.",
            ) from e

    def _keep(self, module: Any, inputs: Any, output: Any) -> None:
        self._states.append(output[0] if isinstance(output, tuple) else output)

    def _keep_input(self, module: Any, inputs: Any, named: Any) -> None:
        self._states.append(inputs[0] if inputs else named["hidden_states"])


class TransformersDecoder(Decoder):
    """transformers' own cache."""

    def __init__(self, runner: TransformersRunner, state: DecodeState) -> None:
        self._runner, self._state = runner, state
        self._cache: Any = None

    def step(self, tokens: Tokens, padding: Any = None, *, last: int | None = None) -> Array:
        """See :meth:`.base.Decoder.step`."""
        batch, slots = self._state.take(tokens, padding)
        real = self._state.real[:, : slots.stop]
        done = self._runner._forward(
            batch.tokens, real, batch.positions, past_key_values=self._cache, use_cache=True,
            logits_to_keep=last or 0,
        )  # fmt: skip
        self._cache = done.past_key_values
        return as_numpy(done.logits)[..., : self._runner.config.vocab_size]


def _first_line(e: Exception) -> str:
    return printable((str(e) or repr(e)).splitlines()[0])


def _load(path: Path, dtype: torch.dtype) -> Any:
    """The model in evaluation mode; no network, no code from the directory.

    Raises:
        FormatError: transformers refuses it; its first line is quoted.
        MissingTensorError: weights are missing, which transformers fills with random numbers.
    """
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        # compressed-tensors draws a bar for each of its steps, which nothing switches off
        with redirect_stderr(io.StringIO()):
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, attn_implementation="eager", output_loading_info=True,
                local_files_only=True, trust_remote_code=False,
            )  # fmt: skip
            if getattr(model, "hf_quantizer", None) is not None:
                with torch.no_grad():
                    model(torch.zeros(1, 1, dtype=torch.int64))  # the first pass unpacks
    except Exception as e:  # whatever its loaders raise
        raise FormatError(
            f"transformers {transformers.__version__} cannot load it: {_first_line(e)}",
            where=path,
        ) from e
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
    missing = [n for n in info["missing_keys"] if n != "lm_head.weight"]
    if missing or info["mismatched_keys"]:
        names = listing(sorted(missing or (str(m) for m in info["mismatched_keys"])))
        raise MissingTensorError(
            f"transformers finds no fitting weight for {names} and would run random numbers.",
            where=path,
        )
    return model.eval()
