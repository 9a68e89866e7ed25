"""Compiling: the compilers of a module side by side, then torch.utils.cpp_extension's loader, which links and opens it.

The loader is imported while the compilers run, as that takes it some tenths of a second, and finds their objects ready: what it
calls as its compiler is a script that hands them over. So a module is as long in the making as its slowest compiler, and torch
needs no CUDA of its own.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jitgen import toolchain
from jitgen.build import DEVICE_RUNTIME, HOST_RUNTIME
from jitgen.errors import ToolchainMissing
from jitgen.host_part import host_headers, host_part
from jitgen.target import CompileTarget
from jitgen.toolchain import CompilerFailed

# The loader reads the environment and a global, so one at a time within a process.
_lock = threading.Lock()
_importing = threading.Lock()

# How a CUDA module's host part is compiled. __CUDACC__: it is to see what nvcc would show it.
HOST_FLAGS = ("-O2", "-std=c++17", "-fPIC", "-w", "-D__CUDACC__", "-include", HOST_RUNTIME)
# nvcc puts a header of this name in front of every source. Ours, if found first, saves it the 30 000 lines of CUDA's.
DEVICE_HEADER = "device/cuda_runtime.h"
QUICK_TOOLKITS = ("13",)  # see quick_options; tried with 13.0 and 13.5
COMPILED = "compiled"  # directory of the objects
# Device code as data: what nvcc made, under the name that driver_runtime.h knows and in the section where CUDA's tools look.
DEVICE_OBJECT = """\
.section .nv_fatbin,"a"
.globl jitgen_binary
.hidden jitgen_binary
.balign 64
jitgen_binary:
.incbin "kernel.fatbin"
.section .note.GNU-stack,"",%progbits
"""


def compile_module(
    kernel: Path, includes: Mapping[str, str], target: CompileTarget, name: str, scratch: Path
) -> tuple[Path, str]:
    """Compile a source, whose headers are below include/ beside it, and link it; return the library and what was printed.

    NOTE: the loader also opens the library. That is harmless: the file is renamed later, not copied, so the system
    linker knows it for the same one.
    Errors:  CompilerFailed, ToolchainMissing.
    """
    toolchain.require_cxx(), toolchain.require_ninja()
    (scratch / COMPILED).mkdir()
    sources = [kernel] if target.kind == "cpu" else [scratch / "host.cpp", scratch / "device.s"]
    linker = _write_linker(sources, target, scratch)
    with _Compilers(scratch) as compilers:
        if target.kind == "cuda":
            _start_cuda(compilers, kernel, includes, target, scratch)
        else:
            _start_cpu(compilers, kernel, target)
        _torchs_loader()  # here, as importing it takes time that the compilers run in
        output = compilers.finish()
        if target.kind == "cuda":
            compilers.start([_cxx(), "-c", "device.s", "-o", f"{COMPILED}/device.o"])
            compilers.finish()
    return _link(sources, linker, name, scratch), output


# ---- compilers ----


class _Compilers:
    """Compilers that run in a directory at the same time; none outlives the block."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> _Compilers:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._running:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started itself
            process.communicate()

    def start(self, command: list[str]) -> None:
        self._running.append(
            subprocess.Popen(
                command,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=toolchain.clean_environment(),
                start_new_session=True,
            )
        )

    def finish(self) -> str:
        """Wait for all; what they printed.

        Errors:  CompilerFailed for the first that refused its input.
        """
        printed = ""
        while self._running:
            process = self._running[0]
            output = process.communicate()[0].decode(errors="replace")
            del self._running[0]
            if process.returncode != 0:
                raise _refusal(output or f"{process.args[0]} ended with status {process.returncode} and printed nothing")
            printed += output
        return printed


def _cxx() -> str:
    return str(toolchain.require_cxx().path)


def _start_cpu(compilers: _Compilers, kernel: Path, target: CompileTarget) -> None:
    include = f"-I{kernel.parent / 'include'}"
    compilers.start([_cxx(), *target.flags, "-fmax-errors=20", include, "-c", str(kernel), "-o", f"{COMPILED}/kernel.o"])


def _start_cuda(compilers: _Compilers, kernel: Path, includes: Mapping[str, str], target: CompileTarget, scratch: Path) -> None:
    """Start nvcc on the device code alone; then, as that takes longer, make the host's part and compile it."""
    toolkit = toolchain.require_toolkit()
    command = [str(toolkit.nvcc), "-ccbin", _cxx(), *target.flags, *quick_options(toolkit, scratch)]
    compilers.start([*command, f"-I{kernel.parent / 'include'}", "-fatbin", "-o", "kernel.fatbin", str(kernel)])
    try:
        headers = host_headers({path: text for path, text in includes.items() if path != DEVICE_RUNTIME})
        host = host_part(kernel.read_text("utf-8"))
    except ValueError as error:
        raise CompilerFailed(f"error: {error}") from error
    _write(scratch, {"host.cpp": host, "device.s": DEVICE_OBJECT, **{f"host/{path}": text for path, text in headers.items()}})
    compilers.start([_cxx(), *HOST_FLAGS, "-Ihost", "-c", "host.cpp", "-o", f"{COMPILED}/host.o"])


