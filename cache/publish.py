"""Building once: a lock for each entry, a private directory for each build, an atomic rename to publish it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from jitgen import paths
from jitgen.cache import entry as entries
from jitgen.cache import usage
from jitgen.cache.store import Store
from jitgen.errors import CacheError, CompileError
from jitgen.events import Event, emit
from jitgen.progress import logger

if TYPE_CHECKING:
    from filelock import FileLock

    from jitgen.cache.source import Builder, Source, Waiting

POLL = 0.05  # seconds between looks at what another process builds


def build_entry(store: Store, name: str, source: Source, key: dict[str, object], label: str, builder: Builder) -> Path:
    """Build an entry in private, publish it and return its module.

    Errors:  CompileError with the failed build kept in the store; OSError when the store cannot be written.
    """
    directory = store.private_dir()
    begun = time.perf_counter()
    try:
        builder(source, name, directory)
        seconds = time.perf_counter() - begun
        entries.seal(directory, name, key, label, seconds)
        publish(store, directory, name)
        _report_build(store.root / name, key, label, seconds)
    except CompileError as error:
        emit(Event("fail", "", label, _arch(key), time.perf_counter() - begun))
        kept = store.keep_failed(directory, name)
        raise error.moved(directory, kept) from None
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    found = store.find(name)
    if found is None:
        raise CacheError(f"{store.root / name} vanished or was damaged while it was published. Try again.")
    return found


def publish(store: Store, directory: Path, name: str) -> None:
    """Rename a sealed directory to its entry; where another process was faster, its entry stays."""
    try:
        os.rename(directory, store.root / name)
    except OSError:
        if not (store.root / name / entries.MANIFEST).is_file():
            raise
        return
    entries.sync(store.root)


def _report_build(entry: Path, key: dict[str, object], label: str, seconds: float) -> None:
    size = (entry / entries.MODULE).stat().st_size
    emit(Event("build", entry.name, label, _arch(key), seconds, size=size))
    usage.note("build", entry, seconds)


def _arch(key: dict[str, object]) -> str:
    target = key["target"]
    return str(target.get("arch")) if isinstance(target, dict) else ""


@contextmanager
def one_builder(
    store: Store, kernel: str, label: str, arch: str, waiting: Waiting, is_there: Callable[[], bool]
) -> Iterator[None]:
    """Hold the lock of a kernel, or go on without it as soon as ``is_there``: another process has built the kernel.

    Where the file system has no locks there is none; two may then build, and the rename keeps that safe.
    """
    import filelock

    paths.make_private_dir(store.root)
    path = paths.make_private_dir(store.root / "locks") / f"{kernel}.lock"
    lock = filelock.FileLock(path)
    is_held = False
    try:
        try:
            lock.acquire(timeout=0)
            is_held = True
        except filelock.Timeout:
            begun, owner = time.perf_counter(), _owner(path)
            logger().info("waiting kernel=%r arch=%s for=%r", label, arch, owner)
            with waiting(f"waiting for {owner}"):
                is_held = _wait(lock, is_there)
            emit(Event("wait", "", label, arch, time.perf_counter() - begun, owner))
    except (NotImplementedError, OSError):
        pass
    if is_held:
        mine = {"host": os.uname().nodename, "pid": os.getpid(), "since": time.time()}
        with suppress(OSError):
            path.with_suffix(".owner").write_text(json.dumps(mine))
    try:
        yield
    finally:
        if is_held:
            lock.release()


def _wait(lock: FileLock, is_there: Callable[[], bool]) -> bool:
    """Wait until the lock is ours (True) or the kernel is there (False): many that wait need not have the lock in turn.

    There is no limit: a builder that dies gives up its lock.
    """
    import filelock

    while not is_there():
        try:
            lock.acquire(timeout=POLL, poll_interval=POLL)
            return True
        except filelock.Timeout:
            pass
    return False


def _owner(lock: Path) -> str:
    """Who builds, for a human."""
    try:
        owner = json.loads(lock.with_suffix(".owner").read_text())
        seconds = max(0, time.time() - owner["since"])
        return f"the build of process {owner['pid']} on {owner['host']}, begun {seconds:.0f} s ago"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process's build"
