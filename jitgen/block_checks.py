"""Validation of block lists: every error names the argument, what was expected and the remedy."""

from __future__ import annotations

import torch

from jitgen.checks import check_is_tensor, dtype_name, plain_int
from jitgen.emit_ranges import POSITION_LIMIT
from jitgen.errors import InvalidType, ShapeMismatch, UnsupportedDevice, UnsupportedDtype

Tensor = torch.Tensor


def checked_pair(name: str, value: object, form: str) -> tuple[int, int]:
    """Two lengths or sizes, as a tuple of ints."""
    pair = tuple(map(plain_int, value)) if isinstance(value, tuple | list) else ()
    if len(pair) != 2 or not all(type(n) is int for n in pair):
        raise InvalidType(f"{name} is {value!r} of type {type(value).__name__}, expected a pair of integers {form}.")
    if min(pair) < 0 or max(pair) > POSITION_LIMIT:
        raise ShapeMismatch(f"{name} is {pair}, expected {form} from 0 to {POSITION_LIMIT}.")
    return pair  # type: ignore[return-value]


def check_has_values(**tensors: Tensor) -> None:
    """Dense tensors of a device that has kernels."""
    for name, t in tensors.items():
        check_is_tensor(**{name: t})
        if t.device.type not in ("cpu", "cuda"):
            raise UnsupportedDevice(f"{name} is on {t.device}, expected a cpu or cuda tensor. Move it with .to('cpu').")
        if t.layout is not torch.strided or t.is_nested:
            raise UnsupportedDevice(f"{name} has layout {t.layout}, expected torch.strided. Convert it with .to_dense().")


def check_visible(**tensors: Tensor) -> None:
    """What is visible is True, or an integer but 0: a mask of 0 and -inf to be added would mean the opposite."""
    check_has_values(**tensors)
    for name, t in tensors.items():
        if t.is_floating_point() or t.is_complex():
            raise UnsupportedDtype(f"{name} has dtype {dtype_name(t.dtype)}, expected bool: True where it is visible.")


def check_one_device(**tensors: Tensor) -> None:
    """All on one device, that has kernels."""
    check_has_values(**tensors)
    (first, leader), *others = tensors.items()
    for name, t in others:
        if t.device != leader.device:
            raise UnsupportedDevice(
                f"{name} is on {t.device}, {first} is on {leader.device}. All must be on one device: {name}.to({first}.device)."
            )
