"""Every file-system call of a conversion is made to fail, tear or be the last; nothing may be lost.

Invariants after every fault: the input is untouched; what is at the destination is whole, old or new; nothing at a
final name fails its manifest; nothing lies outside ``DST.partial``; the error is one of ours; and the same command
run again ends with the bytes of an uninterrupted run.
"""

import errno
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest

from g2kit.formats.errors import ConflictError, FileIOError, G2Error, ResumeError, SpaceError

from .fault_fs import Crash, Faulty, PowerLoss, Unsynced
from .output_case import Case, assert_sound, snapshot

MODES = {
    "new directory": {},
    "swapped directory": {"overwrite": True},
    "directory replaced by two renames": {"overwrite": True, "swap": False},
    "new file": {"single": True},
    "replaced file": {"single": True, "overwrite": True},
}
ERRNOS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.EACCES)


class Scene:
    """A directory with a source, maybe an older output, and the reference result."""

    def __init__(self, root: Path, *, single=False, overwrite=False, swap=True) -> None:
        self.root, self.swap = root / "work", swap
        self.dst = self.root / "out"
        self.case = Case(single=single, overwrite=overwrite)
        (root / "older/source").mkdir(parents=True)
        (root / "older/source/model").write_bytes(b"weights")
        if overwrite:
            Case(single=single, seed=1).run(root / "older/out", fs=Unsynced())
        self.before = self.visible(root / "older")
        self.older = root / "older"
        (root / "reference").mkdir()
        self.case.run(root / "reference/out", overwrite=False, fs=Unsynced())
        self.want = self.visible(root / "reference")
        assert self.case.expected(root / "plain").items() <= self.inner(self.want).items()

    def inner(self, tree: dict[str, bytes]) -> dict[str, bytes]:
        if self.case.single:
            return {"x": tree["out"]}
        return {name.removeprefix("out/"): data for name, data in tree.items()}

    @staticmethod
    def visible(root: Path) -> dict[str, bytes]:
        """Everything but the source and the staging directory."""
        found = snapshot(root)
        return {n: d for n, d in found.items() if not n.startswith(("out.partial/", "source/"))}

    def prepare(self) -> None:
        shutil.copytree(self.older, self.root)

    def run(self, fs: Unsynced) -> BaseException | None:
        try:
            self.case.run(self.dst, fs=fs, sources=[self.root / "source"])
        except (G2Error, Crash) as e:
            return e
        return None

    def check(self, *, gap: bool = False) -> None:
        """``gap``: between two renames the destination may be absent for a moment."""
        assert snapshot(self.root / "source") == {"model": b"weights"}
        names = {p.name for p in self.root.iterdir()}
        assert names <= {"source", "out", "out.partial", "out.g2kit.manifest.json"}, names
        now = self.visible(self.root)
        if "out.partial" not in names:
            assert now in (self.before, self.want)
        elif self.case.single:
            assert now.get("out") in (self.before.get("out"), self.want["out"])
        else:
            absent = now == {} and gap
            assert absent or now in (self.before, self.want), sorted(now)
        if self.dst.exists():
            assert_sound(self.dst)

    def finish(self) -> None:
        """The same command again: ends with the reference, whatever it found."""
        error = self.run(Unsynced())
        # complete before the fault, and cleared up but for the lock
        assert error is None or error.code == "E_EXISTS", error
        assert self.visible(self.root) == self.want
        assert not (self.root / "out.partial").exists()

    def clean(self) -> None:
        shutil.rmtree(self.root)


@pytest.fixture(params=MODES, ids=[m.replace(" ", "-") for m in MODES])
def scene(request, tmp_path):
    """In memory where there is a place for that: thousands of runs."""
    memory = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else tmp_path))
    yield Scene(root, **MODES[request.param])
    shutil.rmtree(root)


every = pytest.mark.parametrize(
    "step", [pytest.param(6, id="sampled"), pytest.param(1, id="all", marks=pytest.mark.slow)]
)


def chosen(calls: list[str], step: int) -> list[int]:
    """Which calls to fail: every ``step``-th, and all of the last forty (the commit)."""
    return [k for k in range(1, len(calls) + 1) if k % step == 0 or k > len(calls) - 40]


def calls_of(scene: Scene) -> list[str]:
    scene.prepare()
    fs = Faulty(0, "none", swap=scene.swap)
    assert scene.run(fs) is None
    assert scene.visible(scene.root) == scene.want
    scene.clean()
    return fs.log


def attempt(scene: Scene, at: int, way: int | str) -> None:
    scene.prepare()
    fs = Faulty(at, way, swap=scene.swap)
    error = scene.run(fs)
    fs.after_death()
    scene.check(gap=not scene.swap)
    if isinstance(way, int) and error is not None:
        wanted = SpaceError if way in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else FileIOError
        assert isinstance(error, wanted), (at, fs.log[at - 1], error)
        assert "cannot " in str(error)
    elif way in ("short", "eintr"):
        assert error is None, (at, fs.log[at - 1], error)
    scene.finish()
    scene.clean()


