"""An output of g2conv against its manifest."""

from __future__ import annotations

from pathlib import Path

from ..formats import manifest as manifests
from ..formats.errors import ChecksumError, FormatError, UsageError, printable
from ..formats.named_files import require_there
from ..formats.names import listing
from ..model.config import GemmaConfig
from . import digest
from .open import open_checkpoint
from .progress import Progress, Report, Silent


def check(
    dst: str | Path,
    *,
    config: str | Path | GemmaConfig | None = None,
    fix_config: bool = False,
    gating: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compare an output of g2conv with its manifest: every file's bytes and every tensor as read.

    Raises:
        ChecksumError: lists what differs.
        FormatError: there is no manifest.
        NotFoundError: there is nothing at that path.
        UsageError: the path is a part of an output; its manifest speaks of the whole.
    """
    dst = Path(dst)
    meter = progress or Silent()
    at = _manifest_of(dst)
    expected = manifests.load(at)
    meter.start(sum(f.size for f in expected.files.values()), "hashing files")
    surplus = manifests.check_files(dst, expected, lambda n: meter(n, "files"))
    notes = [f"not in the manifest, so not checked: {listing(surplus)}"] if surplus else []
    if not dst.is_dir() and dst.name not in expected.files:
        notes.append(f"renamed: the manifest calls it {printable(next(iter(expected.files), '?'))}")
    with open_checkpoint(
        dst, config=config, container=expected.format, gating=gating, fix_config=fix_config
    ) as c:
        meter.start(sum(t.nbytes for t in c.tensors.values()), "hashing tensors")
        found = digest.counting(digest.digests(c, meter))
    wrong = [
        n for n in expected.tensors.keys() | found.keys() if found.get(n) != expected.tensors.get(n)
    ]
    if wrong:
        raise ChecksumError(
            f"{len(wrong)} tensors differ from the manifest: {digest.names_of(sorted(wrong))}.",
            where=dst,
            fix="convert it again.",
        )
    return {
        "path": str(dst),
        "files": len(expected.files),
        "tensors": len(found),
        "fingerprint": expected.fingerprint,
        "notes": notes,
    }


def _orphans(directory: Path) -> list[str]:
    """Manifests of single files that are not there any more under their names."""
    suffix = f".{manifests.NAME}"
    found = directory.glob(f"*{suffix}")
    return sorted(p.name for p in found if not p.with_name(p.name.removesuffix(suffix)).exists())


def _manifest_of(dst: Path) -> Path:
    """The manifest of an output, or an error that says where to look instead."""
    at = manifests.path_for(dst)
    require_there(dst, fix="pass an output of g2conv.")
    if at.is_file():
        return at
    if (above := manifests.covering(dst)) is not None:
        raise UsageError(
            f"this is a part of an output; the manifest in {printable(str(above.parent))} covers all of it.",
            where=dst,
            fix=f"run `g2conv check {printable(str(above.parent))}`.",
        )
    fix = "compare two checkpoints with `g2conv fingerprint` instead."
    if dst.is_file() and (beside := _orphans(dst.parent)):
        fix = f"if the file was renamed, rename its manifest ({listing(beside)}) to {at.name}; else {fix}"
    raise FormatError("there is no g2kit manifest, so nothing to compare with.", where=at, fix=fix)
