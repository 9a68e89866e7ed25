"""Generated CUDA sources, compiled as the loader does but to device code alone."""

from __future__ import annotations

import subprocess
from pathlib import Path

from jitgen import build, toolchain
from jitgen.loader import quick_options
from jitgen.target import CUDA_FLAGS


def code_for(*archs: str) -> list[str]:
    """The flags of a CompileTarget, for several architectures such as '90a' at once."""
    return [*CUDA_FLAGS, *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs), "-Xptxas=-v"]


def write_source(source, directory: Path) -> None:
    """kernel.cu, and the headers it includes, or that stand in front of it, below include/."""
    headers = {**build.runtime_headers(), **source.includes}
    for path, text in {"kernel.cu": source.text, **{f"include/{p}": t for p, t in headers.items()}}.items():
        file = directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def compile_source(source, directory: Path, *options: str, is_quick: bool = True) -> tuple[Path, str]:
    """The binary, a cubin unless ``options`` say -fatbin, and what the compiler says; a source that fails fails the test.

    Without ``is_quick`` as a user compiles the source: with CUDA's headers in front.
    """
    write_source(source, directory)
    kind = "fatbin" if "-fatbin" in options else "cubin"
    binary = directory / f"kernel.{kind}"
    toolkit = toolchain.require_toolkit()
    command = [str(toolkit.nvcc), "-ccbin", str(toolchain.require_cxx().path), *options]
    command += quick_options(toolkit, directory) if is_quick else []
    command += ["-cubin"] if kind == "cubin" else []
    command += [f"-I{directory / 'include'}", "-o", str(binary), str(directory / "kernel.cu")]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=toolchain.clean_environment()
    )
    assert done.returncode == 0, done.stdout
    return binary, done.stdout