def quick_options(toolkit: toolchain.Toolkit, directory: Path) -> list[str]:
    """Options that make nvcc faster and its code no other: none for toolkits of other major versions than were tried.

    Our own header, written below the directory, is found before CUDA's; ptxas compiles the kernels of a module side by side.
    """
    if toolkit.version.split(".")[0] not in QUICK_TOOLKITS:
        return []
    _write(directory, {DEVICE_HEADER: f'#include "{DEVICE_RUNTIME}"\n'})
    return [f"-I{(directory / DEVICE_HEADER).parent}", "-Xptxas=-split-compile=0"]


def _write(directory: Path, texts: Mapping[str, str]) -> None:
    """Write files below a directory."""
    for path, text in texts.items():
        file = directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")


def _refusal(output: str) -> Exception:
    """The error for a compiler that refused a source."""
    if re.search(r"\bomp\.h\b.*(?:not found|No such file)|cannot find -l(?:omp|gomp)\b", output):
        return ToolchainMissing(f"{toolchain.require_cxx().path} has no OpenMP", toolchain.OPENMP_REMEDY + ".")
    return CompilerFailed(output)


# ---- linking ----


def _write_linker(sources: list[Path], target: CompileTarget, scratch: Path) -> Path:
    """What the loader takes for its compiler: has every object already, and links without the libraries of torch's.

    A module needs none of them, and to look through their symbols takes the linker longer than all the rest.
    Errors:  OSError where files cannot be started, and so libraries not loaded.
    """
    flags = list(target.link_flags)
    if target.kind == "cuda":
        flags.append("-ldl")
    elif toolchain.require_cxx().is_clang:
        # Clang's OpenMP runtime must be named. GCC's is not: its functions are found in the one that torch has loaded,
        # so that both share their threads, and a prebuilt module needs no libgomp of the system's.
        flags.append("-fopenmp")
    link = shlex.join([_cxx(), "-shared", *(f"{source.stem}.o" for source in sources), *flags])
    script = scratch / "linker"
    script.write_text(f"""\
#!/bin/sh
for out; do :; done
case " $* " in
*" -c "*) exec mv "{COMPILED}/$out" "$out" ;;
*) exec {link} -o "$out" ;;
esac
""", "utf-8", "surrogateescape")
    script.chmod(0o700)
    if not os.access(script, os.X_OK):
        raise _not_for_programs(scratch)
    return script


def _torchs_loader() -> Any:
    """torch.utils.cpp_extension, without the warning it logs where there is a toolkit and no GPU: nothing is wrong there."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    with _importing:  # threads that compile at the same time would take each other's level for the user's
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            from torch.utils import cpp_extension
        finally:
            logger.setLevel(level)
    return cpp_extension


def _link(sources: list[Path], linker: Path, name: str, scratch: Path) -> Path:
    """The library, linked and opened by torch's loader."""
    with _lock, _plain_name(scratch.parent) as plain, _loader_environment(plain / linker.relative_to(scratch.parent)):
        try:
            module = _torchs_loader().load(
                name=name,
                sources=[str(plain / source.relative_to(scratch.parent)) for source in sources],
                build_directory=str(plain / scratch.name),
                with_cuda=False,
                is_python_module=False,
                verbose=False,
            )
        except RuntimeError as error:
            raise _refusal(str(error)) from error
        except OSError as error:
            raise _load_failure(error, scratch) from error
    return scratch / Path(module).name


@contextmanager
def _plain_name(directory: Path) -> Iterator[Path]:
    """The directory under a name that the loader can write into its ninja file: it escapes spaces, and nothing else."""
    if re.fullmatch(r"[\w./+ -]+", str(directory), re.ASCII):
        yield directory
        return
    holder = Path(tempfile.mkdtemp(prefix="jitgen-"))
    try:
        (holder / "build").symlink_to(directory)
        yield holder / "build"
    finally:
        shutil.rmtree(holder)


def _load_failure(error: OSError, scratch: Path) -> Exception:
    """The error for a library that was built but does not load: the loader hides the system linker's reason."""
    reason = str(error.__cause__ or error)
    if error.errno is not None or error.__cause__ is None:
        return error  # of a file, not of loading
    if "failed to map segment" in reason:
        return _not_for_programs(scratch)
    return CompilerFailed(f"error: the library does not load: {reason}")


def _not_for_programs(directory: Path) -> OSError:
    return OSError(errno.EACCES, "libraries there cannot be loaded, as if it were mounted noexec", str(directory))


@contextmanager
def _loader_environment(compiler: Path) -> Iterator[None]:
    """The environment of a build, put in place of the process's own for as long as the loader runs."""
    ninja = toolchain.require_ninja()
    kept = dict(os.environ)
    wanted = toolchain.clean_environment()
    wanted["CXX"] = str(compiler)
    wanted["TORCH_DONT_CHECK_COMPILER_ABI"] = "1"  # no libtorch symbol is in a module
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
