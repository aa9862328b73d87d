"""output.py: what is written equals the plan; what an interrupted run did is kept; what is wrong is refused."""

import dataclasses
import itertools
import os
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from g2kit.formats import manifest as mf
from g2kit.formats.base import Chunk, ContainerPlan, Crc32Patch, FilePlan, Slot, runs
from g2kit.formats.errors import (
    ConflictError,
    DtypeError,
    FileIOError,
    FormatError,
    LayoutError,
    ParityError,
    ResumeError,
    ShapeError,
    UsageError,
)
from g2kit.formats.journal import Journal
from g2kit.formats.output import Output
from g2kit.formats.output_ranges import Ranges, check_plan, split_runs

from .fault_fs import Unsynced
from .output_case import EXTRA, F32, MANIFEST, PLAN, SLOTS, Case, assert_sound, pieces, snapshot
from .plan_writer import materialise, random_array


class Stopped(Exception):  # noqa: N818
    """Ends a run where the test wants it."""


def interrupt(case: Case, dst: Path, before: str = "bytes", **options) -> None:
    """A run that ends before the given unit."""

    def stop(unit: str) -> None:
        if unit == before:
            raise Stopped

    with pytest.raises(Stopped):
        case.run(dst, between=stop, fs=Unsynced(), **options)


# ---- what is written


@pytest.mark.parametrize("background", [False, True])
def test_a_directory_holds_exactly_the_plan(tmp_path, background):
    case = Case()
    out = case.run(tmp_path / "out", background=background)
    found = snapshot(tmp_path / "out")
    manifest = mf.load(tmp_path / "out" / mf.NAME)
    assert found.pop(mf.NAME) == manifest.dumps()
    assert found == case.expected(tmp_path / "plain")
    assert manifest.files.keys() == found.keys()
    assert_sound(tmp_path / "out")
    assert out.notes == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "plain"]
    assert manifest == dataclasses.replace(MANIFEST, files=manifest.files)


def test_a_single_file_stands_beside_its_manifest(tmp_path):
    case = Case(single=True)
    case.run(tmp_path / "model.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model.gguf",
        "model.gguf.g2kit.manifest.json",
    ]
    assert (tmp_path / "model.gguf").read_bytes() == case.expected(tmp_path / "plain")["x"]
    manifest = mf.load(mf.path_for(tmp_path / "model.gguf"))
    assert list(manifest.files) == ["model.gguf"]
    assert_sound(tmp_path / "model.gguf")


@pytest.mark.parametrize("single", [False, True])
def test_overwrite_replaces_all_of_it(tmp_path, single):
    Case(single=single, seed=1).run(tmp_path / "out")
    case = Case(single=single, overwrite=True)
    case.run(tmp_path / "out")
    fresh = Case(single=single)
    fresh.run(tmp_path / "fresh")
    same = dict(zip(snapshot(tmp_path / "fresh"), snapshot(tmp_path / "out").values(), strict=True))
    assert snapshot(tmp_path / "fresh") == same
    assert_sound(tmp_path / "out")
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027])
def test_permissions_follow_the_umask(tmp_path, mask):
    old = os.umask(mask)
    try:
        Case().run(tmp_path / "out", fs=Unsynced())
    finally:
        os.umask(old)
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        wanted = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == wanted & ~mask, path


@pytest.mark.parametrize("name", ["with space", "new\nline", "ünï-коды-模型", "-rf", "a.partial"])
def test_odd_destination_names(tmp_path, name):
    case = Case()
    case.run(tmp_path / name, fs=Unsynced())
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert_sound(tmp_path / name)


def test_many_threads_may_write(tmp_path):
    rows, width = 512, 64
    array = random_array(1, F32, (rows, width))
    plan = ContainerPlan(
        (FilePlan("w", array.nbytes + 8),),
        {"w": (Chunk((0, 0), array.shape, "w", 8),)},
        (Crc32Patch("w", "w", (0,)),),
    )
    with Output(tmp_path / "out", plan, [Slot("w", F32, array.shape)], {}, sync_bytes=4096) as out:

        def work(k: int) -> None:
            for row in range(k, rows, 4):
                out.write("w", (row, 0), array[row : row + 1])
                out.complete(str(row), {})

        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        out.finish(MANIFEST)
    data = (tmp_path / "out/w").read_bytes()
    assert data[8:] == array.tobytes()
    assert data[:4] == zlib.crc32(array.tobytes()).to_bytes(4, "little")
    assert_sound(tmp_path / "out")


