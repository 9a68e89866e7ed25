"""Where in the user's source a trace stands, and refusals that say so."""

from __future__ import annotations

import linecache
import os
import sys
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import NoReturn

from jitgen.errors import UnsupportedVariant

BOUNDARY = "_call_user"  # name of the tracer's function below which frames belong to the hook being traced
_PACKAGE = str(Path(__file__).parent) + os.sep


def _is_user_file(filename: str) -> bool:
    if filename.startswith((_PACKAGE, "<frozen")):
        return False
    parts = filename.replace("\\", "/").split("/")
    return not ("torch" in parts and "site-packages" in parts) and parts[-1] not in ("functools.py", "contextlib.py")


def user_frame() -> FrameType | None:
    """Innermost frame of the user's hook now on the stack; None when the hook is not running."""
    frame: FrameType | None = sys._getframe(1)
    found = None
    while frame is not None:
        if frame.f_code.co_name == BOUNDARY and frame.f_code.co_filename.startswith(_PACKAGE):
            return found
        if found is None and _is_user_file(frame.f_code.co_filename):
            found = frame
        frame = frame.f_back
    return None


def line_of(frame: FrameType) -> str:
    """Source text of the line a frame stands at, or the empty string."""
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()


def definition_of(code: CodeType | None) -> tuple[str | None, int | None]:
    return (None, None) if code is None else (code.co_filename, code.co_firstlineno)


def raised_at(tb: TracebackType | None) -> tuple[str | None, int | None]:
    """Deepest user line of a traceback that started inside a hook."""
    place: tuple[str | None, int | None] = (None, None)
    while tb is not None:
        if _is_user_file(tb.tb_frame.f_code.co_filename):
            place = (tb.tb_frame.f_code.co_filename, tb.tb_lineno)
        tb = tb.tb_next
    return place


def refuse(message: str, *, at: tuple[str | None, int | None] | None = None) -> NoReturn:
    """Raise UnsupportedVariant at the user's line: the one now running, or ``at``."""
    frame = user_frame()
    if frame is not None:
        at = (frame.f_code.co_filename, frame.f_lineno)
    file, line = at or (None, None)
    raise UnsupportedVariant(message, file=file, line=line)
