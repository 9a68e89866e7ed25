"""From a KernelSpec to something that can be called: module look-up, loading, argument packing, launching."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from jitgen.abi import ArgField, pack_format
from jitgen.errors import CacheError, LaunchError
from jitgen.program import Program
from jitgen.spec import KernelSpec

NO_CODE = 209  # CUDA_ERROR_NO_BINARY_FOR_GPU
CANNOT_COPY = 20004  # code of a launch that launched nothing: kErrorCannotCopy of sm90_host.cuh


class CompiledKernel:
    """A loaded module and the packer of its arguments.

    ``launch(bytes)`` starts the kernel and returns its error code. ctypes releases the interpreter lock meanwhile, so a CPU
    kernel does not stop other Python threads.
    """

    __slots__ = ("_library", "_loading", "_tail", "launch", "pack", "path", "spec")

    def __init__(self, path: Path, spec: KernelSpec, fields: tuple[ArgField, ...]) -> None:
        self.path, self.spec = path, spec
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            remedy = "Built on a newer system, it must be prebuilt on one as old as this; else remove it."
            raise CacheError(f"{path} does not load: {error}. {remedy}") from error
        self.launch = self._library.jitgen_launch
        self.launch.argtypes = [ctypes.c_char_p]
        self.launch.restype = ctypes.c_int
        self.pack = struct.Struct(pack_format(fields)).pack
        self._tail: struct.Struct | None = None
        self._loading: CompiledKernel | None = None

    def that_loads(self) -> CompiledKernel:
        """The kernel for captured tensors that the copy engine cannot take; compiled when it is first asked for."""
        if self._loading is None:
            from jitgen.families import loading_spec

            self._loading = get_kernel(loading_spec(self.spec))
        return self._loading

    def pack_tail(self, words: list[object]) -> bytes:
        """The last fields of the arguments, as many as there are words."""
        if not words:
            return b""
        if self._tail is None:
            self._tail = struct.Struct(pack_format(fields_of(self.spec)[-len(words) :]))
        return self._tail.pack(*words)

    def function(self, name: str, result: type = ctypes.c_int) -> Callable[[bytes], int]:
        """Another entry point of the module that takes packed arguments."""
        found = getattr(self._library, name)
        if found.argtypes is None:
            found.argtypes, found.restype = [ctypes.c_char_p], result
        return found

    def raise_error(self, code: int) -> None:
        """Turn a non-zero code of ``launch`` into an exception."""
        describe = self._library.jitgen_error_string
        describe.argtypes, describe.restype = [ctypes.c_int], ctypes.c_char_p
        text = (describe(code) or b"unknown error").decode(errors="replace")
        target = self.spec.target
        if code == NO_CODE and target.kind == "cuda":
            text += f"; it was compiled for {target.arch}. Unset JITGEN_CUDA_ARCH where GPUs of other architectures are used"
        raise LaunchError(f"{self.spec.label} failed with code {code}: {text} ({self.path}).")


_kernels: dict[tuple[str, object], CompiledKernel] = {}
_lock = threading.Lock()


def get_kernel(spec: KernelSpec) -> CompiledKernel:
    """The kernel of ``spec``: from memory, from a prebuilt layer or the user store, or compiled now.

    Errors:  CompileError, ToolchainMissing, KernelNotPrebuilt, CacheError.
    Cost:    memory: a dictionary look-up; store: a few milliseconds; compiling: seconds, once per spec and machine.
    """
    key = (spec.digest, spec.target)
    kernel = _kernels.get(key)
    if kernel is None:
        path = module_path(spec)
        with _lock:
            kernel = _kernels.get(key)
            if kernel is None:
                kernel = _kernels[key] = CompiledKernel(path, spec, fields_of(spec))
    return kernel


def get_kernels(specs: Sequence[KernelSpec]) -> tuple[CompiledKernel, ...]:
    """The kernels of several specs that are wanted together: what must be compiled is compiled at the same time.

    Errors:  as get_kernel, the first spec's first.
    """
    if sum((spec.digest, spec.target) not in _kernels for spec in specs) > 1:
        with ThreadPoolExecutor(len(specs), "jitgen") as pool:
            return tuple(pool.map(get_kernel, specs))
    return tuple(get_kernel(spec) for spec in specs)


def fields_of(spec: KernelSpec) -> tuple[ArgField, ...]:
    """The fields of ``struct Args`` in the kernel of ``spec``."""
    return spec.own_args + capture_fields(spec.program)


def respecify(spec: KernelSpec, program: Program) -> KernelSpec:
    """The spec of the same kernel for another program."""
    return replace(spec, program=program)


def module_path(spec: KernelSpec) -> Path:
    """Path of the spec's shared library, which is built when no layer has it."""
    from jitgen.build import get_module

    def make_source() -> object:
        from jitgen.render import render_kernel  # Jinja is imported on a miss only: a disk hit must stay cheap

        return render_kernel(spec)

    return get_module(spec.digest, spec.family, spec.label, make_source, spec.target, call=(module_path, spec))


def capture_fields(program: Program) -> tuple[ArgField, ...]:
    """The part of ``struct Args`` that carries the captures, in slot order."""
    fields: list[ArgField] = []
    for i, slot in enumerate(program.slots):
        if slot.kind == "scalar":
            fields.append(ArgField("double", f"a{i}", format="d") if slot.dtype == "f32" else ArgField("int64_t", f"a{i}"))
        else:
            fields.append(ArgField("const void*", f"a{i}", format="P"))
            fields += [ArgField("int64_t", f"a{i}_size{d}") for d in range(slot.rank)]
            fields += [ArgField("int64_t", f"a{i}_stride{d}") for d in range(slot.rank)]
    return tuple(fields)


def capture_words(program: Program, values: list[object]) -> list[object]:
    """Values for ``capture_fields``."""
    words: list[object] = []
    for slot, value in zip(program.slots, values, strict=True):
        if slot.kind == "scalar":
            words.append(value)
        else:
            words.append(value.data_ptr())  # type: ignore[attr-defined]
            words.extend(value.shape)  # type: ignore[attr-defined]
            words.extend(value.stride())  # type: ignore[attr-defined]
    return words


def loaded_kernels() -> list[CompiledKernel]:
    """Kernels this process has loaded, oldest first."""
    return list(_kernels.values())
