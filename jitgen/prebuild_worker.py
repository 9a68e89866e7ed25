"""A process that builds kernels one after the other: requests come in as lines of JSON, results go out as such.

It needs none of the user's Python: a request holds all of a kernel. The store is JITGEN_CACHE_DIR.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from jitgen.errors import JitgenError
from jitgen.events import Event, on_event
from jitgen.portable import unpack

INTERRUPTED = 130  # exit code, as a shell reports Ctrl-C


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Build one request; the result says what became of it."""
    events: list[Event] = []
    remove = on_event(events.append)
    begun = time.monotonic()
    try:
        function, arguments = unpack(request)
        module = function(*arguments)
    except (JitgenError, OSError) as error:
        return {"outcome": "failed", "seconds": time.monotonic() - begun, "error": str(error)}
    finally:
        remove()
    built = any(event.kind == "build" for event in events)
    seconds = sum(event.seconds for event in events if event.kind == "build")
    return {
        "outcome": "built" if built else "hit",
        "seconds": seconds if built else time.monotonic() - begun,
        "entry": module.parent.name,
        "size": module.stat().st_size,
    }


def main() -> int:
    """Answer every line of standard input. What compilers print on standard output goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(build(json.loads(line))) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:  # Ctrl-C goes to all processes of a terminal, and the first one speaks
        raise SystemExit(INTERRUPTED) from None
