"""flashinfer.utils: enumerations, and questions about the device that FlashInfer's users ask."""

from __future__ import annotations

import enum

import torch

from jitgen.errors import InvalidValue


class PosEncodingMode(enum.Enum):
    """Position encoding inside attention."""

    NONE = 0
    ROPE_LLAMA = 1
    ALIBI = 2


class MaskMode(enum.Enum):
    """Kinds of mask; jitgen's masks are functions, and multi-item scoring is refused."""

    NON_CAUSAL = 0
    CAUSAL = 1
    CUSTOM = 2
    MULTIITEMSCORING = 3


class TensorLayout(enum.Enum):
    """Order of the axes of keys and values: [.., rows, heads, dim] or [.., heads, rows, dim]."""

    NHD = 0
    HND = 1


def has_flashinfer_jit_cache() -> bool:
    """True: there is nothing to prebuild, jitgen keeps what it compiles."""
    return True


def get_compute_capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    if torch.device(device).type != "cuda":
        raise InvalidValue(f"device is {device}, expected a CUDA device: only those have a compute capability.")
    return torch.cuda.get_device_capability(device)


def is_sm90a_supported(device: torch.device) -> bool:
    """Whether the device is a Hopper GPU."""
    return torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def is_fa3_backend_supported(*args: object, **kwargs: object) -> bool:
    """True: backend='fa3' is accepted on every device, and means jitgen's own kernels."""
    return True


def is_fa3_prefill_head_dim_supported(*args: object, **kwargs: object) -> bool:
    """True: backend='fa3' is accepted for every head dim that jitgen takes."""
    return True


def determine_attention_backend(*args: object, **kwargs: object) -> str:
    """'fa2'; every backend that is accepted means jitgen's own kernels."""
    return "fa2"
