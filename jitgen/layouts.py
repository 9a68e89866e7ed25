"""How tensors of a call lie in memory: strides of the output, what a kernel cannot read, copies that it can."""

from __future__ import annotations

import torch

from jitgen.checks import address_of, check_is_tensor, dtype_name
from jitgen.errors import ShapeMismatch, UnsupportedDevice, UnsupportedDtype
from jitgen.families import padded_head_dims
from jitgen.fp8 import FP8


def stride_like(q: torch.Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Dense strides for the output: heads inside positions when q is laid out so, else contiguous."""
    _, heads, length, dim = shape
    if q.stride(1) < q.stride(2) and heads > 1:
        return (length * heads * dim, dim, heads * dim, 1)
    return (heads * length * dim, length * dim, dim, 1)


def expanded_stride(t: torch.Tensor, batch: int) -> tuple[int, ...]:
    """Strides of k or v, with 0 along a batch axis of 1 that serves the whole batch."""
    stride = t.stride()
    return (0, *stride[1:]) if t.shape[0] == 1 and batch != 1 else stride


def needs_adapting(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether a kernel cannot read these as they are: on CUDA rows that are not contiguous or not in 16-byte steps, and an odd
    head dim."""
    if q.device.type != "cuda":
        return False
    if padded_head_dims(q.shape[3], v.shape[3], dtype_name(q.dtype)) != (q.shape[3], v.shape[3]):
        return True
    return any(not is_row_aligned(t) for t in (q, k, v))


def is_row_aligned(t: torch.Tensor) -> bool:
    """16-byte rows that differ: unit stride along head_dim, every other stride a multiple of 16 bytes, rows not broadcast (a
    tensor map cannot describe that)."""
    strides = [t.stride(i) * t.itemsize for i in range(3) if t.shape[i] > 1]
    return t.stride(3) == 1 and all(s % 16 == 0 for s in strides) and (t.stride(2) != 0 or t.shape[2] <= 1)


def pad_columns(t: torch.Tensor, width: int) -> torch.Tensor:
    """Copy with zero columns appended up to ``width``."""
    return torch.nn.functional.pad(t, (0, width - t.shape[3])).contiguous()


def finished(result: torch.Tensor, out: torch.Tensor | None, q: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """The result in its dtype, in ``out`` where there is one."""
    if out is None:
        return result.to(out_dtype)
    check_out(out, tuple(result.shape), q, out_dtype)
    return out.copy_(result)


def check_out(out: torch.Tensor, shape: tuple[int, ...], q: torch.Tensor, dtype: torch.dtype) -> None:
    """``out=`` must be what the call would have allocated, up to strides."""
    check_is_tensor(out=out)
    if tuple(out.shape) != shape:
        raise ShapeMismatch(f"out has shape {tuple(out.shape)}, expected {shape}.")
    if out.dtype != dtype:
        if q.dtype == FP8:
            raise UnsupportedDtype(f"out has dtype {out.dtype}, expected {dtype}. Say so: out_dtype={out.dtype}.")
        raise UnsupportedDtype(f"out has dtype {dtype_name(out.dtype)}, q has {dtype_name(q.dtype)}. Both must match.")
    if out.device != q.device:
        raise UnsupportedDevice(f"out is on {out.device}, q is on {q.device}. Both must be on one device.")
    if out.numel() and (out.stride(3) != 1 or (q.device.type == "cuda" and not is_row_aligned(out))):
        raise ShapeMismatch(f"out has strides {tuple(out.stride())}, expected unit stride along head_dim (axis 3).")
    check_own_rows(out)


def check_apart(out: torch.Tensor, **inputs: torch.Tensor) -> None:
    """What is written is not read meanwhile: ``out`` begins where no input does, and shares no memory with one where both fill
    theirs. Tensors with gaps may lie between one another's rows, as parts of a packed qkv do.

    Errors:  ShapeMismatch.
    """
    for name, t in inputs.items():
        if not (isinstance(out, torch.Tensor) and isinstance(t, torch.Tensor)) or out.device != t.device:
            return  # other checks say what is wrong
        begin, other = address_of(out), address_of(t)
        if not begin or not other or not out.numel() or not t.numel():
            continue
        are_dense = all(x.numel() == reach(x) for x in (out, t))
        apart = begin + reach(out) * out.itemsize <= other or other + reach(t) * t.itemsize <= begin
        if begin == other or (are_dense and not apart):
            raise ShapeMismatch(
                f"out shares memory with {name}, which is read while it is written. Give one from torch.empty, or leave it out."
            )


def reach(t: torch.Tensor) -> int:
    """Elements from the first of a tensor to its last, gaps included."""
    return 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))


def check_own_rows(out: torch.Tensor, name: str = "out") -> None:
    """What is written shows its memory: no two rows are the same, as those of an expanded tensor are, and none is negated."""
    if 0 in out.stride() and any(n > 1 and s == 0 for n, s in zip(out.shape, out.stride(), strict=True)):
        raise ShapeMismatch(f"{name} has strides {tuple(out.stride())}, so rows of it share memory. Give one from torch.empty.")
    if out.is_neg():
        raise ShapeMismatch(f"{name} is a view that negates what it shows (is_neg()). Give one from torch.empty.")
