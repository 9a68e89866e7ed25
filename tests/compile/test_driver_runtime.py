"""CUDA modules run on the driver alone: small, bound to no CUDA library, and driving it as the runtime would.

There is no GPU: a library that prints how it is called stands in for the driver.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from compiling import compile_source
from disassembly import disassemble

import jitgen
from jitgen import build, runtime, toolchain
from jitgen.errors import CompileError
from jitgen.families import cuda_spec
from jitgen.render import render_kernel
from jitgen.target import cuda_target

HERE = Path(__file__).parent
MAX_BYTES = 300_000
SYSTEM_LIBRARIES = {"libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0"}

pytestmark = pytest.mark.skipif(
    toolchain.find_toolkit() is None or toolchain.find_cxx() is None,
    reason="no complete CUDA toolkit (see 'jitgen doctor')",
)

# Calls a module's launcher with a packed struct Args: argv holds the module, the struct in hex, and how often.
LAUNCH = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.jitgen_error_string.restype = ctypes.c_char_p
for _ in range(int(sys.argv[3])):
    code = library.jitgen_launch(bytes.fromhex(sys.argv[2]))
    ctypes.CDLL(None).fflush(None)
    print("code", code, library.jitgen_error_string(code).decode(), flush=True)
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the driver that prints."""
    folder = tmp_path_factory.mktemp("driver")
    cxx = str(toolchain.require_cxx().path)
    subprocess.run([cxx, "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(HERE / "fake_driver.cpp")], check=True)
    return folder


def spec_of(family: str):
    program = jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx).trace().program
    return cuda_spec(program, "bfloat16", (64, 64), family, cuda_target("9.0a" if family == "sm90" else "8.0"))


@pytest.fixture(scope="module")
def modules() -> dict[str, Path]:
    return {family: runtime.module_path(spec_of(family)) for family in ("sm80", "sm90")}


def launch(driver: Path, family: str, module: Path, *, times: int = 1, fail: str = "") -> list[str]:
    """What the driver was asked and what the launcher returned, for 2 heads of 300 rows."""
    import struct

    names = [field.name for field in runtime.fields_of(spec_of(family))]
    known = {"batch": 1, "num_q_heads": 2, "num_kv_heads": 2, "q_len": 300, "kv_len": 300, "scale": 1.0, "stream": 0x51}
    known |= {f"{t}_stride_{axis}": step for t in "qkvo" for axis, step in zip("bhsd", (38400, 19200, 64, 1), strict=True)}
    known |= dict.fromkeys("qkvo", 1 << 20)
    from jitgen.abi import pack_format

    fields = runtime.fields_of(spec_of(family))
    packed = struct.pack(pack_format(fields), *(known.get(name, 0) for name in names))
    command = [sys.executable, "-c", LAUNCH, str(module), packed.hex(), str(times)]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(driver), "FAIL": fail}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("family", ["sm80", "sm90"])
def test_module_is_small_and_needs_no_cuda_library(family: str, modules: dict[str, Path]) -> None:
    assert modules[family].stat().st_size <= MAX_BYTES
    listed = subprocess.run(["readelf", "-d", str(modules[family])], capture_output=True, text=True, check=True).stdout
    needed = {name for name in re.findall(r"NEEDED.*\[(.*)\]", listed) if not name.startswith("ld-linux")}
    assert needed <= SYSTEM_LIBRARIES


@pytest.mark.parametrize("family", ["sm80", "sm90"])
def test_module_shows_nothing_of_its_runtime_to_others(family: str, modules: dict[str, Path]) -> None:
    listed = subprocess.run(["nm", "-D", str(modules[family])], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r" [TVWBDu] (\S+)", listed)) == {"jitgen_launch", "jitgen_error_string"}
    assert "cuda" not in listed.lower()


@pytest.mark.parametrize("family", ["sm80", "sm90"])
def test_module_loads_with_an_old_c_library(family: str, modules: dict[str, Path]) -> None:
    """manylinux_2_28 is what torch asks for."""
    versions = re.findall(rb"GLIBC_(\d+)\.(\d+)", modules[family].read_bytes())
    assert max((int(major), int(minor)) for major, minor in versions) <= (2, 28)


def test_module_has_the_machine_code_that_nvcc_makes_of_the_whole_source(modules: dict[str, Path], tmp_path: Path) -> None:
    """And where CUDA's tools look for it."""
    binary, _ = compile_source(render_kernel(spec_of("sm80")), tmp_path, *spec_of("sm80").target.flags)
    found, wanted = (re.findall(r"/\*\w{4,}\*/.*", disassemble(file)) for file in (modules["sm80"], binary))
    assert wanted and found == wanted


