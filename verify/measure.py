"""Everything a comparison measures, as plain data: a *part*. One part is a whole comparison or one shard of it.

Nothing is judged here. The work is divided so that no number depends on the division: tensors of the ledger and batches of
probes go round the shards; what is there once (floor, checks, coverage) is done by the first. What needs all of it (a look
into the first divergent block, the most likely tokens at the worst positions) is only done unsharded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..convert.progress import Progress, Silent
from ..formats.errors import UsageError
from ..model.config import GemmaConfig
from .behaviour import check_greedy_agreement, run_checks
from .checks import Check
from .coverage import coverage
from .divergence import Inside, first_divergent, look_inside, shortest_showing
from .floor import Floor, K, measure_floor
from .identity import SIZE, compare_identity
from .lockstep import LockstepResult, run_lockstep
from .options import DEQUANTIZING, Options
from .part_checks import weights_of
from .part_frame import SCHEMA, Part, frame_of, hashed, kernel_of, key_of
from .probes import Probe, ProbeSet, build_probes
from .profiles import DEFAULT_PROFILE
from .recording import compare_recording, compare_recordings
from .runners import RUNNERS, Runner
from .side import Engine, Side
from .softcap import USED, Utilisation, derive, reads_views, stress_for, stressed_check, utilisation
from .tokenizer import SentencePieceTokenizer, tokenizer_of
from .weights import compare_weights
from .worst import contexts, likely_tokens, top_ids

_COARSE = {"float64": 0, "float32": 1, "bfloat16": 2}
MAX_EXCESS = 30.0  # of a recorded floor over the reader's own, as errors; other processors differ by a few times
TAP_SCORES = 256 << 20  # bytes of attention scores a look into a block may take


def measure(
    ref: Side, cand: Side, options: Options, *, run: bool = True, progress: Progress | None = None
) -> Part:
    """Compare two sides.

    Args:
        ref: the reference.
        cand: the candidate.
        options: what to do.
        run: run the models; False compares identity and weights only.
        progress: told of bytes and tokens.

    Returns:
        JSON-ready. Where the two are different models only ``identity`` is filled.

    Raises:
        G2Error: something cannot be read or run.
    """
    meter = progress or Silent()
    options.require_embeddings(recorded=(ref.recording is not None, cand.recording is not None))
    identity = compare_identity(ref, cand)
    part = frame_of(ref, cand, options, identity, run)
    if identity.of(SIZE):
        return part
    work = _Run(ref, cand, options, part, meter) if run else None  # refuses before any work
    if options.shard is not None:
        part["weights"] = [weights_of(s, meter) for s in (ref, cand)]
    if ref.checkpoint is not None and cand.checkpoint is not None:
        total = sum(t.nbytes for c in (ref.checkpoint, cand.checkpoint) for t in c.tensors.values())
        meter.start(total // options.share[1], "weights")
        rows = compare_weights(ref.checkpoint, cand.checkpoint, progress=meter, part=options.share)
        part["ledger"] = [r.to_json() for r in rows]
    elif cand.checkpoint is not None and options.share[0] == 0:
        part["fingerprint"] = hashed(cand, meter)
    elif cand.recording is not None:
        part["fingerprint"] = cand.recording.fingerprint
    if work is not None:
        work.all()
    return part


class _Run:
    """Runs the models and fills a part."""

    def __init__(
        self, ref: Side, cand: Side, options: Options, part: Part, meter: Progress
    ) -> None:
        self.ref, self.cand, self.options, self.part, self.meter = ref, cand, options, part, meter
        self.kernel = kernel_of(cand, options)
        self.engine = Engine() if self.kernel else options.candidate
        self.tokenizer = _tokenizer(ref, cand)
        self.probes = probes_of(ref, cand, options)
        self.first = options.share[0] == 0

    def all(self) -> None:
        """Lockstep, kernel, floor, checks, extras."""
        self.part["probes"] = {
            "sha256": self.probes.sha256,
            "profile": self.probes.profile,
            "tokens": self.probes.tokens,
            "documents": len(self.probes),
            "list": [[p.id, p.group] for p in self.probes],
            "skipped": [dict(s) for s in self.probes.skipped],
        }
        layers = self.ref.config.num_hidden_layers + 1
        self.meter.start(self.probes.tokens * layers // self.options.share[1], "models", "tokens")
        result = self._compare()
        self.part["lockstep"] = result.to_json()
        self.part["contexts"] = contexts(result.records, self.probes, self.tokenizer)
        self._add_pieces(top_ids(result.records))
        if self.kernel is not None:
            self.part["kernel"] = self._compare_kernel(self.kernel).to_json()
        if self.first:
            self._floors(result)
            self._tolerance()
            self._checks()
        if self.options.shard is None:
            self._extras(result)

    def _compare(self) -> LockstepResult:
        o, share = self.options, self.options.share
        kind: dict[str, Any] = {
            "batch_tokens": o.batch_tokens, "shard": share, "progress": self.meter,
        }  # fmt: skip
        if self.ref.recording is not None and self.cand.recording is not None:
            return compare_recordings(
                self.ref.recording, self.cand.recording,
                reference_embedding=o.reference_embedding, candidate_embedding=o.candidate_embedding,
                **kind,
            )  # fmt: skip
        if self.ref.recording is not None:
            with self.cand.open_runner(self.engine) as runner:
                return compare_recording(
                    self.ref.recording, runner, reference_embedding=o.reference_embedding,
                    candidate_checkpoint=self.cand.checkpoint, device=_place(self.engine), **kind,
                )  # fmt: skip
        with (
            self.ref.open_runner(o.reference) as one,
            self.cand.open_runner(self.engine) as two,
        ):
            return run_lockstep(one, two, self.probes, device=_place(self.engine), **kind)

    def _compare_kernel(self, kernel: Engine) -> LockstepResult:
        with self.cand.open_runner(Engine()) as one, self.cand.open_runner(kernel) as two:
            return run_lockstep(
                one, two, self.probes, batch_tokens=self.options.batch_tokens,
                shard=self.options.share, progress=self.meter,
            )  # fmt: skip

    # ---- what is there once

    def _floors(self, result: LockstepResult) -> None:
        """Noise between the two runs; ``own`` is that of the candidate alone, for its checks."""
        self.own: Floor | None = None
        self.served: Floor | None = None  # of the kernel
        try:
            self._measure_floors(result)
        except UsageError as e:  # no finite position, or no estimator: claims will say so
            self.part["floor_reason"] = str(e)

    def _measure_floors(self, result: LockstepResult) -> None:
        o = self.options
        tiles = result.head == "tiles"
        mine = self.engine.computes_in
        if self.ref.recording is None:
            theirs = o.reference.computes_in
            dtype = max(theirs, mine, key=_COARSE.__getitem__)
            self.own = self._floor(self.ref, dtype, o.reference, tiles)
            self.part["floor"] = self.own.to_json()
        else:
            self._recorded_floors(mine, tiles)
        if self.kernel is not None:
            self.served = self._floor(
                self.cand, self._kernel_dtype(), Engine(), tiles=True, kernel=self.kernel
            )
            self.part["kernel_floor"] = self.served.to_json()

    def _tolerance(self) -> None:
        """What thresholds wider than usual let pass."""
        if self.options.k <= K or self.part["floor"] is None or self.cand.quantized:
            return  # what changed weights may cost is a budget, not a multiple of the floor
        checkpoint = self.ref.checkpoint or self.cand.checkpoint
        if checkpoint is None:
            self.part["let_pass"] = {"k": self.options.k, "tried": None, "passed": []}
            return
        from .unnoticed import let_pass  # imports torch

        floor = Floor.from_json(self.part["floor"])
        device = self.engine.device if self.engine.runner == "torch" else None
        self.part["let_pass"] = let_pass(checkpoint, self.probes, floor, device)

    def _kernel_dtype(self) -> str:
        """What a kernel does beyond that is imitated by :mod:`.kernel_floor`."""
        assert self.kernel is not None
        return self.kernel.computes_in

    def _recorded_floors(self, mine: str, tiles: bool) -> None:
        recording = self.ref.recording
        assert recording is not None
        other = self.cand.recording
        if self.cand.checkpoint is not None:
            self.own = self._floor(self.cand, mine, self.engine, tiles)
        elif other is not None and other.floor is not None:
            self.own = other.floor
        if recording.floor is None or self.own is None:
            self.part["floor_reason"] = (
                "a recording carries no noise floor; record again without --no-floor"
            )
            return
        excess = recording.floor.excess(self._alike(recording.floor.dtype, mine, tiles))
        if excess > MAX_EXCESS:
            self.part["floor_reason"] = (
                f"the recording's noise floor is {excess:.3g} times what this machine measures in the same "
                f"compute type, beyond {MAX_EXCESS:g}; no noise is that large"
            )
            return
        both = recording.floor.plus(self.own)
        self.part["floor"] = replace(both, k=self.options.k).to_json()

    def _alike(self, dtype: str, mine: str, tiles: bool) -> Floor:
        """The candidate's own floor in the recording's compute type, where it can be measured here."""
        assert self.own is not None
        if dtype == mine or self.cand.checkpoint is None:
            return self.own
        engine = Engine(dtype=dtype, device=_place(self.engine))
        return self._floor(self.cand, dtype, engine, tiles)

    def _floor(
        self, side: Side, dtype: str, engine: Engine, tiles: bool, kernel: Engine | None = None
    ) -> Floor:
        from .kernel_floor import is_exact, kernel_estimate  # imports torch

        served = (kernel or self.engine).runner
        floor = side_floor(side, self.options, list(self.probes), dtype, engine, tiles, served)
        checkpoint = self.cand.checkpoint
        if checkpoint is not None and not is_exact(checkpoint, served):
            extra = kernel_estimate(
                checkpoint, list(self.probes), served, batch_tokens=self.options.batch_tokens
            )
            floor = replace(floor, estimators=(*floor.estimators, extra))
        return floor

    def _checks(self) -> None:
        """What the candidate must do by itself, and coverage."""
        if self.cand.checkpoint is None:
            self.part["coverage"] = coverage(self.ref.config, self.probes)
            return
        found: list[Check] = []
        used = self._utilisation()
        with self.cand.open_runner(self.kernel or self.engine) as runner:
            found += run_checks(runner, self.probes, self.served or self.own, used=used)
        if self.probes.profile != "smoke":
            found += self._pair_checks(used)
        self.part["coverage"] = coverage(self.ref.config, self.probes, found, used)

    def _utilisation(self) -> Utilisation:
        """Of the reference where it lies here, else of the candidate's weights; by torch where a runner hides scores."""
        here = self.ref.checkpoint is not None
        side, engine = (
            (self.ref, self.options.reference) if here else (self.cand, self.kernel or self.engine)
        )
        if "taps" not in RUNNERS[engine.runner].gives:
            engine = Engine()
        with side.open_runner(engine) as runner:
            return utilisation(runner, list(self.probes))

    def _pair_checks(self, used: Utilisation) -> list[Check]:
        if self.ref.checkpoint is None or self.kernel is not None or self.cand.quantized:
            return []
        found = []
        with (
            self.ref.open_runner(self.options.reference) as one,
            self.cand.open_runner(self.engine) as two,
        ):
            found.append(check_greedy_agreement(one, two, self.probes, self.own))
        return found + (self._stressed(used) if _low(used) else [])

    def _stressed(self, used: Utilisation) -> list[Check]:
        """Both sides changed alike, so that their soft-caps are reached."""
        pair = (self.options.reference, self.engine)
        if not all(reads_views(e.runner) for e in pair):
            return []
        stress = stress_for(used)
        sides = [Side(s.path, derive(s.opened, stress), None) for s in (self.ref, self.cand)]
        dtype = max((e.computes_in for e in pair), key=_COARSE.__getitem__)
        try:
            floor: Floor | None = self._floor(sides[0], dtype, pair[0], tiles=False)
        except UsageError:
            floor = None
        with sides[0].open_runner(pair[0]) as one, sides[1].open_runner(pair[1]) as two:
            return [stressed_check(one, two, list(self.probes), floor)]

    # ---- what needs all of it

    def _extras(self, result: LockstepResult) -> None:
        if self.ref.checkpoint is None or self.cand.checkpoint is None:
            return
        with (
            self.ref.open_runner(self.options.reference) as one,
            self.cand.open_runner(self.engine) as two,
        ):
            inside = self._inside(one, two, result)
            if inside is not None:
                self.part["inside"] = _plain_inside(inside)
            likely = likely_tokens(one, two, result.records, self.probes)
        self.part["likely"] = likely
        self._add_pieces(
            {int(i) for place in likely.values() for top in place.values() for i, _ in top}
        )

    def _add_pieces(self, ids: Iterable[int]) -> None:
        if self.tokenizer is not None:
            self.part["pieces"] |= {str(i): self.tokenizer.piece(i) for i in ids}

    def _inside(self, one: Runner, two: Runner, result: LockstepResult) -> Inside | None:
        if self.own is None or not ({"taps", "replay"} <= one.gives & two.gives):
            return None
        at = first_divergent(result, self.own)
        if at is None or not 0 <= at.layer < self.ref.config.num_hidden_layers or at.error is None:
            return None
        tokens = shortest_showing(result, self.probes, at)
        if tokens is None or not fits(self.ref.config, tokens):
            return None
        return look_inside(one, two, tokens, at.layer, self.own)


