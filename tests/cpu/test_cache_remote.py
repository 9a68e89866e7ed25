"""The remote layer: asked before compiling, checked before use, and never waited for without end."""

from __future__ import annotations

import gzip
import threading
import time
import warnings
from pathlib import Path

import pytest
from fake_builder import TARGET, FakeBuilder, FakeSource, request

from jitgen import cache
from jitgen.cache import lookup, remote
from jitgen.errors import CacheError, CacheWarning, EnvError

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(autouse=True)
def shared(private_store: Path, tmp_path: Path, monkeypatch) -> Path:
    """Directory of a remote that this process writes to and reads from."""
    monkeypatch.setenv("JITGEN_REMOTE", f"file://{tmp_path}/remote")
    monkeypatch.setenv("JITGEN_REMOTE_UPLOAD", "1")
    monkeypatch.setattr(remote, "_given_up", set())
    monkeypatch.setattr(remote, "_uploads", [threading.Thread()])  # one is there: nothing is registered for the end
    return tmp_path / "remote"


def finish() -> None:
    for thread in remote._uploads[1:]:
        thread.join()


def build_and_upload(**options) -> Path:
    module = cache.get_module(request(**options), FakeBuilder())
    finish()
    return module


@pytest.fixture
def other_machine(tmp_path: Path, monkeypatch) -> None:
    """A machine with another store and another compiler, after this one uploaded a kernel."""
    build_and_upload()
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(tmp_path / "other"))


ELSEWHERE = {**TARGET, "compiler": "clang 99"}


@pytest.mark.usefixtures("other_machine")
def test_kernel_built_elsewhere_is_taken_and_kept(tmp_path: Path) -> None:
    builder = FakeBuilder()
    module = cache.get_module(request(target=ELSEWHERE), builder)
    assert builder.num_builds == 0 and module.is_relative_to(tmp_path / "other")
    assert module.read_bytes() == b"\x7fELF" + FakeSource().text.encode() * 100
    assert lookup._find(request(target=ELSEWHERE)).source == "store"  # the second time it is no remote's


@pytest.mark.usefixtures("other_machine")
def test_kernel_that_is_not_there_is_built_and_sent(shared: Path) -> None:
    assert len(list((shared / "entries").iterdir())) == 1
    build_and_upload(source=FakeSource("int other;\n"), spec="other")
    assert len(list((shared / "entries").iterdir())) == 2
    assert not list(shared.rglob("*.part"))


def test_nothing_is_sent_unless_asked(shared: Path, monkeypatch) -> None:
    monkeypatch.setenv("JITGEN_REMOTE_UPLOAD", "0")
    build_and_upload()
    assert not shared.exists()


@pytest.mark.parametrize("where", [0.02, 0.3, 0.6, 0.95])
@pytest.mark.usefixtures("other_machine")
def test_damaged_kernel_is_not_used_but_built(where: float, shared: Path) -> None:
    (packed,) = (shared / "entries").iterdir()
    data = bytearray(gzip.decompress(packed.read_bytes()))
    data[int(len(data) * where)] ^= 4
    packed.write_bytes(gzip.compress(bytes(data)))
    builder = FakeBuilder()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = cache.get_module(request(target=ELSEWHERE), builder)
    assert module.read_bytes() == b"\x7fELF" + FakeSource().text.encode() * 100
    if builder.num_builds:  # else the bit was one of a tar's padding
        assert "sent a damaged kernel" in str(caught[0].message)


@pytest.mark.usefixtures("other_machine")
def test_kernel_under_another_kernels_name_is_refused(shared: Path, tmp_path: Path) -> None:
    """The index says which entry; an entry's name must be that of its key, so that a mix-up cannot pass."""
    (packed,) = (shared / "entries").iterdir()
    wrong = "cpu-" + "0" * 32
    packed.rename(packed.with_name(f"{wrong}.tar.gz"))
    for alias in (shared / "index").iterdir():
        alias.write_text(f"{wrong}\n")
    builder = FakeBuilder()
    with pytest.warns(CacheWarning, match="belongs to another entry"):
        cache.get_module(request(target=ELSEWHERE), builder)
    assert builder.num_builds == 1 and wrong not in cache.Store(tmp_path / "other").names()


class HangingFiles(fsspec.AbstractFileSystem):
    """A remote that never answers."""

    protocol = "hang"

    def cat_file(self, path, start=None, end=None, **options):
        time.sleep(30)

    def exists(self, path, **options):
        time.sleep(30)


class RefusingFiles(fsspec.AbstractFileSystem):
    """A remote that refuses everyone."""

    protocol = "refuse"

    def cat_file(self, path, start=None, end=None, **options):
        raise PermissionError("403 Forbidden")


for kind in (HangingFiles, RefusingFiles):
    fsspec.register_implementation(kind.protocol, kind, clobber=True)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("hang://x", "it gave no answer within 0.2 s"),
        ("refuse://x", "PermissionError: 403 Forbidden"),
        ("nosuchprotocol://x", "Protocol not known"),
    ],
)
def test_unusable_remote_costs_a_bounded_time_once(url: str, reason: str, monkeypatch) -> None:
    monkeypatch.setenv("JITGEN_REMOTE", url)
    monkeypatch.setenv("JITGEN_REMOTE_TIMEOUT", "0.2")
    begun = time.monotonic()
    with pytest.warns(CacheWarning, match=f"is not used by this process any more: .*{reason}"):
        cache.get_module(request(), FakeBuilder())
    cache.get_module(request(FakeSource("int b;\n"), spec="b"), FakeBuilder())  # a second warning would be an error
    finish()
    assert time.monotonic() - begun < 5


def test_missing_fsspec_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.warns(CacheWarning, match=r"pip install 'jitgen\[remote\]'"):
        cache.get_module(request(), FakeBuilder())


@pytest.mark.usefixtures("other_machine")
def test_store_that_others_can_write_takes_nothing_from_the_remote(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other").chmod(0o777)
    with pytest.raises(CacheError, match="can be written by other users"):
        cache.get_module(request(target=ELSEWHERE), FakeBuilder())


@pytest.mark.parametrize(("name", "value"), [("JITGEN_REMOTE", "/srv/kernels"), ("JITGEN_REMOTE_TIMEOUT", "soon")])
def test_bad_value_of_a_variable_is_an_error(name: str, value: str, monkeypatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(EnvError, match=f"{name}='?{value}"):
        cache.get_module(request(), FakeBuilder())
