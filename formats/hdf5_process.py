"""Runs :mod:`.hdf5_child`, which holds the HDF5 C library, and turns its end into errors.

Measured with HDF5 2.0 and 26,000 Keras files with a few damaged bytes: 1 in 400 makes the library loop for ever
(global heap); 1 in 3,000 with chunked datasets crashes it. A checkpoint must not be able to do that to the caller.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from .errors import DependencyError, FormatError, LimitError, TruncatedError, printable

CPU_SECONDS = 20  # for one listing or block of rows; a real one takes less than one
DAMAGED = "the file is damaged; download or copy it again."
_SCRIPT = Path(__file__).with_name("hdf5_child.py")


class Hdf5Process:
    """The child process. Started on the first request, one request at a time, ended by :meth:`close`.

    Args:
        cpu_seconds: processor time one request may take.
    """

    def __init__(self, cpu_seconds: float = CPU_SECONDS) -> None:
        self.cpu_seconds = cpu_seconds
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def list(self, path: Path) -> dict[str, Any]:
        """What :func:`.hdf5_child.listing` found.

        Raises:
            FormatError: HDF5 cannot make sense of the file, crashes or does not come to an end.
            LimitError: too many or too deeply nested objects.
            TruncatedError: the file ends before its superblock says it does.
            DependencyError: h5py is not installed.
        """
        return self._ask({"op": "list", "path": str(path.absolute())}, path, None, None)

    def read(self, path: Path, name: str, start: int, stop: int, out: memoryview) -> None:
        """Rows ``start:stop`` of axis 0 of one dataset into ``out``, as stored."""
        request = {"op": "read", "path": str(path.absolute()), "name": name}
        self._ask(request | {"start": start, "stop": stop}, path, name, out)

    def close(self) -> None:
        """End the child; closing twice is harmless."""
        with self._lock:
            self._stop()

    def _ask(
        self, request: dict[str, Any], path: Path, name: str | None, out: memoryview | None
    ) -> dict[str, Any]:
        with self._lock:
            try:
                reply = self._exchange(request, path, name, out)
            except BaseException:
                self._stop()  # what is left of this exchange would answer the next request
                raise
        if "too_much" in reply:
            raise LimitError(
                f"{reply['too_much']}; no Keras checkpoint has that.", where=path, fix=DAMAGED
            )
        if "error" in reply:
            raise _complaint(reply["error"], path, name)
        return reply

    def _exchange(
        self, request: dict[str, Any], path: Path, name: str | None, out: memoryview | None
    ) -> dict[str, Any]:
        child = self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        line = b""
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(json.dumps(request | {"cpu": self.cpu_seconds}).encode() + b"\n")
            child.stdin.flush()
            line = child.stdout.readline()
        if not line.endswith(b"\n"):
            raise FormatError(self._reason(child), where=path, tensor=name, fix=DAMAGED)
        reply: dict[str, Any] = json.loads(line)
        if out is not None and "bytes" in reply:
            self._fill(child, reply["bytes"], out, path, name)
        return reply

    def _fill(
        self,
        child: subprocess.Popen[bytes],
        size: int,
        out: memoryview,
        path: Path,
        name: str | None,
    ) -> None:
        assert child.stdout is not None
        done = 0
        while size == len(out) and done < size:
            n = child.stdout.readinto(out[done:])  # type: ignore[attr-defined]
            if not n:
                break
            done += n
        if done != len(out):
            raise FormatError(
                f"HDF5 gave {max(size, done)} bytes of rows, expected {len(out)}.",
                where=path,
                tensor=name,
                fix=DAMAGED,
            )

    def _start(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        if importlib.util.find_spec("h5py") is None:
            raise DependencyError("reading Keras .h5 files needs h5py.", fix="pip install h5py")
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "OPENBLAS_NUM_THREADS": "1",
            "HDF5_PLUGIN_PRELOAD": "::",  # no filter code from outside the library
            "HDF5_USE_FILE_LOCKING": "FALSE",  # only reading, also from read-only file systems
        }
        try:
            child = subprocess.Popen(
                [sys.executable, "-P", str(_SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        except OSError as e:
            raise DependencyError(
                f"cannot start {sys.executable!r} to read HDF5: {e.strerror}."
            ) from e
        self._child = child
        self._end = weakref.finalize(self, _end, child)
        return child

    def _stop(self) -> None:
        if self._child is not None:
            self._end()
            self._child = None

    def _reason(self, child: subprocess.Popen[bytes]) -> str:
        """Why the child died."""
        code = child.wait()
        if code == -signal.SIGXCPU:
            return f"the HDF5 library comes to no end with it (stopped after {self.cpu_seconds} s)."
        if code < 0:
            return f"the HDF5 library crashes on it ({signal.Signals(-code).name})."
        return f"the process that reads HDF5 ended with status {code}."


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # a request that the child did not take
                pipe.close()


def _complaint(text: str, path: Path, name: str | None) -> FormatError | TruncatedError:
    text = printable(text, 200).rstrip(".")
    if "truncated file" in text:
        return TruncatedError(
            f"the file ends before its data do ({text}).", where=path, fix=DAMAGED
        )
    return FormatError(f"HDF5 cannot read it: {text}.", where=path, tensor=name, fix=DAMAGED)
