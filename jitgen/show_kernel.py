"""The kernel that a variant would get: family, tiles, target, generated source, key, and whether it is stored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from jitgen.cache import Request, digest, find_module, generator_digest
from jitgen.cache.key import module_key
from jitgen.cache.lookup import stores
from jitgen.dense_split import is_divisible
from jitgen.errors import JitgenError, UnsupportedDtype
from jitgen.families import SM90_ARCHS, choose_spec, cuda_spec, hopper_family, padded_head_dims, serving_spec
from jitgen.program import Program, reads_pages
from jitgen.render import Source, render_kernel
from jitgen.spec import CUDA_DTYPES, FP8_DTYPE, KernelSpec
from jitgen.target import cuda_target

# Where a family is asked for on a machine without a GPU.
DEFAULT_ARCH = {"sm80": "8.0", "sm90": "9.0a", "sm90_wide": "9.0a", "sm90_fp8": "9.0a"}


@dataclass(frozen=True)
class Choice:
    """What the command line says about the kernel; None: as a call would choose."""

    device: str | None = None
    arch: str | None = None
    family: str | None = None
    dtype: str | None = None
    head_dim: int = 128
    head_dim_v: int = 128
    q_len: int = 1 << 20
    rows: int = 8  # query rows of all query heads of a KV head
    is_short: bool = False  # few rows over many keys: a GPU cuts the keys, see dense_split.py

    @property
    def device_type(self) -> str:
        """'cpu' or 'cuda'."""
        if self.device is not None:
            return self.device
        if self.arch is not None or self.family not in (None, "cpu"):
            return "cuda"
        return "cuda" if self.family is None and torch.cuda.is_available() else "cpu"


def spec_of(program: Program, choice: Choice) -> KernelSpec:
    """The kernel for a choice, as a call with such tensors would get it: one for pages where the program reads of them.

    Errors:  UnsupportedDtype, UnsupportedDevice, VariantError, ShapeMismatch.
    """
    is_cpu = choice.device_type == "cpu"
    dtype = choice.dtype or ("float32" if is_cpu else "bfloat16")
    is_split = not is_cpu and choice.is_short and choice.family is None and dtype in CUDA_DTYPES and is_divisible(program)
    is_paged = is_split or bool(reads_pages(*program.roots()))
    dims = (choice.head_dim, choice.head_dim_v)
    if is_cpu:
        if is_paged:
            return serving_spec(program, dtype, dims, torch.device("cpu"), "paged", family=choice.family)
        return choose_spec(program, dtype, dims, torch.device("cpu"), q_len=choice.q_len, family=choice.family)
    if dtype not in (*CUDA_DTYPES, FP8_DTYPE):
        raise UnsupportedDtype(f"dtype is {dtype}, expected {' or '.join((*CUDA_DTYPES, FP8_DTYPE))} on cuda.")
    dims = padded_head_dims(*dims, dtype)
    arch = choice.arch
    if arch is None and not torch.cuda.is_available():
        arch = DEFAULT_ARCH.get(choice.family or "")
    if (arch is None or choice.family == "cpu") and is_paged:
        family = "decode" if is_split else choice.family
        return serving_spec(program, dtype, dims, torch.device("cuda"), "paged", family=family, rows=choice.rows)
    if arch is None or choice.family == "cpu":
        return choose_spec(program, dtype, dims, torch.device("cuda"), q_len=choice.q_len, family=choice.family)
    if choice.family != "sm80" and f"{arch}a" in SM90_ARCHS:  # as a device of this architecture would get it
        arch += "a"
    best = hopper_family(max(dims)) if arch in SM90_ARCHS else "sm80"
    own = "decode" if is_split else "sm90_fp8" if dtype == FP8_DTYPE else best
    family = choice.family or own
    layout = "paged" if is_paged else "dense"
    return cuda_spec(program, dtype, dims, family, cuda_target(arch), q_len=choice.q_len, layout=layout, rows=choice.rows)


@dataclass(frozen=True)
class Kernel:
    """A spec with what is made from it. ``entry`` is the directory it is stored in, None if it is in no store."""

    spec: KernelSpec
    source: Source
    key: str
    entry: Path | None
    problem: str = ""  # why the stores could not be searched


def kernel_of(spec: KernelSpec) -> Kernel:
    """Render a spec and look for it in the stores; compiles nothing."""
    source = render_kernel(spec)
    key = f"{spec.family}-{digest(module_key(source.text, source.includes, vars(spec.target)))}"
    request = Request(spec.family, spec.label, spec.digest + generator_digest(), vars(spec.target), lambda: source)
    try:  # by its key where its alias is not known: another version of jitgen may have generated the same source
        found = (find_module(request), *(store.find(key) for store in stores()))
    except JitgenError as error:
        return Kernel(spec, source, key, None, str(error))
    module = next(filter(None, found), None)
    return Kernel(spec, source, key, module.parent if module else None)
