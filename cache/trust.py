"""Whether a file may be loaded: loading a module runs native code, so no other user may have been able to write it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from jitgen.errors import CacheError


def check_trusted(path: Path, remedy: str) -> None:
    """Refuse a directory or file that another user owns or could write.

    Errors:  CacheError naming the path, what is wrong and the command that mends it; OSError if it does not exist.
    """
    state = os.stat(path)
    mode = stat.S_IMODE(state.st_mode)
    if state.st_uid not in (os.geteuid(), 0):
        raise CacheError(
            f"{path} belongs to user {state.st_uid}, you are {os.geteuid()}: loading from it would run that user's "
            f"code. Remove it, or {remedy}."
        )
    if mode & 0o022:
        raise CacheError(
            f"{path} can be written by other users (mode {mode:04o}): loading from it would run their code. "
            f"Run: chmod go-w '{path}', or {remedy}."
        )
