"""Device code compiled with our own header in front, device_runtime.h, is what CUDA's headers make of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from compiling import code_for, compile_source
from disassembly import disassemble

from jitgen import toolchain
from jitgen.loader import DEVICE_HEADER, quick_options
from jitgen.render import Source, reached_headers

GOLDEN = Path(__file__).parent.parent / "golden"
# One of each family: what it calls of the header becomes the same instructions.
SOURCES = {
    "every_hook__sm90__bfloat16.cu": "90a",
    "plain__sm90_fp8__float8_e4m3fn.cu": "90a",
    "alibi_sink__sm80__bfloat16.cu": "80",
    "merged_sigmoid__sm80_ragged__float16.cu": "80",
    "every_hook__decode__bfloat16.cu": "90a",
    "every_hook__merge__float16.cu": "80",
    "cache_ops/append_float8__cuda.cu": "90a",
    "sampling/every_filter_bfloat16__sm90.cu": "90a",
}

pytestmark = pytest.mark.skipif(
    toolchain.find_toolkit() is None or toolchain.find_cxx() is None,
    reason="no complete CUDA toolkit (see 'jitgen doctor')",
)


def code_of(name: str, directory: Path, *, is_quick: bool) -> str:
    """Machine code of a golden source."""
    text = (GOLDEN / name).read_text()
    source = Source(text, text, reached_headers(text), ".cu")
    binary, said = compile_source(source, directory, *code_for(SOURCES[name]), is_quick=is_quick)
    assert "warning" not in said, said
    return disassemble(binary)


def is_tuned_with() -> bool:
    """Whether kernels were tuned with this toolkit; others may have another __ldg, whose loads ptxas orders otherwise."""
    toolkit = toolchain.find_toolkit()
    return toolkit is not None and toolkit.version.startswith("13.0.")


@pytest.mark.skipif(not is_tuned_with(), reason="a toolkit with other headers than those of CUDA 13.0")
@pytest.mark.parametrize("name", SOURCES)
def test_code_is_what_cudas_headers_make_of_it(name, tmp_path):
    ours, theirs = (code_of(name, tmp_path / str(quick), is_quick=quick) for quick in (True, False))
    assert len(ours) > 1000
    assert ours == theirs


def test_a_source_of_ours_reads_no_header_of_cuda(tmp_path):
    code_of("every_hook__merge__float16.cu", tmp_path, is_quick=True)
    toolkit = toolchain.require_toolkit()
    options = [*quick_options(toolkit, tmp_path)[:1], f"-I{tmp_path / 'include'}"]
    command = [str(toolkit.nvcc), "-M", *options, str(tmp_path / "kernel.cu")]
    read = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert DEVICE_HEADER in read
    assert str(toolkit.root) not in read


def test_toolkits_of_other_major_versions_compile_as_ever(tmp_path):
    assert quick_options(toolchain.Toolkit(tmp_path, tmp_path / "nvcc", "12.9.86"), tmp_path) == []
