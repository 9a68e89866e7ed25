"""What a user sees while a kernel is compiled: one line on a terminal, nothing elsewhere; and one log line after it."""

from __future__ import annotations

import logging
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from jitgen import env

SHOW_AFTER = 0.3  # seconds: what is over sooner needs no explanation
REDRAW_EVERY = 0.1  # seconds
_line = threading.Lock()  # of those that compile at the same time the first has the line, and then the next


def logger() -> logging.Logger:
    """The logger 'jitgen'; JITGEN_LOG makes it print to stderr, else it follows the application's logging."""
    log = logging.getLogger("jitgen")
    level = env.log_level()
    if level == "off":
        if not log.handlers:  # else Python would print warnings itself where the application has set up no logging
            log.addHandler(logging.NullHandler())
    elif not any(isinstance(handler, logging.StreamHandler) for handler in log.handlers):
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("jitgen: %(message)s"))
        log.addHandler(handler)
        log.setLevel(level.upper())
        log.propagate = False
    return log


@contextmanager
def progress_line(message: str) -> Iterator[None]:
    """Show a message and the seconds elapsed on stderr, on one line that vanishes at the end."""
    if not _is_shown():
        yield
        return
    done = threading.Event()
    drawer = threading.Thread(target=_draw, args=(message, done), daemon=True)
    drawer.start()
    try:
        yield
    finally:
        done.set()
        drawer.join()


def _is_shown() -> bool:
    wanted = env.progress()
    if wanted == "auto":
        return sys.stderr is not None and sys.stderr.isatty()
    return wanted == "on"


def _draw(message: str, done: threading.Event) -> None:
    begun = time.monotonic()
    if done.wait(SHOW_AFTER):
        return
    while not _line.acquire(timeout=REDRAW_EVERY):
        if done.is_set():
            return
    try:
        _draw_until(done, message, begun)
    finally:
        _line.release()


def _draw_until(done: threading.Event, message: str, begun: float) -> None:
    while True:
        elapsed = f" ({time.monotonic() - begun:.1f} s)"
        # a line that wraps could not be erased again
        room = shutil.get_terminal_size().columns - len(elapsed) - 1
        sys.stderr.write(f"\r\x1b[2K{f'jitgen: {message}'[:room]}{elapsed}")
        sys.stderr.flush()
        if done.wait(REDRAW_EVERY):
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
            return


class Bar:
    """A progress bar on stderr, where progress is shown; it vanishes at the end."""

    WIDTH = 24  # columns of the bar itself

    def __init__(self, title: str) -> None:
        self.title, self._is_shown, self._begun = title, _is_shown(), time.monotonic()

    def __enter__(self) -> Bar:
        self.show(0, 0, "")
        return self

    def show(self, done: int, total: int, last: str) -> None:
        """Draw how many of how many are done, and what the last one was."""
        if not self._is_shown:
            return
        filled = self.WIDTH * done // total if total else 0
        line = f"jitgen: {self.title} [{'#' * filled}{'.' * (self.WIDTH - filled)}] {done}/{total or '?'}"
        line += f" ({time.monotonic() - self._begun:.0f} s) {last}"
        sys.stderr.write(f"\r\x1b[2K{line[: shutil.get_terminal_size().columns - 1]}")
        sys.stderr.flush()

    def __exit__(self, *error: object) -> None:
        if self._is_shown:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
