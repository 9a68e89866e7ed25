"""Warnings of the store, which name the line that called jitgen."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

from jitgen.errors import CacheWarning


def warn(message: str) -> None:
    """A CacheWarning at the innermost line that is not jitgen's own."""
    level = 2
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "jitgen":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, CacheWarning, stacklevel=level)
