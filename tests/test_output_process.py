"""output.py against the real thing: killed processes, rival processes, full disks, file size limits."""

import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from g2kit.formats.base import Chunk, ContainerPlan, FilePlan, Slot
from g2kit.formats.errors import ConflictError, FileIOError, G2Error, LockedError, SpaceError
from g2kit.formats.lock import Lock, Owner
from g2kit.formats.output import Output
from g2kit.formats.output_fs import Filesystem

from .fault_fs import Unsynced
from .output_case import MANIFEST, U8, Case, assert_sound, snapshot
from .plan_writer import random_array

UNITS, SIZE = 40, 32 << 10
BIG = ContainerPlan(
    tuple(FilePlan(f"{k}.bin", UNITS // 4 * SIZE) for k in range(4)),
    {f"t{k}": (Chunk((0,), (SIZE,), f"{k % 4}.bin", k // 4 * SIZE),) for k in range(UNITS)},
)
SLOTS = [Slot(f"t{k}", U8, (SIZE,)) for k in range(UNITS)]
ARRAYS = [random_array(k, U8, (SIZE,)) for k in range(UNITS)]


def convert(dst: Path, pause: float = 0, **options) -> Output:
    with Output(dst, BIG, SLOTS, {"v": "1"}, **({"sync_bytes": 4 * SIZE} | options)) as out:
        for k in range(UNITS):
            if f"t{k}" not in out.done:
                out.write(f"t{k}", (0,), ARRAYS[k])
                out.complete(f"t{k}", {})
                time.sleep(pause)
        out.finish(MANIFEST)
    return out


def in_child(work: Callable[[], None]) -> int:
    """Fork; the child's exit status is that of the error it met (0: none, 70: not one of ours)."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        work()
        status = 0
    except G2Error as e:
        status = e.exit_code
    finally:
        os._exit(status)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for_lines(journal: Path, n: int, pid: int) -> None:
    """Until the journal has ``n`` lines or the child has ended."""
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        try:
            if journal.read_bytes().count(b"\n") >= n:
                return
        except FileNotFoundError:
            pass
        time.sleep(0.0005)


@pytest.mark.parametrize("overwrite", [False, True])
def test_kill_9_at_many_moments(tmp_path, overwrite):
    """Thirteen times: killed two or three times, at any moment or while units are written, then run to the end."""
    convert(tmp_path / "warm up")
    begin = time.monotonic()
    convert(tmp_path / "once", pause=0.002)
    usual = time.monotonic() - begin
    want, rng = snapshot(tmp_path / "once"), random.Random(7)
    killed = half_done = 0
    for k in range(13):
        dst = tmp_path / f"out{k}"
        if overwrite:
            Case(seed=1).run(dst, fs=Unsynced())
        journal = dst.with_name(f"{dst.name}.partial") / "journal"
        for way in ["writing", "any", "any"][: 2 + k % 2]:
            pid = in_child(lambda dst=dst: convert(dst, 0.002, overwrite=overwrite))
            if way == "any":
                time.sleep(usual * rng.choice([rng.uniform(0, 1.1), rng.uniform(0.9, 1.05)]))
            else:  # two lines open the journal, about ten follow
                wait_for_lines(journal, 2 + k % 6, pid)
            os.kill(pid, signal.SIGKILL)
            killed += wait(pid) == -signal.SIGKILL
            half_done += journal.exists() and journal.read_bytes().count(b"\n") > 2
            if dst.exists():
                assert_sound(dst)
        try:
            convert(dst, overwrite=overwrite)
        except ConflictError:
            assert not overwrite, "a child may end before it is killed"
        assert snapshot(dst) == want
        assert not dst.with_name(f"{dst.name}.partial").exists()
    assert killed >= 10
    assert half_done >= 5


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_a_resumable_partial(tmp_path, sig):
    started = tmp_path / "started"

    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with Output(tmp_path / "out", BIG, SLOTS, {"v": "1"}) as out:
            out.write("t0", (0,), ARRAYS[0])
            out.complete("t0", {})
            started.touch()
            time.sleep(60)

    pid = in_child(work)
    while not started.exists():
        time.sleep(0.01)
    os.kill(pid, sig)
    assert wait(pid) == (70 if sig == signal.SIGINT else -sig)
    # the handler of SIGINT lets the with block end: the lock is gone and the unit is safe
    assert (tmp_path / "out.partial/lock").exists() == (sig == signal.SIGTERM)
    out = convert(tmp_path / "out")
    assert sorted(out.done) == (["t0"] if sig == signal.SIGINT else [])
    assert any("which no longer runs" in n for n in out.notes) == (sig == signal.SIGTERM)
    assert_sound(tmp_path / "out")


def test_a_second_writer_is_told_who_the_first_is(tmp_path):
    case = Case()
    with case.output(tmp_path / "out") as first:
        owner = Owner.me()
        message = rf"process {owner.pid} on {owner.host} is writing this output.*remove .*/lock"
        with pytest.raises(LockedError, match=message) as e:
            case.run(tmp_path / "out")
        assert (e.value.code, e.value.exit_code) == ("E_LOCKED", 7)
        assert wait(in_child(lambda: case.run(tmp_path / "out"))) == 7
        first.complete("x", {})
    case.run(tmp_path / "out")
    assert_sound(tmp_path / "out")


def test_many_rivals_one_winner(tmp_path):
    errors: list[G2Error] = []
    wins: list[int] = []
    gate = threading.Barrier(8)

    def rival(k: int) -> None:
        gate.wait()
        try:
            Case().run(tmp_path / "out", fs=Unsynced())
            wins.append(k)
        except ConflictError as e:
            errors.append(e)

    threads = [threading.Thread(target=rival, args=(k,)) for k in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(wins) == 1
    assert {e.code for e in errors} <= {"E_LOCKED", "E_EXISTS"}
    assert len(errors) == 7
    assert_sound(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


class NoFlock(Filesystem):
    """A network mount without locks."""

    def flock(self, fd: int) -> None:
        raise OSError(95, "Operation not supported")


def owner(**changes) -> bytes:
    me = Owner.me()
    return Owner(**({"pid": me.pid, "host": me.host, "boot": me.boot} | changes)).dump()


def dead_pid() -> int:
    pid = in_child(lambda: None)
    wait(pid)
    return pid


def test_without_flock_the_owner_is_judged_by_name(tmp_path):
    path = tmp_path / "p/lock"
    lock = Lock(path, NoFlock())
    with pytest.raises(LockedError, match=f"process {os.getpid()} on"):
        Lock(path, NoFlock())
    lock.release()
    lock.release()
    assert not path.parent.exists()
    path.parent.mkdir()
    for content, taken in (
        (owner(pid=dead_pid()), True),
        (owner(boot="an earlier boot"), True),
        (owner(host="elsewhere", boot="x"), False),
        (owner(), False),
        (owner(pid=1), False),
        (owner(pid=0), False),
        (owner(pid=10**30), False),
        (b"", False),
        (b"[1, 2]", False),
        (b'{"pid": "x"}', False),
        (b"[" * 4096, False),
    ):
        path.write_bytes(content)
        if taken:
            lock = Lock(path, NoFlock())
            assert lock.recovered
            lock.release()
            path.parent.mkdir()
        else:
            with pytest.raises(LockedError, match="remove"):
                Lock(path, NoFlock())
            assert path.read_bytes() == content


def test_with_flock_only_the_kernel_is_believed(tmp_path):
    path = tmp_path / "p/lock"
    path.parent.mkdir()
    for content in (owner(), owner(host="elsewhere"), b"", b"\0" * 4096):
        path.write_bytes(content)
        Lock(path).release()
        path.parent.mkdir()


def test_a_lock_removed_while_waiting_for_it_is_taken_anew(tmp_path):
    path = tmp_path / "p/lock"
    holder = Lock(path)

    class Slow(Filesystem):
        """The holder lets go between this one's open and its flock."""

        def flock(self, fd: int) -> None:
            holder.release()
            super().flock(fd)

    lock = Lock(path, Slow())
    with pytest.raises(LockedError):
        Lock(path)
    lock.release()
    assert not path.parent.exists()


def test_the_lock_is_not_followed_through_a_link(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "p/lock").symlink_to(tmp_path / "victim")
    with pytest.raises(FileIOError, match="cannot take the lock"):
        Lock(tmp_path / "p/lock")
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 12 MiB; needs the right to mount."""
    root = tmp_path / "disk"
    root.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "g2kit-test", root], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    yield root
    subprocess.run(["umount", root], check=True)


def fill(path: Path, leave: int) -> None:
    vfs = os.statvfs(path.parent)
    path.write_bytes(bytes(max(0, vfs.f_blocks * vfs.f_frsize - leave)))


class Hopeful(Filesystem):
    """Believes there is room."""

    def statvfs(self, path: Path) -> os.statvfs_result:
        return os.statvfs("/")


class NoReserve(Hopeful):
    """A file system that cannot reserve space: it is missed only when it is written."""

    def allocate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)


def test_a_full_disk(small_disk):
    dst, ballast = small_disk / "out", small_disk / "ballast"
    fill(ballast, 8 << 20)
    with pytest.raises(SpaceError, match=rf"need 9\.3 MiB, have 8\.0 MiB on {small_disk}\."):
        convert(dst)
    fill(ballast, 1 << 20)
    with pytest.raises(SpaceError, match=r"cannot create the file at its .* the disk is full"):
        convert(dst, fs=Hopeful())
    assert [p.name for p in small_disk.iterdir()] == ["ballast"], "nothing may stay on a full disk"
    with pytest.raises(SpaceError, match=r"cannot write at byte .* full\. Fix: free space, then"):
        convert(dst, fs=NoReserve())
    assert not dst.exists()
    ballast.unlink()
    out = convert(dst)
    assert 4 <= len(out.done) < UNITS, "what was written before the disk was full is kept"
    convert(small_disk.parent / "once")
    assert snapshot(dst) == snapshot(small_disk.parent / "once")


def test_file_size_limit(tmp_path):
    says = tmp_path / "says"

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        try:
            convert(tmp_path / "out")
        except SpaceError as e:
            says.write_text(str(e))
            raise

    assert wait(in_child(work)) == 4
    assert "larger than the file system or `ulimit -f` allows" in says.read_text()
    assert "--max-shard-size" in says.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["says"]


def test_unprivileged_users_meet_a_clear_error(tmp_path):
    """Root may write anywhere, so the child gives that up."""
    home = tmp_path / "theirs"
    home.mkdir(mode=0o555)
    says = tmp_path / "says"
    says.touch()
    says.chmod(0o666)
    for p in (tmp_path, *tmp_path.parents[:3]):  # pytest's own directories, xdist's included
        if "pytest" in str(p) and not p.stat().st_mode & 0o001:
            p.chmod(0o755)

    def work() -> None:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        try:
            convert(home / "out")
        except FileIOError as e:
            says.write_text(str(e))
            raise

    assert wait(in_child(work)) == 4
    assert "Permission denied" in says.read_text()
    assert list(home.iterdir()) == []


def test_importing_the_writer_loads_no_framework():
    code = (
        "import sys, g2kit.formats.output, g2kit.formats.manifest;"
        "print([m for m in ('torch', 'jax', 'transformers', 'tensorstore') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
