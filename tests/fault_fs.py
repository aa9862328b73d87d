"""File systems that fail: at the N-th call with an error, a torn write, a crash, or a power loss."""

import itertools
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from g2kit.formats.output_fs import Filesystem

CALLS = [n for n in vars(Filesystem) if not n.startswith("_")]


class Crash(BaseException):
    """The process is gone: nothing it would still do takes effect."""


class Unsynced(Filesystem):
    """The real one, less the waiting for the disk."""

    def fsync(self, fd: int) -> None:
        os.fstat(fd)

    def fdatasync(self, fd: int) -> None:
        os.fstat(fd)


class Numbered(Unsynced):
    """Counts every call; subclasses act on :meth:`before`."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self.fds: set[int] = set()

    def before(self, n: int, name: str, call: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        return call(*args)

    def after_death(self) -> None:
        """What the kernel does for a dead process."""
        for fd in self.fds:
            Unsynced.close(self, fd)
        self.fds.clear()


def _numbered(name: str) -> Callable[..., Any]:
    real = getattr(Unsynced, name)

    def call(self: Numbered, *args: Any) -> Any:
        self.log.append(name)
        result = self.before(len(self.log), name, lambda *a: real(self, *a), args)
        if name == "open":
            self.fds.add(result)
        elif name == "close":
            self.fds.discard(args[0])
        return result

    return call


for _name in CALLS:
    setattr(Numbered, _name, _numbered(_name))


class Faulty(Numbered):
    """Fails call ``at`` in one ``way``: an errno, ``short``, ``eintr``, ``crash`` before or ``crash-after``."""

    def __init__(self, at: int, way: int | str, *, swap: bool = True) -> None:
        super().__init__()
        self.at, self.way, self.swap = at, way, swap
        self.dead = self.hit = False

    def before(self, n: int, name: str, call: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if self.dead:
            raise Crash
        if name == "exchange" and not self.swap:
            call = lambda a, b: False  # noqa: E731
        if n != self.at:
            return call(*args)
        return self.fault(name, call, args)

    def fault(self, name: str, call: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        way = self.way
        if isinstance(way, int):
            self.hit = True
            if name == "close":  # closes all the same
                call(*args)
                self.fds.discard(args[0])
            raise OSError(way, os.strerror(way))
        if way == "short" and name in ("pread", "pwrite") and len(args[1]) > 1:
            self.hit = True
            return call(args[0], args[1][: len(args[1]) // 2], args[2])
        if way == "eintr" and name in ("pread", "pwrite"):
            self.hit = True
            raise InterruptedError
        if way.startswith("crash"):
            self.hit = self.dead = True
            if way == "crash-after":
                result = call(*args)
                if name == "open":
                    self.fds.add(result)
                elif name == "close":
                    self.fds.discard(args[0])
            raise Crash
        return call(*args)


class Node:
    """A file (bytes now, bytes on disk) or a directory."""

    def __init__(self, data: bytes | None) -> None:
        self.now = None if data is None else bytearray(data)
        self.disk = b"" if data is None else data


class PowerLoss(Faulty):
    """Crashes at call ``at``, then :meth:`lose` leaves what a disk might hold.

    Model: names change in the order of the calls, as on a journaling file system; syncing a file or directory makes
    every change of names in that directory, and all before it, durable. Of a file's bytes nothing is sure but what
    it had at its last sync: each byte written since may be there or not.
    """

    def __init__(self, at: int, root: Path, **options: Any) -> None:
        super().__init__(at, "crash-after", **options)
        self.root = root
        self.names: dict[str, Node] = {}
        for p in sorted(root.rglob("*")):
            self.names[self.key(p)] = Node(None if p.is_dir() else p.read_bytes())
        self.start = dict(self.names)
        self.changes: list[tuple[list[str], Callable[[dict[str, Node]], None]]] = []
        self.sure = 0
        self.open_nodes: dict[int, tuple[Node | None, str]] = {}

    def key(self, path: Path) -> str:
        return str(path.relative_to(self.root))

    def change(self, touched: list[Path], act: Callable[[dict[str, Node]], None]) -> None:
        self.changes.append(([self.key(p.parent) for p in touched], act))
        act(self.names)

    def before(self, n: int, name: str, call: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        def tracked(*a: Any) -> Any:
            result = call(*a)
            self.track(name, args, result)
            return result

        return super().before(n, name, tracked, args)

    def track(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        act = getattr(self, f"on_{name}", None)
        if act:
            act(*args, result)

    def on_open(self, path: Path, flags: int, fd: int) -> None:
        key = "." if path == self.root else self.key(path)
        if flags & os.O_CREAT and key not in self.names:
            node = Node(b"")
            self.change([path], lambda names: names.__setitem__(key, node))
        if flags & os.O_TRUNC:
            self.names[key].now = bytearray()
        self.open_nodes[fd] = (self.names.get(key), key)

    def on_pwrite(self, fd: int, data: memoryview, offset: int, n: int) -> None:
        now = self.open_nodes[fd][0].now
        now.extend(bytes(max(0, offset + n - len(now))))
        now[offset : offset + n] = data[:n]

    def on_allocate(self, fd: int, size: int, _: None) -> None:
        now = self.open_nodes[fd][0].now
        now.extend(bytes(size - len(now)))

    def on_truncate(self, fd: int, size: int, _: None) -> None:
        node = self.open_nodes[fd][0]
        node.now = bytearray(bytes(node.now[:size]).ljust(size, b"\0"))

    def on_fsync(self, fd: int, _: Any) -> None:
        node, key = self.open_nodes[fd]
        if node is not None and node.now is not None:
            node.disk = bytes(node.now)
            return
        mine = [k for k, (touched, _) in enumerate(self.changes) if key in touched]
        self.sure = max([self.sure, *(k + 1 for k in mine)])

    def on_fdatasync(self, fd: int, result: Any) -> None:
        self.on_fsync(fd, result)

    def on_mkdir(self, path: Path, _: None) -> None:
        key, node = self.key(path), Node(None)
        self.change([path], lambda names: names.__setitem__(key, node))

    def on_rmdir(self, path: Path, _: None) -> None:
        key = self.key(path)
        self.change([path], lambda names: names.__delitem__(key))

    def on_unlink(self, path: Path, _: None) -> None:
        self.on_rmdir(path, None)

    def on_rename(self, old: Path, new: Path, _: None) -> None:
        a, b = self.key(old), self.key(new)
        self.change([old, new], lambda names: _move(names, {a: b}))

    def on_rename_new(self, old: Path, new: Path, _: None) -> None:
        self.on_rename(old, new, None)

    def on_exchange(self, a: Path, b: Path, done: bool) -> None:
        if done:
            x, y = self.key(a), self.key(b)
            self.change([a, b], lambda names: _move(names, {x: y, y: x}))

    def lose(self, seed: int) -> None:
        """Replace the real tree by one that the disk might hold."""
        rng = random.Random(seed)
        kept = rng.choice([self.sure, len(self.changes), rng.randint(self.sure, len(self.changes))])
        names = dict(self.start)
        for _, act in self.changes[:kept]:
            act(names)
        for p in self.root.iterdir():
            shutil.rmtree(p) if p.is_dir() else p.unlink()
        for key in sorted(names):
            path, node = self.root / key, names[key]
            if node.now is None:
                path.mkdir()
            else:
                path.write_bytes(_torn(node, rng))


def _move(names: dict[str, Node], moves: dict[str, str]) -> None:
    found = {}
    for old, new in moves.items():
        for key in [k for k in names if k == old or k.startswith(old + "/")]:
            found[new + key[len(old) :]] = names.pop(key)
    names.update(found)


def _torn(node: Node, rng: random.Random) -> bytes:
    now, disk = bytes(node.now), node.disk
    way = rng.choice(["disk", "now", "mixed"])
    if way != "mixed":
        return disk if way == "disk" else now
    size = rng.choice([len(disk), len(now)])
    old, new = disk.ljust(size, b"\0")[:size], now.ljust(size, b"\0")[:size]
    block = rng.choice([1, 7, 64])
    parts = (rng.choice([old, new])[k : k + block] for k in range(0, size, block))
    return b"".join(itertools.chain(parts))
