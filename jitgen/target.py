"""CompileTarget: the machine a kernel is compiled for, complete enough to be part of a key, free of paths."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from functools import lru_cache

from jitgen import env, toolchain
from jitgen.errors import EnvError, UnsupportedDevice
from jitgen.records import record

CUDA_FLAGS = ("-O3", "-std=c++17")
# -O2: what -O3 adds takes as long again, and the loops that would gain from it say so themselves. NaN and infinity must keep
# their meaning, as masked logits are -inf: so no -ffast-math, only what lets loops vectorise.
CPU_FLAGS = (
    "-O2", "-ftree-vectorize", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
)  # fmt: skip
# --as-needed: the loader names libtorch and others, a generated module needs none of them. -s: no symbol table.
LINK_FLAGS = ("-Wl,--as-needed", "-Wl,-s")
# A CUDA module links to no CUDA library. -z defs: a function that nobody has is found out when linking.
CUDA_LINK_FLAGS = (*LINK_FLAGS, "-Wl,-z,defs")
LEAST_MAJOR = 8  # of the compute capabilities that kernels run on

# cpuinfo names of each level, in the order they are tried
_AVX512 = ("avx2", "fma", "f16c", "bmi2", "avx512f", "avx512bw", "avx512dq", "avx512vl")
_AMX = ("amx_tile", "amx_bf16")
CPU_LEVELS = {
    "amx": (*_AVX512, "avx512_bf16", *_AMX),
    "avx512": _AVX512,
    "avx2": ("avx2", "fma", "f16c", "bmi2"),
    "portable": (),
}
# cpuinfo name -> what a kernel gains from it on top of its level
CPU_EXTRAS = {"amx": (), "avx512": ("avx512_bf16",), "avx2": (), "portable": ()}


@record
class CompileTarget:
    """What a kernel is compiled for and by.

    kind is 'cpu' or 'cuda'. arch is an instruction set such as 'x86_64+avx2+fma' or a CUDA architecture such as
    '9.0a'. compiler names the compilers and their versions, and is empty when there is none on this machine.
    """

    kind: str
    arch: str
    flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    host: str
    compiler: str = ""
    toolkit: str = ""

    @property
    def suffix(self) -> str:
        """File suffix of a source for this target."""
        return ".cu" if self.kind == "cuda" else ".cpp"

    @property
    def isa(self) -> str:
        """Level of a CPU target: amx, avx512, avx2 or portable."""
        return next(level for level, names in CPU_LEVELS.items() if set(names) <= set(self.arch.split("+")[1:]))

    @property
    def sm(self) -> str:
        """CUDA architecture as nvcc writes it: '90a' for '9.0a'."""
        return self.arch.replace(".", "")

    @property
    def compute_capability(self) -> tuple[int, int]:
        """Major and minor of a CUDA architecture, without its suffix."""
        major, minor = re.fullmatch(r"(\d+)\.(\d)[af]?", self.arch).groups()
        return int(major), int(minor)


def detect_cpu() -> CompileTarget:
    """The target of this machine's CPU; JITGEN_CPU_ISA may ask for less than it has.

    Errors:  EnvError when JITGEN_CPU_ISA asks for instructions that the CPU lacks, or the system withholds.
    """
    wanted = env.cpu_isa()
    has = cpu_features()
    if has.issuperset(_AMX) and wanted in ("auto", "amx") and not may_use_tiles():
        has = has.difference(_AMX)
    if wanted == "auto":
        wanted = next(level for level, names in CPU_LEVELS.items() if has.issuperset(names))
    missing = [name for name in CPU_LEVELS[wanted] if name not in has]
    if missing:
        withheld = " that this process may use" if cpu_features().issuperset(missing) else ""
        raise EnvError(f"JITGEN_CPU_ISA={wanted}, but this CPU has no {', '.join(missing)}{withheld}. Use auto.")
    return cpu_target(wanted, tuple(name for name in CPU_EXTRAS[wanted] if name in has))


def cpu_target(isa: str, extras: tuple[str, ...] = ()) -> CompileTarget:
    """The target of a CPU with a given instruction set, which need not be this machine's."""
    names = CPU_LEVELS[isa] + extras
    flags = [f"-m{name.replace('_', '')}" for name in names if name not in _AMX]  # those are written in assembly
    if isa in ("amx", "avx512"):
        flags.append("-mprefer-vector-width=512")
    cxx = toolchain.find_cxx() if _may_compile() else None
    return CompileTarget(
        kind="cpu",
        arch="+".join((os.uname().machine, *names)),
        flags=(*CPU_FLAGS, *flags),
        link_flags=LINK_FLAGS,
        host=_host(),
        compiler=cxx.version if cxx else "",
    )


@lru_cache(maxsize=1)
def cpu_features() -> frozenset[str]:
    """Names of the instruction sets of this CPU, as the kernel lists them.

    Cost:    one read of a few kB; the rest of the file repeats it for each core, and producing that takes time.
    """
    try:
        with open("/proc/cpuinfo", "rb", buffering=0) as stream:
            text = stream.read(16384).decode(errors="replace")
    except OSError:
        return frozenset()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


