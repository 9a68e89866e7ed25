"""Archives of files with the same bytes whenever they hold the same: tar in three compressions, and wheels.

Members have no time, no owner and one of two modes, and come in the order of their names. Reading trusts nothing: a member
is a plain file with a relative name of plain parts, and no larger than it may be.
"""

from __future__ import annotations

import gzip
import io
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from jitgen.errors import BundleError

TAR_SUFFIXES = (".tar.zst", ".tar.xz", ".tar.gz")
ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can say
MAX_FILE = 1 << 30  # bytes; a module has some 100 kB
MAX_TOTAL = 1 << 34
MAX_MEMBERS = 500_000
DAMAGED = (OSError, EOFError, ValueError, tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error)
ZSTD_REMEDY = "Install zstandard (pip install 'jitgen[bundle]'), or use .tar.xz."


class Member(NamedTuple):
    """A file of an archive."""

    name: str
    data: bytes
    is_program: bool = False  # mode 0755 in place of 0644

    @property
    def mode(self) -> int:
        return 0o755 if self.is_program else 0o644


# ---- writing ------------------------------------------------------------------------------------------------------------


def write_archive(path: Path, members: Iterable[Member], suffix: str) -> None:
    """Write members, in the order given, to a compressed tar file; ``suffix`` is the one of TAR_SUFFIXES that it will have.

    Errors:  BundleError when the compression is not available; OSError.
    """
    with open(path, "wb") as raw, _compressing(raw, suffix) as stream:
        write_tar(stream, members)


def write_tar(stream: IO[bytes], members: Iterable[Member]) -> None:
    """Write members to a stream as a tar."""
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.size, info.mode = len(member.data), member.mode
            tar.addfile(info, io.BytesIO(member.data))


def write_zip(path: Path, members: Iterable[Member]) -> None:
    """Write members, in the order given, to a zip file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in members:
            info = zipfile.ZipInfo(member.name, ZIP_TIME)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.create_system = 3  # Unix: the mode counts
            info.external_attr = (0o100000 | member.mode) << 16
            archive.writestr(info, member.data)


def _compressing(raw: IO[bytes], suffix: str) -> IO[bytes]:
    if suffix == ".tar.xz":
        return lzma.open(raw, "wb", preset=6)  # type: ignore[return-value]
    if suffix == ".tar.gz":
        return gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=9, mtime=0)  # type: ignore[return-value]
    return _zstd_writer(raw)


def _zstd_writer(raw: IO[bytes]) -> IO[bytes]:
    try:
        from compression import zstd

        return zstd.ZstdFile(raw, "wb", level=19)  # type: ignore[no-any-return]
    except ImportError:
        pass
    try:
        import zstandard
    except ImportError:
        raise BundleError(f"this Python has no zstd. {ZSTD_REMEDY}") from None
    return zstandard.ZstdCompressor(level=19).stream_writer(raw, closefd=False)  # type: ignore[no-any-return]


# ---- reading ------------------------------------------------------------------------------------------------------------


def read_archive(path: Path) -> Iterator[Member]:
    """The files of a .tar.xz, .tar.gz, .tar.zst or .whl file, each checked before it is read.

    Errors:  BundleError when the archive is damaged, or holds what it must not; OSError when it cannot be opened.
    """
    with open(path, "rb") as raw:
        yield from read_members(raw, path.name)


def read_members(raw: IO[bytes], name: str) -> Iterator[Member]:
    """The files of an archive; what kind it is, its first bytes say. ``name`` is what messages call it.

    Errors:  BundleError.
    """
    total = 0
    try:
        for number, member in enumerate(_members(raw, name)):
            total += len(member.data)
            if number >= MAX_MEMBERS or total > MAX_TOTAL:
                raise BundleError(f"{name} holds more than {MAX_MEMBERS} files or {MAX_TOTAL >> 30} GiB.")
            yield member
    except BundleError:
        raise
    except DAMAGED as error:
        raise BundleError(f"{name} is damaged or no archive ({type(error).__name__}: {error}).") from error


def _members(raw: IO[bytes], name: str) -> Iterator[Member]:
    magic = raw.read(4)
    raw.seek(0)
    if magic == b"PK\3\4":
        yield from _zip_members(raw, name)
        return
    with _decompressing(raw, magic, name) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        for info in tar:
            if info.isdir():
                continue
            if not info.isreg():
                raise BundleError(f"{name} holds {info.name!r}, which is no plain file. It is not unpacked.")
            check_name(info.name, name)
            file = tar.extractfile(info)
            yield Member(info.name, _read(file, info.size, info.name, name), bool(info.mode & 0o100))


def _zip_members(raw: IO[bytes], name: str) -> Iterator[Member]:
    with zipfile.ZipFile(raw) as archive:
        for info in archive.infolist():
            mode = info.external_attr >> 16
            if info.is_dir():
                continue
            if mode & 0o170000 not in (0, 0o100000):
                raise BundleError(f"{name} holds {info.filename!r}, which is no plain file. It is not unpacked.")
            check_name(info.filename, name)
            with archive.open(info) as file:
                yield Member(info.filename, _read(file, info.file_size, info.filename, name), bool(mode & 0o100))


def _read(file: IO[bytes] | None, size: int, name: str, archive: str) -> bytes:
    if file is None or size > MAX_FILE:
        raise BundleError(f"{archive}: {name} is larger than {MAX_FILE >> 20} MiB.")
    data = file.read(size + 1)
    if len(data) != size:
        raise BundleError(f"{archive}: {name} has another size than the archive says.")
    return data


def check_name(name: str, archive: str) -> None:
    """Refuse a name that could lead out of the directory that an archive is unpacked to.

    Errors:  BundleError.
    """
    parts = name.split("/")
    if not name or "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts) or os.path.isabs(name):
        raise BundleError(f"{archive} holds a file named {name!r}, which leads elsewhere. It is not unpacked.")


def _decompressing(raw: IO[bytes], magic: bytes, name: str) -> IO[bytes]:
    if magic == b"\xfd7zX":
        return lzma.open(raw, "rb")  # type: ignore[return-value]
    if magic[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=raw, mode="rb")  # type: ignore[return-value]
    if magic == b"\x28\xb5\x2f\xfd":
        return _zstd_reader(raw)
    raise BundleError(f"{name} is no archive of {', '.join(TAR_SUFFIXES)} or .whl.")


def _zstd_reader(raw: IO[bytes]) -> IO[bytes]:
    try:
        from compression import zstd

        return zstd.ZstdFile(raw, "rb")  # type: ignore[no-any-return]
    except ImportError:
        pass
    try:
        import zstandard
    except ImportError:
        raise BundleError(f"this Python has no zstd. {ZSTD_REMEDY}") from None
    return zstandard.ZstdDecompressor().stream_reader(raw, closefd=False)  # type: ignore[no-any-return]
