"""Terminal manners shared by the commands: progress on stderr, one-line errors, exit codes, signals, colour."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, TextIO, cast

import click

from .formats.errors import (
    LAST_RESORT,
    FileIOError,
    G2Error,
    MemoryLimitError,
    UsageError,
    printable,
)

_BUG = "this is a bug in g2kit; run again with --debug and report the traceback."
_MORE_MEMORY = (
    "close other programs, raise the limits (`ulimit -a` lists them) or use a machine with more memory; an "
    "interrupted conversion resumes."
)
# exceptions that mean too little memory: type -> whether this one does
_NO_MEMORY: dict[type[BaseException], Callable[[Any], bool]] = {
    MemoryError: lambda e: True,
    OSError: lambda e: e.errno == errno.ENOMEM,
    RuntimeError: lambda e: "can't start new thread" in str(e),
}


class Meter:
    """Progress of a long command: bytes, rate and time left, on stderr, only when that is a terminal.

    Call it with bytes (or other units) just done and what they belong to; safe from any thread. ``total`` may be set late.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.shown = not quiet and sys.stderr.isatty()
        self._bar: Any = None
        self._lock = threading.Lock()

    def start(self, total: int, what: str, unit: str = "B") -> None:
        """Begin a phase of ``total`` bytes, or another unit."""
        self.stop()
        if self.shown:
            from tqdm import tqdm

            # a terminal that does not tell its size (0 x 0) would show no bar at all
            known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
            self._bar = tqdm(
                total=total, unit=unit, unit_scale=True, desc=what, leave=False, mininterval=0.2,
                dynamic_ncols=known, ncols=None if known else 80, nrows=None if known else 24,
            )  # fmt: skip

    def __call__(self, nbytes: int, name: str) -> None:
        """Report ``nbytes`` more, of tensor ``name``."""
        if self._bar is not None:
            with self._lock:
                self._bar.set_postfix_str(name[-40:], refresh=False)
                self._bar.update(nbytes)

    def say(self, text: str) -> None:
        """A message on stderr, kept apart from the bar."""
        if not self.quiet:
            self.stop()
            click.echo(text, err=True)

    def stop(self) -> None:
        """End the phase."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()


class Terminated(BaseException):
    """SIGTERM or SIGHUP arrived; files are left resumable."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(signum)


def _on_signal(signum: int, frame: FrameType | None) -> None:
    raise Terminated(signum)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind the command, as Ctrl-C does; the caller's handlers come back afterwards."""
    before = {s: signal.signal(s, _on_signal) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler if handler is not None else signal.SIG_DFL)


def _are_complete(paths: Sequence[str | Path]) -> str:
    listed = ", ".join(printable(str(path)) for path in paths)
    return f"{listed} {'is' if len(paths) == 1 else 'are'} complete"


class _StdoutError(Exception):
    """stdout takes no more: nobody reads it (``| head``), or it is full.

    Not an OSError, of which click makes exit code 1 where it is a BrokenPipeError.
    """

    def __init__(self, reason: OSError) -> None:
        self.reason = reason
        self.complete: tuple[str | Path, ...] = ()
        super().__init__(reason)

    def as_error(self) -> G2Error:
        """What to say where somebody reads."""
        done = f"{_are_complete(self.complete)}, only " if self.complete else ""
        return FileIOError(
            f"{done}the report could not be printed: {self.reason.strerror or self.reason}.",
            where="standard output",
            fix="look at where standard output goes.",
        )


class _Guarded:
    """A standard stream whose failures are handled here, whoever writes to it."""

    def __init__(self, stream: TextIO, failed: Callable[[OSError], None]) -> None:
        self._stream, self._failed = stream, failed

    def write(self, text: str) -> int:
        try:
            # click asks with "" whether text is taken, and ignores what happens then
            return 0 if text == "" else self._stream.write(text)
        except OSError as e:
            self._give_up(e)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as e:
            self._give_up(e)

    def _give_up(self, e: OSError) -> None:
        # Python flushes once more at exit: let the stream swallow what is still in its buffer
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        self._failed(e)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _cannot_print(e: OSError) -> None:
    raise _StdoutError(e) from e