def probes_of(ref: Side, cand: Side, options: Options) -> ProbeSet:
    """What a comparison runs.

    Raises:
        UsageError: a recording has its own tokens, and others are named.
    """
    if ref.recording is not None:
        options.require_no_tokens()
        return ref.recording.probes
    return build_probes(
        ref.config, _tokenizer(ref, cand), options.profile or DEFAULT_PROFILE,
        text=options.text, tokens=options.tokens, seed=options.seed or 0,
    )  # fmt: skip


def side_floor(
    side: Side,
    options: Options,
    probes: list[Probe],
    dtype: str,
    engine: Engine | None = None,
    tiles: bool = False,
    served: str = "torch",
) -> Floor:
    """The noise of running a side.

    Args:
        side: a checkpoint.
        options: for ``k``, the batches and, without ``engine``, the reference's engine.
        probes: to choose from.
        dtype: compute type.
        engine: whose arithmetic; another runner than torch and jax is stood in for by torch.
        tiles: logits are the runners' own.
        served: runner whose known shortcuts count as noise.
    """
    engine = engine or options.reference
    name = engine.runner if engine.runner in DEQUANTIZING else "torch"
    return measure_floor(
        side.opened, probes, dtype, runner=name,
        device=engine.device if name == engine.runner else None,
        emulate="llama_cpp" if served == "llama_cpp" and name == "torch" else None,
        tiles=tiles, k=options.k, batch_tokens=options.batch_tokens,
    )  # fmt: skip


def fits(config: GemmaConfig, tokens: Sequence[int] | np.ndarray[Any, Any]) -> bool:
    """Whether whole score matrices of these tokens may be held, of both sides."""
    return 2 * 8 * config.num_attention_heads * len(tokens) ** 2 <= TAP_SCORES


def _low(used: Utilisation) -> bool:
    return any(u is not None and u < USED for u in (*used.layers, used.final))


def _plain_inside(inside: Inside) -> dict[str, Any]:
    return {n: getattr(inside, n) for n in ("layer", "tap", "position", "error", "diagonal")}


def _place(engine: Engine) -> str:
    """Where the head's products are made: on the runner's device where torch knows it."""
    return engine.device if engine.runner == "torch" and engine.device else "cpu"


def _tokenizer(ref: Side, cand: Side) -> SentencePieceTokenizer | None:
    for side in (ref, cand):
        if side.checkpoint is not None:
            found = tokenizer_of(side.checkpoint)
            if found is not None:
                return found
    return None


__all__ = ["SCHEMA", "Part", "fits", "key_of", "measure", "probes_of", "side_floor"]
