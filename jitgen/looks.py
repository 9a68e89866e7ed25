"""Whether tensors look like others: what a call that is made again asks of its arguments, in place of checking them anew."""

from __future__ import annotations

from collections.abc import Callable

import torch

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # a torch without them
    TensorGuards = None


def can_be_asked(*tensors: object) -> bool:
    """Whether these are tensors, and none is nested, whose guards would end the process. To be asked before ``looks_of``'s."""
    try:
        for t in tensors:
            if t.is_nested:  # type: ignore[attr-defined]
                return False
    except AttributeError:
        return False
    return True


def looks_of(tensors: tuple[torch.Tensor, ...]) -> Callable[..., bool]:
    """Whether other tensors look like these, as a function of them, for what is called again and again.

    It costs a microsecond to make: where torch has guards, they compare in 0.3 us and not in 1 us; but they take a tensor that
    is passed twice for another, and cannot be asked about nested ones. Nothing looks like tensors that require grad: whether
    they may be used depends on more than their looks.
    """
    if any(t.requires_grad for t in tensors):
        return lambda *others: False
    if TensorGuards is not None and len(set(map(id, tensors))) == len(tensors):
        sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
        return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check  # type: ignore[no-any-return]

    def look(tensors: tuple[torch.Tensor, ...]) -> list[object]:
        return [(type(t), t.shape, t.stride(), t.dtype, t.device, t.requires_grad, t.is_neg()) for t in tensors]

    looks = look(tensors)
    return lambda *others: can_be_asked(*others) and looks == look(others)
