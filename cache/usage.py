"""How kernels are used: one line per build and load, appended to a file of the user store, and what they add up to.

Losing a line loses a count and nothing else, so nothing here is an error or waits for a disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from jitgen import paths
from jitgen.records import record

LOG = "usage.log"
COMPACT_ABOVE = 1 << 20  # bytes; a line is about 60


@record
class Usage:
    """Counts of one kernel: builds, seconds they took, and loads by processes."""

    builds: int = 0
    build_seconds: float = 0.0
    loads: int = 0


def note(kind: str, entry: Path, seconds: float = 0.0) -> None:
    """Count a 'load' or a 'build' of an entry, in whichever store or layer it is.

    Cost:    one append of a short line, which the system keeps whole among several writers; some 30 us.
    """
    store = paths.cache_dir()
    if store is None:
        return
    builds, loads = (1, 0) if kind == "build" else (0, 1)
    log = store / LOG
    with suppress(OSError):
        handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(handle, _line(entry.name, Usage(builds, seconds, loads)))
            size = os.fstat(handle).st_size
        finally:
            os.close(handle)
        if size > COMPACT_ABOVE * (1 if kind == "build" else 4):  # where nothing is built, loads must not add up for ever
            compact(store)


def read(store: Path) -> dict[str, Usage]:
    """Counts by entry name; lines that a crash cut are left out."""
    total: dict[str, Usage] = {}
    for name, usage in _lines(store / LOG):
        old = total.get(name, Usage())
        seconds = old.build_seconds + usage.build_seconds
        total[name] = Usage(old.builds + usage.builds, seconds, old.loads + usage.loads)
    return total


def compact(store: Path) -> None:
    """Replace the lines by their sums. Lines appended meanwhile are lost, which is a count."""
    temporary = store / f"{LOG}.{os.getpid()}"
    with suppress(OSError):
        temporary.write_bytes(b"".join(_line(name, usage) for name, usage in sorted(read(store).items())))
        os.replace(temporary, store / LOG)


def _line(name: str, usage: Usage) -> bytes:
    return f"{name} {usage.builds} {usage.build_seconds:.2f} {usage.loads}\n".encode()


def _lines(log: Path) -> Iterator[tuple[str, Usage]]:
    with suppress(OSError):
        for line in log.read_text(errors="replace").splitlines():
            with suppress(ValueError):
                name, builds, seconds, loads = line.split(" ")
                yield name, Usage(int(builds), float(seconds), int(loads))
