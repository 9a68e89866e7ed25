"""The host's part of a CUDA source: no device code, everything else on its line, and a C++ compiler takes it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from golden_cases import CASES, case_source

from jitgen import toolchain
from jitgen.build import WithRuntime
from jitgen.host_part import host_headers, host_part
from jitgen.loader import HOST_FLAGS
from jitgen.render import Source, reached_headers

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize(
    "device",
    [
        "JITGEN_FN float f(float x) { return x > 0 ? x : -x; }",
        "template <class T> JITGEN_FN void f(const T (&x)[2]) {\n  for (;;) { asm(\"exit; } {\"); }   // }\n}",
        "JITGEN_MEMBER Bounds(long long x) : lo{x}, hi(x) { check(); }",
        "static __device__ __noinline__ int f(int);",
        "__device__ int counters[8][2] = {};",
        "extern __shared__ char memory[];",
        "JITGEN_FN\n#pragma unroll\nint f() { return 0; }",
    ],
)  # fmt: skip
def test_device_code_leaves_nothing_but_its_lines(device: str) -> None:
    before, after = "struct Args { int x; };\n", "\nconstexpr int kTile = 64;\n"
    part = host_part(before + device + after)
    assert part.startswith(before) and part.endswith(after)
    assert not part.removeprefix(before).removesuffix(after).strip()
    assert part.count("\n") == (before + device + after).count("\n")


@pytest.mark.parametrize(
    "text",
    [
        "static constexpr __host__ __device__ int twice(int x) { return 2 * x; }\n",
        "// JITGEN_FN void f() { k<<<1, 2>>>(); }\nstruct Tile { static constexpr int kRows = 4; };\n",
        '#define JITGEN_PLAN_FN __host__ __device__\nJITGEN_PLAN_FN int f() { return 0; }\nconst char* s = "__global__";\n',
        "std::array<std::array<std::array<int, 1>, 1>> x = 1 << 3;\n",
    ],
)
def test_what_the_host_needs_stays_as_it_is(text: str) -> None:
    assert host_part(text) == text


def test_kernel_becomes_what_its_launch_needs() -> None:
    text = (
        "__global__ void __launch_bounds__(kThreads, 1)\n"
        "attend(const __grid_constant__ Args args, int rows) {\n  if (rows) __syncthreads();\n}\n"
        "void launch() { attend<<<dim3(2, 3), f(1, 2) >> 1, 0, stream>>>({4}, 5); }\n"
    )
    assert host_part(text).split("\n") == [
        "static void attend(const Args args, int rows) {} JITGEN_KERNEL(attend)",
        "",
        "",
        "",
        "void launch() { jg_runtime::configure(attend, dim3(2, 3), f(1, 2) >> 1, 0, stream)({4}, 5); }",
        "",
    ]


def test_macros_of_device_code_are_device_code() -> None:
    text = (
        "#define TAKE_FN static __device__\nTAKE_FN int f() { return threadIdx.x; }\n"
        "#define RELATION(op) \\\n  JITGEN_FN bool operator op(Column x) { return x.i op 0; }\nRELATION(<)\n"
    )
    assert host_part(text) == "#define TAKE_FN static __device__\n\n#define RELATION(op)\\\n\nRELATION(<)\n"


def test_directives_inside_device_code_keep_the_lines_of_the_host_right() -> None:
    text = 'JITGEN_FN int f() {\n#line 40 "a.jinja"\n  return 0;\n}\nint here;\n'
    assert host_part(text) == '\n#line 40 "a.jinja"\n\n\nint here;\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("template <int n> __global__ void k(int x) {}\n", "a kernel that is a template"),
        ("JITGEN_FN int f() { if (x) {\n", "a bracket without its end"),
        ("JITGEN_FN int f()", "a device declaration without its end"),
    ],
)
def test_what_cannot_be_parted_is_named(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        host_part(text)


def golden_sources() -> dict[str, Source]:
    """Every CUDA source under review, with the headers it reaches."""
    named = {name: case_source(name) for name in CASES if case_source(name).suffix == ".cu"}
    for path in (*GOLDEN.glob("sampling/*.cu"), *GOLDEN.glob("cache_ops/*.cu")):
        text = path.read_text()
        named[path.stem] = Source(text, text, reached_headers(text), ".cu")
    return named


@pytest.mark.skipif(toolchain.find_cxx() is None, reason="no C++ compiler on this machine")
def test_compiler_takes_the_host_part_of_every_reviewed_source(tmp_path: Path) -> None:
    """Without CUDA's headers: what a launcher needs is in driver_runtime.h."""
    refused = []
    for name, source in golden_sources().items():
        texts = host_headers(WithRuntime(source).includes) | {f"{name}.cpp": host_part(source.text)}
        for path, text in texts.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        command = [str(toolchain.require_cxx().path), *HOST_FLAGS, "-fsyntax-only", "-I.", f"{name}.cpp"]
        done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            refused.append(f"{name}: {done.stdout[:500]}")
    assert not refused, "\n".join(refused)
