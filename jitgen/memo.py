"""Facts about programs, remembered in the store so that a cache hit starts no process.

A fact belongs to one state of one file: path, size and modification time. Losing a memo costs one run of the program.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from jitgen import paths


def remembered(question: str, program: Path, ask: Callable[[], str]) -> str:
    """Return the answer to a question about a program; `ask` runs when the answer is not on record for this file.

    An empty answer means that the program did not say, and is not recorded.
    """
    state = program.stat()
    return recalled(f"{question}\0{program}\0{state.st_size}\0{state.st_mtime_ns}", ask)


def recalled(identity: str, ask: Callable[[], str]) -> str:
    """Like remembered, for an identity that holds the question and the state of all that the answer depends on."""
    store = paths.cache_dir()
    if store is None:
        return ask()
    # a path may hold bytes that are no UTF-8, which Python keeps as surrogates
    memo = store / "programs" / hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    with suppress(OSError, UnicodeDecodeError):
        answer = memo.read_text("utf-8")
        if answer.endswith("\n") and answer.strip():
            return answer[:-1]
    answer = ask()
    if answer:
        with suppress(OSError, UnicodeEncodeError):  # the latter: it names a path that is no UTF-8
            _write(memo, answer + "\n")
    return answer


def _write(memo: Path, text: str) -> None:
    paths.make_private_dir(memo.parent.parent)
    paths.make_private_dir(memo.parent)
    handle, name = tempfile.mkstemp(dir=memo.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(name, memo)
    except (OSError, UnicodeEncodeError):
        os.unlink(name)
        raise