@st.composite
def grids(draw):
    """A shape, a chunk shape, and cuts along every axis that make the writer's boxes."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=3)))
    chunk = tuple(draw(st.integers(1, n + 1)) for n in shape)
    cuts = tuple(sorted(draw(st.sets(st.integers(1, n), max_size=2)) | {0, n}) for n in shape)
    return shape, chunk, cuts


@settings(max_examples=60, deadline=None)
@given(grids(), st.randoms(use_true_random=False))
def test_any_boxes_into_any_chunks(tmp_path_factory, grid, rng):
    shape, size, cuts = grid
    array = random_array(7, F32, shape)
    starts = list(itertools.product(*(range(0, n, c) for n, c in zip(shape, size, strict=True))))
    rng.shuffle(starts)
    bytes_each = int(np.prod(size)) * 4
    half = len(starts) // 2
    chunks = tuple(
        Chunk(s, size, f"f{k >= half:d}", 3 + bytes_each * k) for k, s in enumerate(starts)
    )
    plan = ContainerPlan(
        tuple(FilePlan(f"f{k}", 3 + bytes_each * len(starts)) for k in (0, 1)), {"a": chunks}
    )
    boxes = list(itertools.product(*(itertools.pairwise(c) for c in cuts)))
    rng.shuffle(boxes)
    root = tmp_path_factory.mktemp("any")
    with Output(root / "out", plan, [Slot("a", F32, shape)], {}, fs=Unsynced()) as out:
        for box in boxes:
            part = array[tuple(slice(a, b) for a, b in box)]
            out.write("a", tuple(a for a, _ in box), part)
        out.finish(MANIFEST)
    (root / "plain").mkdir()
    materialise(plan, {"a": array}, root / "plain")
    found = snapshot(root / "out")
    assert {n: found[n] for n in ("f0", "f1")} == snapshot(root / "plain")


@settings(max_examples=100, deadline=None)
@given(grids(), st.data())
def test_split_runs_agrees_with_runs(grid, data):
    shape, size, _ = grid
    lo = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    hi = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(lo, shape, strict=True))
    chunk = Chunk(tuple(0 for _ in shape), size, "f", 11)
    parts = list(split_runs(chunk, 4, lo, hi))
    try:
        one = runs(chunk, 4, lo, hi)
    except LayoutError:
        assert len(parts) > 1
        return
    assert len(parts) == (one is not None)
    if one:
        assert parts[0][0] == one[0]
        box = np.arange(np.prod([b - a for a, b in zip(lo, hi, strict=True)], dtype=int))
        box = box.reshape([b - a for a, b in zip(lo, hi, strict=True)])
        assert box[parts[0][2]].tobytes() == box[one[1]].tobytes()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=20))
def test_ranges_are_a_set(spans):
    ranges, naive = Ranges(), set()
    for start, n in spans:
        ranges.add(start, start + n)
        naive |= set(range(start, start + n))
    found = ranges.spans()
    assert {i for a, b in found for i in range(a, b)} == naive
    assert all(a < b for a, b in found)
    assert all(b < c for (_, b), (c, _) in itertools.pairwise(found))
    for at in range(50):
        end = ranges.end(at)
        assert all(i in naive for i in range(at, end))
        assert end == at or end not in naive


# ---- what is refused while writing


def test_a_hole_is_an_error_not_zeros(tmp_path):
    case = Case()
    with case.output(tmp_path / "out") as out:
        for name in ("crc", "scalar", "none"):
            out.write(name, (0,) * case.arrays[name].ndim, case.arrays[name])
        out.write("grid", (0, 0), case.arrays["grid"][:, :6])
        out.write("bytes", (1,), case.arrays["bytes"][1:])
        with pytest.raises(LayoutError, match=r"2 slots were never .* end: grid, bytes\."):
            out.finish(MANIFEST)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("slot", "start", "array", "error", "message"),
    [
        ("nope", (0,), np.zeros(1, F32), LayoutError, "no such slot"),
        ("crc", (0, 0), np.zeros((1, 5), np.float64), DtypeError, "expected float32, got float64"),
        ("crc", (0, 0), np.zeros((1, 5), ">f4"), DtypeError, "expected float32, got >f4"),
        ("crc", (5, 0), np.zeros((2, 5), F32), ShapeError, r"\(2, 5\) at \(5, 0\)"),
        ("crc", (0,), np.zeros((1, 5), F32), ShapeError, r"does not lie in shape \(6, 5\)"),
        ("crc", (-1, 0), np.zeros((1, 5), F32), ShapeError, "does not lie in"),
    ],
)
def test_a_box_must_fit_its_slot(tmp_path, slot, start, array, error, message):
    with Case().output(tmp_path / "out", fs=Unsynced()) as out, pytest.raises(error, match=message):
        out.write(slot, start, array)
    assert list(tmp_path.iterdir()) == []


def change(**changes) -> ContainerPlan:
    return dataclasses.replace(PLAN, **changes)


def chunks(**changes) -> ContainerPlan:
    return change(chunks={**PLAN.chunks, **changes})


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (change(files=(*PLAN.files, FilePlan("empty", 0))), "names a file twice"),
        (change(chunks={}), "differ in 5 names: bytes, crc, grid, none, scalar"),
        (chunks(bytes=(Chunk((0,), (300,), "z", 0),)), "bytes: the plan has no file 'z'"),
        (chunks(bytes=(Chunk((0,), (299,), "d.bin", 4),)), "hold 299 bytes of 300"),
        (chunks(bytes=(Chunk((0,), (300,), "d.bin", 5),)), "does not fit into the file"),
        (chunks(bytes=(Chunk((0,), (300,), "d.bin", -1),)), "does not fit into the file"),
        (chunks(bytes=(Chunk((0,), (300,), "d.bin", 3),)), "two things are planned at byte 3"),
        (chunks(crc=(Chunk((0, 0), (6, 5), "a.bin", 10),)), "two things are planned at byte 10"),
        (change(crc32=(Crc32Patch("crc", "a.bin", (217,)),)), "two things are planned at byte 217"),
        (change(crc32=(Crc32Patch("crc", "a.bin", (398,)),)), "398 to 402|100 to 402 of 400"),
        (change(crc32=(Crc32Patch("grid", "a.bin", (0,)),)), "grid: a checksum needs a slot in"),
        (change(crc32=(Crc32Patch("what", "a.bin", (0,)),)), "what: a checksum needs a slot in"),
    ],
)
def test_a_plan_gives_every_byte_one_place(plan, message):
    check_plan(PLAN, SLOTS)
    with pytest.raises(LayoutError, match=message):
        check_plan(plan, SLOTS)


def test_planned_names_are_checked(tmp_path):
    slots = [Slot("a", F32, ())]

    def out(name: str, **options) -> Output:
        plan = ContainerPlan((FilePlan(name, 4),), {"a": (Chunk((), (), name, 0),)})
        return Output(tmp_path / "out", plan, slots, {}, **options)

    for name in ("../x", "/x", "a/../b", "a//b", "", "a\0b"):
        with pytest.raises(Exception, match="file name") as e, out(name):
            pass
        assert e.value.code == "E_PATH", name
    with pytest.raises(FileIOError, match="as file and as directory: a"):
        out("a/b", extra={"a": b""}).preflight()
    with pytest.raises(LayoutError, match="manifest's own name"):
        out(mf.NAME)
    with pytest.raises(UsageError, match="one output file cannot hold 2: a, b"):
        out("a", single_file="a", extra={"b": b""})
    assert list(tmp_path.iterdir()) == []


def test_two_names_that_the_file_system_takes_for_one(tmp_path):
    class Folding(Unsynced):
        def open(self, path: Path, flags: int) -> int:
            return super().open(path.with_name(path.name.lower()), flags)

    plan = ContainerPlan((FilePlan("a", 1), FilePlan("A", 1)), {})
    with pytest.raises(FileIOError, match="A: cannot create the file at its 1 bytes: File exists"):
        Output(tmp_path / "out", plan, [], {}, fs=Folding()).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_finished_is_finished(tmp_path):
    case = Case()
    out = case.run(tmp_path / "out", fs=Unsynced())
    for late in (
        lambda: out.write("scalar", (), case.arrays["scalar"]),
        lambda: out.complete("x", {}),
        lambda: out.finish(MANIFEST),
    ):
        with pytest.raises(UsageError):
            late()
    with pytest.raises(UsageError, match="with block"):
        case.output(tmp_path / "other").write("scalar", (), case.arrays["scalar"])


# ---- interrupted runs


def test_an_interrupted_run_is_continued(tmp_path):
    case = Case()
    interrupt(case, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    seen: list[str] = []
    out = case.run(tmp_path / "out", between=seen.append)
    assert seen == ["bytes", "scalar", "none", "finish"]
    assert list(out.done) == ["crc", "grid"]
    assert out.notes == ["continued an interrupted run: 2 units were done."]
    case.run(tmp_path / "once")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "once")


def test_units_complete_at_the_interruption_are_kept_though_no_sync_was_due(tmp_path):
    case = Case()
    interrupt(case, tmp_path / "out", sync_bytes=1 << 30)
    with case.output(tmp_path / "out") as out:
        assert list(out.done) == ["crc", "grid"]


def test_a_run_that_completed_nothing_leaves_nothing(tmp_path):
    interrupt(Case(), tmp_path / "out", before="crc")
    with pytest.raises(KeyboardInterrupt), Case().output(tmp_path / "out"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_the_checksum_of_a_slot_written_in_two_runs(tmp_path):
    case = Case()
    parts = pieces(case.arrays["crc"])

    with case.output(tmp_path / "out") as out:
        out.write("crc", *parts[0])
        out.complete("first half", {})
    with case.output(tmp_path / "out") as out:
        assert "first half" in out.done
        out.write("crc", *parts[1])
        for name in ("grid", "bytes", "scalar", "none"):
            out.write(name, (0,) * case.arrays[name].ndim, case.arrays[name])
        out.finish(MANIFEST)
    found = snapshot(tmp_path / "out")
    found.pop(mf.NAME)
    assert found == case.expected(tmp_path / "plain")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "f32"}, "dtype was keep, now f32"),
        ({"tool": "0.2.0", "source": "g2:sha256:11"}, "source was g2:sha256:00, now g2:sha256:11"),
        ({"new-option": "1"}, "new-option was not set, now 1"),
        ({"the source": "ab" * 32}, "settings is there: the source was not there. Fix"),
    ],
)
def test_another_plan_is_not_continued(tmp_path, change, said):
    case = Case()
    interrupt(case, tmp_path / "out")
    before = snapshot(tmp_path)
    case.plan_hash = case.plan_hash | change
    with pytest.raises(ResumeError, match=said) as e:
        case.run(tmp_path / "out")
    assert all(k in str(e.value) for k in change)
    assert "--no-resume" in str(e.value)
    assert snapshot(tmp_path) == before, "a refused run must leave the partial as it was"
    case.run(tmp_path / "out", resume=False)
    assert_sound(tmp_path / "out")


def test_another_layout_under_the_same_options_is_not_continued(tmp_path):
    case = Case()
    interrupt(case, tmp_path / "out")
    case.plan = change(files=(*PLAN.files, FilePlan("more", 1)))
    with pytest.raises(ResumeError, match="layout of the files is another one now"):
        case.run(tmp_path / "out")


def test_no_resume_starts_afresh(tmp_path):
    case, seen = Case(), []
    interrupt(case, tmp_path / "out")
    out = case.run(tmp_path / "out", between=seen.append, resume=False)
    assert seen == [*(s.name for s in SLOTS), "finish"]
    assert not out.done
    assert_sound(tmp_path / "out")


def test_times_do_not_matter_contents_do(tmp_path):
    case = Case()
    interrupt(case, tmp_path / "out")
    for path in (tmp_path / "out.partial").rglob("*"):
        os.utime(path, (0, 0))
    assert list(case.run(tmp_path / "out").done) == ["crc", "grid"]


def test_files_changed_in_the_partial_are_noticed(tmp_path):
    case = Case()
    interrupt(case, tmp_path / "out")
    victim = tmp_path / "out.partial/data/d.bin"
    victim.write_bytes(b"short")
    with pytest.raises(ResumeError, match=r"d.bin: .* has 5 bytes, not 304.*--no-resume"):
        case.run(tmp_path / "out")
    victim.unlink()
    with pytest.raises(ResumeError, match=r"d.bin: .* is missing"):
        case.run(tmp_path / "out")
    victim.symlink_to("/etc/passwd")
    with pytest.raises(ConflictError, match=r"symbolic links are in the .* d\.bin"):
        case.run(tmp_path / "out")


def test_foreign_files_in_the_partial_are_neither_published_nor_removed(tmp_path):
    case = Case()
    interrupt(case, tmp_path / "out")
    mine = tmp_path / "out.partial/data/sub/mine.txt"
    mine.write_text("keep me")
    with pytest.raises(ConflictError, match=r"sub/mine\.txt"):
        case.run(tmp_path / "out")
    with pytest.raises(ConflictError, match=r"does not remove them: sub/mine.txt"):
        case.run(tmp_path / "out", resume=False)
    assert mine.read_text() == "keep me"
    mine.unlink()
    case.run(tmp_path / "out")
    assert_sound(tmp_path / "out")


def test_a_symlinked_directory_in_the_partial_is_not_followed(tmp_path):
    case = Case()
    interrupt(case, tmp_path / "out")
    away = tmp_path / "away"
    (tmp_path / "out.partial/data/sub").rename(away)
    (tmp_path / "out.partial/data/sub").symlink_to(away)
    with pytest.raises(ConflictError, match="sub"):
        case.run(tmp_path / "out", resume=False)
    assert sorted(snapshot(away)) == ["grid/b.bin", "grid/c.bin"]


def test_the_journal_may_be_torn_anywhere(tmp_path):
    case = Case()
    case.run(tmp_path / "once", fs=Unsynced())
    interrupt(case, tmp_path / "first")
    journal = (tmp_path / "first.partial/journal").read_bytes()
    head = journal.index(b"\n") + 1
    for size in range(head, len(journal), 37):
        interrupt(case, tmp_path / "out")
        path = tmp_path / "out.partial/journal"
        path.write_bytes(path.read_bytes()[:size] + b"\0" * (size % 3))
        case.run(tmp_path / "out", fs=Unsynced())
        assert snapshot(tmp_path / "out") == snapshot(tmp_path / "once")
        Case(seed=1, overwrite=True).run(tmp_path / "out", fs=Unsynced())
        for p in sorted((tmp_path / "out").rglob("*"), reverse=True):
            p.rmdir() if p.is_dir() else p.unlink()
        (tmp_path / "out").rmdir()


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_damaged_journal_never_gives_wrong_bytes(tmp_path_factory, at, flip):
    root, case = tmp_path_factory.mktemp("j"), Case()
    interrupt(case, root / "out")
    path = root / "out.partial/journal"
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= flip
    path.write_bytes(data)
    if at % len(data) <= data.index(b"\n"):  # the first line tells whose files these are
        with pytest.raises(ConflictError, match="files of something else: data"):
            case.run(root / "out", fs=Unsynced())
        return
    case.run(root / "out", fs=Unsynced())
    found = snapshot(root / "out")
    found.pop(mf.NAME)
    assert found == case.expected(root / "plain")


def test_an_error_behind_the_scenes_is_not_lost(tmp_path):
    """A sync that fails in its thread stops the next call, and is not tried again."""

    class Failing(Unsynced):
        armed, syncs = False, 0

        def fdatasync(self, fd: int) -> None:
            if self.armed:
                self.syncs += 1
                raise OSError(5, "Input/output error")

    case, fs = Case(), Failing()

    def write_for_ever(out: Output) -> None:
        fs.armed = True
        while True:
            out.write("bytes", (0,), case.arrays["bytes"])
            out.complete("bytes", {})
            time.sleep(0.005)

    with case.output(tmp_path / "out", background=True, fs=fs) as out:
        with pytest.raises(FileIOError, match=r"d\.bin: cannot make durable: Input/output error"):
            write_for_ever(out)
        with pytest.raises(FileIOError, match="cannot make durable"):
            out.finish(MANIFEST)
    assert fs.syncs == 1
    assert not (tmp_path / "out").exists()


def test_a_failed_sync_is_not_repeated_by_a_caller_who_goes_on(tmp_path):
    class FailingOnce(Unsynced):
        armed = False

        def fdatasync(self, fd: int) -> None:
            if self.armed:
                self.armed = False
                raise OSError(5, "Input/output error")

    case, fs = Case(), FailingOnce()
    with case.output(tmp_path / "out", fs=fs) as out:
        out.write("scalar", (), case.arrays["scalar"])
        fs.armed = True
        for _ in range(3):
            with pytest.raises(FileIOError, match="cannot make durable"):
                out.complete("scalar", {})
        with pytest.raises(FileIOError, match="cannot make durable"):
            out.write("scalar", (), case.arrays["scalar"])
        with pytest.raises(FileIOError, match="cannot make durable"):
            out.seal()
    assert list(tmp_path.iterdir()) == []


def test_a_unit_that_completes_during_a_sync_waits_for_the_next(tmp_path):
    """Its bytes came too late to be in that sync, so its record must not be in that line."""

    class Busy(Unsynced):
        during = None

        def fdatasync(self, fd: int) -> None:
            during, self.during = self.during, None
            if during:
                during()

    case, fs = Case(), Busy()

    def do(name: str) -> None:
        out.write(name, (0,) * case.arrays[name].ndim, case.arrays[name])
        out.complete(name, {})

    with case.output(tmp_path / "out", background=True, sync_bytes=1 << 40, fs=fs) as out:
        do("crc")
        fs.during = lambda: do("bytes")
        out._flush()
        line = Journal(out.partial / "journal").records[-1]
        assert list(line["units"]) == ["crc"]
        assert list(line["written"]) == ["a.bin"]
        out._flush()
        line = Journal(out.partial / "journal").records[-1]
        assert (list(line["units"]), list(line["written"])) == (["bytes"], ["d.bin"])


def test_more_files_than_descriptors(tmp_path):
    import resource

    n = 400
    slots = [Slot(f"t{k}", F32, (2,)) for k in range(n)]
    plan = ContainerPlan(
        tuple(FilePlan(f"d/{k}", 8) for k in range(n)),
        {f"t{k}": (Chunk((0,), (2,), f"d/{k}", 0),) for k in range(n)},
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with Output(tmp_path / "out", plan, slots, {}, fs=Unsynced()) as out:
            for half in (0, 1):
                for k in range(n):
                    out.write(f"t{k}", (half,), np.array([k + half], F32))
            out.finish(MANIFEST)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all(
        (tmp_path / f"out/d/{k}").read_bytes() == np.array([k, k + 1], F32).tobytes()
        for k in range(n)
    )


def test_extra_files_are_part_of_the_transaction(tmp_path):
    Case().run(tmp_path / "out", fs=Unsynced())
    assert (tmp_path / "out/config.json").read_bytes() == EXTRA["config.json"]
    assert "config.json" in mf.load(tmp_path / "out" / mf.NAME).files


# ---- looking at it before it is there


@pytest.mark.parametrize("background", [False, True])
def test_a_sealed_output_can_be_read_before_it_is_visible(tmp_path, background):
    case = Case()
    with case.output(tmp_path / "out", background=background) as out:
        for name, array in case.arrays.items():
            out.write(name, (0,) * array.ndim, array)
            out.complete(name, {})
        staged = out.seal()
        assert not (tmp_path / "out").exists()
        assert snapshot(staged) == case.expected(tmp_path / "plain")
        assert out.seal() == staged
        out.finish(MANIFEST)
    assert_sound(tmp_path / "out")


def test_sealing_finds_holes(tmp_path):
    message = "4 slots were never written"
    with (
        Case().output(tmp_path / "out", fs=Unsynced()) as out,
        pytest.raises(LayoutError, match=message),
    ):
        out.seal()


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (ParityError("read back differently"), False),
        (FormatError("the input is broken"), False),
        (FileIOError("cannot read"), True),
        (RuntimeError("a bug"), True),
        (KeyboardInterrupt(), True),
    ],
)
def test_what_is_kept_depends_on_whose_fault_it_was(tmp_path, error, kept):
    """After bad input or bad output there is nothing worth continuing; after anything else there is."""

    def fail(unit: str) -> None:
        if unit == "bytes":
            raise error

    with pytest.raises(type(error)):
        Case().run(tmp_path / "out", between=fail, fs=Unsynced())
    assert [p.name for p in tmp_path.iterdir()] == (["out.partial"] if kept else [])
