"""Gathering a shard's moments (:mod:`.moments`): one pass over the original model with a share of the batches."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .. import __version__
from ..convert import digest
from ..convert.open import Checkpoint, open_checkpoint
from ..convert.progress import Progress, Report, Silent
from ..formats import output_paths as paths
from ..formats.errors import UsageError
from ..formats.output_commit import exists_error
from ..model import torch_gemma as tg
from ..model.config import GemmaConfig
from . import own_text, plan
from .calibration import SELF, Calibration
from .hessian import STAGES, Collector
from .known import known_of, require_device
from .moments import IDS, NAME, SCHEMA, UNITS, VERSION, ExactMoments, checksum, file_name
from .pipeline import BATCH_TOKENS, batches
from .states import States
from .weights import Weights


def gather_moments(
    src: str | Path,
    dst: str | Path,
    *,
    shard: str = "0/1",
    calibration: str | Path | npt.ArrayLike = SELF,
    samples: int | None = None,
    seq_len: int | None = None,
    held_out: float | None = None,
    seed: int = 0,
    config: str | Path | GemmaConfig | None = None,
    fix_config: bool = False,
    gating: str | None = None,
    max_memory: int | str | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Report:
    """Gather the moments that ``quantize(moments=…)`` needs, or a share of them.

    Args:
        src: any checkpoint g2conv opens.
        dst: directory to make.
        shard: ``i/N``: every N-th batch of sequences, from the i-th on.
        calibration: as :func:`.api.quantize`, of all shards together; so are ``samples``, ``seq_len``, ``held_out``, ``seed``,
            ``config``, ``fix_config``, ``gating``, ``max_memory`` and ``device``.
        samples: see there.
        seq_len: see there.
        held_out: see there.
        seed: see there.
        config: see there.
        fix_config: see there.
        gating: see there.
        max_memory: see there.
        device: see there.
        progress: told of phases and bytes.

    Returns:
        JSON-ready: ``path``, ``shard``, ``of``, ``tokens``, ``calibration``, ``source_fingerprint``.

    Raises:
        G2Error: any subclass; ``dst`` is not there then.
    """
    part = parse_shard(shard)
    require_device(device)
    limit = plan.memory_limit(max_memory)
    dst, meter = paths.normalise(Path(dst)), progress or Silent()
    with open_checkpoint(src, config=config, fix_config=fix_config, gating=gating) as checkpoint:
        if paths.check_kind(dst, is_file=False):
            raise exists_error(dst)
        known = known_of(checkpoint, calibration, samples, seq_len, held_out, device=device)
        if known.direct:
            raise UsageError("there are no moments without calibration sequences.")
        found = known.text
        if found is None:
            found = own_text.written(checkpoint, known.wanted, seed, limit, meter, device)
        keep = plan.keeps_states(checkpoint.config, found.tokens, limit)
        told = gather(checkpoint, found, dst, part, keep_states=keep, progress=meter, device=device)
    return {"path": str(dst), **told}


def parse_shard(text: str) -> tuple[int, int]:
    """``"i/N"``, counted from 0.

    Raises:
        UsageError: anything else.
    """
    found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
    i, n = (int(found[1]), int(found[2])) if found else (0, 0)
    if not i < n:
        raise UsageError(
            f"--shard is {text!r}.", fix="pass i/N with i from 0 to N - 1, such as 0/4."
        )
    return i, n


def gather(
    checkpoint: Checkpoint,
    calibration: Calibration,
    dst: Path,
    shard: tuple[int, int],
    *,
    keep_states: bool = True,
    device: str = "cpu",
    progress: Progress,
) -> dict[str, Any]:
    """Gather a shard's moments of every linear layer's inputs in the original model.

    Args:
        checkpoint: the model.
        calibration: all sequences; batch ``b`` belongs to shard ``b % N``.
        dst: directory to make; appears when it is complete.
        shard: ``(i, N)``.
        keep_states: hold hidden states in memory.
        device: to compute on.
        progress: told of bytes of weights done.

    Returns:
        What ``moments.json`` says.
    """
    progress.start(sum(t.nbytes for t in checkpoint.tensors.values()), "reading")
    fingerprint = digest.root(digest.digests(checkpoint, progress))
    partial = Path(tempfile.mkdtemp(prefix=f"{dst.name}.", suffix=".partial", dir=dst.parent))
    try:
        run = _Pass(checkpoint, calibration, shard, partial, device)
        tokens = run.all_layers(keep_states, progress)
        checkpoint.source.check_unchanged()
        sequences = [*calibration.train, *calibration.held]
        np.save(partial / IDS, np.concatenate(sequences))
        document = {
            "schema": SCHEMA,
            "version": VERSION,
            "g2kit": __version__,
            "shard": shard[0],
            "of": shard[1],
            "tokens": tokens,
            "source_fingerprint": fingerprint,
            "crc32": run.checksums,
            "calibration": {
                "source": calibration.source,
                "train": len(calibration.train),
                "lengths": [len(s) for s in sequences],
                "sha256": calibration.sha256,
            },
        }
        (partial / NAME).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
        partial.rename(dst)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return document


class _Pass:
    """A shard's batches going through all blocks."""

    def __init__(
        self, checkpoint: Checkpoint, calibration: Calibration, shard: tuple[int, int], where: Path, device: str
    ) -> None:  # fmt: skip
        self.config, self.where, self.device = checkpoint.config, where, device
        self.weights = Weights(checkpoint, device=device)
        self.calibration = calibration
        every = batches(calibration.train, 0, BATCH_TOKENS)
        self.mine = [b for k, b in enumerate(every) if k % shard[1] == shard[0]]
        self.checksums: dict[str, int] = {}
        # the first batch sets the units, whoever adds it
        self.seen = self.mine if every[0] in self.mine else [every[0], *self.mine]

    @torch.no_grad()
    def all_layers(self, keep_states: bool, progress: Progress) -> int:
        """Write every layer's moments and their units; tokens of this shard."""
        ids = np.concatenate(self.calibration.train)
        layers = range(self.config.num_hidden_layers)
        progress.start(len(layers), "gathering (layers)")
        units: dict[str, Any] = {}
        states = States(
            self.where / "states.bin", len(ids), self.config.hidden_size, keep=keep_states, create=True
        )  # fmt: skip
        try:
            for b in self.seen:
                states.write(b.start, self.weights.embed(torch.from_numpy(ids[b.start : b.stop])))
            for layer in layers:
                for stage, m in enumerate(self._layer(layer, states)):
                    flat = torch.cat([p.view(-1) for p in m.panels])
                    sums, name = flat.cpu().numpy(), file_name(layer, stage)
                    np.save(self.where / name, sums)
                    self.checksums[name] = checksum(sums)
                    assert m.units is not None
                    units[f"{layer}-{stage}"] = m.units.to(torch.int16).cpu().numpy()
                progress(1, f"layer {layer}")
        finally:
            states.close()
        states.path.unlink()
        np.savez(self.where / UNITS, **units)
        return sum(b.count * b.length for b in self.mine)

    def _layer(self, layer: int, states: States) -> list[ExactMoments]:
        """Moments of a layer's stages; the states go through it."""
        block = self.weights.block(layer)
        collector = Collector(STAGES, layer, self.config, block, 0, kind=ExactMoments, stop=False)
        moments = [m for m in collector.moments if isinstance(m, ExactMoments)]
        for b in self.seen:
            for m in moments:
                m.adding = b in self.mine
            x = states.read(b.start, b.stop).view(b.count, b.length, -1).to(self.device)
            positions = torch.arange(b.length, device=x.device).expand(b.count, -1)
            y, _ = tg.block(x, block, layer, self.config, positions, linear=collector)
            states.write(b.start, y)
        return moments
