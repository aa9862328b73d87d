"""What may be a destination: nothing is overwritten, followed or filled up by accident."""

import os
from pathlib import Path

import pytest

from g2kit.formats import manifest as mf
from g2kit.formats.errors import ConflictError, FileIOError, SpaceError, UsageError
from g2kit.formats.output_fs import Filesystem
from g2kit.formats.output_paths import mount_point, show_bytes

from .fault_fs import Unsynced
from .output_case import EXTRA, PLAN, Case, assert_sound, snapshot


def refused(dst: Path, error: type[Exception], message: str, case: Case | None = None, **options):
    """The run is refused with this message, before and inside the lock, and changes nothing below the parent."""
    case, root = case or Case(), dst.parent
    options = {"fs": Unsynced()} | options
    before = (snapshot(root), sorted(root.rglob("*"))) if root.is_dir() else None
    with pytest.raises(error, match=message) as e:
        case.output(dst, **options).preflight()
    with pytest.raises(error, match=message):
        case.run(dst, **options)
    if before:
        assert (snapshot(root), sorted(root.rglob("*"))) == before
    return e.value


@pytest.mark.parametrize("single", [False, True])
def test_an_existing_output_needs_overwrite(tmp_path, single):
    Case(single=single).run(tmp_path / "out", fs=Unsynced())
    kind = "file" if single else "directory"
    message = rf"out: the destination {kind} exists\. Fix: pass --overwrite"
    e = refused(tmp_path / "out", ConflictError, message, Case(single=single))
    assert (e.code, e.exit_code) == ("E_EXISTS", 7)


def test_an_empty_directory_exists_too(tmp_path):
    (tmp_path / "out").mkdir()
    refused(tmp_path / "out", ConflictError, "exists")
    Case(overwrite=True).run(tmp_path / "out", fs=Unsynced())
    assert_sound(tmp_path / "out")


