"""The part of 'jitgen doctor' that concerns CUDA: toolkit, driver, GPUs, torch, and a small kernel as a proof.

On a machine without a GPU nothing here is wrong: what is absent is a note, not a problem.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import NamedTuple

from jitgen import doctor_probe, env, toolchain
from jitgen.doctor import CUDA, ERROR, MISSING, NOTE, OK, Finding
from jitgen.errors import ToolchainMissing
from jitgen.target import cuda_target
from jitgen.toolchain import driver_version

LEAST_CAPABILITY = (8, 0)
PROBE_ARCH = "8.0"  # compiled for where there is no GPU: every supported toolkit knows it

PROBE = """
__global__ void answer(int* out) { *out = 42; }

extern "C" int jitgen_probe() {
  void* memory = nullptr;
  int found = 0;
  cudaError_t code = cudaMalloc(&memory, sizeof(int));
  if (code != cudaSuccess) return code;
  answer<<<1, 1>>>(static_cast<int*>(memory));
  code = cudaGetLastError();
  if (code == cudaSuccess) code = cudaMemcpy(&found, memory, sizeof(int), cudaMemcpyDeviceToHost);
  cudaFree(memory);
  return code == cudaSuccess ? found : code;
}
"""


class Gpu(NamedTuple):
    """One GPU as the driver knows it."""

    name: str
    driver: str
    capability: tuple[int, int]


def check_cuda() -> Iterator[Finding]:
    """Driver and GPUs first, since they decide how serious the rest is."""
    gpus, version = find_gpus(), driver_version()
    yield check_driver(gpus, version)
    for number, gpu in enumerate(gpus):
        yield check_gpu(number, gpu)
    needed = gpus != []
    torch = check_torch_build(needed)
    toolkit = check_toolkit(needed)
    yield torch
    yield toolkit
    if toolkit.status != OK:
        return
    found = toolchain.require_toolkit()
    yield from check_versions(found.version, version)
    if doctor_probe.check_torch().is_bad or doctor_probe.check_cxx().status != OK:
        yield Finding(CUDA, "compiling", NOTE, "not tried: compiling needs torch and a C++ compiler, see CPU kernels")
    elif env.is_frozen():
        yield Finding(CUDA, "compiling", NOTE, "not tried: JITGEN_MODE=frozen, nothing is compiled")
    else:
        can_run = torch.status == OK and needed
        yield doctor_probe.check_probe(CUDA, PROBE, cuda_target(probe_arch(gpus)), load=can_run)


# ---- driver and GPUs ------------------------------------------------------------------------------------------------


def check_driver(gpus: list[Gpu], version: tuple[int, int] | None) -> Finding:
    """The NVIDIA driver, and the newest CUDA it can run."""
    if version is None and not gpus:
        return Finding(
            CUDA, "driver", NOTE, "no NVIDIA driver here (no libcuda.so.1): CUDA kernels can be compiled, not run",
            "Nothing to do without a GPU. With one: install its driver; in a container, start it with --gpus all.",
        )  # fmt: skip
    if version is None:
        return Finding(
            CUDA, "driver", ERROR, f"{gpus[0].driver}, but libcuda.so.1 cannot be loaded",
            "In a container, start it with --gpus all and NVIDIA_DRIVER_CAPABILITIES=compute,utility.",
        )  # fmt: skip
    number = f"{gpus[0].driver}, " if gpus else ""
    text = f"{number}runs CUDA up to {version[0]}.{version[1]}"
    if not gpus:
        return Finding(CUDA, "driver", NOTE, f"{text}; it lists no GPU", "If there is one, see what nvidia-smi says.")
    return Finding(CUDA, "driver", OK, text)


def find_gpus() -> list[Gpu]:
    """GPUs as torch numbers them; where it sees none, all that nvidia-smi lists.

    nvidia-smi knows the driver's version, but counts in another order, and those too that CUDA_VISIBLE_DEVICES hides.
    """
    program = shutil.which("nvidia-smi")
    listed: list[Gpu] = []
    if program is not None:
        query = [program, "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
        listed = parse_gpus(toolchain.run_text(query))
    return torch_gpus(listed[0].driver if listed else "version unknown") or listed


def parse_gpus(text: str) -> list[Gpu]:
    """Lines like 'NVIDIA H100 80GB HBM3, 580.65.06, 9.0'; anything else in the text is a message and is passed over."""
    found = []
    for line in text.splitlines():
        name, _, rest = line.partition(", ")
        driver, _, capability = rest.partition(", ")
        major, _, minor = capability.strip().partition(".")
        if major.isdecimal() and minor.isdecimal():
            found.append(Gpu(name, driver, (int(major), int(minor))))
    return found


def torch_gpus(driver: str) -> list[Gpu]:
    """GPUs that torch sees; it does not know the driver's version."""
    if doctor_probe.check_torch().is_bad:
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    devices = range(torch.cuda.device_count())
    return [Gpu(torch.cuda.get_device_name(i), driver, torch.cuda.get_device_capability(i)) for i in devices]


