"""Text for a terminal: colours, tables, wrapping, numbers as a human reads them. Imports the standard library only."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence

STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
LEAST_WIDTH, MOST_WIDTH = 72, 120  # columns: what is pleasant to read


def has_colour() -> bool:
    """Whether standard output shows colours: a terminal, and NO_COLOR (no-color.org) is not set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, style: str) -> str:
    """The text in one of STYLES, where standard output shows colours."""
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if has_colour() and text else text


def terminal_width() -> int:
    """Columns to write in."""
    return max(LEAST_WIDTH, min(MOST_WIDTH, shutil.get_terminal_size((100, 24)).columns))


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` columns; a command or a path is never broken."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def field(name: str, text: str, *, name_width: int = 10, style: str | None = None) -> str:
    """A named value, indented by two and wrapped below itself."""
    indent = 2 + name_width
    lines = wrapped(text, terminal_width() - indent)
    if style is not None:
        lines = [paint(line, style) for line in lines]
    return f"  {name:<{name_width}}" + ("\n" + " " * indent).join(lines)


def table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """Aligned lines; the first row is the head, and the columns numbered in ``right`` are flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return [paint(lines[0], "bold"), *lines[1:]]


def counted(number: int, noun: str, plural: str = "") -> str:
    """'1 kernel', '2 kernels'."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def size_text(size: float) -> str:
    """Bytes in a unit a human reads."""
    if size < 1000:
        return f"{size:.0f} B"
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.5 or unit == "GB":
            break
    return f"{size:.0f} {unit}" if size >= 10 else f"{size:.1f} {unit}"


def age_text(seconds: float) -> str:
    """How long ago, or that a clock was wrong."""
    return duration_text(seconds) if seconds >= 0 else "in the future"


def duration_text(seconds: float) -> str:
    """A time span in the unit that leaves a small number."""
    units = ((1e-3, 1e-6, "us"), (1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h"))
    for limit, unit, name in units:
        if seconds < limit:
            value = seconds / unit
            return f"{value:.1f} {name}" if value < 10 and unit <= 1 else f"{value:.0f} {name}"
    return f"{seconds / 86400:.0f} days"


def short_arch(arch: str) -> str:
    """A CPU's instruction sets by the name of their level; anything else as it is."""
    names = arch.split("+")
    for last, level in (("amx_bf16", "amx"), ("avx512f", "avx512"), ("avx2", "avx2")):
        if last in names:
            return f"{names[0]} {level}"
    return arch


def positive(text: str) -> int:
    """An argument of the command line that counts something."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)
