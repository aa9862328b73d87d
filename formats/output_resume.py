"""What an earlier run left in the staging directory, and whether this run may go on from there."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from . import output_commit as oc
from . import output_fs as ofs
from .errors import ConflictError, ResumeError, printable
from .journal import Journal
from .names import listing
from .output_paths import check_kind, tree
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
        ConflictError: it holds other things, or symbolic links in place of g2kit's.
    """
    kinds = {
        stage.lock.name: stat.S_ISREG,
        stage.journal.name: stat.S_ISREG,
        stage.data.name: stat.S_ISDIR,
        stage.old.name: stat.S_ISDIR,
    }
    with ofs.calls("list", stage.partial):
        names = fs.listdir(stage.partial)
    odd = []
    for name in names:
        with ofs.calls("look at", stage.partial / name), suppress(FileNotFoundError):
            mode = fs.lstat(stage.partial / name).st_mode
            if name not in kinds or not kinds[name](mode):
                odd.append(name)
    if odd:
        raise _not_ours(stage, sorted(odd))


def _require_no_links(fs: ofs.Filesystem, stage: oc.Stage) -> None:
    """Refuse links below the staging directory: whoever writes or removes through them hits other files."""
    for root in (stage.data, stage.old):
        with ofs.calls("list", root):
            files = tree(root)[0] if ofs.exists(fs, root) else {}
        links = sorted(n for n, st in files.items() if stat.S_ISLNK(st.st_mode))
        if links:
            raise ConflictError(
                f"symbolic links are in the unfinished output: {listing(links)}.",
                where=root,
                fix=f"remove them, or move {stage.partial} away; nothing was changed or deleted.",
            )


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
    require_ours(fs, stage)  # once more: now nobody else works here
    if not journal.records:
        with ofs.calls("list", stage.partial):
            odd = set(fs.listdir(stage.partial)) - {stage.lock.name, stage.journal.name}
        if odd:
            raise _not_ours(stage, sorted(odd))
        require_free(fs, stage, overwrite=overwrite)
        return Found()
    _require_no_links(fs, stage)
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
        if resume and found.created and ofs.exists(fs, stage.data):
            return (
                found  # without data a finished output was put in its place, and is gone from there
            )
        oc.clear(fs, stage, known)
    journal.forget()
    return Found()


def require_free(fs: ofs.Filesystem, stage: oc.Stage, *, overwrite: bool) -> None:
    """Refuse a destination that is there, unless it may be replaced and g2kit wrote all of it.

    Raises:
        ConflictError: the destination exists, or holds what is not g2kit's.
    """
    for path in stage.visible:
        there = check_kind(path, is_file=stage.single is not None)
        if there and not overwrite:
            raise oc.exists_error(path)
        if there and not stage.single:
            oc.previous_files(path)


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_units(value: Any) -> bool:
    return _is_table(value) and all(map(_is_table, value.values()))


def _is_spans(value: Any) -> bool:
    """File -> list of [start, stop]."""
    return _is_table(value) and all(
        isinstance(spans, list)
        and all(isinstance(s, list) and [type(n) for n in s] == [int, int] for s in spans)
        for spans in value.values()
    )


# kind of line -> what its fields must be
_FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "open": {"plan": _is_table, "files": _is_names},
    "created": {},
    "sync": {"units": _is_units, "written": _is_spans},
    "commit": {"replaces": _is_names},
}


def _is_sound(record: Mapping[str, Any]) -> bool:
    fields = _FIELDS.get(str(record.get("kind")))
    return fields is not None and all(good(record.get(key)) for key, good in fields.items())


def _checked_head(journal: Journal, stage: oc.Stage) -> dict[str, Any]:
    head = journal.records[0]
    good = (head.get("kind"), head.get("version")) == ("open", VERSION)
    if not good or not all(map(_is_sound, journal.records)):
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
