"""The parts of 'jitgen doctor' that concern compiling: each program that it takes, and a small library as a proof."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from jitgen import doctor, env, paths, toolchain
from jitgen.cache import Store
from jitgen.doctor import CPU, ERROR, MISSING, NOTE, OK, Finding
from jitgen.errors import CompileError, EnvError, JitgenError, ToolchainMissing

if TYPE_CHECKING:
    from jitgen.target import CompileTarget

# /etc/os-release ID or ID_LIKE -> how its package manager installs a C++ compiler
INSTALL_CXX = {
    "debian": "apt install g++",
    "ubuntu": "apt install g++",
    "fedora": "dnf install gcc-c++",
    "rhel": "dnf install gcc-c++",
    "suse": "zypper install gcc-c++",
    "opensuse": "zypper install gcc-c++",
    "arch": "pacman -S gcc",
    "gentoo": "emerge sys-devel/gcc",
}
SUCCESS = 42  # what a probe returns


def check_torch() -> Finding:
    """Torch's version; importing it takes seconds."""
    if not doctor.has_package("torch"):
        return Finding(CPU, "torch", MISSING, "not installed", "Run: pip install torch")
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding(CPU, "torch", ERROR, f"cannot be imported: {error}", "Run: pip install --force-reinstall torch")
    return Finding(CPU, "torch", OK, torch.__version__)


def check_setuptools() -> Finding:
    """torch.utils.cpp_extension imports setuptools."""
    if doctor.has_package("setuptools"):
        return Finding(CPU, "setuptools", OK, "present (torch's extension loader imports it)")
    return Finding(CPU, "setuptools", missing(), "torch's extension loader imports it", "Run: pip install setuptools")


def check_ninja() -> Finding:
    found = toolchain.find_ninja()
    if found is None:
        return Finding(CPU, "ninja", missing(), "neither on PATH nor installed in Python", "Run: pip install ninja")
    return Finding(CPU, "ninja", OK, str(found))


def check_cxx() -> Finding:
    try:
        found = toolchain.require_cxx()
    except ToolchainMissing as error:
        return Finding(CPU, "C++ compiler", missing(), error.what, cxx_remedy(doctor.release()))
    return Finding(CPU, "C++ compiler", OK, f"{found.version} ({found.path})")


def missing() -> str:
    """Status of an absent program: with JITGEN_MODE=frozen it is not needed."""
    try:
        return NOTE if env.is_frozen() else MISSING
    except EnvError:
        return MISSING


def cxx_remedy(os_release: dict[str, str], sudo: bool | None = None) -> str:
    """How to install a C++ compiler on this distribution, or into this conda environment."""
    if os.environ.get("CONDA_PREFIX"):
        return "Run: conda install -c conda-forge gxx; or name a compiler in JITGEN_CXX."
    prefix = "sudo " if (os.geteuid() != 0 if sudo is None else sudo) else ""
    for name in (os_release.get("ID", ""), *os_release.get("ID_LIKE", "").split()):
        command = INSTALL_CXX.get(name.partition("-")[0])
        if command is not None:
            return f"Run: {prefix}{command}; without root: conda install -c conda-forge gxx. Or name one in JITGEN_CXX."
    return toolchain.CXX_REMEDY + "."


def check_isa() -> Finding:
    from jitgen.target import CPU_LEVELS, detect_cpu

    try:
        target = detect_cpu()
    except EnvError as error:
        return Finding(CPU, "instructions", ERROR, str(error), "Run: unset JITGEN_CPU_ISA")
    extras = [name for name in target.arch.split("+")[1:] if name not in CPU_LEVELS[target.isa]]
    return Finding(CPU, "instructions", OK, " with ".join([target.isa, *extras]) + f", {os.cpu_count()} CPUs")


# ---- the proof ------------------------------------------------------------------------------------------------------


def check_probe(section: str, source: str, target: CompileTarget | None = None, load: bool = True) -> Finding:
    """Compile a small library the way kernels are compiled, load it from where they are loaded from, and call it."""
    from jitgen.build import build
    from jitgen.target import detect_cpu

    target = target or detect_cpu()
    name = "first kernel" if load else "compiling"
    begun = time.perf_counter()
    try:
        with scratch_directory() as directory:
            probe = f"jitgen_doctor_{target.kind}"
            module = build(source, name=probe, target=target, includes={}, label="a test", directory=directory)
            elapsed = time.perf_counter() - begun
            code = ctypes.CDLL(str(module)).jitgen_probe() if load else SUCCESS
    except CompileError as error:
        return Finding(section, name, ERROR, f"compiling a test failed: {'; '.join(error.lines)}", probe_remedy(error))
    except (JitgenError, OSError) as error:
        return Finding(section, name, ERROR, str(error), load_remedy(str(error)))
    if code != SUCCESS:
        return Finding(section, name, ERROR, f"a compiled test returned {code}, expected {SUCCESS}", run_remedy(target))
    did = "compiled, loaded and run" if load else "compiled (nothing here to run it on)"
    parallel = " with OpenMP" if target.kind == "cpu" else f" for {target.arch}"
    return Finding(section, name, OK, f"{did}{parallel} in {elapsed:.1f} s")


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A directory in the store's file system, which may forbid programs; a temporary one if the store is unusable."""
    root = paths.cache_dir()
    try:
        if root is None:
            raise OSError("no home directory")
        directory = Store(root).private_dir()
    except (OSError, JitgenError):
        directory = Path(tempfile.mkdtemp(prefix="jitgen-doctor-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def probe_remedy(error: CompileError) -> str:
    """What usually helps against a compiler that refuses a correct source."""
    text = " ".join(error.lines)
    if re.search(r"\bomp\.h|-fopenmp|-lg?i?omp|libg?i?omp", text):
        return "OpenMP is missing. g++ brings it; clang++ needs: apt install libomp-dev, or dnf install libomp-devel."
    if "unsupported GNU version" in text or "unsupported clang version" in text:
        return "nvcc does not know this C++ compiler: name an older one in JITGEN_CXX, or update the toolkit."
    return "Reinstall the compiler, or name another one in JITGEN_CXX or JITGEN_NVCC."


def load_remedy(text: str) -> str:
    if "failed to map segment" in text or "Operation not permitted" in text:
        return "The store's file system forbids programs (noexec): set JITGEN_CACHE_DIR to one that allows them."
    return ""


def run_remedy(target: CompileTarget) -> str:
    if target.kind == "cuda":
        return "This is an error of the CUDA runtime. 35 and 222: the driver is older than the toolkit; update it."
    return "Threads do not work as OpenMP expects: check limits on processes (ulimit -u) in this container."
