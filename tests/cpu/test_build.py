"""The build: a real compiler, what it leaves behind, and what is said when it fails or is missing."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
from fake_builder import FakeSource

from jitgen import build, runtime, target, toolchain
from jitgen.errors import CompileError, ToolchainMissing

torch = pytest.importorskip("torch")
needs_cxx = pytest.mark.skipif(toolchain.find_cxx() is None, reason="needs a C++ compiler")

KERNEL = """
#include "jitgen/factor.h"
struct Args { float* x; long long n; };
extern "C" int jitgen_launch(const Args* args) {
#pragma omp parallel for
  for (long long i = 0; i < args->n; i++) args->x[i] *= kFactor;
  return 0;
}
"""
HEADERS = {"jitgen/factor.h": "constexpr float kFactor = 3.0f;\n"}


def module_of(text: str, *, spec: str = "spec", includes: dict[str, str] | None = None) -> Path:
    source = FakeSource(text, text, HEADERS if includes is None else includes)
    return build.get_module(spec, "cpu", "test kernel", lambda: source, target.detect_cpu())


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JITGEN_CACHE_DIR", str(tmp_path_factory.mktemp("built") / "store"))
        toolchain._find_cxx.cache_clear()  # so that the compiler's version goes on record in this store
        # what a user's environment may hold and must not reach the compiler
        patch.setenv("TORCH_CUDA_ARCH_LIST", "1.0")
        patch.setenv("CPLUS_INCLUDE_PATH", "/nonexistent")
        return module_of(KERNEL)


@needs_cxx
def test_built_module_computes(module: Path) -> None:
    x = torch.arange(1000.0)
    words = (ctypes.c_int64 * 2)(x.data_ptr(), x.numel())
    assert ctypes.CDLL(str(module)).jitgen_launch(words) == 0
    assert torch.equal(x, torch.arange(1000.0) * 3)


@needs_cxx
@pytest.mark.parametrize("name", ["a b", "ä'\"", "$HOME:=,;#(x)"])
def test_store_may_have_any_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(tmp_path / name))
    module = module_of(KERNEL)
    assert module.is_relative_to(tmp_path / name)
    ctypes.CDLL(str(module))


@needs_cxx
def test_names_of_any_language_are_compiled_where_the_locale_has_none(tmp_path: Path) -> None:
    text = KERNEL + "// größe\n"
    script = (
        "from test_build import HEADERS, build, target, FakeSource\n"
        f"source = FakeSource({text!a}, {text!a}, HEADERS)\n"
        "print(build.get_module('s', 'cpu', 'k', lambda: source, target.detect_cpu()).stat().st_size)\n"
    )
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "JITGEN_CACHE_DIR": str(tmp_path / "größe")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=Path(__file__).parent, env={**os.environ, **plain}, capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr


@needs_cxx
def test_built_module_depends_on_no_torch_and_no_openmp_library(module: Path) -> None:
    dynamic = subprocess.run(["readelf", "-d", str(module)], stdout=subprocess.PIPE, text=True, check=True).stdout
    needed = [line for line in dynamic.splitlines() if "NEEDED" in line]
    assert not any(name in line for line in needed for name in ("torch", "c10", "gomp", "python"))
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


@needs_cxx
def test_entry_holds_only_what_belongs_to_it(module: Path) -> None:
    files = {path.relative_to(module.parent).as_posix() for path in module.parent.rglob("*") if path.is_file()}
    assert files == {*("kernel.cpp", "include/jitgen/factor.h", "module.so", "build.log", "key.json", "manifest.json")}


@needs_cxx
def test_build_leaves_the_environment_as_it_was(private_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "1.0")
    before = dict(os.environ)
    module_of(KERNEL)
    assert dict(os.environ) == before


@needs_cxx
def test_hit_starts_no_process(module: Path) -> None:
    """In a fresh process, with the programs' versions on record."""
    program = """
import os, subprocess, torch
from jitgen import build, target
def fail(*args, **options): raise AssertionError("started a process")
subprocess.Popen = os.fork = os.posix_spawn = fail
def render(): raise AssertionError("rendered on a hit")
print(build.get_module("spec", "cpu", "test kernel", render, target.detect_cpu()))
"""
    environment = {**os.environ, "JITGEN_CACHE_DIR": str(module.parent.parent)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.strip() == str(module)


@needs_cxx
@pytest.mark.usefixtures("private_store")
def test_compiler_error_shows_its_line_and_keeps_source_and_log() -> None:
    text = '#line 41 "attention/cpu.cpp.jinja"\nint broken = nonsense;\n'
    with pytest.raises(CompileError, match=r"compiling test kernel failed:\n.*cpu.cpp.jinja:41.*nonsense") as caught:
        module_of(text)
    assert "nonsense" in caught.value.log.read_text()
    assert caught.value.source.read_text() == text
    assert "/tmp/" not in str(caught.value).replace(str(caught.value.log.parent), "")


@needs_cxx
@pytest.mark.usefixtures("private_store")
def test_flood_of_errors_is_cut_in_the_message() -> None:
    with pytest.raises(CompileError) as caught:
        module_of("".join(f"int a{i} = nonsense{i} + {'x' * 500};\n" for i in range(3000)))
    assert len(str(caught.value)) < 4000
    assert len(caught.value.lines) == build.SHOWN_LINES


@needs_cxx
@pytest.mark.usefixtures("private_store")
def test_different_kernels_can_be_built_by_threads_at_once() -> None:
    found: list[Path] = []
    texts = [f"{KERNEL}int variant_{i};\n" for i in range(2)]
    threads = [threading.Thread(target=lambda t=t: found.append(module_of(t, spec=t[-12:]))) for t in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 2


def test_kernels_wanted_together_are_looked_up_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [types.SimpleNamespace(digest=digest, target="target") for digest in ("first", "second")]
    both = threading.Barrier(2, timeout=30)
    monkeypatch.setattr(runtime, "_kernels", {})
    monkeypatch.setattr(runtime, "module_path", lambda spec: both.wait() >= 0 and spec.digest)
    monkeypatch.setattr(runtime, "CompiledKernel", lambda path, spec, fields: path)
    monkeypatch.setattr(runtime, "fields_of", lambda spec: ())
    assert runtime.get_kernels(specs) == ("first", "second")
    assert runtime.get_kernels(specs[:1]) == ("first",)  # in memory: it would wait for ever


def test_kernel_of_several_that_cannot_be_built_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(spec):
        raise ToolchainMissing(f"no compiler for {spec.digest}", "Install one.")

    monkeypatch.setattr(runtime, "_kernels", {})
    monkeypatch.setattr(runtime, "module_path", refuse)
    specs = [types.SimpleNamespace(digest=digest, target="target") for digest in ("first", "second")]
    with pytest.raises(ToolchainMissing, match="no compiler for first"):
        runtime.get_kernels(specs)


@pytest.mark.parametrize("is_collecting", [True, False])
def test_nothing_is_collected_while_a_source_is_rendered(is_collecting: bool) -> None:
    seen: list[bool] = []

    def render() -> FakeSource:
        seen.append(gc.isenabled())
        raise KeyError("a mistake")

    try:
        (gc.enable if is_collecting else gc.disable)()
        with pytest.raises(KeyError):
            build.get_module("a spec", "cpu", "test kernel", render, target.detect_cpu())
        assert (seen, gc.isenabled()) == ([False], is_collecting)
    finally:
        gc.enable()


@needs_cxx
def test_entry_removed_in_this_process_is_built_again(private_store: Path) -> None:
    import shutil

    module = module_of(KERNEL)
    shutil.rmtree(module.parent)
    assert module_of(KERNEL) == module and module.is_file()


@pytest.mark.usefixtures("private_store")
def test_missing_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolchainMissing, match=r"no C\+\+ compiler on PATH\. Install one: 'apt install g\+\+'"):
        module_of(KERNEL)


@pytest.mark.usefixtures("private_store")
def test_compiler_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITGEN_CXX", "g++-99")
    with pytest.raises(ToolchainMissing, match=r"JITGEN_CXX=g\+\+-99 is not a program"):
        module_of(KERNEL)


@pytest.mark.usefixtures("private_store")
def test_ninja_outside_path_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("ninja")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert toolchain.require_ninja().is_file()


def test_first_errors_prefers_telling_lines() -> None:
    output = "[1/2] g++ -c kernel.cpp\nkernel.cpp:3:1: error: bad\nkernel.cpp:3:1: note: why\nninja: build stopped\n"
    assert build.first_errors(output) == ("kernel.cpp:3:1: error: bad",)


def test_first_errors_falls_back_to_the_last_lines() -> None:
    assert build.first_errors("Killed\n") == ("Killed",)
