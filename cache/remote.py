"""The remote layer: entries shared by a fleet through fsspec (JITGEN_REMOTE), asked before compiling.

Layout: `index/<alias>` names an entry, `entries/<name>.tar.gz` holds it. The alias is the portable one, so a machine takes
what another built, whichever compiler it has. An entry is unpacked in private and checked against its name and its
manifest before it enters the user store. Whoever can write to the remote layer can run code on those who read it.

Every exchange has a time limit. The first that fails or takes too long ends the use of the remote in this process.
"""

from __future__ import annotations

import atexit
import gzip
import io
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jitgen import env
from jitgen.cache import entry as entries
from jitgen.cache.archive import Member, read_members, write_tar
from jitgen.cache.entry import ENTRY_NAME, Corrupt
from jitgen.cache.key import digest
from jitgen.cache.publish import publish
from jitgen.cache.store import Store, discard
from jitgen.cache.warned import warn
from jitgen.errors import BundleError, CacheError
from jitgen.events import Event, emit

if TYPE_CHECKING:
    from jitgen.cache.lookup import Request

MAX_PACKED = 256 << 20  # bytes of an entry as it is transferred
Result = TypeVar("Result")


class _Unusable(Exception):
    """The remote gave no answer; the text says why."""


_given_up: set[str] = set()
_uploads: list[threading.Thread] = []


def fetch(request: Request, store: Store) -> str | None:
    """Copy a kernel from the remote into a store and return its entry's name; None when it is not there.

    Whatever is wrong with the remote, or with what it sent, is one warning and no error.
    """
    url = env.remote()
    if url is None or url in _given_up:
        return None
    begun = time.perf_counter()
    alias = request.alias(portable=True)
    try:
        found = _within(env.remote_timeout(), lambda: _download(url, alias))
        if found is None:
            return None
        name, packed = found
        size = _install(store, name, packed, request.family)
        for portable in (False, True):
            store.remember_alias(request.alias(portable=portable), name)
        emit(Event("fetch", name, request.label, request.arch, time.perf_counter() - begun, url, size))
        return name
    except _Unusable as reason:
        _give_up(url, str(reason))
    except (BundleError, Corrupt) as error:
        warn(f"{url} sent a damaged kernel ({error}). It is not used.")
    except OSError as error:
        if isinstance(error, CacheError):
            raise
        warn(f"a kernel from {url} cannot be kept: {error}.")
    return None


def upload(request: Request, module: Path) -> None:
    """Send a kernel that was built here to the remote, in the background; the end of the process waits for it, in bounds."""
    url = env.remote()
    if url is None or url in _given_up or not env.remote_upload():
        return
    if not _uploads:
        atexit.register(_finish_uploads)
    limit = env.remote_timeout()
    thread = threading.Thread(target=_upload, args=(url, request, module.parent, limit), daemon=True)
    _uploads.append(thread)
    thread.start()


def _upload(url: str, request: Request, entry: Path, limit: float) -> None:
    begun = time.perf_counter()
    try:
        packed = _packed(entry)
        _within(limit, lambda: _send(url, request.alias(portable=True), entry.name, packed))
    except _Unusable as reason:
        _give_up(url, str(reason))
    except (OSError, Corrupt) as error:
        warn(f"{entry} cannot be sent to {url}: {error}.")
    else:
        emit(Event("upload", entry.name, request.label, request.arch, time.perf_counter() - begun, url, len(packed)))


def _finish_uploads() -> None:
    end = time.monotonic() + env.remote_timeout()
    for thread in _uploads:
        thread.join(max(0.0, end - time.monotonic()))


def _give_up(url: str, reason: str) -> None:
    if url not in _given_up:
        _given_up.add(url)
        warn(f"JITGEN_REMOTE={url} is not used by this process any more: {reason}. Kernels are compiled here.")


def _within(seconds: float, work: Callable[[], Result]) -> Result:
    """The result of some work, which is left behind when it takes too long.

    Errors:  _Unusable; OSError of the local disk does not occur in such work.
    """
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((True, work()))
        except Exception as error:
            outcome.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise _Unusable(f"it gave no answer within {seconds:g} s (JITGEN_REMOTE_TIMEOUT)")
    worked, result = outcome[0]
    if worked:
        return result  # type: ignore[no-any-return]
    if isinstance(result, _Unusable):
        raise result
    raise _Unusable(f"{type(result).__name__}: {result}")


# ---- what is exchanged ----------------------------------------------------------------------------------------------------


def _file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it."""
    try:
        import fsspec
    except ImportError:
        raise _Unusable("fsspec is not installed. Run: pip install 'jitgen[remote]'") from None
    return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]


def _download(url: str, alias: str) -> tuple[str, bytes] | None:
    files, root = _file_system(url)
    try:
        name = files.cat_file(f"{root}/index/{alias}", end=200).decode("ascii", "replace").strip()
        if ENTRY_NAME.fullmatch(name) is None:
            return None
        path = f"{root}/entries/{name}.tar.gz"
        if files.size(path) > MAX_PACKED:
            raise _Unusable(f"{name} is larger than {MAX_PACKED >> 20} MiB")
        return name, files.cat_file(path)
    except FileNotFoundError:
        return None


def _send(url: str, alias: str, name: str, packed: bytes) -> None:
    """The entry first: an index must not name what is not there."""
    files, root = _file_system(url)
    for path, data in ((f"{root}/entries/{name}.tar.gz", packed), (f"{root}/index/{alias}", f"{name}\n".encode())):
        if files.exists(path):
            continue
        files.makedirs(path.rpartition("/")[0], exist_ok=True)
        if "file" in (files.protocol if isinstance(files.protocol, tuple) else (files.protocol,)):
            # an object store puts an object at once; a file has to be moved to its place
            part = f"{path}.{time.time_ns()}.part"
            files.pipe_file(part, data)
            files.mv(part, path)
        else:
            files.pipe_file(path, data)


def _packed(entry: Path) -> bytes:
    """An entry as one compressed tar, the same bytes for the same entry."""
    files = entries.verify(entry)["files"]
    names = sorted({*files, entries.MANIFEST})
    members = [Member(name, (entry / name).read_bytes(), name == entries.MODULE) for name in names]
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=buffer, mode="wb", mtime=0) as stream:
        write_tar(stream, members)
    return buffer.getvalue()


def _install(store: Store, name: str, packed: bytes, family: str) -> int:
    """Check what was sent and publish it; returns the size of its module.

    Errors:  BundleError, Corrupt: what was sent is not the entry it is said to be; OSError of the store.
    """
    stage = store.private_dir()
    try:
        directory = stage / name
        directory.mkdir()
        for member in read_members(io.BytesIO(packed), name):
            file = directory / member.name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(member.data)
            file.chmod(member.mode)
        entries.verify(directory)
        if name != f"{family}-{digest(entries.read_key(directory))}":
            raise Corrupt(f"{name} holds another kernel's key")
        size = (directory / entries.MODULE).stat().st_size
        publish(store, directory, name)
        return size
    except (tarfile.TarError, ValueError, KeyError) as error:
        raise Corrupt(f"{name} cannot be read ({error})") from error
    finally:
        discard(store, stage)
