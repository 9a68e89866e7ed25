"""From a SamplingSpec to a started kernel."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from jitgen import runtime
from jitgen.errors import UnsupportedDevice
from jitgen.program import Program, check_numbers, direct_indices, too_short
from jitgen.sampling_spec import SamplingSpec, render_sampling, team_size
from jitgen.streams import cuda_index, start
from jitgen.target import CompileTarget, detect_cpu, detect_cuda

MAX_SPECS = 1024  # combinations that are remembered: processors that are traced anew are others
_kernels: dict[tuple[str, CompileTarget], runtime.CompiledKernel] = {}
_specs: dict[tuple[object, ...], tuple[SamplingSpec, runtime.CompiledKernel]] = {}
_targets: dict[torch.device, CompileTarget] = {}
_teams: dict[tuple[int, torch.device], int] = {}
_lock = threading.Lock()


def target_of(device: torch.device) -> CompileTarget:
    """What kernels for a device are compiled for."""
    target = _targets.get(device)
    if target is None:
        target = _targets[device] = detect_cpu() if device.type == "cpu" else detect_cuda(device.index)
    return target


def get_kernel(op: str, dtype: str, device: torch.device, program: Program, **flags: object) -> runtime.CompiledKernel:
    """The kernel of an operation on this device: from memory, from a prebuilt layer or the user store, or compiled now.

    Errors:  CompileError, ToolchainMissing, KernelNotPrebuilt, CacheError, UnsupportedDevice.
    Cost:    memory: two dictionary look-ups; compiling: about a second on a GPU machine's host, once per combination.
    """
    key = (op, dtype, device, id(program), *flags.values())
    found = _specs.get(key)
    if found is None:
        spec = SamplingSpec(op=op, dtype=dtype, target=target_of(device), program=program, **flags)  # type: ignore[arg-type]
        if len(_specs) >= MAX_SPECS:
            _specs.clear()
        found = _specs[key] = (spec, _load(spec))  # keeps the program, so its id stays its own
    return found[1]


def _load(spec: SamplingSpec) -> runtime.CompiledKernel:
    with _lock:
        kernel = _kernels.get((spec.digest, spec.target))
        if kernel is None:
            kernel = runtime.CompiledKernel(module_path(spec), spec, spec.args)  # type: ignore[arg-type]
            _kernels[spec.digest, spec.target] = kernel
    return kernel


def module_path(spec: SamplingSpec) -> Path:
    """Path of the spec's shared library, which is built when no layer has it."""
    from jitgen.build import get_module

    call = (module_path, spec)
    return get_module(spec.digest, spec.family, spec.label, lambda: render_sampling(spec), spec.target, call=call)


def address(t: torch.Tensor | None) -> int:
    """Address for a launch argument; 0 stands for a parameter that was not given."""
    return 0 if t is None else t.data_ptr()


def team_of(vocab: int, device: torch.device) -> int:
    """Slices of a row of this length."""
    team = _teams.get((vocab, device))
    if team is None:
        if len(_teams) >= MAX_SPECS:  # rows of ever other lengths
            _teams.clear()
        team = _teams[vocab, device] = team_size(vocab, target_of(device))
    return team


def launch(kernel: runtime.CompiledKernel, device: torch.device, words: Sequence[object]) -> None:
    """Pack the arguments and start the kernel.

    Errors:  LaunchError.
    """
    start(kernel, cuda_index(device), kernel.pack(*words))


def capture_words(program: Program, values: list[object], batch: int, vocab: int, device: torch.device) -> list[object]:
    """Launch arguments of what processors capture, once it is known to be on the device and large enough.

    Errors:  ShapeMismatch, UnsupportedDevice.
    """
    if not values:
        return values
    for slot, value in zip(program.slots, values, strict=True):
        if slot.kind == "tensor" and value.device != device:  # type: ignore[attr-defined]
            raise UnsupportedDevice(
                f"captured tensor '{slot.name}' is on {value.device}, the logits are on {device}. "  # type: ignore[attr-defined]
                f"Move it with {slot.name}.to({str(device)!r})."
            )
    check_numbers(program, values)
    sizes = {"b": ("row", batch), "kv_idx": ("token", vocab), "any": ("any", 1)}
    for i, dim, index in direct_indices(program):
        name, least = sizes[index]
        size = values[i].shape[dim]  # type: ignore[attr-defined]
        if size < least:
            raise too_short(program.slots[i].name, dim, size, name, least)
    return runtime.capture_words(program, values)
