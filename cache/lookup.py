"""get_module: from a kernel's spec to the path of its module, by way of layers, the user store, the remote and the builder."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from jitgen import env, paths
from jitgen.cache import usage
from jitgen.cache.installed import installed_layers
from jitgen.cache.key import FORMAT, digest, module_key
from jitgen.cache.store import Store
from jitgen.cache.warned import warn
from jitgen.errors import CacheError, CompileError
from jitgen.events import Event, emit
from jitgen.records import record

if TYPE_CHECKING:
    from jitgen.cache.source import Builder, Source, Waiting

# Parts of a target that say who built a module, not what it needs: a prebuilt layer is searched without them.
BUILDER_PARTS = ("compiler", "toolkit")

Target = Mapping[str, object]


@record
class Request:
    """A kernel that is wanted.

    family names the template and starts the entry's name; label is what a human calls the kernel. spec_digest stands
    for everything that make_source depends on. target maps the names of the target's parts to plain values.
    as_manifest gives the text that asks for the kernel in a manifest; lesser_targets gives further targets whose kernels
    run here, asked for where nothing may be compiled.
    """

    family: str
    label: str
    spec_digest: str
    target: Target
    make_source: Callable[[], Source]
    as_manifest: Callable[[], str] | None = None
    lesser_targets: Callable[[], Iterable[Target]] | None = None

    @property
    def arch(self) -> str:
        return str(self.target.get("arch"))

    def alias(self, *, portable: bool = False) -> str:
        """Name under which an index holds this kernel: built exactly so, or (portable) by whichever compiler."""
        target = {name: part for name, part in self.target.items() if not (portable and name in BUILDER_PARTS)}
        return digest([FORMAT, "portable" if portable else "exact", self.family, self.spec_digest, target])


@record
class Found:
    """A module, and the kind of place it came from: 'layer', 'store', 'temporary', 'remote' or 'built'."""

    module: Path
    source: str


def get_module(request: Request, builder: Builder, waiting: Waiting | None = None) -> Path:
    """Return the path of a kernel's module: from a prebuilt layer, the user store, the remote layer, or built now.

    A hit renders nothing and starts no process. Threads and processes that ask for one kernel at the same time share
    one build. Where the user store cannot be written, the module is built in a private temporary directory.
    Errors:  KernelNotPrebuilt when frozen; CompileError and ToolchainMissing from the builder; CacheError when a store
             could be written by another user.
    """
    with _thread_lock(request.alias()):
        begun = time.perf_counter()
        found = _find(request) or _fetch(request)
        if found is None and (env.is_frozen() or not request.target.get("compiler")):
            found = _find_lesser(request)
        if found is None:
            if env.is_frozen():
                from jitgen.cache.frozen import not_prebuilt

                raise not_prebuilt(request, stores())
            _say_missing_layers()
            found = _build(request, builder, waiting or (lambda message: nullcontext()))
            if env.remote() is not None and found.source == "built":
                from jitgen.cache.remote import upload

                upload(request, found.module)
        _report(request, found, time.perf_counter() - begun)
        return found.module


def find_module(request: Request) -> Path | None:
    """The module of a kernel that is already stored, or None; never builds."""
    found = _find(request)
    return None if found is None else found.module


def _find(request: Request) -> Found | None:
    has_compiler = bool(request.target.get("compiler"))
    for store in stores():
        # without a compiler nothing could be built anew, so a module by any compiler is the best there is
        alias = request.alias(portable=store.is_layer or not has_compiler)
        module = store.find_alias(alias)
        if module is not None:
            return Found(module, store.kind)
    return None


def _find_lesser(request: Request) -> Found | None:
    """The kernel for another target that this machine can run, where it may not be compiled for its own."""
    for target in request.lesser_targets() if request.lesser_targets else ():
        # as if without a compiler: any will do
        found = _find(replace(request, target={**target, "compiler": ""}))
        if found is not None:
            return found
    return None


def _fetch(request: Request) -> Found | None:
    """The kernel from the remote layer, which is copied into the user store and found there from then on."""
    if env.remote() is None:
        return None
    from jitgen.cache.remote import fetch

    user = paths.cache_dir()
    name = None if user is None else fetch(request, _store(user, False))
    module = None if name is None else _store(user, False).find(name)
    return None if module is None else Found(module, "remote")


def _report(request: Request, found: Found, seconds: float) -> None:
    name = found.module.parent.name
    size = os.stat(found.module).st_size
    emit(Event("load", name, request.label, request.arch, seconds, found.source, size))
    if found.source not in ("built", "temporary"):
        usage.note("load", found.module.parent)


def stores() -> list[Store]:
    """Stores in look-up order: prebuilt layers, the user store, and this process's temporary one if it has one."""
    found = [_store(path, True) for path in (*env.prebuilt_dirs(), *installed_layers())]
    user = paths.cache_dir()
    if user is not None:
        found.append(_store(user, False))
    if _temporary:
        found.append(_temporary[0])
    return found


