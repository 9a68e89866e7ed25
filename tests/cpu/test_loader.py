"""Torch's extension loader reports everything in its own way: what users get to read instead."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest

from jitgen import loader, toolchain
from jitgen.errors import ToolchainMissing
from jitgen.target import cpu_target
from jitgen.toolchain import CompilerFailed

pytestmark = pytest.mark.skipif(toolchain.find_cxx() is None, reason="no C++ compiler on this machine")


def load_error(reason: str) -> OSError:
    """What torch raises when the system linker refuses a library."""
    error = OSError("Could not load this library: kernel.so")
    error.__cause__ = OSError(reason)
    return error


def compile_with(outcome: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile with a loader that fails in a given way."""

    def load(**options):
        raise outcome

    monkeypatch.setattr("torch.utils.cpp_extension.load", load)
    (tmp_path / "kernel.cpp").write_text("int kernel;\n")
    loader.compile_module(tmp_path / "kernel.cpp", {}, cpu_target("portable"), "kernel", tmp_path)


@pytest.mark.parametrize(
    "output",
    [
        "kernel.cpp:9:10: fatal error: 'omp.h' file not found",
        "fatal error: omp.h: No such file or directory",
        "/usr/bin/ld: cannot find -lomp: No such file or directory",
    ],
)
def test_missing_openmp_says_what_to_install(output, tmp_path, monkeypatch):
    with pytest.raises(ToolchainMissing, match=r"has no OpenMP\. Install it: 'apt install libomp-dev'"):
        compile_with(RuntimeError(output), tmp_path, monkeypatch)


def test_refused_source_keeps_the_output_of_the_compiler(tmp_path, monkeypatch):
    with pytest.raises(CompilerFailed, match=r"kernel\.cpp:1: error: no"):
        compile_with(RuntimeError("kernel.cpp:1: error: no"), tmp_path, monkeypatch)


def test_library_that_does_not_load_is_a_failed_build(tmp_path, monkeypatch):
    with pytest.raises(CompilerFailed, match=r"does not load: kernel\.so: undefined symbol: f"):
        compile_with(load_error("kernel.so: undefined symbol: f"), tmp_path, monkeypatch)


def test_store_that_forbids_libraries_is_an_error_of_its_directory(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="noexec") as caught:
        compile_with(load_error("failed to map segment from shared object"), tmp_path, monkeypatch)
    assert (caught.value.errno, caught.value.filename) == (errno.EACCES, str(tmp_path))


def test_full_disk_stays_an_error_of_the_file(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device", "build.ninja")
    with pytest.raises(OSError, match="No space left") as caught:
        compile_with(full, tmp_path, monkeypatch)
    assert caught.value is full


def test_compiler_that_fails_takes_the_others_with_it(tmp_path):
    """With all that they have started themselves, as nvcc does."""
    with pytest.raises(CompilerFailed, match="no luck"), loader._Compilers(tmp_path) as compilers:
        compilers.start(["sh", "-c", "until [ -s pid ]; do sleep 0.01; done; echo no luck; exit 3"])
        compilers.start(["sh", "-c", "sleep 1000 & echo $! > pid; wait"])
        compilers.finish()
    pid = int((tmp_path / "pid").read_text())
    end = time.monotonic() + 10  # a killed process is there until it is its turn to run
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert not is_alive(pid)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_silent_compiler_that_fails_is_named(tmp_path):
    with pytest.raises(CompilerFailed, match="false ended with status 1"), loader._Compilers(tmp_path) as compilers:
        compilers.start(["false"])
        compilers.finish()
