"""Which kernel family and which tiles serve a call.

Lengths decide little: sm90 has two tiles for some head dims, one for short queries and one for long ones, and few rows over
many keys go to the decode kernel (dense_split.py). So a variant compiles at most three modules for a head dim and dtype, but
for kernels of decode steps that share a key among more than 8 rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from jitgen.deep import goes_deep
from jitgen.errors import ShapeMismatch, UnsupportedDtype, UnsupportedVariant, VariantError
from jitgen.program import Program, all_roots, reads_pages
from jitgen.spec import FP8_DTYPE, FP8_OUT_DTYPES, MLA_DIMS, MLA_FAMILIES, KernelSpec, Tiles
from jitgen.target import CompileTarget, detect_cpu, detect_cuda
from jitgen.tiles import WIDE_TILES, sm80_tiles
from jitgen.tiles_decode import MLA_COLUMNS, decode_tiles, mla_decode_tiles, shared_kib
from jitgen.tiles_fp8 import FP8_HEAD_DIMS, fp8_tiles
from jitgen.tiles_sm90 import sm90_tiles

FAMILIES = ("cpu", "sm80", "sm90", "sm90_wide", "sm90_fp8")
SERVING_FAMILIES = ("cpu", "decode", "mla", "mla_decode", "sm80", "sm80_mla", "sm90", "sm90_wide")
SM90_ARCHS = ("9.0a",)  # wgmma and setmaxnreg exist in this architecture only
MERGE_FAMILIES = ("merge", "merge_outs")  # of states that kernels have left, and of a caller's
PAGE_BOX = 8  # keys: from pages of a multiple of it the sm90 prefill kernel has the copy engine bring boxes
MAX_SM90_KEYS = 1 << 22  # of a request in the sm90 prefill kernel
CUDA_HEAD_DIMS = (64, 96, 128, 192, 256, 512)
MAX_SM90_HEAD_DIM = 256  # of the sm90 family, and sm90_wide has the others


def choose_spec(
    program: Program,
    dtype: str,
    head_dims: tuple[int, int],
    device: torch.device,
    *,
    q_len: int = 1 << 20,
    family: str | None = None,
    out_dtype: str = "",
) -> KernelSpec:
    """The kernel for these types on this device. ``family`` forces one; otherwise the best that supports the program.
    ``out_dtype`` is that of the output, where it is not dtype."""
    check_rows(program)
    check_pages(program, "dense")
    if family is not None and family not in FAMILIES:
        raise VariantError(f"family={family!r} is not a kernel family. Use one of {', '.join(FAMILIES)}.")
    if device.type == "cpu":
        if family not in (None, "cpu"):
            raise VariantError(f"family={family!r} needs cuda tensors, q is on cpu. Leave family out.")
        of_inputs = FP8_DTYPE if dtype == FP8_DTYPE else ""
        dtype = (out_dtype or FP8_OUT_DTYPES[0]) if of_inputs else dtype
        return KernelSpec("cpu", program, dtype, *head_dims, cpu_tiles(*head_dims), detect_cpu(), kv_dtype=of_inputs)
    if family == "cpu":
        raise VariantError(f"family='cpu' needs cpu tensors, q is on {device}. Leave family out.")
    target = detect_cuda(device.index, accelerated=family != "sm80")
    if family is None and dtype == FP8_DTYPE:
        family = "sm90_fp8"
    if family is None:
        family = hopper_family(max(head_dims)) if target.arch in SM90_ARCHS else "sm80"
        target = target if family != "sm80" else detect_cuda(device.index)
    return cuda_spec(program, dtype, head_dims, family, target, q_len=q_len, out_dtype=out_dtype)


def serving_spec(
    program: Program,
    dtype: str,
    head_dims: tuple[int, int],
    device: torch.device,
    layout: str,
    *,
    family: str | None = None,
    rows: int = 8,
    kv_dtype: str = "",
    page_size: int | None = PAGE_BOX,
) -> KernelSpec:
    """A kernel of a plan. ``family`` None is the best prefill kernel; ``rows`` share a KV head in a decode step.
    ``kv_dtype``: of K and V, if it is not ``dtype``. ``page_size``: of the cache, None if any."""
    check_rows(program)
    if family is not None and family not in SERVING_FAMILIES:
        raise VariantError(f"family={family!r} is not a family of serving kernels. Use one of {', '.join(SERVING_FAMILIES)}.")
    if device.type == "cpu":
        return KernelSpec("cpu", program, dtype, *head_dims, cpu_tiles(*head_dims, layout), detect_cpu(), layout, kv_dtype)
    if family is None:
        family = mla_family(device, rows) if head_dims == MLA_DIMS else prefill_family(device, None, max(head_dims))
    target = detect_cuda(device.index, accelerated=not family.startswith("sm80"))
    spec = cuda_spec(program, dtype, head_dims, family, target, layout=layout, rows=rows, kv_dtype=kv_dtype)
    has_boxes = page_size is not None and page_size % PAGE_BOX == 0
    return spec if family != "sm90" or layout.startswith("ragged") or has_boxes else replace(spec, copies=False)


def merge_spec(program: Program, dtype: str, head_dim_v: int, device: torch.device) -> KernelSpec:
    """The kernel that joins the states which kernels of a plan have left of each row."""
    family, target = ("merge_cpu", detect_cpu()) if device.type == "cpu" else ("merge", detect_cuda(device.index))
    return KernelSpec(family, program, dtype, head_dim_v, head_dim_v, Tiles(0, 0), target, "states")


def prefill_family(device: torch.device, max_kv_len: int | None, head_dim: int) -> str:
    """The prefill kernel of a plan."""
    is_hopper = detect_cuda(device.index, accelerated=True).arch in SM90_ARCHS
    family = hopper_family(head_dim) if is_hopper else "sm80"
    return "sm80" if family == "sm90" and (max_kv_len or 0) >= MAX_SM90_KEYS else family


def hopper_family(head_dim: int) -> str:
    """The kernels for 16-bit inputs on compute capability 9.0."""
    return "sm90" if head_dim <= MAX_SM90_HEAD_DIM else "sm90_wide"


@goes_deep
def cuda_spec(
    program: Program,
    dtype: str,
    head_dims: tuple[int, int],
    family: str,
    target: CompileTarget,
    *,
    q_len: int = 1 << 20,
    layout: str = "dense",
    rows: int = 8,
    kv_dtype: str = "",
    out_dtype: str = "",
) -> KernelSpec:
    """A CUDA spec of a given family; also used for compile-only checks, where there is no device."""
    check_rows(program)
    check_fp8(program, dtype, family, target)
    if (family in MLA_FAMILIES) != (head_dims == MLA_DIMS) and family not in MERGE_FAMILIES:
        names = " and ".join(repr(name) for name in MLA_FAMILIES)
        raise VariantError(f"family={family!r} and head dims {head_dims} do not go together: {names} are for {MLA_DIMS} only.")
    if family in MLA_FAMILIES:
        tiles = mla_tiles(program, family, target, rows)
    elif family == "decode":
        tiles = decode_tiles(*head_dims, program, target, rows, 1 if kv_dtype else 2)
    elif family == "sm90_fp8":
        tiles = fp8_tiles(*head_dims, program)
        out_dtype = out_dtype or "bfloat16"
    elif family in MERGE_FAMILIES:
        tiles = Tiles(0, 0)
    elif family in ("sm90", "sm90_wide"):
        if target.arch not in SM90_ARCHS:
            raise VariantError(
                f"family={family!r} needs compute capability 9.0 (architecture {SM90_ARCHS[0]}), the target is {target.arch}. "
                "Leave family out, or use 'sm80'."
            )
        if family != hopper_family(max(head_dims)):
            raise VariantError(
                f"family={family!r} has no kernel for head_dim {max(head_dims)}: 'sm90' has those up to {MAX_SM90_HEAD_DIM}, "
                "'sm90_wide' the others. Leave family out."
            )
        is_wide = family == "sm90_wide"
        tiles = WIDE_TILES if is_wide else sm90_tiles(*head_dims, program, q_len=q_len, layout=layout)
    else:
        tiles = sm80_tiles(*head_dims, shared_kib(target), layout)
    if kv_dtype and family != "decode":
        raise VariantError(f"family={family!r} does not read a cache of {kv_dtype}. Leave family out, or use 'decode'.")
    return KernelSpec(family, program, dtype, *head_dims, tiles, target, layout, kv_dtype, out_dtype)


def loading_spec(spec: KernelSpec) -> KernelSpec:
    """The kernel in place of one that copies a captured tensor, for a tensor that the copy engine cannot take."""
    tiles = sm90_tiles(spec.head_dim, spec.head_dim_v, spec.program, copies=False)
    return replace(spec, copies=False, tiles=tiles)


def check_rows(program: Program) -> None:
    """No kernel but those for rows, and for decode in pages, transforms rows: they are given transformed ones."""
    if program.rows is not None:
        raise VariantError(
            "a kernel was asked for by itself for a variant that transforms rows of q, k or v. Such variants take several: "
            "call jitgen.attention or make a jitgen.Plan, and record what they ask for."
        )


def check_pages(program: Program, layout: str) -> None:
    """Keys are in pages, where a program reads of which."""
    name = "" if layout == "paged" else reads_pages(*all_roots(program))
    if name:
        instead = "kv_off + kv_idx, the row of k" if layout == "ragged" else "b and kv_idx"
        raise VariantError(
            f"the variant reads {name}, and {layout} keys are in no pages. Index by {instead}, or call jitgen.paged_attention."
        )


def check_fp8(program: Program, dtype: str, family: str, target: CompileTarget) -> None:
    """8-bit inputs and their family belong together, need Hopper, and take a softmax."""
    if (dtype == FP8_DTYPE) != (family == "sm90_fp8"):
        raise VariantError(f"family={family!r} does not take {dtype}. Leave family out.")
    if dtype != FP8_DTYPE:
        return
    if target.arch not in SM90_ARCHS:
        raise UnsupportedDtype(
            f"{dtype} needs compute capability 9.0 (architecture {SM90_ARCHS[0]}), the target is {target.arch}. "
            "Dequantise before the call: (q.float() * scale).bfloat16(), and k and v alike."
        )
    if program.norm is not None:
        raise UnsupportedVariant(
            f"an OnlineNorm makes weights of any size, and with {dtype} inputs weights must fit 8 bits. Dequantise before the "
            "call: (q.float() * scale).bfloat16(), and k and v alike."
        )


def mla_family(device: torch.device, rows: int) -> str:
    """The kernel for latent attention that is best on a GPU, for requests of ``rows`` packed rows."""
    if detect_cuda(device.index, accelerated=True).arch not in SM90_ARCHS:
        return "sm80_mla"
    return "mla_decode" if rows <= MLA_COLUMNS[-1] else "mla"


def mla_tiles(program: Program, family: str, target: CompileTarget, rows: int) -> Tiles:
    """Tiles of a kernel for latent attention: queries take 72 kB of shared memory, 64 keys as much."""
    if family != "sm80_mla" and target.arch not in SM90_ARCHS:
        raise VariantError(
            f"family={family!r} needs compute capability 9.0 (architecture {SM90_ARCHS[0]}), the target is {target.arch}. "
            "Leave family out, or use 'sm80_mla'."
        )
    if program.norm is not None or program.output is not None:
        hook = "softmax" if program.norm is not None else "output_transform"
        raise VariantError(
            f"hook {hook} is not available with head dims {MLA_DIMS} on cuda, where several warps share a row of the output. "
            "Leave it out, or use a plan on the CPU."
        )
    if family == "mla_decode":
        return mla_decode_tiles(rows)
    if family == "mla":
        return Tiles(64, 64, num_warps=12, num_stages=2)
    if shared_kib(target) < 163:
        return Tiles(64, 16, num_warps=8, num_stages=1)
    return Tiles(64, 32, num_warps=8, num_stages=2)


def cpu_tiles(head_dim: int, head_dim_v: int, layout: str = "dense") -> Tiles:
    """Tiles of the CPU kernel: a packed K/V tile and the rows that meet it stay in a 512 kB second-level cache.

    The dense kernel keeps packed tiles for all rows. The serving kernel packs a tile anew for every block of rows, and takes
    twice as many: 15 % of the time of a prefill instead of 30.
    """
    widest = max(head_dim, head_dim_v)
    tile_q = 48 if layout == "dense" else 96
    return Tiles(tile_q=tile_q, tile_kv=256 if widest <= 128 else 128 if widest <= 256 else 64)


def padded_head_dims(head_dim: int, head_dim_v: int, dtype: str = "") -> tuple[int, int]:
    """Head dims of the CUDA kernel that serves these: the next supported ones."""
    if (head_dim, head_dim_v) == (192, 128) and dtype != FP8_DTYPE:
        return head_dim, head_dim_v
    width = max(head_dim, head_dim_v)
    for supported in FP8_HEAD_DIMS if dtype == FP8_DTYPE else CUDA_HEAD_DIMS:
        if width <= supported:
            return supported, supported
    raise ShapeMismatch(
        f"head_dim {width} is larger than {CUDA_HEAD_DIMS[-1]}, the largest the cuda kernels take. "
        "Use the CPU, or split the heads."
    )
