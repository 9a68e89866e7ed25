"""Building once: a lock for each entry, a private directory for each build, an atomic rename to publish it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from jitgen import paths
from jitgen.cache import entry as entries
from jitgen.cache.store import Store
from jitgen.errors import CacheError, CompileError

if TYPE_CHECKING:
    from jitgen.cache.source import Builder, Source, Waiting


def build_once(
    store: Store, name: str, source: Source, *, key: dict[str, object], label: str, builder: Builder, waiting: Waiting
) -> Path:
    """Return the module of an entry, building it unless another process does so first.

    Errors:  CompileError with the failed build kept in the store; OSError when the store cannot be written.
    """
    with _locked(store, name, waiting):
        found = store.find(name)
        if found is not None:
            return found
        directory = store.private_dir()
        try:
            builder(source, name, directory)
            entries.seal(directory, name, key, label)
            _publish(store, directory, name)
        except CompileError as error:
            kept = store.keep_failed(directory, name)
            raise error.moved(directory, kept) from None
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    found = store.find(name)
    if found is None:
        raise CacheError(f"{store.root / name} vanished or was damaged while it was published. Try again.")
    return found


def _publish(store: Store, directory: Path, name: str) -> None:
    """Rename a sealed directory to its entry; where another process was faster, its entry stays."""
    try:
        os.rename(directory, store.root / name)
    except OSError:
        if not (store.root / name / entries.MANIFEST).is_file():
            raise
        return
    entries.sync(store.root)


@contextmanager
def _locked(store: Store, name: str, waiting: Waiting) -> Iterator[None]:
    """Hold the lock of an entry; without one where the file system has none, as the rename keeps that safe too."""
    import filelock

    paths.make_private_dir(store.root)
    path = paths.make_private_dir(store.root / "locks") / f"{name}.lock"
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        with waiting(f"waiting for {_owner(path)}"):
            lock.acquire()
    except (NotImplementedError, OSError):
        lock = nullcontext()
    owner = {"host": os.uname().nodename, "pid": os.getpid(), "since": time.time()}
    with suppress(OSError):
        path.with_suffix(".owner").write_text(json.dumps(owner))
    try:
        yield
    finally:
        if not isinstance(lock, nullcontext):
            lock.release()


def _owner(lock: Path) -> str:
    """Who builds, for a human."""
    try:
        owner = json.loads(lock.with_suffix(".owner").read_text())
        seconds = max(0, time.time() - owner["since"])
        return f"the build of process {owner['pid']} on {owner['host']}, begun {seconds:.0f} s ago"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process's build"
