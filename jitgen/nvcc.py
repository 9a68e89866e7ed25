"""Compiling with nvcc alone: what torch's loader does for CUDA, where torch itself was built without CUDA."""

from __future__ import annotations

import subprocess
from pathlib import Path

from jitgen import toolchain
from jitgen.target import CompileTarget
from jitgen.toolchain import CompilerFailed


def compile_module(kernel: Path, include: Path, target: CompileTarget, name: str, scratch: Path) -> tuple[Path, str]:
    """Compile and link a CUDA source; return the library and the compiler's output.

    The library holds the CUDA runtime, so that it loads beside any other.
    Errors:  CompilerFailed, ToolchainMissing.
    """
    toolkit, cxx = toolchain.require_toolkit(), toolchain.require_cxx()
    module = scratch / f"{name}.so"
    linker = [flag.replace("-Wl,", "-Xlinker=") for flag in target.link_flags]
    command = [str(toolkit.nvcc), "-ccbin", str(cxx.path), *target.flags, "-Xcompiler=-fPIC", f"-I{include}"]
    command += ["-shared", "-cudart=static", *linker, f"-L{toolkit.lib}", "-o", str(module), str(kernel)]
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