def check_gpu(number: int, gpu: Gpu) -> Finding:
    """Whether a GPU has kernels, and of which family."""
    major, minor = gpu.capability
    name, text = f"GPU {number}", f"{gpu.name}, compute capability {major}.{minor}"
    if gpu.capability < LEAST_CAPABILITY:
        return Finding(CUDA, name, ERROR, f"{text}: kernels need 8.0 (Ampere) or later", "Use the CPU on this machine.")
    return Finding(CUDA, name, OK, f"{text}: family {'sm90' if (major, minor) == (9, 0) else 'sm80'}")


# ---- torch and the toolkit ------------------------------------------------------------------------------------------


def check_torch_build(needed: bool) -> Finding:
    """Whether torch can hold CUDA tensors."""
    absent = MISSING if needed else NOTE
    state = doctor_probe.check_torch()
    if state.is_bad:
        return Finding(CUDA, "torch", absent, "not usable, see CPU kernels")
    import torch

    built = torch.version.cuda
    if built is None:
        return Finding(
            CUDA, "torch", absent, f"{torch.__version__} is built without CUDA: kernels can be compiled, not run",
            "With a GPU: install the build for your CUDA version, with the command that pytorch.org/get-started shows.",
        )  # fmt: skip
    if torch.cuda.is_available():
        return Finding(CUDA, "torch", OK, f"{torch.__version__}, built with CUDA {built}")
    status = ERROR if needed else NOTE
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    cause = "" if visible is None else f" CUDA_VISIBLE_DEVICES is {visible!r}: unset it, or name a GPU there."
    remedy = f"Update the driver, or install a torch built for an older CUDA.{cause}" if needed else ""
    return Finding(CUDA, "torch", status, f"{torch.__version__}, built with CUDA {built}, finds no usable GPU", remedy)


def check_toolkit(needed: bool) -> Finding:
    """nvcc and what a build takes from beside it."""
    try:
        found = toolchain.require_toolkit()
    except ToolchainMissing as error:
        named = "JITGEN_NVCC" if env.nvcc() else "CUDA_HOME or CUDA_PATH" if env.cuda_home() else None
        if named is None:
            return Finding(CUDA, "toolkit", doctor_probe.missing() if needed else NOTE, error.what, error.remedy)
        is_absent = env.nvcc() is not None and shutil.which(env.nvcc() or "") is None
        what = f"JITGEN_NVCC={env.nvcc()} is not a program on this machine" if is_absent else error.what
        return Finding(CUDA, "toolkit", ERROR, what, f"Correct {named}, or unset it to search the usual places.")
    return Finding(CUDA, "toolkit", OK, f"{found.version} ({found.root})")


def check_versions(toolkit: str, driver: tuple[int, int] | None) -> Iterator[Finding]:
    """A driver runs kernels of toolkits up to its own major version."""
    major = int(toolkit.split(".")[0]) if toolkit[:1].isdigit() else None
    if driver is None or major is None or major <= driver[0]:
        return
    text = f"toolkit {toolkit} is too new for the driver, which runs CUDA up to {driver[0]}.{driver[1]}"
    remedy = f"Update the driver, or install a toolkit of CUDA {driver[0]} and name it in CUDA_HOME."
    yield Finding(CUDA, "versions", ERROR, text, remedy)


def probe_arch(gpus: list[Gpu]) -> str:
    """Architecture to compile the test for."""
    asked = env.cuda_arch()
    if asked is not None:
        return asked
    usable = [gpu.capability for gpu in gpus if gpu.capability >= LEAST_CAPABILITY]
    return "{}.{}".format(*usable[0]) if usable else PROBE_ARCH
