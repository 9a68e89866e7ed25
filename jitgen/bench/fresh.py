"""Fresh processes that have torch: forked, one for each task, from a process that has imported it and has not touched a device.

Importing torch takes longer than most of what is measured. So a process of its own imports it once, with what the tasks need,
and then forks: `Fresh` starts it and asks it, `serve` is what it does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

LIMIT_S = 400
# variables of the caller that would change what is measured
UNWANTED = ("JITGEN_PREBUILT", "JITGEN_MODE", "PYTHONDONTWRITEBYTECODE")

Tasks = Mapping[str, Callable[..., dict[str, Any]]]


class ProbeFailed(Exception):
    """A fresh process gave no figure; the message is the last line of its error."""


class Fresh:
    """Runs tasks of a module, one after the other, each in a process of its own.

    The module is run as a program and calls ``serve``.
    """

    def __init__(self, module: str) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={name: value for name, value in os.environ.items() if name not in UNWANTED},
        )

    def __enter__(self) -> Fresh:
        return self

    def __exit__(self, *error: object) -> None:
        self._server.communicate()  # it ends with its input

    def __call__(self, task: str, arguments: dict[str, Any], store: Path) -> dict[str, Any]:
        """Run one task, its caches below ``store``.

        Errors:  ProbeFailed.
        """
        environment = {
            "JITGEN_CACHE_DIR": str(store / "jitgen"),
            "TORCHINDUCTOR_CACHE_DIR": str(store / "inductor"),
            "TRITON_CACHE_DIR": str(store / "triton"),
        }
        with suppress(BrokenPipeError):
            print(json.dumps([task, arguments, environment]), file=self._server.stdin, flush=True)
        answer = self._server.stdout.readline()  # type: ignore[union-attr]
        if not answer:
            raise ProbeFailed(f"the process that forks others ended with status {self._server.wait()}")
        found, error = json.loads(answer)
        if error:
            raise ProbeFailed(error)
        return found


def serve(tasks: Tasks) -> None:
    """Answer requests, one line of JSON each, until the input ends: with what a task found, or else its error."""
    for line in sys.stdin:
        task, arguments, environment = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _work(tasks, task, arguments, environment, writer)
        os.close(writer)
        with os.fdopen(reader) as stream:
            answer = stream.readline()
        status = os.waitpid(child, 0)[1]
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what it has started itself
        print(answer.strip() or json.dumps([None, _end(status)]), flush=True)


def _work(tasks: Tasks, task: str, arguments: dict[str, Any], environment: dict[str, str], writer: int) -> None:
    """A forked process: writes its answer and ends."""
    os.setsid()
    os.dup2(2, 1)  # what a task prints is no answer
    signal.alarm(LIMIT_S)
    os.environ.update(environment)
    try:
        answer = [tasks[task](**arguments), ""]
    except BaseException as error:
        answer = [None, traceback.format_exception_only(error)[-1].strip().splitlines()[-1]]
    os.write(writer, (json.dumps(answer) + "\n").encode())
    os._exit(0)


def _end(status: int) -> str:
    """What is known of a process that gave no answer."""
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGALRM:
        return f"no answer after {LIMIT_S} s"
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
