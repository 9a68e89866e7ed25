"""Compiling with nvcc alone: what torch's loader does for CUDA, where torch itself was built without CUDA."""

from __future__ import annotations

import subprocess
from pathlib import Path

from jitgen import toolchain
from jitgen.target import CompileTarget
from jitgen.toolchain import HOST_FLAGS, CompilerFailed


def compile_module(
    sources: list[Path], include: Path, target: CompileTarget, name: str, scratch: Path, *, whole_runtime: bool = False
) -> tuple[Path, str]:
    """Compile and link CUDA sources; return the library and the compiler's output.

    The library needs no CUDA library, so that it loads beside any other: what it calls of the runtime is among the
    sources, or (whole_runtime) linked statically.
    Errors:  CompilerFailed, ToolchainMissing.
    """
    toolkit, cxx = toolchain.require_toolkit(), toolchain.require_cxx()
    module = scratch / f"{name}.so"
    linker = [flag.replace("-Wl,", "-Xlinker=") for flag in target.link_flags]
    compiler = [f"-Xcompiler={flag}" for flag in HOST_FLAGS]
    command = [str(toolkit.nvcc), "-ccbin", str(cxx.path), *target.flags, *compiler, f"-I{include}"]
    command += ["-shared", f"-cudart={'static' if whole_runtime else 'none'}", *linker, f"-L{toolkit.lib}", "-ldl"]
    command += ["-o", str(module), *map(str, sources)]
    done = subprocess.run(
        command,
        cwd=scratch,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=toolchain.clean_environment(),
        check=False,
    )
    output = done.stdout.decode(errors="replace")
    if done.returncode != 0:
        raise CompilerFailed(output or f"nvcc ended with status {done.returncode} and printed nothing")
    return module, output