_missing: set[Path] = set()  # layers that this process has been told of


def _say_missing_layers() -> None:
    """Say, where something is compiled for want of it, that a layer of JITGEN_PREBUILT is not there."""
    for path in env.prebuilt_dirs():
        if path not in _missing and not path.is_dir():
            _missing.add(path)
            warn(f"JITGEN_PREBUILT names {path}, which is no directory. Correct it; kernels are compiled here.")


@lru_cache(maxsize=64)
def _store(path: Path, is_layer: bool) -> Store:
    return Store(path, is_layer=is_layer)


def forget() -> None:
    """Forget what this process has verified: what is asked for next is checked as if the process had just begun."""
    _store.cache_clear()


def _build(request: Request, builder: Builder, waiting: Waiting) -> Found:
    user = paths.cache_dir()
    if user is None:
        return _build_in(_temporary_store("there is no home directory, or not its full path"), request, builder, waiting)
    try:
        return _build_in(_store(user, False), request, builder, waiting)
    except CacheError:
        raise
    except CompileError as error:
        if not _is_full(error):
            raise
        reason = f"{user} is full"
    except OSError as error:
        reason = f"{error.strerror or error} ({error.filename or user})"
    try:
        return _build_in(_temporary_store(reason), request, builder, waiting)
    except CacheError:
        raise
    except OSError as error:
        raise CacheError(
            f"a compiled kernel can be kept nowhere: {reason}; {error.strerror or error} "
            f"({error.filename or tempfile.gettempdir()}). Set JITGEN_CACHE_DIR to a directory with some free megabytes that "
            "you can write; a limit on the size of files (ulimit -f) must allow as much."
        ) from error


def _build_in(store: Store, request: Request, builder: Builder, waiting: Waiting) -> Found:
    """The module, rendered and built by one process: the others wait, and find it without rendering anything."""
    from jitgen.cache.publish import build_entry, one_builder

    alias = request.alias()
    kernel = f"{request.family}-{alias}"

    def is_there() -> bool:
        return store.find_alias(alias) is not None

    with one_builder(store, kernel, request.label, request.arch, waiting, is_there):
        module = store.find_alias(alias)
        if module is not None:
            return Found(module, store.kind)
        source = request.make_source()
        key = module_key(source.text, source.includes, request.target)
        name = f"{request.family}-{digest(key)}"
        # another kernel may have the same source
        module = store.find(name) or build_entry(store, name, source, key, request.label, builder)
        for portable in (False, True):
            store.remember_alias(request.alias(portable=portable), name)
        return Found(module, "built")


def _is_full(error: CompileError) -> bool:
    try:
        return error.log is not None and "No space left on device" in error.log.read_text(errors="replace")
    except OSError:
        return True  # not even the log could be kept


_temporary: list[Store] = []
_thread_locks: dict[str, threading.Lock] = {}


def _thread_lock(alias: str) -> AbstractContextManager[object]:
    """The lock of one kernel among the threads of this process."""
    if not _thread_locks:
        # a child must not inherit a lock whose holder does not exist in it
        os.register_at_fork(after_in_child=_thread_locks.clear)
    return _thread_locks.setdefault(alias, threading.Lock())


def _temporary_store(reason: str) -> Store:
    """A store of this process alone, removed when it ends; says once why the user store is not used."""
    if not _temporary:
        import atexit

        root = Path(tempfile.mkdtemp(prefix="jitgen-"))
        _temporary.append(Store(root, kind="temporary"))
        atexit.register(_remove_temporary, os.getpid(), _temporary[0])
        warn(
            f"the kernel cache cannot be used: {reason}. Kernels are compiled again in each process (now in {root}). "
            "Set JITGEN_CACHE_DIR to a directory that you can write."
        )
    return _temporary[0]


def _remove_temporary(owner: int, store: Store) -> None:
    if os.getpid() == owner and not (store.root / "failed").is_dir():
        shutil.rmtree(store.root, ignore_errors=True)
