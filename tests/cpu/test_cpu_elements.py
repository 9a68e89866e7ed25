"""Elements of the CPU kernels to float and back, vector by vector and four by four, as torch converts them."""

import ctypes
import subprocess

import pytest
import torch

from jitgen import toolchain
from jitgen.paths import template_dir
from jitgen.target import CPU_LEVELS, cpu_features, cpu_target

pytestmark = pytest.mark.skipif(toolchain.find_cxx() is None, reason="no C++ compiler on this machine")
# every combination of instructions that has code of its own
MACHINES = {
    "portable": cpu_target("portable").flags,
    "avx": (*cpu_target("portable").flags, "-mavx"),
    "avx2": cpu_target("avx2").flags,
    "avx512": cpu_target("avx512").flags,
    "avx512_bf16": cpu_target("avx512", ("avx512_bf16",)).flags,
}
NEEDED = {"avx": ("avx",), "avx512_bf16": (*CPU_LEVELS["avx512"], "avx512_bf16")}
LOADED = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
}
SOURCE = """\
#include "jitgen/cpu_gemm.h"
using namespace jg;
#define LOAD(T) \\
  extern "C" void load_##T(const T* p, float* vectors, float* fours, int n) { \\
    for (int i = 0; i < n; i += kVec) store_vec(vectors + i, load_vec(p + i)); \\
    for (int i = 0; i < n; i += 4) *reinterpret_cast<Vec4Unaligned*>(fours + i) = load_vec4(p + i); \\
  }
#define STORE(T) \\
  extern "C" void store_##T(const float* p, T* out, int n) { \\
    for (int i = 0; i < n; i += kVec) store_vec(out + i, load_vec(p + i)); \\
  }
LOAD(float16) LOAD(bfloat16) LOAD(float8_e4m3fn) LOAD(float8_e5m2) LOAD(int8)
STORE(float16) STORE(bfloat16)
extern "C" float sum(const float* p) { return sum_lanes(load_vec(p)); }
extern "C" int width() { return kVec; }
"""


@pytest.fixture(scope="module", params=MACHINES)
def library(request, tmp_path_factory):
    needed = NEEDED.get(request.param) or CPU_LEVELS[request.param]
    if not cpu_features().issuperset(needed):
        pytest.skip(f"this CPU has no {', '.join(needed)}")
    directory = tmp_path_factory.mktemp(request.param)
    (directory / "elements.cpp").write_text(SOURCE)
    include = f"-I{template_dir() / 'include'}"
    command = [str(toolchain.require_cxx().path), *MACHINES[request.param], "-Wall", include, "-shared"]
    done = subprocess.run([*command, "elements.cpp", "-o", "elements.so"], cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = ctypes.CDLL(str(directory / "elements.so"))
    found.sum.restype, found.sum.argtypes = ctypes.c_float, [ctypes.c_void_p]
    return found


def pointer(t):
    return ctypes.c_void_p(t.data_ptr())


def assert_same(got, expected):
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got[~nan], expected[~nan])


@pytest.mark.parametrize("name", LOADED)
def test_every_code_is_read_as_torch_reads_it(library, name):
    dtype = LOADED[name]
    codes = torch.arange(256, dtype=torch.uint8) if dtype.itemsize == 1 else torch.arange(-32768, 32768, dtype=torch.int16)
    elements = codes.view(dtype)
    expected = elements.float()
    vectors, fours = (torch.full(expected.shape, float("nan")) for _ in range(2))
    getattr(library, f"load_{name}")(pointer(elements), pointer(vectors), pointer(fours), len(codes))
    if name.startswith("float8"):  # codes of NaN and infinity are not told apart from numbers
        kept = expected.isfinite()
        vectors, fours, expected = vectors[kept], fours[kept], expected[kept]
    assert_same(vectors, expected)
    assert_same(fours, expected)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_floats_of_every_exponent_are_rounded_as_torch_rounds_them(library, name):
    generator = torch.Generator().manual_seed(7)
    bits = torch.randint(-(2**31), 2**31, (1 << 18,), generator=generator, dtype=torch.int64).int()
    ties = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16  # bfloat16 itself, then halfway to the next
    halves = torch.arange(-32768, 32768, dtype=torch.int16).view(torch.float16).float().view(torch.int32)
    values = torch.cat([bits, ties, ties | 0x8000, halves, halves | 0x1000]).view(torch.float32)
    if name == "bfloat16":  # the instruction takes denormal floats for 0
        values = values[(values.abs() >= 2.0**-126) | (values == 0) | values.isnan()]
    values = values[: len(values) // 16 * 16]
    got = torch.full(values.shape, float("nan"), dtype=LOADED[name])
    getattr(library, f"store_{name}")(pointer(values), pointer(got), len(values))
    assert_same(got, values.to(LOADED[name]))


def test_lanes_are_summed(library):
    values = torch.randn(library.width())
    assert library.sum(pointer(values)) == pytest.approx(values.double().sum().item(), abs=1e-5)