def _cannot_say(e: OSError) -> None:
    """A message that stderr does not take ends no command."""


@contextmanager
def _usable_streams() -> Iterator[None]:
    """Standard streams that exist and take any text.

    A closed descriptor (``>&-``) would be given to the next file that is opened, weights among them: all three lead
    to /dev/null then. Characters that the encoding lacks, such as bytes of a path that are no UTF-8, are escaped.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    before = sys.stdout, sys.stderr
    with Path(os.devnull).open("w") as nowhere:
        streams = [stream or nowhere for stream in before]
        for stream in streams:
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        sys.stdout = cast(TextIO, _Guarded(streams[0], _cannot_print))
        sys.stderr = cast(TextIO, _Guarded(streams[1], _cannot_say))
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


@contextmanager
def reporting(*complete: str | Path) -> Iterator[None]:
    """Around the printing of a report on ``complete``, outputs that are in place: whatever stops it, the message says so."""
    try:
        yield
    except _StdoutError as e:
        e.complete = complete
        raise
    except (KeyboardInterrupt, Terminated) as e:
        if complete:
            e.add_note(f"{_are_complete(complete)}, {_ONLY}")
        raise


def run_cli(group: click.Group, argv: Sequence[str] | None = None) -> int:
    """Run a command group; returns the exit code of the documented table.

    A failure is one line on stderr. With ``--json`` anywhere among the arguments it is also one JSON document on
    stdout: ``{"error": {code, message, file, tensor, found, expected, fix}, "exit_code": n}``.
    """
    with _usable_streams(), _signals_raise():
        return _run(group, list(sys.argv[1:] if argv is None else argv))


def _run(group: click.Group, args: list[str]) -> int:
    options = args[: args.index("--")] if "--" in args else args
    debug, as_json = "--debug" in options, "--json" in options
    # --debug is accepted anywhere, so that it can be added to the end of a failed command
    args = [a for a in options if a != "--debug"] + args[len(options) :]
    group.no_args_is_help = False  # help is no error message
    try:
        if empty := [a for a in args if not a or re.fullmatch("--[a-z-]+=", a)]:
            raise UsageError(
                f"an argument is empty{f' ({empty[0]})' if empty[0] else ''}.",
                fix="leave it out, or set the shell variable that it came from.",
            )
        status = group.main(args=args, prog_name=group.name, standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0  # click returns what ctx.exit() was given
    except _StdoutError as e:
        gone = isinstance(e.reason, BrokenPipeError)
        return 128 + signal.SIGPIPE if gone else _fail(e.as_error(), as_json=False)
    except BaseException as e:
        if isinstance(e, SystemExit | GeneratorExit):
            raise
        if debug:
            traceback.print_exc()
        signum = _signal_of(e)
        return _fail(_as_error(e), as_json) if signum is None else _stopped(signum, e, as_json)


def _as_error(e: BaseException) -> G2Error:
    """Any exception as one of ours."""
    if isinstance(e, G2Error):
        return e
    if isinstance(e, click.UsageError):
        return _usage_error(e)
    if any(isinstance(e, kind) and says(e) for kind, says in _NO_MEMORY.items()):
        return MemoryLimitError(f"out of memory ({e or type(e).__name__}).", fix=_MORE_MEMORY)
    if isinstance(e, OSError):
        return FileIOError(f"{e.strerror or e}.", where=e.filename and os.fsdecode(e.filename))
    return G2Error(f"{type(e).__name__}: {e}.", fix=_BUG)


def _usage_error(e: click.UsageError) -> UsageError:
    """Click's own complaints, which may have several lines, as one sentence."""
    what, fix = " ".join(e.format_message().split()).rstrip(".") + ".", None
    if e.ctx:
        usage = " ".join(e.ctx.get_usage().removeprefix("Usage:").split())
        fix = f"the usage is `{usage}`; see `{e.ctx.command_path} --help`."
    return UsageError(what, fix=fix)


