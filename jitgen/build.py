"""Building: a rendered source becomes a shared library."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jitgen import cache, env
from jitgen.cache import Request, generator_digest
from jitgen.cache.entry import read_key
from jitgen.errors import CompileError, UnsupportedDevice
from jitgen.paths import template_dir
from jitgen.progress import logger, progress_line
from jitgen.records import record
from jitgen.target import CompileTarget, lesser_targets
from jitgen.toolchain import CompilerFailed, driver_version

if TYPE_CHECKING:
    from jitgen.cache.source import Source
    from jitgen.portable import Call

# Lines of compiler output that say what is wrong, and how many of them an error message shows.
ERROR_MARKS = ("error:", "error :", "error ", "ptxas fatal", "nvcc fatal", "undefined reference", "cannot find", "/ld:")
SHOWN_LINES = 6
SHOWN_COLUMNS = 300

# What the host's part of a CUDA module and its device's have in front in place of CUDA's headers; both include the last.
HOST_RUNTIME, DEVICE_RUNTIME = "jitgen/driver_runtime.h", "jitgen/device_runtime.h"
RUNTIME_HEADERS = (HOST_RUNTIME, DEVICE_RUNTIME, "jitgen/cuda_api.h")


def get_module(
    spec_digest: str,
    family: str,
    label: str,
    make_source: Callable[[], Source],
    target: CompileTarget,
    *,
    call: Call | None = None,
) -> Path:
    """Path of a kernel's shared library: stored, or rendered and compiled now.

    `spec_digest` stands for all that make_source depends on besides the generator's own files. `call` is the caller's own
    function and its arguments, by which the kernel is recorded and prebuilt: see jitgen.portable.
    Errors:  CompileError, ToolchainMissing, KernelNotPrebuilt, CacheError.
    Cost:    stored: a few milliseconds, no process started, nothing rendered; otherwise seconds.
    """
    request = Request(
        family,
        label,
        spec_digest + generator_digest(),
        vars(target),
        partial(_render, make_source, target.kind),
        None if call is None else partial(_manifest_text, call, label, target.arch),
        lambda: map(vars, lesser_targets(target)),
    )
    path = cache.get_module(request, partial(_build_entry, target=target, label=label), waiting=progress_line)
    if target.kind == "cuda":
        _check_driver(path)
    if env.record() is not None:
        _record(request)
    return path


def _render(make_source: Callable[[], Source], kind: str) -> Source:
    """The source. Nothing is collected meanwhile: to look through all objects of torch's takes longer than to render."""
    is_collecting = gc.isenabled()
    gc.disable()
    try:
        source = make_source()
    finally:
        if is_collecting:
            gc.enable()
    return source if kind == "cpu" else WithRuntime(source)


def _manifest_text(call: Call, label: str, arch: str) -> str:
    from jitgen.recording import manifest_text

    return manifest_text(call, label, arch)


def _record(request: Request) -> None:
    from jitgen.recording import record

    path = env.record()
    if path is None or request.as_manifest is None:
        logger().warning("%s kernel %r cannot be recorded: its module passes no call", request.family, request.label)
    else:
        record(path, request.as_manifest())


def _check_driver(module: Path) -> None:
    """A CUDA module needs a driver of its toolkit's major version; without this it would fail as an invalid image.

    Errors:  UnsupportedDevice.
    """
    import torch

    if torch.version.cuda is None or not torch.cuda.is_initialized():
        return
    toolkit = read_key(module.parent)["target"]["toolkit"]
    driver, _ = driver_version() or (0, 0)
    if toolkit and driver and driver < int(toolkit.split(".")[0]):
        raise UnsupportedDevice(
            f"{module} was compiled by CUDA {toolkit}, and this machine's driver is for CUDA {driver}. Update the driver, "
            f"or build with a toolkit of CUDA {driver} (JITGEN_NVCC names its nvcc)."
        )


@record
class WithRuntime:
    """A CUDA source and, among its headers, those that stand in front of its parts."""

    source: Source

    @property
    def text(self) -> str:
        return self.source.text

    @property
    def mapped_text(self) -> str:
        return self.source.mapped_text

    @property
    def includes(self) -> Mapping[str, str]:
        return {**self.source.includes, **runtime_headers()}


def runtime_headers() -> dict[str, str]:
    """What the parts of a CUDA module have in place of CUDA's headers."""
    folder = template_dir() / "include"
    return {path: (folder / path).read_text("utf-8") for path in RUNTIME_HEADERS}


def _build_entry(source: Source, name: str, directory: Path, *, target: CompileTarget, label: str) -> None:
    text = source.mapped_text if env.line_map() else source.text
    build(text, name=name, target=target, includes=source.includes, label=label, directory=directory)


def build(source: str, *, name: str, target: CompileTarget, includes: Mapping[str, str], label: str, directory: Path) -> Path:
    """Compile a source in a directory of its own and return the path of the shared library in it.

    Leaves in the directory: the source, the headers below include/, build.log, module.so. `name` must not have been
    built before in this process with another source; `label` is what progress and errors call the kernel.
    Errors:  CompileError, with the compiler's complete output in build.log; ToolchainMissing.
    """
    from jitgen.loader import compile_module  # on a miss only: a hit must stay cheap

    kernel, scratch = directory / f"kernel{target.suffix}", directory / "scratch"
    if target.kind == "cuda":
        includes = {**runtime_headers(), **includes}
    for path, text in {kernel.name: source, **{f"include/{p}": t for p, t in includes.items()}}.items():
        file = directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")
    scratch.mkdir()
    with progress_line(f"compiling {label} for {target.isa if target.kind == 'cpu' else target.arch}"):
        try:
            built, output = compile_module(kernel, includes, target, name.replace("-", "_"), scratch)
        except CompilerFailed as failure:
            raise _compile_error(label, kernel, str(failure)) from None
    (directory / "build.log").write_text(output, "utf-8")
    module = directory / "module.so"
    os.rename(built, module)
    shutil.rmtree(scratch)
    return module


def _compile_error(label: str, kernel: Path, output: str) -> CompileError:
    log = kernel.parent / "build.log"
    log.write_text(output, "utf-8", "replace")
    return CompileError(label, log=log, source=kernel, lines=first_errors(output))


def first_errors(output: str) -> tuple[str, ...]:
    """The lines of a compiler's output that say what is wrong, the first few; its last lines if none does."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if any(mark in line for mark in ERROR_MARKS)]
    return tuple(line[:SHOWN_COLUMNS] for line in (telling[:SHOWN_LINES] or lines[-SHOWN_LINES:]))
