"""What a run is to know of the layers' inputs: text, moments gathered before, an importance matrix, or nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy.typing as npt
import torch
from torch import Tensor

from ..convert.open import Checkpoint
from ..formats.errors import ConflictError, DependencyError, UsageError, printable
from ..model.config import GemmaConfig
from .calibration import HELD_OUT, SAMPLES, SELF, SEQ_LEN, Calibration, Wanted, read_calibration
from .direct import NONE, NOTHING, importance_of
from .moments import Merged
from .plan import require_method

LARGE, FEW = 1_000_000_000, 32  # parameters from which a processor gets fewer sequences


@dataclass(frozen=True, eq=False)
class Known:
    """See the module.

    Attributes:
        wanted: how much text, where it is written or cut.
        text: sequences; None where the model is to write them.
        merged: moments that take the place of the calibration sequences; ``text`` has the held-out ones then.
        importance: canonical name -> mean squares; there is no text then.
    """

    wanted: Wanted
    text: Calibration | None = None
    merged: Merged | None = None
    importance: Mapping[str, Tensor] | None = None

    @property
    def source(self) -> str:
        """Where it comes from."""
        return SELF if self.text is None else self.text.source

    def whole(self, found: Calibration) -> Calibration:
        """All sequences behind a run, those behind moments too."""
        return found if self.merged is None else self.merged.calibration

    def described(self, found: Calibration) -> list[str]:
        """For the manifest."""
        if self.direct:
            return [f"calibration: {self.source}"]
        c = self.whole(found)
        source = "written by the model itself" if c.source == SELF else Path(c.source).name
        return [
            f"calibration: {len(c.train)} sequences, {c.tokens} tokens, {source}, sha256 {c.sha256}"
        ]

    def settings(self) -> dict[str, str]:
        """What else decides the codes, as words for the user -> value."""
        if self.merged is not None:
            return {"--moments": self.merged.calibration.sha256[:16]}
        if self.importance is None:
            return {}
        digest = hashlib.sha256()
        for name in sorted(self.importance):
            digest.update(name.encode() + self.importance[name].numpy().tobytes())
        return {"--imatrix": digest.hexdigest()[:16]}

    def method(
        self, asked: str | None, *, recover: str, imatrix_out: object, sequential: bool = True
    ) -> str:
        """What to round by.

        Raises:
            UsageError: no such method, or what was asked for needs text that is not there.
        """
        if asked is not None:
            require_method(asked)
        wanted = {
            "--recover": recover != "none",
            "--imatrix-out": imatrix_out is not None,
            "--no-sequential": not sequential,
        }
        over = {f"--method {asked}": asked not in (None, "rtn")} if self.direct else {}
        if self.merged is not None:
            over = {f"--method {asked}": asked not in (None, "rtn", "gptq")}
        refused = [n for n, yes in (wanted | over).items() if yes]
        if refused and (self.direct or self.merged is not None):
            raise UsageError(
                f"{' and '.join(refused)} cannot be: there are no calibration sequences to run the model on.",
                fix="leave it out, or use another --calibration.",
            )
        return asked or ("rtn" if self.direct else "gptq")

    @property
    def direct(self) -> bool:
        """Nothing needs the model to be run."""
        return self.text is not None and not self.text.held

    def require_source(self, fingerprint: str, where: Path) -> None:
        """Refuse moments of other weights.

        Raises:
            ConflictError: they are.
        """
        if self.merged is not None and self.merged.fingerprint != fingerprint:
            raise ConflictError(
                "the moments were gathered from other weights.",
                where=where,
                fix="gather them again with `g2quant moments`.",
                found=self.merged.fingerprint,
                expected=fingerprint,
            )


def samples_for(config: GemmaConfig, device: str = "cpu") -> int:
    """Calibration sequences where nothing is said: fewer for a large model on a processor, where they take hours."""
    few = config.num_parameters >= LARGE and torch.device(device).type == "cpu"
    return FEW if few else SAMPLES


def known_of(
    checkpoint: Checkpoint,
    calibration: str | Path | npt.ArrayLike = SELF,
    samples: int | None = None,
    seq_len: int | None = None,
    held_out: float | None = None,
    *,
    moments: Sequence[str | Path] = (),
    imatrix: str | Path | None = None,
    device: str = "cpu",
) -> Known:
    """Settle what is known, before a weight is read.

    Args:
        checkpoint: the model.
        calibration: ``self``, ``none``, or as :func:`.calibration.read_calibration`.
        samples: sequences; None for :func:`samples_for`.
        seq_len: tokens of each; None for 512, or the model's context where that is shorter.
        held_out: further sequences, as a share of ``samples``; None for an eighth.
        moments: directories of :func:`.moments.gather`.
        imatrix: an importance matrix.
        device: that will compute.

    Raises:
        UsageError: two of them at once, numbers of sequences where none are made or cut, longer than the model's context, or
            not fit for calibration.
        G2Error: any other, of a file that cannot be read.
    """
    config = checkpoint.config
    context = config.max_position_embeddings
    count = samples_for(config, device) if samples is None else samples
    wanted = Wanted(
        count,
        min(SEQ_LEN, context) if seq_len is None else seq_len,
        HELD_OUT if held_out is None else held_out,
    )
    word = calibration if isinstance(calibration, str) else None
    several = [n for n, x in (("--moments", moments), ("--imatrix", imatrix)) if x]
    if len(several) + (word != SELF) > 1:
        named = [*several, *(() if word == SELF else ["--calibration"])]
        raise UsageError(f"{' and '.join(named)} exclude each other.", fix="give one of them.")
    if several or word == NONE:
        sizes = {"--samples": samples, "--seq-len": seq_len, "--held-out": held_out}
        if given := [n for n, x in sizes.items() if x is not None]:
            raise UsageError(
                f"{' and '.join(given)} cannot apply: {several[0] if several else '--calibration none'} takes the place "
                "of calibration sequences.",
                fix=f"leave out {' and '.join(given)}.",
            )
    if imatrix is not None:
        source = Calibration(str(imatrix), (), ())
        return Known(wanted, source, importance=importance_of(imatrix, checkpoint))
    if moments:
        merged = Merged(moments)
        held = Calibration(merged.calibration.source, (), merged.calibration.held)
        return Known(wanted, held, merged)
    if word == NONE:
        return Known(wanted, NOTHING)
    if word != SELF:
        return Known(wanted, read_calibration(calibration, checkpoint, wanted))
    if wanted.seq_len > context:
        raise UsageError(
            f"--seq-len is {wanted.seq_len}, the model's context {context}.",
            fix=f"use at most {context}.",
        )
    return Known(wanted)


def require_device(device: str) -> str:
    """Refuse a device that is not there.

    Raises:
        UsageError: not the name of one that g2quant uses.
        DependencyError: this torch, or this machine, has none.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise UsageError(f"{printable(device, 40)} is no device.", fix="use cpu, cuda or cuda:0.")
    if found.type == "cuda" and (
        not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()
    ):
        raise DependencyError(
            f"{device} is not there: {torch.cuda.device_count()} CUDA devices are visible to torch {torch.__version__}.",
            fix="use --device cpu, or install a torch build with CUDA and its driver.",
        )
    return device
