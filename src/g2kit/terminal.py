"""Terminal manners shared by the commands: progress on stderr, one-line errors, exit codes, signals, colour."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

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


def run_cli(group: click.Group, argv: Sequence[str] | None = None) -> int:
    """Run a command group; returns the exit code of the documented table.

    A failure is one line on stderr. With ``--json`` anywhere among the arguments it is also one JSON document on
    stdout: ``{"error": {code, message, file, tensor, found, expected, fix}, "exit_code": n}``.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    options = args[: args.index("--")] if "--" in args else args
    debug, as_json = "--debug" in options, "--json" in options
    # --debug is accepted anywhere, so that it can be added to the end of a failed command
    args = [a for a in options if a != "--debug"] + args[len(options) :]
    group.no_args_is_help = False  # help is no error message
    for s in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(s, _on_signal)
    try:
        status = group.main(args=args, prog_name=group.name, standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0  # click returns what ctx.exit() was given
    except BrokenPipeError:
        # the reader of our output went away (`| head`): no message, no traceback at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
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
    if isinstance(e, MemoryError):
        fix = "close other programs or use a machine with more memory; an interrupted conversion resumes."
        return MemoryLimitError("out of memory.", fix=fix)
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
    try:
        yield
    except (KeyboardInterrupt, Terminated) as e:
        partial = dst.with_name(f"{dst.name}.partial")
        state, again = "nothing unfinished is left behind.", ""
        with suppress(OSError):
            if partial.exists():
                state = (
                    f"the destination is unchanged, what is done lies in {printable(str(partial))}."
                )
                again = "run the same command again to continue."
        e.add_note(f"{state}\n{again}")
        raise


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
    with suppress(BrokenPipeError):
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


def clock() -> float:
    """Monotonic seconds."""
    return time.monotonic()
