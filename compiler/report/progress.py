"""Progress on standard error, and Ctrl-C as a wish to stop with the best plan so far."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..pipeline import Progress

__all__ = ["watched"]


@contextmanager
def watched() -> Iterator[tuple[Callable[[Progress], None], threading.Event]]:
    """Progress lines on standard error, and a stop that the first Ctrl-C sets; the second one abandons."""
    stop = threading.Event()

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        sys.stderr.write("\nopweave: stopping with the best plan so far; Ctrl-C again abandons it\n")

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield _progress_line(), stop
    finally:
        signal.signal(signal.SIGINT, previous)
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")


def _progress_line() -> Callable[[Progress], None]:
    """One line that is rewritten on a terminal; into a file, a line every few seconds."""
    terminal = sys.stderr.isatty()
    interval, last = (0.1 if terminal else 5.0), [0.0]

    def listen(progress: Progress) -> None:
        if time.monotonic() - last[0] < interval:
            return
        last[0] = time.monotonic()
        figures = [f"{progress.elapsed_s:6.1f} s"]
        if progress.incumbent is not None:
            figures.append(f"incumbent {progress.incumbent:,}")
        if progress.bound is not None:
            figures.append(f"bound {progress.bound:,}")
        if progress.gap is not None:
            figures.append(f"gap {progress.gap:.2%}")
        line = f"{progress.pass_name}  {'  '.join(figures)}"
        sys.stderr.write(f"\r\x1b[K{line}" if terminal else f"{line}\n")
        sys.stderr.flush()

    return listen