def _signal_of(e: BaseException) -> int | None:
    """The signal that ended the command, None where it was none."""
    if isinstance(e, Terminated):
        return e.signum
    return signal.SIGINT if isinstance(e, click.Abort | KeyboardInterrupt) else None


@contextmanager
def resumable(dst: Path) -> Iterator[None]:
    """Around a command that writes ``dst`` as a transaction: a signal's message says what became of it."""
    before = _inode(dst)
    try:
        yield
    except (KeyboardInterrupt, Terminated) as e:
        partial = dst.with_name(f"{dst.name}.partial")
        # the output takes its place in one step, at the very end
        landed, left = _inode(dst) not in (None, before), _inode(partial) is not None
        e.add_note(_STOPPED_AT[landed, left].format(_are_complete([dst]), printable(str(partial))))
        raise


_ONLY = "only the report was not printed."
# (the output is in its place, the staging directory is there) -> what became of it, what to do
_STOPPED_AT = {
    (False, False): "nothing unfinished is left behind.",
    (False, True): "the destination is unchanged, what is done lies in {1}.\n"
    "run the same command again to continue.",
    (True, False): f"{{0}}, {_ONLY}",
    (True, True): f"{{0}}, {_ONLY}\nrun the same command again to clear up {{1}}.",
}


def _inode(path: Path) -> tuple[int, int] | None:
    """Which file or directory is there; a path that nobody can use is none."""
    try:
        st = path.lstat()
    except (OSError, ValueError):
        return None
    return st.st_dev, st.st_ino


def _stopped(signum: int, e: BaseException, as_json: bool) -> int:
    # click turns KeyboardInterrupt into its own Abort
    notes = [n for x in (e, e.__cause__) for n in getattr(x, "__notes__", ())]
    state, _, again = (notes[0] if notes else "nothing was written.").partition("\n")
    if as_json:
        what = f"stopped by {signal.Signals(signum).name}: {state}"
        error = G2Error(what, fix=again or None).as_dict() | {"code": "E_STOPPED"}
        _print_failure(error, 128 + signum)
    said = f"stopped: {state}" + (f" {again.capitalize()}" if again else "")
    click.echo(said, err=True)
    return 128 + signum


def _fail(e: G2Error, as_json: bool) -> int:
    fix = e.fix or LAST_RESORT.get(e.code)
    if as_json:
        _print_failure(e.as_dict() | {"fix": fix}, e.exit_code)
    label = f"error[{e.code}]"
    if use_color():
        label = click.style(label, fg="red", bold=True)
    text = f"{e} Fix: {fix}" if fix and not e.fix else str(e)
    click.echo(f"{label}: {text}", err=True, color=use_color())
    return e.exit_code


def _print_failure(error: Mapping[str, Any], status: int) -> None:
    with suppress(_StdoutError):  # stderr and the exit code tell it too
        click.echo(dump_json({"error": error, "exit_code": status}))


def dump_json(report: Any) -> str:
    """A report as one JSON document, in ASCII; NaN and the infinities, which JSON lacks, as strings."""
    return json.dumps(_plain(report), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # "nan", "inf", "-inf"
    return value


def use_color() -> bool:
    """Colour on stderr: a terminal, and NO_COLOR not set (https://no-color.org)."""
    return (
        sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )


def seconds(t: float) -> str:
    """``4.2 s`` or ``3 min 5 s``."""
    return f"{t:.1f} s" if t < 100 else f"{int(t // 60)} min {int(t % 60)} s"


def size(n: float) -> str:
    """Bytes in binary units: ``4.9 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if n < 1024 or unit == "TiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError("unreachable")


def count(n: int) -> str:
    """Parameters for reading: ``2.61 B``, ``0.42 M``."""
    return f"{n / 1e9:.2f} B" if n >= 1e8 else f"{n / 1e6:.2f} M"


def clock() -> float:
    """Monotonic seconds."""
    return time.monotonic()
