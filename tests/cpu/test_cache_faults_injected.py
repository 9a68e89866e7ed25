"""Faults put in by force: a disk that is full at each write, death at each step, other users, other versions, a bent clock."""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import kill_trials
import pytest
from fake_builder import FakeBuilder, FakeSource, request

from jitgen import cache, toolchain
from jitgen.cache import admin, generator, lookup
from jitgen.errors import CacheError, CacheWarning

HERE = Path(__file__).parent
NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as several users")
needs_compiler = pytest.mark.skipif(toolchain.find_cxx() is None, reason="no C++ compiler on this machine")


@pytest.fixture(autouse=True)
def store(private_store: Path) -> Path:
    return private_store


# ---- at each write ----------------------------------------------------------------------------------------------------------

# One process that forks for each trial: argv holds the library, a folder and the error number (0: kill). For n = 0, 1, ...
# the n-th change of the disk fails, until a trial needs fewer than n. Prints the steps, or the first that went wrong.
STEPS = """
import ctypes, os, sys, tempfile, warnings
from pathlib import Path
from fake_builder import FakeBuilder, FakeSource, request
from jitgen import cache
from jitgen.cache import admin, lookup
import filelock, jitgen.cache.publish, jitgen.cache.remote
library, folder, number = ctypes.CDLL(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
source = FakeSource(includes={"a.h": "x" * 3000})
wanted = b"\\x7fELF" + source.text.encode() * 100

def attempt(store, step):
    os.environ["JITGEN_CACHE_DIR"] = str(store)
    library.arm(str(store).encode(), step, number)
    warnings.simplefilter("ignore")
    module = cache.get_module(request(source), FakeBuilder())
    good = module.read_bytes() == wanted
    done = library.calls_seen() <= step
    if not module.is_relative_to(store): os.unlink(module)
    os._exit(0 if done and good else 1 if good else 2)

for step in range(1000):
    store = folder / str(step)
    child = os.fork()
    if child == 0:
        try: attempt(store, step)
        except BaseException as error: print("step", step, repr(error), flush=True); os._exit(3)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status in (2, 3) or (status < 0 and number): sys.exit(f"step {step}: status {status}")
    problems = [problem for _, problem in admin.verify_entries(store) if problem]
    if problems: sys.exit(f"step {step}: {problems}")
    os.environ["JITGEN_CACHE_DIR"] = str(store)
    lookup.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = cache.get_module(request(source), FakeBuilder())  # the disk has room again
    if not (module.is_relative_to(store) and module.read_bytes() == wanted): sys.exit(f"step {step}: {module} afterwards")
    admin.collect_garbage(store)
    left = [*(store / "tmp").iterdir()]
    if left: sys.exit(f"step {step}: {left} is left")
    if status == 0: break
print("steps", step)
"""


@pytest.fixture(scope="module")
def faulty_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("faulty") / "faulty_disk.so"
    cxx = str(toolchain.require_cxx().path)
    subprocess.run([cxx, "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "faulty_disk.cpp"), "-ldl"], check=True)
    return library


@needs_compiler
@pytest.mark.parametrize("number", [0, errno.ENOSPC, errno.EROFS, errno.EDQUOT], ids=["kill", "full", "read-only", "quota"])
def test_store_is_whole_whichever_step_fails(number: int, faulty_disk: Path, tmp_path: Path) -> None:
    beside = tmp_path / "beside"  # the temporary stores of the processes that end here at once
    beside.mkdir()
    environment = {**os.environ, "LD_PRELOAD": str(faulty_disk), "PYTHONPATH": str(HERE), "TMPDIR": str(beside)}
    command = [sys.executable, "-c", STEPS, str(faulty_disk), str(tmp_path / "stores"), str(number)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) > 25  # a build with its lock, entry, index and log changes the disk that often


def test_random_kills_lose_nothing(store: Path) -> None:
    found = kill_trials.run(30, store, seed=int(time.time()))
    assert (found["wrong"], found["lost"]) == (0, 0) and found["interrupted"] + found["published"] > 0


# ---- other users ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may look into; pytest's own are closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="jitgen-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def as_nobody(work) -> int:
    """Exit status of some work done by another user in a child process."""
    child = os.fork()
    if child == 0:
        status = 9
        try:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            lookup.forget()
            status = work() or 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@needs_root
@pytest.mark.parametrize("part", ["", "entry", "module"])
def test_what_belongs_to_another_user_is_refused(part: str, store: Path) -> None:
    module = cache.get_module(request(), FakeBuilder())
    os.chown({"": store, "entry": module.parent, "module": module}[part], 12345, 12345)
    lookup.forget()
    with pytest.raises(CacheError, match="belongs to user 12345, you are 0"):
        cache.get_module(request(), FakeBuilder())


@needs_root
def test_layer_of_root_serves_other_users(open_folder: Path, store: Path, monkeypatch) -> None:
    cache.get_module(request(), FakeBuilder())
    (store / "layer.json").write_text("{}")
    from jitgen.cache.bundle import pack

    layer = pack([store], open_folder / "layer").path
    monkeypatch.setenv("JITGEN_PREBUILT", str(layer))
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(open_folder / "none"))
    monkeypatch.setenv("JITGEN_MODE", "frozen")
    assert as_nobody(lambda: 0 if cache.get_module(request(), FakeBuilder()).is_relative_to(layer) else 1) == 0
    os.chown(layer, 12345, 12345)
    with pytest.raises(CacheError, match="belongs to user 12345"):
        cache.get_module(request(), FakeBuilder())


@needs_root
def test_read_only_store_is_used_and_built_beside(open_folder: Path, monkeypatch) -> None:
    """A user who may read a store and not write it loads what is there; what is not there is built in a temporary place."""
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(open_folder / "store"))
    there = cache.get_module(request(), FakeBuilder())
    from jitgen.cache.layer import make_readable

    make_readable(open_folder / "store")
    monkeypatch.setattr(lookup, "_temporary", [])

    def work() -> int:
        with pytest.warns(CacheWarning, match="cannot be used: Permission denied"):
            other = cache.get_module(request(FakeSource("int b;\n"), spec="b"), FakeBuilder())
        found = cache.get_module(request(), FakeBuilder())
        shutil.rmtree(other.parent.parent)
        return 0 if found == there and not other.is_relative_to(open_folder) else 1

    assert as_nobody(work) == 0


