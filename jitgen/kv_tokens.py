"""What calls of jitgen.rope and jitgen.append are given: rows of new tokens, and the indices that say where they belong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from jitgen.checks import address_of, as_int32, check_is_tensor, check_memory, dtype_name
from jitgen.errors import GradNotSupported, ShapeMismatch, UnsupportedDevice, UnsupportedDtype
from jitgen.kv_spec import FLOATS, MAX_HEAD_DIM
from jitgen.serving_lists import check_indices

Tensor = torch.Tensor


@dataclass(slots=True)
class Tokens:
    """Which positions, requests and slots tokens have; addresses of index tensors, which are kept alive here."""

    count: int
    positions: Tensor | None = None
    batch_indices: Tensor | None = None
    slot_mapping: Tensor | None = None
    q_indptr: Tensor | None = None
    lengths: Tensor | None = None
    from_end: bool = False
    batch: int = 0
    list_start: Tensor | None = None
    pages: Tensor | None = None
    page_size: int = 1
    num_pages: int = 0
    list_stride: int = 0

    @classmethod
    def at(cls, where: Sequence[Tensor], count: int, device: torch.device) -> Tokens:
        """Tokens at given positions, or at those of requests: q_indptr and the first position of each."""
        if len(where) == 2:
            return cls(count).of_requests("positions", where[0], where[1], False, device)
        return cls(count, positions=token_indices("positions", where[0], count, device))

    def of_requests(self, name: str, indptr: Tensor, lengths: Tensor, from_end: bool, device: torch.device) -> Tokens:
        """Positions from the bounds of requests."""
        for what, t in (("q_indptr", indptr), (name, lengths)):
            check_indices(what, t, 1)
            if t.device != device:
                raise UnsupportedDevice(
                    f"{what} is on {t.device}, the rows are on {device}. Move it with .to({str(device)!r})."
                )
        if indptr.shape[0] != lengths.shape[0] + 1:
            raise ShapeMismatch(
                f"q_indptr has {indptr.shape[0]} entries, expected {lengths.shape[0] + 1}: one more than {name}."
            )
        self.q_indptr, self.lengths, self.from_end = as_int32(indptr), as_int32(lengths), from_end
        self.batch = lengths.shape[0]
        return self

    def addresses(self) -> tuple[int, ...]:
        """The pointers of TOKEN_ARGS."""
        tensors = (
            self.positions,
            self.batch_indices,
            self.slot_mapping,
            self.q_indptr,
            self.lengths,
            self.list_start,
            self.pages,
        )
        return tuple([0 if t is None else t.data_ptr() for t in tensors])

    def numbers(self) -> tuple[int, ...]:
        """The numbers of TOKEN_ARGS up to the stream."""
        indices = (self.positions, self.batch_indices, self.slot_mapping)
        wide = sum(1 << i for i, t in enumerate(indices) if t is not None and t.dtype == torch.int64)
        length = 0 if self.pages is None else self.pages.shape[-1]
        return (wide, self.from_end, self.count, self.batch, self.page_size, self.num_pages, self.list_stride, length)


Form = tuple[object, ...] | None


def form_of(t: Tensor | None) -> Form:
    """Everything about a tensor that checks, strides and the choice of a kernel depend on."""
    if t is None:
        return None
    return type(t), t.shape, t.stride(), t.dtype, t.device, t.requires_grad and torch.is_grad_enabled(), t.is_neg()


def low_bits(*tensors: Tensor | None) -> tuple[int, ...]:
    """How addresses are aligned, which decides how wide an access may be; -1 without memory, which no prepared call has."""
    return tuple([0 if t is None else -1 if not (at := address_of(t)) else at & 63 for t in tensors])


def token_indices(name: str, t: Tensor, count: int, device: torch.device) -> Tensor:
    """One index for each token: int32 or int64, contiguous."""
    check_indices(name, t, 1)
    if t.shape[0] != count:
        raise ShapeMismatch(f"{name} has {t.shape[0]} entries, expected {count}: one for each token.")
    if t.device != device:
        raise UnsupportedDevice(f"{name} is on {t.device}, the rows are on {device}. Move it with .to({str(device)!r}).")
    return t if t.is_contiguous() else t.contiguous()


def new_rows(name: str, x: Tensor) -> Tensor:
    """Rows of new tokens as [num_tokens, heads, head_dim]; without the axis of heads there is one.

    Errors:  ShapeMismatch, UnsupportedDtype, UnsupportedDevice, GradNotSupported.
    """
    check_is_tensor(**{name: x})
    check_memory(**{name: x})
    if x.dim() not in (2, 3):
        raise ShapeMismatch(f"{name} has shape {tuple(x.shape)}, expected [num_tokens, heads, head_dim].")
    if dtype_name(x.dtype) not in FLOATS:
        raise UnsupportedDtype(f"{name} has dtype {dtype_name(x.dtype)}, expected {', '.join(FLOATS)}.")
    if x.device.type not in ("cpu", "cuda"):
        raise UnsupportedDevice(f"{name} is on {x.device}, expected a cpu or cuda tensor.")
    if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
        raise ShapeMismatch(f"{name} has head_dim {x.shape[-1]}, expected 1 to {MAX_HEAD_DIM}.")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ShapeMismatch(f"{name} has strides {x.stride()}, expected unit stride along the head dim, the last axis.")
    if x.requires_grad and torch.is_grad_enabled():
        raise GradNotSupported(f"{name} requires grad, and this has no gradient. Detach it, or call under torch.no_grad().")
    return x.unsqueeze(1) if x.dim() == 2 else x
