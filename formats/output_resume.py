"""What an earlier run left in the staging directory, and whether this run may go on from there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import output_commit as oc
from . import output_fs as ofs
from .errors import ConflictError, ResumeError, printable
from .journal import Journal
from .names import listing
from .output_ranges import Span

VERSION = 1
_LAYOUT = "layout of the files"  # a digest of their names, sizes, headers and small files
CONTENT = "the content of "  # begins the keys of side files
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass
class Found:
    """What is done already.

    Attributes:
        units: complete and durable units -> their records.
        written: file -> durable spans.
        created: the files are there at full size with all fixed bytes.
        committed: the output is in its place; nothing is left to do.
    """

    units: dict[str, dict[str, Any]] = field(default_factory=dict)
    written: dict[str, list[Span]] = field(default_factory=dict)
    created: bool = False
    committed: bool = False


def head_record(plan_hash: Mapping[str, str], layout: str, files: list[str]) -> dict[str, Any]:
    """The journal's first line: whose bytes these are."""
    plan = {**plan_hash, _LAYOUT: layout}
    return {"kind": "open", "version": VERSION, "plan": plan, "files": files}


def require_ours(fs: ofs.Filesystem, stage: oc.Stage) -> None:
    """Refuse a staging directory that g2kit did not make, before anything is put into it.

    Raises:
        ConflictError: it holds other things.
    """
    ours = {p.name for p in (stage.lock, stage.journal, stage.data, stage.old)}
    with ofs.calls("list", stage.partial):
        odd = set(fs.listdir(stage.partial)) - ours
    if odd:
        raise _not_ours(stage, sorted(odd))


def _not_ours(stage: oc.Stage, odd: list[str]) -> ConflictError:
    return ConflictError(
        f"this directory is needed for writing, and holds files of something else: {listing(odd)}.",
        where=stage.partial,
        fix="move it away or pass another destination.",
    )


def take_over(
    fs: ofs.Filesystem,
    stage: oc.Stage,
    journal: Journal,
    head: Mapping[str, Any],
    *,
    overwrite: bool,
    resume: bool,
) -> Found:
    """Judge what is there; afterwards the staging directory is either resumable or empty.

    Raises:
        ConflictError: the destination exists, or something in the way is not g2kit's.
        ResumeError: an interrupted run of another plan is there.
    """
    if not journal.records:
        with ofs.calls("list", stage.partial):
            odd = set(fs.listdir(stage.partial)) - {stage.lock.name, stage.journal.name}
        if odd:
            raise _not_ours(stage, sorted(odd))
        require_free(fs, stage, overwrite=overwrite)
        return Found()
    old = _checked_head(journal, stage)
    known = _known(journal, old)
    differences = _differences(old["plan"], head["plan"])
    if landed := oc.complete_commit(fs, stage, journal.records):
        oc.clear(fs, stage, known)
    if landed and resume and not differences:
        return Found(units=_replay(journal).units, committed=True)
    require_free(fs, stage, overwrite=overwrite)
    if not landed:
        if resume and differences:
            raise _mismatch(stage, differences)
        found = _replay(journal)
        if resume and found.created:
            return found
        oc.clear(fs, stage, known)
    journal.forget()
    return Found()


def require_free(fs: ofs.Filesystem, stage: oc.Stage, *, overwrite: bool) -> None:
    """Refuse a destination that is there, unless it may be replaced and g2kit wrote all of it.

    Raises:
        ConflictError: the destination exists, or holds what is not g2kit's.
    """
    with ofs.calls("look at the destination", stage.dst):
        there = ofs.exists(fs, stage.dst)
    if there and not overwrite:
        raise oc.exists_error(stage.dst)
    if there and not stage.single:
        oc.previous_files(stage.dst)


def _checked_head(journal: Journal, stage: oc.Stage) -> dict[str, Any]:
    head = journal.records[0]
    good = (
        head.get("kind") == "open"
        and head.get("version") == VERSION
        and isinstance(head.get("plan"), dict)
        and isinstance(head.get("files"), list)
    )
    if not good:
        raise ConflictError(
            "the interrupted run in this directory was made by another version of g2kit.",
            where=stage.partial,
            fix="remove the directory, or finish it with that version.",
        )
    return head


def _known(journal: Journal, head: Mapping[str, Any]) -> set[str]:
    """The files the interrupted run may have made, and those of the output it was to replace."""
    replaced = [r.get("replaces", []) for r in journal.records if r.get("kind") == "commit"]
    return {str(name) for names in (head["files"], *replaced) for name in names}


def _replay(journal: Journal) -> Found:
    found = Found()
    for record in journal.records:
        if record.get("kind") == "created":
            found.created = True
        elif record.get("kind") == "sync":
            found.units.update(record["units"])
            for name, spans in record["written"].items():
                found.written.setdefault(name, []).extend((int(a), int(b)) for a, b in spans)
    return found


def _differences(
    old: Mapping[str, Any], new: Mapping[str, str]
) -> dict[str, tuple[str | None, str | None]]:
    """Key -> (interrupted run's value, this run's), None where there is none; digests are kept out of messages."""
    keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    told = [k for k in keys if k != _LAYOUT]
    # side files and headers are consequences, unless they stand alone
    shown = [k for k in told if not k.startswith(CONTENT)] or told or keys
    return {k: (_text(old.get(k)), _text(new.get(k))) for k in shown}


def _text(value: Any) -> str | None:
    return str(value) if value not in (None, "", "None") else None


def _in_words(key: str, old: str | None, new: str | None) -> str:
    if not any(_DIGEST.fullmatch(v) for v in (old, new) if v):
        return f"{key} was {old or 'not set'}, now {new or 'not set'}"
    if old and new:
        return f"{key} is another one now"
    return f"{key} was not there" if new else f"{key} is no longer there"


def _mismatch(
    stage: oc.Stage, differences: Mapping[str, tuple[str | None, str | None]]
) -> ResumeError:
    said = "; ".join(_in_words(k, *values) for k, values in differences.items())
    return ResumeError(
        f"an interrupted run with other settings is there: {printable(said, 600)}.",
        where=stage.partial,
        fix="repeat the earlier command to finish it, or pass --no-resume to discard it and start "
        "afresh.",
        found={k: old for k, (old, _) in differences.items()},
        expected={k: new for k, (_, new) in differences.items()},
    )
