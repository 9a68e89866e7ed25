"""Validation of the inputs of sampling calls: every error names the argument, what was expected and the remedy."""

from __future__ import annotations

import torch

from jitgen.checks import as_int32, check_is_tensor, check_memory, dtype_name
from jitgen.errors import GradNotSupported, InvalidType, InvalidValue, ShapeMismatch, UnsupportedDevice, UnsupportedDtype
from jitgen.layouts import check_own_rows

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_VOCAB = 2**24  # counts are exact in float32 up to here
Parameter = float | int | torch.Tensor


def check_rows(name: str, x: torch.Tensor, dims: int = 2) -> None:
    """Logits or probabilities: [rows, vocab], or [batch, draft, vocab] with ``dims`` 3."""
    check_is_tensor(**{name: x})
    check_memory(**{name: x})
    axes = "[rows, vocab]" if dims == 2 else "[batch, tokens, vocab]"
    if x.dim() != dims:
        raise ShapeMismatch(f"{name} has {x.dim()} dimensions (shape {tuple(x.shape)}), expected {dims}: {axes}.")
    if x.device.type not in ("cpu", "cuda"):
        raise UnsupportedDevice(
            f"{name} is on {x.device}, expected a cpu or cuda tensor. Move it with .to('cpu') or .to('cuda')."
        )
    if x.dtype not in ROW_DTYPES:
        allowed = ", ".join(map(dtype_name, ROW_DTYPES))
        raise UnsupportedDtype(f"{name} has dtype {dtype_name(x.dtype)}, expected {allowed}. Convert with .to(torch.float32).")
    if not 1 <= x.shape[-1] <= MAX_VOCAB:
        raise ShapeMismatch(f"{name} has a vocabulary of {x.shape[-1]} (axis {dims - 1}), expected 1 to {MAX_VOCAB}.")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ShapeMismatch(
            f"{name} has strides {x.stride()}, expected unit stride along the vocabulary (axis {dims - 1}). Use .contiguous()."
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise GradNotSupported(f"{name} requires grad, and sampling has no gradient. Detach it, or call under torch.no_grad().")


def row_parameter(
    name: str, value: Parameter | None, default: Parameter, bounds: tuple[float, float], batch: int, device: torch.device
) -> tuple[torch.Tensor | None, float | int]:
    """A parameter as (tensor [batch], 0) or (None, number). Values of tensors are not looked at: that would wait for them."""
    wanted = torch.int32 if isinstance(default, int) else torch.float32
    if value is None:
        return None, default
    if isinstance(value, torch.Tensor):
        if tuple(value.shape) != (batch,):
            raise ShapeMismatch(f"{name} has shape {tuple(value.shape)}, expected ({batch},): one for each row of the output.")
        if value.device != device:
            raise UnsupportedDevice(
                f"{name} is on {value.device}, the rows are on {device}. Move it with .to({str(device)!r})."
            )
        if value.dtype == torch.bool or value.is_complex() or (wanted == torch.int32 and value.is_floating_point()):
            raise UnsupportedDtype(f"{name} has dtype {dtype_name(value.dtype)}, expected {dtype_name(wanted)}.")
        return as_int32(value) if wanted == torch.int32 else value.to(wanted).contiguous(), 0
    number = int if wanted == torch.int32 else (int, float)
    if isinstance(value, bool) or not isinstance(value, number):
        kind = "an int" if number is int else "a number"
        raise InvalidType(f"{name} is {value!r} of type {type(value).__name__}, expected {kind} or a tensor [batch].")
    if not bounds[0] <= value <= bounds[1]:
        raise InvalidValue(f"{name} is {value}, expected {bounds[0]:g} to {bounds[1]:g}.")
    return None, value


def check_indices(indices: torch.Tensor | None, rows: int, device: torch.device) -> tuple[torch.Tensor | None, int]:
    """Row indirection as int32, and the number of rows of the output."""
    if indices is None:
        return None, rows
    if not isinstance(indices, torch.Tensor) or indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
        what = f"{tuple(indices.shape)} {dtype_name(indices.dtype)}" if isinstance(indices, torch.Tensor) else repr(indices)
        raise ShapeMismatch(f"indices is {what}, expected a tensor [batch] of int32 or int64.")
    if indices.device != device:
        raise UnsupportedDevice(f"indices is on {indices.device}, the rows are on {device}. Move it with .to({str(device)!r}).")
    if device.type == "cpu" and indices.numel() and not (0 <= int(indices.min()) and int(indices.max()) < rows):
        raise ShapeMismatch(f"indices reach from {int(indices.min())} to {int(indices.max())}, expected 0 to {rows - 1}.")
    return as_int32(indices), indices.shape[0]


def check_output(
    name: str, out: torch.Tensor | None, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> torch.Tensor:
    """``out`` if it is what the call would have allocated, or a new tensor of the first dtype."""
    if out is None:
        return torch.empty(shape, dtype=dtypes[0], device=device)
    check_is_tensor(**{name: out})
    if tuple(out.shape) != shape:
        raise ShapeMismatch(f"{name} has shape {tuple(out.shape)}, expected {shape}.")
    if out.dtype not in dtypes:
        allowed = " or ".join(dtype_name(d) for d in dtypes)
        raise UnsupportedDtype(f"{name} has dtype {dtype_name(out.dtype)}, expected {allowed}.")
    if out.device != device:
        raise UnsupportedDevice(f"{name} is on {out.device}, the rows are on {device}. Both must be on one device.")
    if out.numel() > 1 and out.stride(-1) != 1:
        raise ShapeMismatch(f"{name} has strides {out.stride()}, expected unit stride along the last axis.")
    check_own_rows(out, name)
    return out
