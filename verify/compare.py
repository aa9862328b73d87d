"""Comparing two models: the library calls behind ``g2verify compare``, ``weights`` and ``merge``. Plain data out.

>>> from g2kit.verify.compare import compare
>>> report = compare("gemma2-2b-flax", "gemma2-2b")  # doctest: +SKIP
>>> report["verdict"]  # doctest: +SKIP
'PASS'
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy.typing as npt

from ..convert.open import Checkpoint
from ..convert.progress import Progress, Silent
from ..formats.errors import FormatError, NonFiniteError, UsageError
from ..model.config import GemmaConfig
from ..sealed import sealed
from .claims import FAIL, Claim
from .document import build, error_document, self_test_report
from .machine import environment
from .measure import Part, measure, probes_of, side_floor
from .options import Options, engines
from .part_checks import check_complete
from .profiles import DEFAULT_PROFILE
from .shards import check_parts, join, read_part
from .side import open_side

Config = str | Path | GemmaConfig | None
Where = str | Path | Checkpoint


class How(TypedDict, total=False):
    """How both sides are opened, and who watches; as of :func:`compare`."""

    fix_config: bool
    gating: str | None
    progress: Progress | None


def compare(
    ref: Where,
    cand: Where,
    *,
    profile: str | None = None,
    runner: str | None = None,
    cand_runner: str | None = None,
    dtype: str | None = None,
    cand_dtype: str | None = None,
    device: str | None = None,
    cand_device: str | None = None,
    mesh: str | None = None,
    text: str | Path | None = None,
    tokens: str | Path | npt.NDArray[Any] | None = None,
    config: Config = None,
    ref_config: Config = None,
    cand_config: Config = None,
    fix_config: bool = False,
    gating: str | None = None,
    budget: float | str | None = None,
    k: float = 10.0,
    seed: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run two models over the same tokens and judge how far apart they are.

    Args:
        ref: the reference: a checkpoint of any format, or a recording.
        cand: the candidate: a checkpoint of any format, or a recording if the reference is one.
        profile: how much to run: ``smoke``, ``ci`` (default) or ``full``; a recording has its own.
        runner: implementation that runs both, of :data:`g2kit.verify.runners.RUNNERS`; default ``torch``.
        cand_runner: another one for the candidate.
        dtype: compute type of both, such as ``float32``.
        cand_dtype: another one for the candidate.
        device: of both where both have the same runner.
        cand_device: another one for the candidate.
        mesh: ``data=2,model=4`` for the jax runner.
        text: UTF-8 file whose documents replace the built-in ones.
        tokens: ``.npy`` of ids that replace them.
        config: configuration of both, for checkpoints that carry none.
        ref_config: of the reference only.
        cand_config: of the candidate only.
        fix_config: correct values known to be wrong in published files.
        gating: ``df`` or ``fd``, for Flax checkpoints whose sizes leave the orientation open.
        budget: mean KL in nats that changed weights may cost; default the preset of the candidate's bits.
        k: thresholds are this many times the measured noise floor.
        seed: of pseudo-random token ids, default 0; a recording has its own.
        progress: told of bytes and tokens.

    Returns:
        A ``g2kit.report/1`` document; see ``report/schema.json``. Different models are a document with verdict ERROR.

    Raises:
        G2Error: a side cannot be opened or run, or the options are wrong.
    """
    one, two = engines(
        runner=runner, cand_runner=cand_runner, dtype=dtype, cand_dtype=cand_dtype, device=device,
        cand_device=cand_device, mesh=mesh,
    )  # fmt: skip
    options = Options(profile, one, two, text, tokens, budget, k, seed)
    configs = (ref_config or config, cand_config or config)
    return document_of(
        ref, cand, options, configs, fix_config=fix_config, gating=gating, progress=progress
    )


