"""A staged directory appears whole or not at all, whatever fails at whatever call."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from fault_fs import Crash, Faulty, Numbered, PowerLoss, Unsynced

from g2kit.formats.base import FilePlan
from g2kit.formats.errors import (
    ConflictError,
    FileIOError,
    G2Error,
    LockedError,
    SpaceError,
    UsageError,
)
from g2kit.formats.output_fs import Filesystem
from g2kit.verify.staging import StagedDirectory

OLD, NEW = b"old payload!", b"new payload!"


def stage(
    dst: Path, payload: bytes = NEW, fs: Filesystem | None = None, *, overwrite: bool = False
) -> None:
    plan = FilePlan("arrays", 4 + len(payload), ((0, b"HEAD"),))
    with StagedDirectory(
        dst, [plan], ["notes.json"], overwrite=overwrite, fs=fs or Unsynced()
    ) as out:
        out.write("arrays", memoryview(payload)[:5], 4)
        out.write("arrays", memoryview(payload)[5:], 9)
        out.add("notes.json", b"{}\n")
        out.commit()


def content(dst: Path) -> dict[str, bytes] | None:
    return {p.name: p.read_bytes() for p in dst.iterdir()} if dst.exists() else None


def whole(payload: bytes) -> dict[str, bytes]:
    return {"arrays": b"HEAD" + payload, "notes.json": b"{}\n"}


def test_written_and_replaced(tmp_path: Path) -> None:
    stage(tmp_path / "out", OLD)
    assert content(tmp_path / "out") == whole(OLD)
    with pytest.raises(ConflictError, match="the destination directory exists"):
        stage(tmp_path / "out")
    stage(tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out") == whole(NEW)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_nothing_is_left_without_a_commit(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"other\.json was not announced"):  # noqa: SIM117
        with StagedDirectory(tmp_path / "out", [], fs=Unsynced()) as out:
            out.add("other.json", b"")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("swap", [True, False])
def test_every_call_may_fail(tmp_path: Path, swap: bool) -> None:
    log = Numbered()
    stage(tmp_path / "count")
    stage(tmp_path / "count", fs=log, overwrite=True)
    data = [at for at, name in enumerate(log.log, 1) if name in ("pread", "pwrite", "allocate")]
    every = range(1, len(log.log) + 1)
    hits = 0
    for way, where in (
        (errno.EIO, every), (errno.ENOSPC, data), ("short", data), ("eintr", data), ("crash-after", every),
    ):  # fmt: skip
        for at in where:
            root = tmp_path / f"{way}-{at}"
            root.mkdir()
            stage(root / "out", OLD)
            fs = Faulty(at, way, swap=swap)
            try:
                stage(root / "out", NEW, fs, overwrite=True)
                error: BaseException | None = None
            except (G2Error, Crash) as e:
                error = e
            wanted = SpaceError if way == errno.ENOSPC else FileIOError
            assert isinstance(error, wanted | Crash | None), error
            fs.after_death()
            hits += fs.hit
            found = content(root / "out")
            # without a swap of names there is an instant with the old output under .partial/old
            between = not swap and found is None
            assert between or found in (whole(OLD), whole(NEW)), (way, at)
            assert error is not None or found == whole(NEW)
            stage(root / "out", NEW, overwrite=True)
            assert content(root / "out") == whole(NEW)
            assert [p.name for p in root.iterdir()] == ["out"], (way, at)
    assert hits > len(every)


def test_the_old_output_comes_back_after_a_crash_between_two_renames(tmp_path: Path) -> None:
    stage(tmp_path / "out", OLD)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out").rename(tmp_path / "out.partial" / "old")
    with pytest.raises(ConflictError, match="exists"):
        stage(tmp_path / "out")
    assert content(tmp_path / "out") == whole(OLD)


def test_power_loss_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    log = Numbered()
    stage(tmp_path / "count", fs=log)
    for at in range(1, len(log.log) + 1):
        for seed in range(3):
            root = tmp_path / f"{at}-{seed}"
            root.mkdir()
            fs = PowerLoss(at, root)
            with pytest.raises(Crash):
                stage(root / "out", NEW, fs)
            fs.after_death()
            fs.lose(seed)
            assert content(root / "out") in (None, whole(NEW)), (at, seed)
            stage(root / "out", NEW, overwrite=True)
            assert content(root / "out") == whole(NEW)


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    stage(tmp_path / "out")
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ConflictError, match="1 files that g2kit did not write: mine"):
        stage(tmp_path / "out", overwrite=True)
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "mine").write_text("x")
    with pytest.raises(ConflictError, match="holds files of something else: mine"):
        stage(tmp_path / "new")
    (tmp_path / "data.partial" / "data").mkdir(parents=True)
    (tmp_path / "data.partial" / "data" / "mine").write_text("x")
    with pytest.raises(ConflictError, match="holds files of something else: mine"):
        stage(tmp_path / "data")
    assert len(list(tmp_path.rglob("mine"))) == 3


def test_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConflictError, match="not a directory"):
        stage(tmp_path / "file", overwrite=True)
    with pytest.raises(ConflictError, match="lies inside the input"):  # noqa: SIM117
        with StagedDirectory(tmp_path / "out", [], sources=[tmp_path]):
            pass
    with pytest.raises(SpaceError, match="not enough disk space"):  # noqa: SIM117
        with StagedDirectory(tmp_path / "out", [FilePlan("a", 1 << 60)]):
            pass
    with pytest.raises(FileIOError, match="does not exist"):
        stage(tmp_path / "no" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with (
        StagedDirectory(tmp_path / "out", [], fs=Unsynced()),
        pytest.raises(LockedError, match="is writing this output"),
    ):
        stage(tmp_path / "out")
    stage(tmp_path / "out")


def test_a_destination_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    with StagedDirectory(tmp_path / "out", [], ["a"], fs=Unsynced()) as out:
        out.add("a", b"mine")
        (tmp_path / "out").mkdir()
        with pytest.raises(ConflictError, match="exists"):
            out.commit()
    assert content(tmp_path / "out") == {}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
