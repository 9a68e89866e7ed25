"""Damage, races and sudden death: each leaves the store usable."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_builder import FakeBuilder, FakeSource, request

from jitgen.cache import get_module, lookup
from jitgen.cache.admin import collect_garbage
from jitgen.errors import CacheWarning, KernelNotPrebuilt

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def store(private_store: Path) -> Path:
    return private_store


def as_new_process() -> None:
    """Forget what this process verified: an entry is checked on its first load in a process."""
    lookup._store.cache_clear()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [truncate, empty, flip_bit, Path.unlink], ids=["cut", "empty", "bit", "gone"])
@pytest.mark.parametrize("name", ["module.so", "key.json", "manifest.json"])
def test_damaged_entry_is_moved_aside_and_rebuilt(name: str, damage, store: Path) -> None:
    builder = FakeBuilder()
    module = get_module(request(), builder)
    sound = module.read_bytes()
    damage(module.parent / name)
    as_new_process()
    with pytest.warns(CacheWarning, match="is damaged: .*will be built again"):
        assert get_module(request(), builder) == module
    assert module.read_bytes() == sound
    assert builder.num_builds == 2
    assert len(list((store / "corrupt").iterdir())) == 1


def test_every_flipped_bit_of_a_manifest_is_noticed(store: Path) -> None:
    module = get_module(request(), FakeBuilder())
    manifest = module.parent / "manifest.json"
    whole = manifest.read_bytes()
    for position in range(0, len(whole), 7):
        data = bytearray(whole)
        data[position] ^= 4
        manifest.write_bytes(bytes(data))
        found = lookup.Store(store, is_layer=True)
        if json_equal(bytes(data), whole):
            continue  # a blank that became another blank says the same
        with pytest.warns(CacheWarning, match="is damaged"):
            assert found.find(module.parent.name) is None


def json_equal(a: bytes, b: bytes) -> bool:
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


def test_damaged_entry_of_a_layer_is_left_alone(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = get_module(request(), FakeBuilder())
    flip_bit(module)
    monkeypatch.setenv("JITGEN_PREBUILT", str(store))
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(tmp_path / "other"))
    with pytest.warns(CacheWarning, match="replace this prebuilt layer"):
        rebuilt = get_module(request(), FakeBuilder())
    assert rebuilt.is_relative_to(tmp_path / "other") and module.is_file()


def test_frozen_process_says_that_its_kernel_is_damaged(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = get_module(request(), FakeBuilder())
    flip_bit(module)
    monkeypatch.setenv("JITGEN_PREBUILT", str(store))
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(tmp_path / "other"))
    monkeypatch.setenv("JITGEN_MODE", "frozen")
    with (
        pytest.warns(CacheWarning, match="is damaged"),
        pytest.raises(KernelNotPrebuilt, match=f"holds it as {module.parent.name}, damaged: module.so differs.*Replace"),
    ):
        get_module(request(), FakeBuilder())


@pytest.mark.parametrize("content", [b"", b"cpu-00000000000000000000000000000000\n", b"../../etc\n", b"\xff\xfe"])
def test_damaged_alias_is_only_a_miss(content: bytes, store: Path) -> None:
    builder = FakeBuilder()
    module = get_module(request(), builder)
    for alias in (store / "index").iterdir():
        alias.write_bytes(content)
    assert get_module(request(), builder) == module
    assert builder.num_builds == 1


def test_store_deleted_while_in_use_is_built_again(store: Path) -> None:
    module = get_module(request(), FakeBuilder())
    shutil.rmtree(store)
    assert get_module(request(), FakeBuilder()) == module and module.is_file()


def test_lock_file_left_behind_does_not_block(store: Path) -> None:
    module = get_module(request(), FakeBuilder())
    shutil.rmtree(module.parent)
    assert list((store / "locks").glob("*.lock"))
    assert get_module(request(), FakeBuilder()) == module


def run_children(program: str, count: int, folder: Path) -> list[subprocess.Popen]:
    environment = {**os.environ, "PYTHONPATH": str(HERE), "FOLDER": str(folder)}
    return [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(count)]


RACER = """
import os, time, pathlib
from fake_builder import FakeBuilder, request
from jitgen.cache import get_module
folder = pathlib.Path(os.environ["FOLDER"])
def build(directory):
    (folder / f"built-{os.getpid()}").touch()
    time.sleep(0.3)
(folder / f"ready-{os.getpid()}").touch()
while not (folder / "go").exists():
    time.sleep(0.01)
assert get_module(request(), FakeBuilder(build)).is_file()
"""


def test_same_key_compiles_once_across_processes(tmp_path: Path) -> None:
    children = run_children(RACER, 32, tmp_path)
    while len(list(tmp_path.glob("ready-*"))) < 32:
        assert all(child.poll() is None for child in children)
        time.sleep(0.02)
    (tmp_path / "go").touch()
    assert [child.wait() for child in children] == [0] * 32
    assert len(list(tmp_path.glob("built-*"))) == 1


HANGING = """
import os, time, pathlib
from fake_builder import FakeBuilder, request
from jitgen.cache import get_module
def build(directory):
    (pathlib.Path(os.environ["FOLDER"]) / "building").touch()
    time.sleep(600)
get_module(request(), FakeBuilder(build))
"""


def test_killed_builder_leaves_no_stale_lock(store: Path, tmp_path: Path) -> None:
    (child,) = run_children(HANGING, 1, tmp_path)
    while not (tmp_path / "building").exists():
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert get_module(request(), FakeBuilder()).is_file()
    assert len(list((store / "tmp").iterdir())) == 1  # its private directory
    collect_garbage(store)
    assert list((store / "tmp").iterdir()) == []


def test_waiting_process_says_whose_build_it_waits_for(tmp_path: Path) -> None:
    (child,) = run_children(HANGING, 1, tmp_path)
    while not (tmp_path / "building").exists():
        assert child.poll() is None
        time.sleep(0.02)
    said: list[str] = []

    def waiting(message: str):
        said.append(message)
        child.kill()
        return child

    get_module(request(), FakeBuilder(), waiting)
    assert f"process {child.pid}" in said[0]


def test_two_builds_without_locks_end_with_one_entry(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import filelock

    def no_locks(self: filelock.FileLock, *args: object, **options: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(filelock.FileLock, "acquire", no_locks)
    inner = FakeBuilder()

    def other_process(directory: Path) -> None:
        lookup._thread_locks.clear()
        get_module(request(), inner)

    module = get_module(request(FakeSource()), FakeBuilder(other_process))
    assert module.is_file() and inner.num_builds == 1
    assert len([path for path in store.iterdir() if path.name.startswith("cpu-")]) == 1
    assert list((store / "tmp").iterdir()) == []


LIMITED = """
import resource, sys
from fake_builder import FakeBuilder, FakeSource, request
from jitgen.cache import get_module
from jitgen.errors import CacheError

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    get_module(request(FakeSource("x" * 2000)), FakeBuilder())
except CacheError as error:
    print(error)
"""


def test_kernel_that_can_be_kept_nowhere_is_a_cache_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(tmp_path / "store"))
    done = subprocess.run([sys.executable, "-c", LIMITED], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert "can be kept nowhere: File too large" in done.stdout and "ulimit -f" in done.stdout, done.stderr