def compare_weights(
    ref: Where,
    cand: Where,
    *,
    config: Config = None,
    ref_config: Config = None,
    cand_config: Config = None,
    fix_config: bool = False,
    gating: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Claims W1, W2 and C0 only: nothing is run. See :func:`compare`."""
    configs = (ref_config or config, cand_config or config)
    how: How = {"fix_config": fix_config, "gating": gating, "progress": progress}
    return document_of(ref, cand, Options(), configs, run=False, **how)


def document_of(
    ref: Where,
    cand: Where,
    options: Options,
    configs: tuple[Config, Config] = (None, None),
    *,
    run: bool = True,
    **how: Unpack[How],
) -> dict[str, Any]:
    """:func:`compare` with its options as one object."""
    try:
        part = part_of(ref, cand, options, configs, run=run, **how)
    except NonFiniteError as e:
        return non_finite(e, "compare" if run else "weights")
    return build(join([part]))


def part_of(
    ref: Where,
    cand: Where,
    options: Options,
    configs: tuple[Config, Config] = (None, None),
    *,
    fix_config: bool = False,
    gating: str | None = None,
    run: bool = True,
    progress: Progress | None = None,
) -> Part:
    """Measurements only: a shard where ``options`` say so, to be put together by :func:`merge`."""
    with ExitStack() as stack:
        sides = [
            stack.enter_context(open_side(path, config, fix_config=fix_config, gating=gating))
            for path, config in zip((ref, cand), configs, strict=True)
        ]
        if sides[0].checkpoint is not None and sides[1].checkpoint is None:
            raise UsageError(
                "the candidate is a recording, which holds no weights.", where=sides[1].path,
                fix="name the recording first and the checkpoint after it.",
            )  # fmt: skip
        return measure(sides[0], sides[1], options, run=run, progress=progress)


def merge(parts: Iterable[str | Path]) -> dict[str, Any]:
    """The document of a comparison whose shards wrote ``parts``: the same bytes for any number of shards.

    Raises:
        UsageError: a shard is missing, twice, or of another comparison or other weights.
        FormatError: a file is no part, or tensors or positions are missing.
        ChecksumError: a part was changed.
    """
    read = [read_part(Path(p)) for p in parts]
    try:
        ordered = check_parts(read)
        check_complete(ordered)
        return build(join(ordered))
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as e:
        raise FormatError(f"a part is malformed ({e!r}).", fix="run its shard again.") from e


def record_model(
    model: Where,
    out: str | Path,
    *,
    runner: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    mesh: str | None = None,
    config: Config = None,
    fix_config: bool = False,
    gating: str | None = None,
    profile: str | None = None,
    text: str | Path | None = None,
    tokens: str | Path | npt.NDArray[Any] | None = None,
    seed: int | None = None,
    floor: bool = True,
    with_embedding: bool = False,
    overwrite: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run a model and keep what another machine needs to be compared with it.

    Args:
        model: a checkpoint.
        out: directory to make.
        floor: measure the noise floor too, without which claim X1 cannot be decided.
        with_embedding: carry the embedding along.
        overwrite: replace a recording at ``out``.
        command: for the recording's ``run``.
        runner: implementation that runs it.
        dtype: compute type.
        device: of the runner.
        mesh: for the jax runner.
        config: configuration, for a checkpoint that carries none.
        fix_config: correct values known to be wrong in published files.
        gating: ``df`` or ``fd``, for Flax checkpoints whose sizes leave the orientation open.
        profile: how much to run.
        text: file whose documents replace the built-in ones.
        tokens: ``.npy`` of ids that replace them.
        seed: of pseudo-random token ids.
        progress: told of bytes and tokens.

    Returns:
        The recording's document.

    Raises:
        G2Error: the model cannot be opened or run, or ``out`` not be written.
    """
    from .recording import check_output, record

    engine, _ = engines(runner=runner, dtype=dtype, device=device, mesh=mesh)
    options = Options(profile, engine, engine, text, tokens, seed=seed)
    meter = progress or Silent()
    with open_side(model, config, fix_config=fix_config, gating=gating) as side:
        check_output(out, side.opened, overwrite=overwrite)
        probes = probes_of(side, side, options)
        noise = side_floor(side, options, list(probes), engine.computes_in) if floor else None
        meter.start(probes.tokens, "recording", "tokens")
        with side.open_runner(engine) as running:
            return record(
                running, probes, out, checkpoint=side.opened, floor=noise,
                with_embedding=with_embedding, overwrite=overwrite, command=command, progress=meter,
            )  # fmt: skip


def self_test_document(
    model: Where,
    *,
    config: Config = None,
    fix_config: bool = False,
    gating: str | None = None,
    device: str | None = None,
    profile: str = DEFAULT_PROFILE,
    only: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make every known mistake in a model; the report says which claims noticed, and where.

    Args:
        model: a checkpoint.
        only: ids of mistakes; default all.
        config: configuration, for a checkpoint that carries none.
        fix_config: correct values known to be wrong in published files.
        gating: ``df`` or ``fd``, for Flax checkpoints whose sizes leave the orientation open.
        device: of the runner.
        profile: how much to run.
        progress: told of bytes and tokens.

    Returns:
        A ``g2kit.report/1`` document of kind ``self-test``: FAIL if a mistake passed unnoticed or was found elsewhere.

    Raises:
        G2Error: the model cannot be opened or run.
    """
    from .self_test import require_known, self_test

    engine, _ = engines(dtype="float32", device=device)
    options = Options(profile, engine, engine)
    meter = progress or Silent()
    with open_side(model, config, fix_config=fix_config, gating=gating) as side:
        require_known(side.opened, only)
        probes = list(probes_of(side, side, options))
        floor = side_floor(side, options, probes, "float32")
        meter.start(0, "mistakes", "tokens")
        found = self_test(side.opened, probes, floor, only=only, device=device, progress=meter)
        settings = {**options.describe(), "only": list(only)}
        return self_test_report(
            found, side.describe(engine), floor, settings, environment((engine,))
        )


def self_test_estimate(
    model: Where,
    *,
    config: Config = None,
    fix_config: bool = False,
    gating: str | None = None,
    device: str | None = None,
    profile: str = DEFAULT_PROFILE,
    only: Sequence[str] = (),
) -> tuple[dict[str, Any], list[str]]:
    """What :func:`self_test_document` with these arguments would take, as data and as lines; runs nothing.

    Raises:
        G2Error: the model cannot be opened, or no mistake is called so.
    """
    from .estimate_self_test import estimate_self_test, lines

    engine, _ = engines(dtype="float32", device=device)
    with open_side(model, config, fix_config=fix_config, gating=gating) as side:
        found = estimate_self_test(side, Options(profile, engine, engine), only)
    return found, lines(found)


def logits_to_file(
    model: Where,
    tokens: str | Path | npt.NDArray[Any],
    out: str | Path,
    *,
    runner: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    mesh: str | None = None,
    config: Config = None,
    fix_config: bool = False,
    gating: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """A model's logits as a ``.npy`` file, float32 ``[batch, positions, vocab]``, never all of it in memory.

    Args:
        model: a checkpoint.
        tokens: ids ``[n]`` or ``[batch, n]``, or a ``.npy`` file of them.
        out: file to write.
        runner: implementation that runs it.
        dtype: compute type.
        device: of the runner.
        mesh: for the jax runner.
        config: configuration, for a checkpoint that carries none.
        fix_config: correct values known to be wrong in published files.
        gating: ``df`` or ``fd``, for Flax checkpoints whose sizes leave the orientation open.
        progress: told of bytes and tokens.

    Returns:
        ``shape``, ``bytes``, ``non_finite`` (None, or where the first NaN or infinity is), ``notes``.

    Raises:
        G2Error: the model cannot be opened or run, or the ids do not fit it.
    """
    from .logits_file import read_tokens, write_logits

    ids = read_tokens(tokens)
    engine, _ = engines(runner=runner, dtype=dtype, device=device, mesh=mesh)
    meter = progress or Silent()
    with (
        open_side(model, config, fix_config=fix_config, gating=gating) as side,
        side.open_runner(engine) as running,
    ):
        meter.start(int(ids.size), "logits", "tokens")
        return write_logits(running, ids, out, progress=meter)


def non_finite(e: NonFiniteError, kind: str) -> dict[str, Any]:
    """The document for packed weights whose scales are NaN: they cannot be run, and are wrong for certain."""
    claim = Claim("W1", "The weights are finite", FAIL, f"NaN or infinity: {e}")
    document = error_document(e, kind, claims=[claim.to_json()])
    return sealed({**document, "verdict": FAIL, "exit_code": 1, "summary": claim.sentence})
