"""Finding what compiles: the C++ compiler, ninja, the CUDA toolkit; and what to install if one is missing."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from functools import lru_cache, partial
from pathlib import Path

from jitgen import env
from jitgen.errors import ToolchainMissing
from jitgen.memo import remembered
from jitgen.records import record

# C++17 with the AVX-512 flags that target.py passes: GCC 10 is the first to know all of them
MIN_GCC = 10
MIN_CLANG = 12

CXX_REMEDY = (
    "Install one: 'apt install g++', 'dnf install gcc-c++' or 'conda install -c conda-forge gxx', or name one in JITGEN_CXX"
)
OPENMP_REMEDY = (
    "Install it: 'apt install libomp-dev' or 'dnf install libomp-devel'; or use g++, which brings its own, through JITGEN_CXX"
)
TOOLKIT_REMEDY = (
    "Install a CUDA toolkit: 'pip install jitgen[nvcc]', your system's cuda-toolkit package, or "
    "'conda install -c nvidia cuda-nvcc cuda-cudart-dev'; or set CUDA_HOME to the one you have"
)


class CompilerFailed(Exception):
    """A compiler ran and refused its input; the text is its complete output."""


@record
class Cxx:
    """A C++ compiler: the path to start it by, and the version line it prints about itself."""

    path: Path
    version: str

    @property
    def is_clang(self) -> bool:
        return self.version.startswith("clang")

    @property
    def major(self) -> int:
        numbers = re.findall(r"(\d+)\.\d+", re.sub(r"\(.*?\)", "", self.version))
        return int(numbers[0]) if numbers else 0


@record
class Toolkit:
    """A CUDA toolkit that holds all that a build needs."""

    root: Path
    nvcc: Path
    version: str  # like 13.0.88


def find_cxx() -> Cxx | None:
    """The C++ compiler: JITGEN_CXX, else g++, c++ or clang++ on PATH; None when there is none."""
    found = _find_cxx(env.cxx(), os.environ.get("PATH", ""))
    if found is None:
        _find_cxx.cache_clear()  # it may be installed while this process runs, as in a notebook
    return found


def require_cxx() -> Cxx:
    """Like find_cxx, but a missing or too old compiler is a ToolchainMissing."""
    found = find_cxx()
    if found is None:
        named = env.cxx()
        what = f"JITGEN_CXX={named} is not a program on this machine" if named else "no C++ compiler on PATH"
        raise ToolchainMissing(what, CXX_REMEDY + ".")
    if re.fullmatch(r"(.*-)?(gcc|cc|clang)(-[\d.]+)?", found.path.name):
        raise ToolchainMissing(f"{found.path} is a C compiler, which leaves the C++ library out", "Name g++ or clang++.")
    least = MIN_CLANG if found.is_clang else MIN_GCC
    if found.major < least:
        is_known = found.is_clang or not found.version or found.version.startswith("g++")
        lack = f"at least version {least} is needed" if is_known else "neither g++ nor clang++"
        raise ToolchainMissing(f"{found.path} is {found.version or 'of unknown version'}, {lack}", CXX_REMEDY + ".")
    return found


@lru_cache(maxsize=8)
def _find_cxx(named: str | None, search_path: str) -> Cxx | None:
    for name in (named,) if named else ("g++", "c++", "clang++"):
        found = shutil.which(name, path=search_path)
        if found is not None:
            program = Path(os.path.realpath(found))
            return Cxx(Path(found), remembered("c++ version", program, partial(_ask_cxx, found)))
    return None


def _ask_cxx(program: str) -> str:
    """Version line with the program's own name, which depends on how it was called, taken off."""
    line = run_text([program, "--version"]).partition("\n")[0].strip()
    if not re.search(r"\d", line):
        return ""
    if "clang" in line:
        return "clang " + line.partition("version ")[2]
    # GCC's has three numbers behind the packager; another program's is left as it is
    return "g++ " + line.partition(" ")[2] if re.match(r"\S+ \(.*\) \d+\.\d+\.\d+", line) else line


def find_ninja() -> Path | None:
    """The ninja program: on PATH, else the one in the ninja package from PyPI."""
    found = shutil.which("ninja")
    if found is not None:
        return Path(found)
    if importlib.util.find_spec("ninja") is None:
        return None
    import ninja

    # the second: the package is another environment's, which this one sees (venv --system-site-packages)
    places = (Path(ninja.BIN_DIR), *(parent / "bin" for parent in Path(ninja.__file__).parents[3:5]))
    return next((place / "ninja" for place in places if (place / "ninja").is_file()), None)


def require_ninja() -> Path:
    """Like find_ninja, but absence is a ToolchainMissing."""
    found = find_ninja()
    if found is None:
        raise ToolchainMissing("ninja is neither on PATH nor installed in Python", "Install it: 'pip install ninja'.")
    return found


def find_toolkit() -> Toolkit | None:
    """The first complete CUDA toolkit or None; tried: JITGEN_NVCC, CUDA_HOME, nvcc on PATH, PyPI, /usr/local/cuda."""
    return _toolkit_and_lacks()[0]


