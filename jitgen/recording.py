"""Recording: the kernels that a run asked for, as a manifest that rebuilds them anywhere."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path

from jitgen.errors import EnvError
from jitgen.ir_text import to_text
from jitgen.manifest import request_text
from jitgen.portable import Call, pack
from jitgen.program import Program
from jitgen.progress import logger

HEADER = "# Kernels that were asked for, recorded by jitgen. Build them with: jitgen prebuild FILE --out DIR\n"
MAX_EXPRESSION = 200  # columns of an expression in a comment

_written: set[tuple[Path, str]] = set()
_lock = threading.Lock()


def manifest_text(call: Call, label: str, arch: str) -> str:
    """The `[[request]]` table of a kernel, as it is pasted into a manifest."""
    lines = [f"{label} for {arch}", *_hook_lines(call)]
    return request_text(pack(call), "\n".join(lines))


def record(path: Path, text: str) -> None:
    """Add a request to a recording, unless it holds it already; processes may share one.

    Errors:  EnvError when the file cannot be written: a recording that silently lacks kernels is worse than none.
    """
    with _lock:
        if (path, text) in _written:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a+", encoding="utf-8") as stream:
                _lock_file(stream.fileno())
                stream.seek(0)
                known = stream.read()
                if text not in known:
                    stream.write(("\n" if known else f"{HEADER}\n") + text)
        except OSError as error:
            raise EnvError(f"JITGEN_RECORD={str(path)!r} cannot be written: {error.strerror}. Name another file.") from error
        _written.add((path, text))


def _lock_file(handle: int) -> None:
    """Hold the file until it is closed; where the file system has no locks a request may be written twice."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        logger().debug("the recording's file system has no locks")


def _hook_lines(call: Call) -> list[str]:
    """What the hooks compute, for the reader of a manifest."""
    programs = [p for argument in call[1:] for p in (argument, getattr(argument, "program", None)) if isinstance(p, Program)]
    lines = []
    for program in programs[:1]:
        names = [slot.name for slot in program.slots]
        for hook in ("score", "mask", "sink", "output", "lse"):
            root = getattr(program, hook)
            if root is not None:
                text = " ".join(to_text(root, names, 2 * MAX_EXPRESSION).split())
                lines.append(f"{hook} = {text if len(text) <= MAX_EXPRESSION else text[: MAX_EXPRESSION - 3] + '...'}")
    return lines
