"""Masks of serving engines: packed bits, trees of draft tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from jitgen.checks import check_is_tensor
from jitgen.errors import ShapeMismatch, UnsupportedDevice, UnsupportedDtype
from jitgen.serving_lists import check_indices

Tensor = torch.Tensor


def bit_mask(packed: Tensor, byte_indptr: Tensor) -> Callable[..., Any]:
    """A mask_mod that reads one bit for every query row and key of every request, in FlashInfer's packed form.

    Bit ``row * kv_len + key`` of request b, counted from byte ``byte_indptr[b]``, lowest bit of a byte first. Rows count from
    the request's first query row. The tensors are captured under the names ``packed`` and ``byte_indptr``, so a step with
    other masks is ``plan.update(q_indptr, kv_len, packed=..., byte_indptr=...)``.

    For absolute positions (the default of a plan). Combine it with others by jitgen.and_masks; a causal or window mask
    beside it lets kernels skip keys, which the bits alone do not.

    Shapes:  packed [bytes] uint8; byte_indptr [batch + 1] int32 or int64. See ``pack_mask`` for making both.
    Errors:  InvalidType, ShapeMismatch, UnsupportedDtype.
    Cost:    one byte read per query row and key.
    """
    check_is_tensor(packed=packed, byte_indptr=byte_indptr)
    if packed.dtype != torch.uint8:
        raise UnsupportedDtype(f"packed has dtype {str(packed.dtype).removeprefix('torch.')}, expected uint8.")
    if packed.dim() != 1 or byte_indptr.dim() != 1:
        raise ShapeMismatch(f"packed has shape {tuple(packed.shape)}, byte_indptr {tuple(byte_indptr.shape)}, expected rank 1.")

    def mask(b, h, q_idx, kv_idx, *, ctx_len, kv_len):  # type: ignore[no-untyped-def]
        bit = (q_idx - ctx_len) * kv_len + kv_idx
        return (packed[byte_indptr[b] + (bit >> 3)] >> (bit & 7)) & 1 == 1

    return mask


def pack_mask(mask: Tensor, q_len: Tensor, kv_len: Tensor) -> tuple[Tensor, Tensor]:
    """Bits and offsets for ``bit_mask`` from a bool tensor: the masks of all requests, row by row, one after the other.

    Shapes:  mask [sum of q_len * kv_len] bool; q_len, kv_len [batch]; returns uint8 [bytes], int32 [batch + 1].
    Errors:  InvalidType, ShapeMismatch, UnsupportedDtype, UnsupportedDevice.
    Cost:    a few passes over the mask; waits for its device.
    """
    check_is_tensor(mask=mask)
    check_indices("q_len", q_len, 1)
    check_indices("kv_len", kv_len, 1)
    if q_len.shape != kv_len.shape:
        raise ShapeMismatch(f"q_len has {q_len.shape[0]} entries, kv_len {kv_len.shape[0]}. Both must match.")
    for name, t in (("q_len", q_len), ("kv_len", kv_len), ("mask", mask)):
        if t.device.type not in ("cpu", "cuda") or t.device != mask.device or t.layout is not torch.strided:
            raise UnsupportedDevice(
                f"{name} is on {t.device} in layout {t.layout}, mask on {mask.device}. Expected dense tensors on one device, "
                "cpu or cuda."
            )
    if mask.is_floating_point() or mask.is_complex():
        raise UnsupportedDtype(f"mask has dtype {str(mask.dtype)[6:]}, expected bool: True where it is visible.")
    sizes = q_len.to(torch.int64) * kv_len.to(torch.int64)
    if mask.dim() != 1 or mask.shape[0] != int(sizes.sum()):
        raise ShapeMismatch(
            f"mask has shape {tuple(mask.shape)}, expected [{int(sizes.sum())}], the sum of q_len * kv_len. "
            "Flatten the mask of each request row by row, and concatenate."
        )
    zero = sizes.new_zeros(1)
    byte_indptr = torch.cat([zero, ((sizes + 7) // 8).cumsum(0)])
    first_bit = torch.cat([zero, sizes.cumsum(0)])
    request = torch.repeat_interleave(torch.arange(sizes.shape[0], device=mask.device), sizes)
    place = torch.arange(mask.shape[0], device=mask.device) - first_bit[request] + 8 * byte_indptr[request]
    bits = torch.zeros(8 * int(byte_indptr[-1]), dtype=torch.uint8, device=mask.device)
    bits[place] = mask.to(torch.uint8)
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits.view(-1, 8) * weights).sum(1, dtype=torch.uint8), byte_indptr.to(torch.int32)


def tree_mask(visible: Tensor) -> Callable[..., Any]:
    """A mask_mod for speculative decoding: every draft token sees the whole context and its own ancestors.

    The last ``q_len`` keys of a request are the draft tokens, in the order of the query rows. ``visible[i, j]`` says whether
    token i sees token j; with three dimensions ``visible[b, i, j]``, a tree for every request. The tensor is captured under
    the name ``visible``. For absolute positions (the default of a plan).

    Shapes:  visible [tokens, tokens] or [batch, tokens, tokens], bool; tokens at least the largest q_len.
    Errors:  InvalidType, ShapeMismatch, UnsupportedDtype.
    Cost:    context tiles are read without a mask; one byte per pair of draft tokens.
    """
    check_is_tensor(visible=visible)
    if visible.dtype != torch.bool:
        raise UnsupportedDtype(f"visible has dtype {str(visible.dtype).removeprefix('torch.')}, expected bool.")
    if visible.dim() not in (2, 3) or visible.shape[-1] != visible.shape[-2]:
        raise ShapeMismatch(f"visible has shape {tuple(visible.shape)}, expected [tokens, tokens] or [batch, tokens, tokens].")

    def shared(b, h, q_idx, kv_idx, *, ctx_len):  # type: ignore[no-untyped-def]
        return (kv_idx < ctx_len) | visible[q_idx - ctx_len, kv_idx - ctx_len]

    def own(b, h, q_idx, kv_idx, *, ctx_len):  # type: ignore[no-untyped-def]
        return (kv_idx < ctx_len) | visible[b, q_idx - ctx_len, kv_idx - ctx_len]

    return shared if visible.dim() == 2 else own