def test_loading_a_module_touches_no_device(driver: Path, modules: dict[str, Path]) -> None:
    assert launch(driver, "sm80", modules["sm80"], times=0) == []


def test_first_launch_prepares_and_the_second_only_launches(driver: Path, modules: dict[str, Path]) -> None:
    lines = launch(driver, "sm80", modules["sm80"], times=2)
    kernel = lines.index(next(line for line in lines if line.startswith("cuLibraryGetKernel 1 ")))
    assert lines[:3] == ["cuInit", "cuDevicePrimaryCtxRetain 0", "cuCtxSetCurrent"]
    assert lines[3:5] == ["mode 2", "cuLibraryLoadData ba55ed50"] and lines[kernel + 1] == "mode 0"
    attribute, first, code, second, again = lines[kernel + 2 :]
    assert re.fullmatch(r"cuKernelSetAttribute 8 \d+ 1 0", attribute)
    # 3 tiles of 128 rows for each of 2 heads, 4 warps, the shared memory asked for, the stream, the batch size
    assert first == f"cuLaunchKernel 1 6,1,1 128,1,1 {attribute.split()[2]} 0x51 1"
    assert (second, code, again) == (first, "code 0 no error", "code 0 no error")


def test_hopper_module_encodes_its_tensor_maps_through_the_driver(driver: Path, modules: dict[str, Path]) -> None:
    lines = launch(driver, "sm90", modules["sm90"])
    assert "cuGetProcAddress cuTensorMapEncodeTiled 12000" in lines and lines.count("encode") == 4
    assert lines[-2].startswith("cuLaunchKernel 1 ") and lines[-1].startswith("code 0 ")


def test_error_of_the_driver_reaches_the_caller_and_is_not_kept(driver: Path, modules: dict[str, Path]) -> None:
    assert launch(driver, "sm80", modules["sm80"], fail="cuLaunchKernel")[-1] == "code 2 out of memory"
    lines = launch(driver, "sm80", modules["sm80"], times=2, fail="cuLibraryLoadData")
    assert [line for line in lines if line.startswith("code")] == ["code 2 out of memory"] * 2
    assert lines.count("cuLibraryLoadData ba55ed50") == 2


def test_missing_driver_is_named(tmp_path: Path, modules: dict[str, Path]) -> None:
    (tmp_path / "libcuda.so.1").write_text("no library")
    assert launch(tmp_path, "sm80", modules["sm80"])[-1].startswith("code 35 libcuda.so.1 is missing or older")


def test_function_of_cuda_that_the_small_runtime_lacks_is_named(tmp_path: Path) -> None:
    source = 'extern "C" int jitgen_launch(const void*) { void* p = nullptr; return cudaMallocHost(&p, 16); }\n'
    with pytest.raises(CompileError, match=r"cudaMallocHost.* (is undefined|was not declared)"):
        build.build(source, name="sm80_lacks", target=cuda_target("8.0"), includes={}, label="a test", directory=tmp_path)


def test_kernels_are_found_by_the_names_that_nvcc_gives_them(modules: dict[str, Path], driver: Path) -> None:
    """The host's part works them out from the types of their parameters."""
    for family, module in modules.items():
        asked = [line.split()[2] for line in launch(driver, family, module) if line.startswith("cuLibraryGetKernel")]
        compiled = re.findall(r"Compiling entry function '(\w+)'", (module.parent / "build.log").read_text())
        assert asked and set(asked) <= set(compiled)


@pytest.mark.parametrize("planted", ["JITGEN_FN int f() { return nonsense; }", "cudaError_t f() { return cudaDeviceReset(); }"])
def test_error_is_reported_at_the_line_of_the_template(planted: str, tmp_path: Path) -> None:
    """Of device code by nvcc, of the launcher's where it has no such function by the C++ compiler."""
    source = render_kernel(spec_of("sm80"))
    at = source.mapped_text.index("// ---- launcher ----")
    number = source.mapped_text[:at].rpartition("#line ")[2].split()[0]
    lines_after = source.mapped_text[:at].rpartition("#line ")[2].count("\n") - 1
    text = source.mapped_text[:at] + planted + source.mapped_text[at:]
    with pytest.raises(CompileError, match=rf"sm80\.cu\.jinja[:(]{int(number) + lines_after}\D"):
        build.build(
            text, name="sm80_planted", target=cuda_target("8.0"), includes=source.includes, label="a test", directory=tmp_path
        )


def test_undefined_function_of_another_kind_is_a_compile_error(tmp_path: Path) -> None:
    source = 'extern "C" int missing(); extern "C" int jitgen_launch(const void*) { return missing(); }\n'
    with pytest.raises(CompileError, match="undefined reference to `missing'"):
        build.build(source, name="sm80_bad", target=cuda_target("8.0"), includes={}, label="a test", directory=tmp_path)
