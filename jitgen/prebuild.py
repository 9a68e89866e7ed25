"""Prebuilding: compile what manifests ask for, without a GPU, into a directory that is shipped as a layer.

    from jitgen import prebuild
    report = prebuild.build(["kernels.toml"], "layer", archs=["9.0a", "8.0"])
    assert not report.failed
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

from jitgen import paths
from jitgen.cache.layer import STAMP, make_readable, make_stamp
from jitgen.cache.trust import check_trusted
from jitgen.errors import CacheError, InvalidValue, ManifestError
from jitgen.manifest import Manifest, read_manifest
from jitgen.prebuild_worker import INTERRUPTED

if TYPE_CHECKING:
    from jitgen.prebuild_units import Unit

INTERRUPT_TAKES = 2.0  # seconds that a building process is given to end after Ctrl-C

# Variables that would let a worker find kernels elsewhere, or do more than build.
_UNSET = ("JITGEN_PREBUILT", "JITGEN_MODE", "JITGEN_RECORD", "JITGEN_REMOTE", "JITGEN_CPU_ISA", "JITGEN_CUDA_ARCH")


class Built(NamedTuple):
    """What became of one kernel: outcome is 'built', 'hit' (it was there) or 'failed'."""

    what: str
    arch: str
    outcome: str
    seconds: float
    entry: str = ""
    size: int = 0  # bytes of the module
    error: str = ""


class Report(NamedTuple):
    """What became of all kernels of a prebuild, in the order of their names."""

    out: Path
    results: tuple[Built, ...]
    seconds: float

    @property
    def failed(self) -> tuple[Built, ...]:
        return tuple(result for result in self.results if result.outcome == "failed")


def plan(
    manifests: Sequence[str | os.PathLike[str] | Manifest],
    *,
    archs: Sequence[str] | None = None,
    shard: tuple[int, int] = (1, 1),
) -> list[Unit]:
    """The kernels that ``build`` would build: all that the manifests ask for, or one shard of them.

    Errors:  ManifestError, UnsupportedVariant, EnvError for an architecture that does not exist.
    Cost:    imports torch and the modules that define the variants; traces each variant; compiles nothing.
    """
    number, count = shard
    if not 1 <= number <= count:
        raise ManifestError(f"shard {number}/{count}: expected i/n with 1 <= i <= n.")
    from jitgen.prebuild_units import expand, shard_of

    read = [item if isinstance(item, Manifest) else read_manifest(Path(item)) for item in manifests]
    return shard_of(expand(read, archs), number, count)


def build(
    manifests: Sequence[str | os.PathLike[str] | Manifest],
    out: str | os.PathLike[str],
    *,
    archs: Sequence[str] | None = None,
    jobs: int | None = None,
    shard: tuple[int, int] = (1, 1),
    on_done: Callable[[Built, int, int], None] | None = None,
) -> Report:
    """Build the kernels of manifests into the layer ``out``, which is made if need be and kept if it exists.

    ``archs`` as for ``plan``; ``jobs`` processes at once, by default one for each core; ``on_done`` is called with each
    result, the number done and the number of all. A kernel that fails stops no other: see ``Report.failed``. Processes on
    other machines may build other shards into the same directory.
    Errors:  ManifestError, UnsupportedVariant; CacheError when ``out`` cannot be written or belongs to another user.
    Cost:    a few seconds per kernel and core; each process imports torch once.
    """
    if jobs is not None and jobs < 1:
        raise InvalidValue(f"jobs is {jobs}, expected a positive number of processes, or None for one on each core.")
    begun = time.monotonic()
    units = plan(manifests, archs=archs, shard=shard)
    root = _layer_directory(Path(out).resolve())
    jobs = min(jobs or len(os.sched_getaffinity(0)), max(1, len(units)))
    results = _run(units, root, jobs, on_done or (lambda result, done, total: None))
    make_readable(root)
    results.sort(key=lambda result: (result.what, result.arch, result.entry))
    return Report(root, tuple(results), time.monotonic() - begun)


def _layer_directory(root: Path) -> Path:
    """The directory of the layer, with its stamp.

    A layer of another version is refused: its kernels would stay, and nobody would find them.
    """
    from jitgen.cache.layer import read_stamp

    try:
        paths.make_private_dir(root)
        check_trusted(root, "choose another directory")
        stamp = read_stamp(root)
        text = make_stamp()
        if stamp is not None and stamp["generator"] != json.loads(text)["generator"]:
            raise CacheError(f"{root} holds kernels of another jitgen (version {stamp['jitgen']}). Remove it, or name another.")
        (root / STAMP).write_text(text)
    except CacheError:
        raise
    except OSError as error:
        raise CacheError(f"{root} cannot be written: {error.strerror}. Name another directory.") from error
    return root


# ---- processes ----------------------------------------------------------------------------------------------------------


def _run(units: Sequence[Unit], root: Path, jobs: int, on_done: Callable[[Built, int, int], None]) -> list[Built]:
    """Results of all units, in the order in which they were done."""
    waiting: SimpleQueue[Unit] = SimpleQueue()
    for unit in units:
        waiting.put(unit)
    results: list[Built] = []
    lock, is_over = threading.Lock(), threading.Event()
    workers = [_Worker(root) for _ in range(jobs)]

    def work(worker: _Worker) -> None:
        while True:
            try:
                unit = waiting.get_nowait()
            except Empty:
                return
            answer = worker.ask(unit.request)
            if answer is None and is_over.wait(INTERRUPT_TAKES):
                return
            answer = answer or {"outcome": "failed", "seconds": 0.0, "error": "the building process was interrupted."}
            with lock:
                results.append(Built(unit.what, unit.arch, **answer))
                on_done(results[-1], len(results), len(units))

    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        is_over.set()
        for worker in workers:
            worker.clean_up()
        raise
    finally:
        is_over.set()
        for worker in workers:
            worker.stop()
    return results


class _Worker:
    """One building process, started anew when it dies."""

    def __init__(self, root: Path) -> None:
        self._environment = {name: value for name, value in os.environ.items() if name not in _UNSET}
        self._environment |= {"JITGEN_CACHE_DIR": str(root), "JITGEN_PROGRESS": "off"}
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to a request, None of an interrupted process. One that dies takes this request with it and no other."""
        begun = time.monotonic()
        if self._process is None:
            command = [sys.executable, "-m", "jitgen.prebuild_worker"]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=self._environment)
        process = self._process
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        status = process.wait()
        self.stop()
        if status in (INTERRUPTED, -signal.SIGINT):
            return None
        what = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        hint = " Memory may be short: try fewer --jobs." if status == -9 else ""
        return {"outcome": "failed", "seconds": time.monotonic() - begun, "error": f"the building process {what}.{hint}"}

    def clean_up(self) -> None:
        """Let a process that Ctrl-C has reached as well remove what it had begun."""
        process = self._process
        if process is not None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(INTERRUPT_TAKES)

    def stop(self) -> None:
        """End the process; a build under way is abandoned, as if it had been killed."""
        process, self._process = self._process, None  # two threads may stop it: who asked, and who was interrupted
        if process is not None:
            process.terminate()
            process.wait()
            with suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()