@every
def test_every_call_may_return_an_error(scene, step):
    calls = calls_of(scene)
    assert len(calls) > 70
    for at in chosen(calls, step):
        for code in ERRNOS if step == 1 else ERRNOS[at % len(ERRNOS) :][:1]:
            attempt(scene, at, code)


@every
def test_short_and_interrupted_transfers_do_not_matter(scene, step):
    calls = calls_of(scene)
    transfers = [k + 1 for k, name in enumerate(calls) if name in ("pread", "pwrite")]
    assert len(transfers) >= 10
    for k, at in enumerate(transfers):
        for way in ("short", "eintr") if step == 1 else ("short", "eintr")[k % 2 :][:1]:
            attempt(scene, at, way)


@every
def test_a_crash_at_every_call(scene, step):
    calls = calls_of(scene)
    for at in chosen(calls, step):
        attempt(scene, at, "crash")
    attempt(scene, len(calls), "crash-after")


@every
def test_crashes_again_and_again(scene, step):
    """The run that continues is cut short too, up to four times."""
    calls, rng = len(calls_of(scene)), random.Random(4)
    for _ in range(120 // step):
        scene.prepare()
        for _ in range(rng.randint(2, 4)):
            fs = Faulty(rng.randint(1, calls), "crash-after", swap=scene.swap)
            error = scene.run(fs)
            fs.after_death()
            scene.check(gap=not scene.swap)
            if error is None:
                break
        else:
            scene.finish()
        if not (scene.case.overwrite and error is None):
            assert scene.visible(scene.root) == scene.want
        scene.clean()


@every
def test_power_loss_at_every_call(scene, step):
    """What was not synced may be there, or not, or in pieces."""
    for at in chosen(calls_of(scene), step):
        for seed in range(5 if step == 1 else 1):
            scene.prepare()
            fs = PowerLoss(at, scene.root, swap=scene.swap)
            error = scene.run(fs)
            fs.after_death()
            assert isinstance(error, Crash)
            fs.lose(seed=1000 * seed + at)
            scene.check(gap=not scene.swap)
            scene.finish()
            scene.clean()


def test_whoever_comes_next_completes_a_replacement_by_two_renames(tmp_path):
    """Killed between them, the destination is gone; even a run of another plan puts the new one there."""

    class Killed(Unsynced):
        def exchange(self, a: Path, b: Path) -> bool:
            return False

        def rename_new(self, old: Path, new: Path) -> None:
            raise Crash

    dst, case = tmp_path / "out", Case(overwrite=True)
    Case(seed=1).run(dst, fs=Unsynced(), extra={"of the old one only": b""})
    with pytest.raises(Crash):
        case.run(dst, fs=Killed())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.partial"]
    with pytest.raises(ConflictError, match="exists"):
        Case(seed=2).run(dst, fs=Unsynced())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert case.expected(tmp_path / "plain").items() <= snapshot(dst).items()
    assert_sound(dst)


def test_replacing_an_equal_output(tmp_path):
    """Both have the same manifest, so only the directory's identity tells whether they were swapped."""

    class Killed(Unsynced):
        def __init__(self, after: bool) -> None:
            super().__init__()
            self.after = after

        def exchange(self, a: Path, b: Path) -> bool:
            if self.after:
                super().exchange(a, b)
            raise Crash

    for after in (False, True):
        dst, case = tmp_path / f"out{after}", Case(overwrite=True)
        case.run(dst, fs=Unsynced())
        damaged = (dst / "d.bin").read_bytes()
        (dst / "d.bin").write_bytes(bytes(len(damaged)))
        with pytest.raises(Crash):
            case.run(dst, fs=Killed(after))
        out = case.run(dst, fs=Unsynced())
        assert out.committed == after
        assert_sound(dst)
        assert not dst.with_name(f"{dst.name}.partial").exists()


def test_a_staging_directory_restored_from_elsewhere_is_not_guessed_at(tmp_path):
    """A finished output was about to land, and now neither place holds it."""

    class Killed(Unsynced):
        def exchange(self, a: Path, b: Path) -> bool:
            raise Crash

    dst, case = tmp_path / "out", Case(overwrite=True)
    case.run(dst, fs=Unsynced())
    with pytest.raises(Crash):
        Case(seed=1, overwrite=True).run(dst, fs=Killed())
    (tmp_path / "out.partial/data/g2kit.manifest.json").unlink()
    before = snapshot(tmp_path)
    with pytest.raises(ResumeError, match=r"keep what you need, then remove .*out\.partial"):
        Case(seed=1, overwrite=True).run(dst, fs=Unsynced())
    before.pop("out.partial/lock", None)
    assert snapshot(tmp_path) == before
