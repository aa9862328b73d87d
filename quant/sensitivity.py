"""How much each linear weight matters: KL of the original against the model with that weight alone rounded.

Held-out sequences run through the original model, one block in memory. At every block each of its weights is rounded on
its own, and what the block then gives goes along as a further stream of hidden states, on disk, to the end, where it is
compared with the original's logits. Three ways to spend time:

- ``every``: a stream for every weight in every choice;
- ``linear``: one for every weight, in the choice in the middle. The others are that KL times the ratio of the errors in the
  weight's output, tried on some of its rows: KL grows with the square of a small error;
- ``block``: one for every block with all its weights rounded, its KL shared out among them by the
  errors that each leaves in the block's output. Seven times fewer streams than ``linear``.

The work directory makes it resumable, block by block; then stream by stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..convert.open import Checkpoint
from ..convert.progress import Tick
from ..formats.errors import NonFiniteError
from ..model import canonical
from ..model import torch_gemma as tg
from ..model.logits import compare
from .calibration import Calibration
from .choose import Inputs, Target, choose, inputs_of
from .hessian import STAGES, Collector
from .pipeline import BATCH_TOKENS, Batch, batches
from .states import States
from .weights import Weights
from .work import Work

MEASURES = ("linear", "every", "block")
TOKENS = 1024
ROWS = 128  # of a weight, that further choices are tried on


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        choices: what a weight may become, by growing size.
        method: of :func:`.choose.choose`.
        measure: one of :data:`MEASURES`.
        tokens: held-out tokens to measure on; whole sequences, at least one.
        keep_states: hold hidden states in memory; they lie on disk either way.
        batch_tokens: tokens at a time.
    """

    choices: tuple[Target, ...]
    method: str = "gptq"
    measure: str = "linear"
    tokens: int = TOKENS
    keep_states: bool = False
    batch_tokens: int = BATCH_TOKENS

    @property
    def anchor(self) -> Target:
        """The choice whose KL is measured."""
        return self.choices[(len(self.choices) - 1) // 2]


@dataclass
class _Stream:
    """What the model gives with some weights rounded: where its states lie, and then its KL.

    Attributes:
        names: the rounded weights.
        choice: what to.
        layer: where it leaves the original.
        index: its place behind the original's states.
    """

    names: tuple[str, ...]
    choice: str
    layer: int
    index: int


@dataclass
class _Measured:
    """What is known so far: weight -> choice -> JSON values; and the streams."""

    errors: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    streams: list[_Stream] = field(default_factory=list)


class Sensitivity:
    """One measurement of a model.

    Args:
        checkpoint: the model.
        calibration: Hessians come from its ``train``, everything else from its ``held``.
        work: where results go, block by block.
        options: how.
    """

    def __init__(
        self, checkpoint: Checkpoint, calibration: Calibration, work: Work, options: Options
    ) -> None:
        self.checkpoint, self.work, self.options = checkpoint, work, options
        self.config = checkpoint.config
        self.linears = canonical.linears(checkpoint.tensors)
        self._weights = Weights(checkpoint)
        self._train = calibration.train
        self._held = calibration.held[: _enough(calibration.held, options.tokens)]
        self._tokens = calibration.tokens
        self._judged = sum(map(len, self._held))
        self._parts = batches(self._train, 0, options.batch_tokens)
        self._measured = _Measured()

    @torch.no_grad()
    def run(self, meter: Tick) -> dict[str, Any]:
        """Do what is not done yet.

        Returns:
            JSON-ready: ``tokens`` measured on, ``anchor``, ``linears``: weight -> ``weights`` (how many), ``choices``: choice ->
            ``kl``, ``measured``, ``error`` (mean squared error of the block's output relative to it), ``method``.

        Raises:
            NonFiniteError: NaN or infinity in weights or activations; names where.
        """
        layers = self.config.num_hidden_layers
        done = sum(i < layers for i in self.work.layers)
        for i in range(done):
            self._learn(self.work.layers[i])
        with ExitStack() as stack:
            states = self._begin(done, stack)
            for layer in range(done, layers):
                states = self._layer(layer, states, stack, meter)
            kls = self._evaluate(states, meter)
        return {
            "tokens": self._judged,
            "anchor": str(self.options.anchor),
            "linears": self._document(kls),
        }

    # ---- streams of hidden states: train, the original on held-out text, then every stream

    def _rows(self, streams: int) -> int:
        return self._tokens + self._judged * (1 + streams)

    def _open(self, layer: int, streams: int, stack: ExitStack, *, create: bool) -> States:
        keep = self.options.keep_states
        found = States(
            self.work.states(layer), self._rows(streams), self.config.hidden_size, keep=keep,
            create=create,
        )  # fmt: skip
        stack.callback(found.close)
        return found

    def _begin(self, done: int, stack: ExitStack) -> States:
        if done:
            return self._open(done, len(self._measured.streams), stack, create=False)
        states = self._open(0, 0, stack, create=True)
        row = 0
        for ids in (*self._train, *self._held):
            states.write(row, self._weights.embed(torch.from_numpy(ids)))
            row += len(ids)
        return states

    def _held_at(self, stream: int) -> list[Batch]:
        """Batches of held-out sequences: of the original (-1), or of a stream."""
        start = self._tokens + self._judged * (1 + stream)
        return batches(self._held, start, self.options.batch_tokens)

    def _read(self, states: States, parts: Sequence[Batch]) -> Iterator[Tensor]:
        for b in parts:
            yield states.read(b.start, b.stop).view(b.count, b.length, self.config.hidden_size)

    def _run(
        self, layer: int, weights: Mapping[str, Tensor], x: Tensor, linear: tg.Linear
    ) -> Tensor:
        positions = torch.arange(x.shape[1]).expand(x.shape[:2])
        y = tg.block(x, weights, layer, self.config, positions, linear=linear)[0]
        if not bool(torch.isfinite(y).all()):
            raise NonFiniteError(
                "the block's output is NaN or infinite on calibration text.",
                tensor=canonical.DOWN.format(i=layer),
                fix="check the model with `g2verify compare`; nothing was written.",
            )
        return y

    def _through(
        self, layer: int, weights: Mapping[str, Tensor], states: States, parts: Sequence[Batch]
    ) -> Tensor:
        """Rows behind the block ``[rows, hidden_size]``."""
        found = [
            self._run(layer, weights, x, tg.plain_linear).reshape(-1, self.config.hidden_size)
            for x in self._read(states, parts)
        ]
        return torch.cat(found)

    # ---- one block

    def _layer(self, layer: int, states: States, stack: ExitStack, meter: Tick) -> States:
        original = self._weights.block(layer)
        known = len(self._measured.streams)
        told: dict[str, Any] = {"errors": {}, "streams": []}
        new: list[Tensor] = []
        reference = self._through(layer, original, states, self._held_at(-1))
        together = dict(original)
        for name, inputs in self._inputs(layer, original, states):
            entries: dict[str, Any] = {}
            for target in self._whole:
                choice = choose(original[name], target, inputs, self.options.method)
                value = choice.value.dequantize()
                given = self._through(layer, original | {name: value}, states, self._held_at(-1))
                error = _error(reference, given)
                entries[str(target)] = {"error": error, "method": choice.record["method"]}
                if target == self.options.anchor:
                    together[name] = value
                if self.options.measure != "block":
                    told["streams"].append([[name], str(target)])
                    new.append(given)
            entries |= self._others(original[name], together[name], inputs, entries)
            told["errors"][name] = {str(t): entries[str(t)] for t in self.options.choices}
            meter(original[name].numel() * 4, name)
        if self.options.measure == "block":
            told["streams"].append([list(told["errors"]), str(self.options.anchor)])
            new.append(self._through(layer, together, states, self._held_at(-1)))
        after = self._open(layer + 1, known + len(new), stack, create=True)
        self._advance(layer, original, states, after, known)
        after.write(self._tokens, reference)
        for k, rows in enumerate(new):
            after.write(self._rows(known + k), rows)
        after.sync()
        self.work.finish_layer(layer, {}, told)
        self._learn({"layer": layer, **told})
        states.close()
        return after

    @property
    def _whole(self) -> tuple[Target, ...]:
        """Choices in which whole weights are rounded."""
        return self.options.choices if self.options.measure == "every" else (self.options.anchor,)

    def _inputs(
        self, layer: int, original: dict[str, Tensor], states: States
    ) -> Iterator[tuple[str, Inputs]]:
        """Every weight of a block and what is known of its inputs."""
        collector = Collector(STAGES, layer, self.config, original)

        def run(x: Tensor) -> object:
            return self._run(layer, original, x, collector)

        collector.watch(run, self._read(states, self._parts), holding=False)
        collector.watch(run, self._read(states, self._held_at(-1)), holding=True)
        while collector.moments:
            moments = collector.moments.pop(0)
            held, hessian = moments.held(), moments.hessian()
            factored = self.options.method != "rtn"
            inputs = inputs_of(hessian, held, moments.tokens, factored=factored)
            yield from ((name, inputs) for name in moments.names)

    def _others(
        self, weight: Tensor, anchor: Tensor, inputs: Inputs, known: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The other choices, tried on some rows: rows are rounded independently of each other."""
        rows = slice(None, None, max(1, len(weight) // ROWS))
        few, output = weight[rows], inputs.held @ (weight[rows] - anchor[rows]).T
        base = float(output.square().sum(dtype=torch.float64)) or 1.0
        size = float((inputs.held @ few.T).square().sum(dtype=torch.float64))
        out = {}
        for target in self.options.choices:
            if str(target) in known:
                continue
            record = choose(few, target, inputs, self.options.method).record
            error = known[str(self.options.anchor)]["error"] * record["error"] * size / base
            out[str(target)] = {"error": error, "method": record["method"]}
        return out

    def _advance(
        self, layer: int, original: Mapping[str, Tensor], states: States, after: States, known: int
    ) -> None:
        streams = [b for s in range(known) for b in self._held_at(s)]
        last = layer + 1 == self.config.num_hidden_layers  # nothing is gathered behind it
        for b in (*(() if last else self._parts), *streams):
            (x,) = self._read(states, [b])
            after.write(b.start, self._run(layer, original, x, tg.plain_linear))

    def _learn(self, line: Mapping[str, Any]) -> None:
        self._measured.errors.update(line["errors"])
        for names, choice in line["streams"]:
            index = len(self._measured.streams)
            self._measured.streams.append(_Stream(tuple(names), choice, line["layer"], index))

    # ---- the end

    def _evaluate(self, states: States, meter: Tick) -> list[float]:
        """KL of every stream; a block's streams are done and kept together."""
        layers = self.config.num_hidden_layers
        norm = self._weights.final_norm()
        out: list[float] = []
        for layer in range(layers):
            step = layers + 1 + layer  # states(layers) must outlive all of them
            if step not in self.work.layers:
                mine = [s for s in self._measured.streams if s.layer == layer]
                kls = [self._kl(states, s.index, norm) for s in mine]
                self.work.finish_layer(step, {}, {"kl": kls})
            out += self.work.layers[step]["kl"]
            meter(0, f"block {layer}")
        return out

    def _kl(self, states: States, stream: int, norm: Tensor) -> float:
        """Mean over held-out positions."""
        config, total = self.config, 0.0
        start, shift = self._tokens, self._judged * (1 + stream)
        for ids in self._held:
            ref, cand = (
                tg.rms_norm(states.read(a, a + len(ids)), norm, config.rms_norm_eps)
                for a in (start, start + shift)
            )
            stats = compare(
                ref, cand, self.checkpoint.tensors[canonical.EMBED],
                cap=config.final_logit_softcapping, vocab=config.vocab_size, scratch=64 << 20,
            )  # fmt: skip
            total += float(stats.kl.sum())
            start += len(ids)
        return total / self._judged

    def _document(self, kls: Sequence[float]) -> dict[str, Any]:
        errors, anchor = self._measured.errors, str(self.options.anchor)
        measured: dict[str, dict[str, float]] = {n: {} for n in errors}
        for stream, kl in zip(self._measured.streams, kls, strict=True):
            whole = sum(errors[n][stream.choice]["error"] for n in stream.names) or 1.0
            for name in stream.names:
                share = errors[name][stream.choice]["error"] / whole
                measured[name][stream.choice] = kl * (share if len(stream.names) > 1 else 1.0)
        out = {}
        for name in self.linears:
            base, at = measured[name][anchor], errors[name][anchor]["error"]
            out[name] = {
                "weights": self.checkpoint.tensors[name].shape[0]
                * self.checkpoint.tensors[name].shape[1],
                "choices": {
                    choice: {
                        "kl": measured[name].get(choice, base * entry["error"] / (at or 1.0)),
                        "measured": choice in measured[name] and self.options.measure != "block",
                        **entry,
                    }
                    for choice, entry in errors[name].items()
                },
            }
        return out


def _enough(sequences: Sequence[Any], tokens: int) -> int:
    """How many of them it takes."""
    count = total = 0
    while count < len(sequences) and (not count or total + len(sequences[count]) <= tokens):
        total += len(sequences[count])
        count += 1
    return count


def _error(reference: Tensor, given: Tensor) -> float:
    """Mean over tokens of the squared difference, relative to the token's own size."""
    power = reference.double().square().sum(1).clamp_min(1e-30)
    return float(((given - reference).double().square().sum(1) / power).mean())
