"""get_module: from a kernel's spec to the path of its module, by way of layers, the user store and the builder."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jitgen import env, paths
from jitgen.cache.key import FORMAT, digest, module_key
from jitgen.cache.store import Store
from jitgen.errors import CacheError, CacheWarning, CompileError, KernelNotPrebuilt

if TYPE_CHECKING:
    from jitgen.cache.source import Builder, Source, Waiting

# Parts of a target that say who built a module, not what it needs: a prebuilt layer is searched without them.
BUILDER_PARTS = ("compiler", "toolkit")


class Request(NamedTuple):
    """A kernel that is wanted.

    family names the template and starts the entry's name; label is what a human calls the kernel. spec_digest stands
    for everything that make_source depends on. target maps the names of the target's parts to plain values.
    """

    family: str
    label: str
    spec_digest: str
    target: Mapping[str, object]
    make_source: Callable[[], Source]

    def alias(self, *, portable: bool = False) -> str:
        """Name under which an index holds this kernel: built exactly so, or (portable) by whichever compiler."""
        target = {name: part for name, part in self.target.items() if not (portable and name in BUILDER_PARTS)}
        return digest([FORMAT, "portable" if portable else "exact", self.family, self.spec_digest, target])


def get_module(request: Request, builder: Builder, waiting: Waiting | None = None) -> Path:
    """Return the path of a kernel's module: from a prebuilt layer, else the user store, else built now.

    A hit renders nothing and starts no process. Threads and processes that ask for one kernel at the same time share
    one build. Where the user store cannot be written, the module is built in a private temporary directory.
    Errors:  KernelNotPrebuilt when frozen; CompileError and ToolchainMissing from the builder; CacheError when a store
             could be written by another user.
    """
    with _thread_lock(request.alias()):
        found = find_module(request)
        if found is not None:
            return found
        if env.is_frozen():
            raise KernelNotPrebuilt(
                f"JITGEN_MODE=frozen and no prebuilt layer holds {request.family} kernel {request.label!r} "
                f"(spec {request.spec_digest[:12]}) for {request.target.get('arch')}. "
                f"Searched: {', '.join(str(store.root) for store in stores()) or 'nothing'}. "
                "Run once with JITGEN_MODE=auto to build it, and ship that store as JITGEN_PREBUILT."
            )
        return _build(request, builder, waiting or (lambda message: nullcontext()))


def find_module(request: Request) -> Path | None:
    """The module of a kernel that is already stored, or None; never builds."""
    has_compiler = bool(request.target.get("compiler"))
    for store in stores():
        # without a compiler nothing could be built anew, so a module by any compiler is the best there is
        alias = request.alias(portable=store.is_layer or not has_compiler)
        found = store.find_alias(alias)
        if found is not None:
            return found
    return None


def stores() -> list[Store]:
    """Stores in look-up order: prebuilt layers, the user store, and this process's temporary one if it has one."""
    found = [_store(path, True) for path in env.prebuilt_dirs()]
    user = paths.cache_dir()
    if user is not None:
        found.append(_store(user, False))
    if _temporary:
        found.append(_temporary[0])
    return found


@lru_cache(maxsize=64)
def _store(path: Path, is_layer: bool) -> Store:
    return Store(path, is_layer=is_layer)


def _build(request: Request, builder: Builder, waiting: Waiting) -> Path:
    source = request.make_source()
    user = paths.cache_dir()
    if user is None:
        return _build_in(_temporary_store("there is no home directory"), source, request, builder, waiting)
    try:
        return _build_in(_store(user, False), source, request, builder, waiting)
    except CacheError:
        raise
    except CompileError as error:
        if not _is_full(error):
            raise
        reason = f"{user} is full"
    except OSError as error:
        reason = f"{error.strerror or error} ({error.filename or user})"
    return _build_in(_temporary_store(reason), source, request, builder, waiting)


def _build_in(store: Store, source: Source, request: Request, builder: Builder, waiting: Waiting) -> Path:
    key = module_key(source.text, source.includes, request.target)
    name = f"{request.family}-{digest(key)}"
    module = store.find(name)
    if module is None:
        from jitgen.cache.publish import build_once

        module = build_once(store, name, source, key=key, label=request.label, builder=builder, waiting=waiting)
    for portable in (False, True):
        store.remember_alias(request.alias(portable=portable), name)
    return module


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
        _temporary.append(Store(root))
        atexit.register(_remove_temporary, os.getpid(), _temporary[0])
        warnings.warn(
            f"the kernel cache cannot be used: {reason}. Kernels are compiled again in each process (now in {root}). "
            "Set JITGEN_CACHE_DIR to a directory that you can write.",
            CacheWarning,
            stacklevel=2,
        )
    return _temporary[0]


def _remove_temporary(owner: int, store: Store) -> None:
    if os.getpid() == owner and not (store.root / "failed").is_dir():
        shutil.rmtree(store.root, ignore_errors=True)