# ---- other versions, times and places ---------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch) -> Path:
    """A copy of the templates and modules that the generator's digest is taken of."""
    from jitgen import paths

    for name, source in (("kernel_templates", paths.template_dir()), ("jitgen", paths.package_dir())):
        shutil.copytree(source, tmp_path / "checkout" / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(paths, "template_dir", lambda: tmp_path / "checkout" / "kernel_templates")
    monkeypatch.setattr(paths, "package_dir", lambda: tmp_path / "checkout" / "jitgen")
    return tmp_path / "checkout"


def digest_now() -> str:
    generator.generator_digest.cache_clear()
    try:
        return generator.generator_digest()
    finally:
        generator.generator_digest.cache_clear()


def test_edited_header_is_noticed_and_a_touched_one_is_not(checkout: Path) -> None:
    before = digest_now()
    header = checkout / "kernel_templates" / "include" / "jitgen" / "cpu_math.h"
    state = header.stat()
    os.utime(header)
    assert digest_now() == before
    text = header.read_bytes()
    header.write_bytes(text.replace(b"float", b"folat", 1))
    os.utime(header, ns=(state.st_atime_ns, state.st_mtime_ns))  # same size, same time: still another file
    assert digest_now() != before
    header.write_bytes(text)
    assert digest_now() == before


def test_moved_checkout_finds_its_kernels(checkout: Path, monkeypatch) -> None:
    from jitgen import paths

    before = digest_now()
    moved = checkout.rename(checkout.with_name("moved"))
    monkeypatch.setattr(paths, "template_dir", lambda: moved / "kernel_templates")
    monkeypatch.setattr(paths, "package_dir", lambda: moved / "jitgen")
    assert digest_now() == before


def test_two_versions_share_a_store(store: Path) -> None:
    """Each finds its own kernel by its alias, and looking after the store keeps both."""
    old, new = FakeSource("int old;\n"), FakeSource("int new_one;\n")
    modules = [cache.get_module(request(s, spec=f"spec of generator {s.text}"), FakeBuilder()) for s in (old, new)]
    admin.collect_garbage(store)
    builder = FakeBuilder()
    again = [cache.get_module(request(s, spec=f"spec of generator {s.text}"), builder) for s in (old, new)]
    assert again == modules and builder.num_builds == 0


@pytest.mark.parametrize("shift", [-400 * 24 * 3600, 400 * 24 * 3600], ids=["back", "ahead"])
def test_bent_clock_changes_nothing_but_ages(shift: int, store: Path, monkeypatch) -> None:
    module = cache.get_module(request(), FakeBuilder())
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + shift)
    lookup.forget()
    builder = FakeBuilder()
    assert cache.get_module(request(), builder) == module and builder.num_builds == 0
    assert cache.get_module(request(FakeSource("int b;\n"), spec="b"), FakeBuilder()).is_file()
    admin.collect_garbage(store)
    assert len(admin.list_entries(store)) == 2


def test_loaded_module_survives_its_removal_and_a_fork(store: Path) -> None:
    """What a process has opened stays its own, whatever happens to the store."""
    module = cache.get_module(request(), FakeBuilder())
    module.chmod(0o755)
    shutil.copy(ctypes.util.find_library("m") and next(Path("/").glob("lib*/**/libm.so.6")), module)
    library = ctypes.CDLL(str(module))
    library.cos.restype, library.cos.argtypes = ctypes.c_double, [ctypes.c_double]
    shutil.rmtree(store)
    child = os.fork()
    if child == 0:
        os._exit(0 if library.cos(0.0) == 1.0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and library.cos(0.0) == 1.0