def test_a_file_is_not_replaced_by_a_directory_nor_the_reverse(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dir").mkdir()
    over = {"overwrite": True}
    refused(tmp_path / "file", ConflictError, "is not a directory, and a directory", Case(**over))
    refused(
        tmp_path / "dir", ConflictError, "is a directory, and one file", Case(single=True, **over)
    )
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", ConflictError, "is not a directory, and one file", Case(single=True))


def test_a_symlink_is_never_a_destination(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, target in (("link", "real"), ("dangling", "nowhere")):
        message = rf"a symbolic link to {target}\. Fix: pass the path it leads to"
        refused(tmp_path / name, ConflictError, message, Case(overwrite=True))
    (tmp_path / "out.partial").symlink_to("real")
    refused(tmp_path / "out", ConflictError, r"out\.partial: .* symbolic link")
    assert list((tmp_path / "real").iterdir()) == []


def test_overwrite_removes_only_what_g2kit_wrote(tmp_path):
    dst, case = tmp_path / "out", Case(overwrite=True)
    Case(seed=1).run(dst, fs=Unsynced())
    (dst / "sub/notes.txt").write_text("mine")
    refused(dst, ConflictError, r"1 files that g2kit did not write: sub/notes\.txt", case)
    (dst / "sub/notes.txt").unlink()
    manifest = (dst / mf.NAME).read_bytes()
    (dst / mf.NAME).write_bytes(manifest.replace(b'"test"', b'"best"'))
    refused(dst, ConflictError, "its manifest is damaged", case)
    (dst / mf.NAME).unlink()
    refused(dst, ConflictError, "files that g2kit did not write", case)


def test_a_file_added_during_the_run_is_not_removed(tmp_path):
    dst = tmp_path / "out"
    Case(seed=1).run(dst, fs=Unsynced())

    def add(unit: str) -> None:
        if unit == "finish":
            (dst / "late.txt").write_text("mine")

    with pytest.raises(ConflictError, match=r"late\.txt"):
        Case(overwrite=True).run(dst, between=add, fs=Unsynced())
    (dst / "late.txt").rename(tmp_path / "late.txt")
    assert_sound(dst)
    out = Case(overwrite=True).run(dst, fs=Unsynced())
    assert len(out.done) == 5
    assert_sound(dst)


@pytest.mark.parametrize("single", [False, True])
def test_a_destination_that_appears_during_the_run_is_not_replaced(tmp_path, single):
    dst, case = tmp_path / "out", Case(single=single)

    def add(unit: str) -> None:
        if unit == "finish":
            dst.write_text("mine") if single else dst.mkdir()

    with pytest.raises(ConflictError, match="exists"):
        case.run(dst, between=add, fs=Unsynced())
    assert not dst.is_file() or dst.read_text() == "mine"
    dst.unlink() if single else dst.rmdir()
    case.run(dst, fs=Unsynced())
    assert_sound(dst)


def test_input_and_output_are_apart(tmp_path):
    source = tmp_path / "models/source"
    source.mkdir(parents=True)
    (source / "a.safetensors").write_text("weights")
    (tmp_path / "alias").symlink_to("models")
    over = Case(overwrite=True)
    for dst, sources, message in (
        (source, [source], "is the same as the input"),
        (tmp_path / "alias/source", [source], "is the same as the input"),
        (source, [tmp_path / "alias/source"], "is the same as the input"),
        (source / "out", [source], "lies inside the input"),
        (tmp_path / "alias/source/out", [source], "lies inside the input"),
        (tmp_path / "models", [source], "contains the input"),
        (tmp_path / "models", [source / "a.safetensors"], "contains the input"),
        (tmp_path / "models", [tmp_path / "elsewhere", source], "contains the input"),
    ):
        e = refused(dst, ConflictError, message, over, sources=sources)
        assert (e.code, e.exit_code) == ("E_EXISTS", 7)
    single = Case(single=True, overwrite=True)
    refused(source / "a.safetensors", ConflictError, "same", single, sources=list(source.iterdir()))
    (source / "hard").hardlink_to(source / "a.safetensors")
    refused(source / "hard", ConflictError, "same", single, sources=[source / "a.safetensors"])
    # the staging directory must be apart too
    (tmp_path / "out.partial").mkdir()
    refused(tmp_path / "out", ConflictError, "same", sources=[tmp_path / "out.partial"])
    # beside is fine
    Case(single=True).run(source / "new", sources=[source / "a.safetensors"], fs=Unsynced())


def test_a_staging_directory_of_someone_else_is_left_alone(tmp_path):
    (tmp_path / "out.partial/data").mkdir(parents=True)
    (tmp_path / "out.partial/data/thesis.tex").write_text("mine")
    for options in ({}, {"resume": False}, {"overwrite": True}):
        with pytest.raises(ConflictError, match="holds files of something else: data"):
            Case().run(tmp_path / "out", **options)
        assert snapshot(tmp_path / "out.partial") == {"data/thesis.tex": b"mine"}
    (tmp_path / "out.partial/data").rename(tmp_path / "out.partial/book")
    refused(tmp_path / "out", ConflictError, r"something else: book\. Fix: move it away")


def test_the_parent_must_be_there_and_writable(tmp_path):
    e = refused(tmp_path / "no/out", FileIOError, r"does not exist.*mkdir -p .*/no")
    assert (e.code, e.exit_code) == ("E_IO", 4)
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file/out", FileIOError, "is not a directory")
    for bad in (Path("/"), tmp_path / ".."):
        with pytest.raises(UsageError, match="does not name something new"):
            Case().output(bad)


def test_a_directory_that_may_not_be_written(tmp_path):
    class ReadOnly(Filesystem):
        def mkdir(self, path: Path) -> None:
            raise OSError(30, "Read-only file system")

    with pytest.raises(FileIOError, match="cannot take the lock: Read-only file system"):
        Case().run(tmp_path / "out", fs=ReadOnly())
    assert list(tmp_path.iterdir()) == []


def test_names_the_file_system_cannot_hold(tmp_path):
    fits = tmp_path / ("x" * (255 - len(".partial")))
    Case().run(fits, fs=Unsynced())
    assert_sound(fits)
    refused(tmp_path / ("y" * 248), FileIOError, "name is too long: 256 bytes .* allows 255")
    refused(tmp_path / ("ü" * 125), FileIOError, "too long: 258 bytes")
    single = Case(single=True)
    refused(tmp_path / ("z" * 240), FileIOError, "too long: 260 bytes", single)


class Room(Unsynced):
    """Says how much room there is."""

    def __init__(self, nbytes: int, inodes: int = 10**6) -> None:
        super().__init__()
        self.nbytes, self.inodes = nbytes, inodes

    def statvfs(self, path: Path) -> os.statvfs_result:
        known = {"f_bsize": 512, "f_frsize": 1, "f_blocks": 1 << 50, "f_namemax": 255}
        fields = (
            "f_bsize f_frsize f_blocks f_bfree f_bavail f_files f_ffree f_favail f_flag f_namemax"
        )
        known |= {"f_bfree": self.nbytes, "f_bavail": self.nbytes}
        known |= {"f_files": 10**6, "f_ffree": self.inodes, "f_favail": self.inodes, "f_flag": 0}
        return os.statvfs_result([known[f] for f in fields.split()])


def test_room_is_asked_for_before_work(tmp_path):
    planned = PLAN.nbytes + sum(len(b) for b in EXTRA.values())
    need = int(planned * 1.02) + (8 << 20)
    e = refused(
        tmp_path / "out",
        SpaceError,
        rf"need {show_bytes(need)}, have {show_bytes(need - 1)} on {mount_point(tmp_path)}\.",
        fs=Room(need - 1),
    )
    assert (e.code, e.exit_code) == ("E_SPACE", 4)
    refused(tmp_path / "out", SpaceError, "not enough inodes: need 25, have 24", fs=Room(need, 24))
    Case().run(tmp_path / "out", fs=Room(need))


def test_room_already_taken_by_an_interrupted_run_counts(tmp_path):
    case = Case(single=True)
    with case.output(tmp_path / "out") as out:
        out.complete("something", {})
    need = 8 << 20
    case.run(tmp_path / "out", fs=Room(need + 10))
    assert_sound(tmp_path / "out")


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (19756849562, "18.4 GiB"),
        (1 << 51, "2048.0 TiB"),
    ],
)
def test_sizes_are_readable(n, text):
    assert show_bytes(n) == text
