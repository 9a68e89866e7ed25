"""Compiling through torch.utils.cpp_extension's loader, kept from picking up what does not belong to the key."""

from __future__ import annotations

import errno
import os
import re
import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jitgen import toolchain
from jitgen.errors import ToolchainMissing
from jitgen.target import CompileTarget
from jitgen.toolchain import CompilerFailed, Toolkit

# The loader reads the environment and a global, so one build at a time within a process.
_lock = threading.Lock()


def compile_module(
    sources: list[Path], include: Path, target: CompileTarget, name: str, scratch: Path, *, whole_runtime: bool = False
) -> tuple[Path, str]:
    """Compile and link sources; return the library and the compiler's output.

    `whole_runtime` links a CUDA module with libcudart_static, where the functions among its sources do not suffice.
    NOTE: the loader also opens the library. That is harmless: the file is renamed later, not copied, so the system
    linker knows it for the same one.
    Errors:  CompilerFailed, ToolchainMissing.
    """
    toolkit = toolchain.require_toolkit() if target.kind == "cuda" else None
    log = scratch / "nvcc.log"
    view = _toolkit_view(toolkit, scratch / "toolkit", log) if toolkit else None
    link_flags = list(target.link_flags)
    if target.kind == "cpu" and toolchain.require_cxx().is_clang:
        # Clang's OpenMP runtime must be named. GCC's is not: its functions are found in the one that torch has loaded,
        # so that both share their threads, and a prebuilt module needs no libgomp of the system's.
        link_flags.append("-fopenmp")
    if toolkit is not None:
        link_flags += [f"-L{toolkit.lib}", "-lcudart_static", "-lrt", "-lpthread"] if whole_runtime else []
        link_flags.append("-ldl")
    with _lock, _loader_environment(), _cuda_home(view):
        from torch.utils import cpp_extension

        try:
            module = cpp_extension.load(
                name=name,
                sources=list(map(str, sources)),
                extra_cflags=[*target.flags, "-fmax-errors=20"] if target.kind == "cpu" else ["-O3", *toolchain.HOST_FLAGS],
                extra_cuda_cflags=[*target.flags, *(f"-Xcompiler={flag}" for flag in toolchain.HOST_FLAGS)],
                extra_ldflags=link_flags,
                extra_include_paths=[str(include)],
                build_directory=str(scratch),
                with_cuda=target.kind == "cuda",
                is_python_module=False,
                verbose=False,
            )
        except RuntimeError as error:
            raise _refusal(str(error)) from error
        except OSError as error:
            raise _load_failure(error, scratch) from error
    return Path(module), log.read_text(errors="replace") if log.is_file() else ""


def _refusal(output: str) -> Exception:
    """The error for a compiler that refused a source."""
    if re.search(r"\bomp\.h\b.*(?:not found|No such file)|cannot find -l(?:omp|gomp)\b", output):
        return ToolchainMissing(f"{toolchain.require_cxx().path} has no OpenMP", toolchain.OPENMP_REMEDY + ".")
    return CompilerFailed(output)


def _load_failure(error: OSError, scratch: Path) -> Exception:
    """The error for a library that was built but does not load: the loader hides the system linker's reason."""
    reason = str(error.__cause__ or error)
    if error.errno is not None or error.__cause__ is None:
        return error  # of a file, not of loading
    if "failed to map segment" in reason:
        return OSError(errno.EACCES, "libraries there cannot be loaded, as if it were mounted noexec", str(scratch))
    return CompilerFailed(f"error: the library does not load: {reason}")


def _toolkit_view(toolkit: Toolkit, view: Path, log: Path) -> Path:
    """A directory laid out as the loader expects a toolkit to be, whatever the real one looks like.

    Its nvcc is a script that keeps what nvcc prints: the loader throws that away when the build succeeds, and with it
    the register counts.
    """
    (view / "bin").mkdir(parents=True)
    (view / "lib64").mkdir()
    (view / "include").symlink_to(toolkit.include)
    # The loader asks the linker for a libcudart: an empty archive, so that a function missing elsewhere is not taken from it.
    (view / "lib64" / "libcudart.so").write_bytes(b"!<arch>\n")
    script = view / "bin" / "nvcc"
    nvcc, kept = shlex.quote(str(toolkit.nvcc)), shlex.quote(str(log))
    script.write_text(f'#!/bin/sh\n{nvcc} "$@" >{kept} 2>&1\nstatus=$?\ncat {kept}\nexit $status\n')
    script.chmod(0o700)
    return view


@contextmanager
def _loader_environment() -> Iterator[None]:
    """The environment of a build, put in place of the process's own for as long as the loader runs."""
    ninja, cxx = toolchain.require_ninja(), toolchain.require_cxx()
    kept = dict(os.environ)
    wanted = toolchain.clean_environment()
    wanted["CXX"] = wanted["CC"] = str(cxx.path)  # CC: the loader makes it nvcc's host compiler
    wanted["PATH"] = os.pathsep.join([wanted.get("PATH", os.defpath), str(ninja.parent)])
    wanted["TORCH_NO_COMPILER_WRAPPER"] = "1"  # a compiler cache in front would only slow a miss down
    try:
        _replace_environment(wanted)
        yield
    finally:
        _replace_environment(kept)


def _replace_environment(wanted: dict[str, str]) -> None:
    """Change the differing variables only: other threads may be reading."""
    for name in set(os.environ) - set(wanted):
        del os.environ[name]
    for name, value in wanted.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


@contextmanager
def _cuda_home(view: Path | None) -> Iterator[None]:
    """Let the loader find the toolkit: it looks once, when it is imported, and does not resolve links."""
    if view is None:
        yield
        return
    from torch.utils import cpp_extension

    kept = cpp_extension.CUDA_HOME
    cpp_extension.CUDA_HOME = str(view)
    try:
        yield
    finally:
        cpp_extension.CUDA_HOME = kept
