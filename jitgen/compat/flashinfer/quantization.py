"""Packing of bits: flashinfer.quantization."""

from __future__ import annotations

import torch

from jitgen.compat.flashinfer._options import check_choice
from jitgen.errors import ShapeMismatch

BIT_ORDERS = ("big", "little")


def packbits(x: torch.Tensor, bitorder: str = "big") -> torch.Tensor:
    """Pack a boolean tensor, flattened, into bytes; the last byte is filled with zero bits.

    Shapes:  x [...]; returns uint8 [(x.numel() + 7) // 8].
    Units:   'big': the first element is the highest bit of a byte. Attention masks are 'little'.
    Cost:    torch operations, no wait.
    """
    check_choice("bitorder", bitorder, BIT_ORDERS)
    bits = x.reshape(-1).bool()
    return bytes_of(torch.nn.functional.pad(bits, (0, -bits.numel() % 8)), bitorder)


def segment_packbits(x: torch.Tensor, indptr: torch.Tensor, bitorder: str = "big") -> tuple[torch.Tensor, torch.Tensor]:
    """Pack each segment of a flat boolean tensor by itself, from a whole byte on.

    Shapes:  x [indptr[-1]]; indptr [segments + 1]; returns uint8 [bytes] and the segments' first bytes [segments + 1].
    Errors:  ShapeMismatch if x does not end where the last segment does.
    Cost:    waits for the device once: the size of the result depends on indptr.
    """
    check_choice("bitorder", bitorder, BIT_ORDERS)
    indptr = indptr.to(x.device)
    byte_indptr = byte_offsets(indptr)
    num_bits, num_bytes = torch.stack((indptr[-1], byte_indptr[-1])).tolist()
    if x.numel() != num_bits:
        raise ShapeMismatch(f"x has {x.numel()} elements, indptr ends at {num_bits}. Both must match.")
    return pack_segments(x, indptr, byte_indptr, num_bytes, bitorder), byte_indptr


def byte_offsets(indptr: torch.Tensor) -> torch.Tensor:
    """First byte of each segment of bits, [segments + 1] in the dtype of ``indptr``."""
    num_bytes = (indptr.diff() + 7) // 8
    return torch.nn.functional.pad(num_bytes.cumsum(0), (1, 0)).to(indptr.dtype)


def pack_segments(
    x: torch.Tensor, indptr: torch.Tensor, byte_indptr: torch.Tensor, num_bytes: int, bitorder: str
) -> torch.Tensor:
    """Bytes of segments whose total is known, or bounded by ``num_bytes``: no wait for the device."""
    bits = torch.zeros(num_bytes * 8, dtype=torch.bool, device=x.device)
    at = torch.arange(x.numel(), device=x.device)
    segment = torch.searchsorted(indptr, at.to(indptr.dtype), right=True) - 1
    bits[at + byte_indptr.long()[segment] * 8 - indptr.long()[segment]] = x.reshape(-1).bool()
    return bytes_of(bits, bitorder)


def bytes_of(bits: torch.Tensor, bitorder: str) -> torch.Tensor:
    """Bytes of a flat boolean tensor whose size is a multiple of 8."""
    shifts = torch.arange(8, device=bits.device, dtype=torch.uint8)
    if bitorder == "big":
        shifts = 7 - shifts
    return (bits.view(-1, 8).to(torch.uint8) << shifts).sum(1, dtype=torch.uint8)