def require_toolkit() -> Toolkit:
    """Like find_toolkit, but absence is a ToolchainMissing that says what each incomplete toolkit lacks."""
    found, lacking = _toolkit_and_lacks()
    if found is None:
        raise ToolchainMissing("; ".join(lacking) or "no CUDA toolkit found", TOOLKIT_REMEDY + ".")
    return found


def _toolkit_and_lacks() -> tuple[Toolkit | None, tuple[str, ...]]:
    found = _search_toolkit(env.nvcc(), env.cuda_home(), os.environ.get("PATH", ""))
    if found[0] is None:
        _search_toolkit.cache_clear()  # as for the C++ compiler
    return found


@lru_cache(maxsize=8)
def _search_toolkit(nvcc_named: str | None, home: Path | None, search_path: str) -> tuple[Toolkit | None, tuple[str, ...]]:
    """First complete toolkit, and what the incomplete ones before it lack; one that the user names is the only try."""
    if nvcc_named is not None and shutil.which(nvcc_named, path=search_path) is None:
        return None, (f"JITGEN_NVCC={nvcc_named} is not a program on this machine",)
    lacking = []
    for root in _roots(nvcc_named, home, search_path):
        found = _inspect(root)
        if isinstance(found, Toolkit):
            return found, tuple(lacking)
        lacking.append(found)
    return None, tuple(lacking)


def _roots(nvcc_named: str | None, home: Path | None, search_path: str) -> list[Path]:
    if nvcc_named is not None:
        return [_root_of(Path(shutil.which(nvcc_named, path=search_path)))]
    if home is not None:
        return [home]
    roots = []
    program = shutil.which("nvcc", path=search_path)
    if program is not None:
        roots.append(_root_of(Path(program)))
    # a torch built for CUDA has libraries there too: only a root with a compiler is a toolkit
    roots += [root for root in pypi_roots() if (root / "bin" / "nvcc").is_file()]
    roots += [root for root in (Path("/usr/local/cuda"),) if root.is_dir()]
    return list(dict.fromkeys(roots))


def _root_of(nvcc: Path) -> Path:
    """Toolkit root of an nvcc that may be a link, or a script that calls another nvcc."""
    real = Path(os.path.realpath(nvcc))
    if (real.parent.parent / "nvvm").is_dir():
        return real.parent.parent
    return Path(remembered("nvcc root", real, partial(_ask_root, nvcc)))


def _ask_root(nvcc: Path) -> str:
    """Ask nvcc itself: it prints where it thinks it is as TOP."""
    answer = run_text([str(nvcc), "--dryrun", "-E", "-x", "cu", os.devnull])
    found = re.search(r"^#\$ TOP=(.+)$", answer, re.MULTILINE)
    return os.path.realpath(found.group(1).strip()) if found else str(nvcc.parent.parent)


def pypi_roots() -> list[Path]:
    """Where NVIDIA's packages from PyPI unpack, nvcc or others: nvidia/cu13 and the like, newest first."""
    spec = importlib.util.find_spec("nvidia")
    places = list(spec.submodule_search_locations or ()) if spec else []
    return sorted((root for place in places for root in Path(place).glob("cu[0-9]*")), reverse=True)


def _inspect(root: Path) -> Toolkit | str:
    """The toolkit at a root, or what it lacks."""
    nvcc = root / "bin" / "nvcc"
    if not nvcc.is_file():
        return f"{root} has no bin/nvcc"
    bases = (root, root / "targets" / f"{os.uname().machine}-linux")
    # Debian's own package keeps headers and libraries in /usr
    if root == Path("/usr/lib/nvidia-cuda-toolkit"):
        bases = (*bases, Path("/usr"))
    if not any((base / "include" / "cuda_runtime.h").is_file() for base in bases):
        return f"{root} has nvcc but no cuda_runtime.h (the runtime's development files)"
    return Toolkit(root, nvcc, remembered("nvcc version", nvcc, partial(_ask_nvcc, nvcc)))


def _ask_nvcc(nvcc: Path) -> str:
    answer = run_text([str(nvcc), "--version"])
    found = re.search(r"V(\d+\.\d+\.\d+)", answer)
    return found.group(1) if found else ""


# Variables that change what compilers or torch's loader do, and are not part of any key.
LEAKING = (
    *("TORCH_CUDA_ARCH_LIST", "PYTORCH_NVCC", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN", "CUDA_INC_PATH"),
    *("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "GCC_COMPARE_DEBUG", "CUDNN_HOME", "CUDNN_PATH"),
)


def clean_environment() -> dict[str, str]:
    """This process's environment without what would silently change a build; messages untranslated.

    Another thread's build may be changing it: see jitgen.loader.
    """
    found = {name: os.environ.get(name) for name in set(os.environ).difference(LEAKING)}
    return {**{name: value for name, value in found.items() if value is not None}, "LC_ALL": "C"}


def run_text(command: list[str]) -> str:
    """Output of a short query to a program, both streams; empty if it cannot be run."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=clean_environment(),
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")


def driver_version() -> tuple[int, int] | None:
    """Newest CUDA version that the driver runs; None without a driver. Needs no GPU and makes no context."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        number = ctypes.c_int(0)
        if driver.cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return number.value // 1000, number.value % 1000 // 10
