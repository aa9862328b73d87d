"""Terminal manners shared by the commands: progress on stderr, one-line errors, exit codes, signals, colour."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, Self

import click

from .formats.errors import EXIT_INTERNAL, EXIT_RESOURCE, EXIT_USAGE, G2Error

_BUG = "this is a bug in g2kit; run again with --debug and report the traceback."


class Meter:
    """Progress of a long command: bytes, rate and time left, on stderr, only when that is a terminal.

    Call it with bytes just done and what they belong to; safe from any thread. ``total`` may be set late.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.shown = not quiet and sys.stderr.isatty()
        self._bar: Any = None
        self._lock = threading.Lock()

    def start(self, total: int, what: str) -> None:
        """Begin a phase of ``total`` bytes."""
        self.stop()
        if self.shown:
            from tqdm import tqdm

            # a terminal that does not tell its size (0 x 0) would show no bar at all
            known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
            self._bar = tqdm(
                total=total, unit="B", unit_scale=True, desc=what, leave=False, mininterval=0.2,
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
    """Run a command group; returns the exit code of the documented table."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    # --debug is accepted anywhere, so that it can be added to the end of a failed command
    args = [a for a in args if a != "--debug"]
    for s in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(s, _on_signal)
    try:
        group.main(args=args, prog_name=group.name, standalone_mode=False)
        sys.stdout.flush()
        return 0
    except G2Error as e:
        return _fail(e.code, str(e), e.exit_code, debug)
    except click.UsageError as e:
        hint = f" Fix: see `{e.ctx.command_path} --help`." if e.ctx else ""
        return _fail("E_USAGE", e.format_message() + hint, EXIT_USAGE, debug)
    except click.exceptions.Exit as e:
        return e.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _stopped(signal.SIGINT)
    except Terminated as e:
        return _stopped(e.signum)
    except BrokenPipeError:
        # the reader of our output went away (`| head`): no message, no traceback at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except MemoryError:
        fix = "close other programs or use a machine with more memory; an interrupted conversion resumes."
        return _fail("E_MEMORY", f"out of memory. Fix: {fix}", EXIT_RESOURCE, debug)
    except OSError as e:
        place = f"{e.filename}: " if e.filename else ""
        return _fail("E_IO", f"{place}{e.strerror or e}.", EXIT_RESOURCE, debug)
    except Exception as e:
        return _fail("E_INTERNAL", f"{type(e).__name__}: {e}. Fix: {_BUG}", EXIT_INTERNAL, debug)


def _fail(code: str, text: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    label = click.style(f"error[{code}]", fg="red", bold=True) if use_color() else f"error[{code}]"
    click.echo(f"{label}: {text}", err=True, color=use_color())
    return status


def _stopped(signum: int) -> int:
    click.echo(
        "stopped. No destination was changed; a conversion continues when the same command is run again "
        "(what is done so far lies in DST.partial).",
        err=True,
    )
    return 128 + signum


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