@lru_cache(maxsize=1)
def may_use_tiles() -> bool:
    """Whether the system lets this process use the tile registers of AMX: Linux wants to be asked, from 5.16 on."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    if os.uname().machine != "x86_64":
        return False
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def detect_cuda(device: object = None, *, accelerated: bool = False) -> CompileTarget:
    """The target of a CUDA device; JITGEN_CUDA_ARCH overrides the device's architecture.

    `accelerated` asks for the architecture-specific instructions (9.0 becomes 9.0a).
    Errors:  UnsupportedDevice without a usable device or below 8.0.
    """
    arch = env.cuda_arch() or _device_arch(device)
    if accelerated and arch[-1].isdigit() and int(arch.split(".")[0]) >= 9:
        arch += "a"
    return cuda_target(arch)


def _device_arch(device: object) -> str:
    import torch

    if not torch.cuda.is_available():
        raise UnsupportedDevice(
            "no CUDA device is usable here, so there is no architecture to compile for. "
            "Set JITGEN_CUDA_ARCH (for example 9.0) to compile without a device, or see 'jitgen doctor'."
        )
    major, minor = torch.cuda.get_device_capability(device)
    if major < LEAST_MAJOR:
        name = torch.cuda.get_device_name(device)
        raise UnsupportedDevice(f"{name} has compute capability {major}.{minor}, kernels need at least {LEAST_MAJOR}.0.")
    return f"{major}.{minor}"


def cuda_target(arch: str) -> CompileTarget:
    """The target of a CUDA architecture such as '8.0' or '9.0a'; needs no device.

    Errors:  UnsupportedDevice below 8.0.
    """
    if int(arch.split(".")[0]) < LEAST_MAJOR:
        raise UnsupportedDevice(f"there are no kernels for compute capability {arch}: they need at least {LEAST_MAJOR}.0.")
    sm = arch.replace(".", "")
    cxx, toolkit = (toolchain.find_cxx(), toolchain.find_toolkit()) if _may_compile() else (None, None)
    known = toolkit is not None and cxx is not None
    return CompileTarget(
        kind="cuda",
        arch=arch,
        flags=(*CUDA_FLAGS, f"-gencode=arch=compute_{sm},code=sm_{sm}", "-Xptxas=-v"),
        link_flags=CUDA_LINK_FLAGS,
        host=_host(),
        compiler=f"nvcc {toolkit.version}; {cxx.version}" if known else "",
        toolkit=".".join(toolkit.version.split(".")[:2]) if toolkit else "",
    )


def _may_compile() -> bool:
    """False in a frozen process: it looks for no compiler, and takes the kernels of any."""
    try:
        return not env.is_frozen()
    except EnvError:
        return True  # an error where the mode is asked for


def _host() -> str:
    return f"{sys.platform}-{os.uname().machine}"


# ---- by name, and what runs on what ---------------------------------------------------------------------------------------


def target_of(arch: str) -> CompileTarget:
    """The target that an architecture names; it need not be this machine's.

    Takes a CUDA architecture such as '9.0a', an instruction set as in CompileTarget.arch ('x86_64+avx2+fma'), one of its
    levels ('amx', 'avx512', 'avx2', 'portable'), or 'cpu' for this machine.
    Errors:  EnvError for anything else, and for another machine's kind of CPU.
    """
    if re.fullmatch(r"[1-9][0-9]?\.[0-9][af]?", arch):
        return cuda_target(arch)
    if arch == "cpu":
        return detect_cpu()
    if arch in CPU_LEVELS:
        return cpu_target(arch)
    machine, *names = arch.split("+")
    for level, needed in CPU_LEVELS.items():
        extras = tuple(names[len(needed) :])
        if tuple(names[: len(needed)]) == needed and set(extras) <= set(CPU_EXTRAS[level]) and machine == os.uname().machine:
            return cpu_target(level, extras)
    raise EnvError(f"{arch!r} is no architecture for {os.uname().machine}. Use one like 9.0a, {', '.join(CPU_LEVELS)} or cpu.")


# CUDA architectures by major version: what is compiled for one runs on the later ones of its line, unless it has a suffix
CUDA_LINES = {"8": ("8.0", "8.6", "8.7", "8.9"), "9": ("9.0",), "10": ("10.0", "10.3"), "12": ("12.0", "12.1")}


def lesser_targets(target: CompileTarget) -> list[CompileTarget]:
    """Other targets whose kernels run on this one, best first."""
    if target.kind == "cpu":
        has = set(target.arch.split("+"))
        levels = list(CPU_LEVELS)[list(CPU_LEVELS).index(target.isa) :]
        choices = {(level, extras): None for level in levels for extras in (CPU_EXTRAS[level], ()) if has.issuperset(extras)}
        found = [cpu_target(level, extras) for level, extras in choices]
        return [other for other in found if other.arch != target.arch]
    line = CUDA_LINES.get(target.arch.partition(".")[0], ())
    return [cuda_target(arch) for arch in reversed(line[: line.index(target.arch)])] if target.arch in line else []
