"""Calls of dense attention that are made again: what captured values are checked for, and what need not be checked twice."""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch

from jitgen.checks import check_memory
from jitgen.errors import UnsupportedDevice
from jitgen.looks import can_be_asked, looks_of
from jitgen.program import check_numbers, check_sink, number_indices, too_short

if TYPE_CHECKING:
    from collections.abc import Callable

    from jitgen.dense import PreparedCall

Tensor = torch.Tensor


class RecentCall:
    """The last call with some options: one whose tensors look like its own lacks nothing but addresses and numbers.

    ``looks_same`` compares q, k and v, then the captured tensors. It is None until the call has come a second time: it costs a
    microsecond to make, and lengths may differ at every step. Once others can see the object it does not change: a thread may
    ask it while another one notes a call that looks different.
    """

    __slots__ = ("_has_numbers", "_places", "_tensors_of", "_words", "call", "looks_same")

    def __init__(self, call: PreparedCall) -> None:
        self.call = call
        self._has_numbers = bool(number_indices(call.program))  # to be checked anew: numbers differ from call to call
        self.looks_same: Callable[..., bool] | None = None

    def come_again(self, q: Tensor, k: Tensor, v: Tensor, values: list[object], words: list[object]) -> None:
        """Note the looks of tensors that the call was right for, and ``capture_words`` of its values."""
        places, at = [], 0
        for i, capture in enumerate(self.call.captures):
            places.append((at, i, capture is not None))
            at += 1 if capture is None else 1 + 2 * values[i].dim()  # type: ignore[attr-defined]
        self._words, self._places = words, places
        slots: list[Any] = [i for _, i, is_tensor in places if is_tensor]
        if len(slots) == 1:  # itemgetter of a number would return what is there, and no sequence
            slots = [slice(slots[0], slots[0] + 1)]
        self._tensors_of = itemgetter(*slots) if slots else None
        tensors = self._tensors_of(values) if self._tensors_of else ()
        self.looks_same = looks_of((q, k, v, *tensors))

    def is_like(self, q: Tensor, k: Tensor, v: Tensor, values: list[object]) -> bool:
        """Whether this is the call for these tensors and values."""
        if self.looks_same is None or not can_be_asked(q, k, v):
            return False
        if self._tensors_of is None:
            return self.looks_same(q, k, v)
        return self.looks_same(q, k, v, *self._tensors_of(values))

    def words(self, values: list[object]) -> list[object]:
        """``capture_words`` for values whose tensors look the same."""
        if self._has_numbers:
            check_numbers(self.call.program, values)
        words = self._words.copy()
        for at, i, is_tensor in self._places:
            words[at] = values[i].data_ptr() if is_tensor else values[i]  # type: ignore[attr-defined]
        return words


def capture_words(call: PreparedCall, values: list[object], device: torch.device) -> list[object]:
    """Values for runtime.capture_fields. Captured tensors must be on the inputs' device and large enough for the positions
    they are indexed with."""
    words: list[object] = []
    check_numbers(call.program, values)
    check_sink(call.program, values, call.o_shape[1])
    for value, capture in zip(values, call.captures, strict=True):
        if capture is None:
            words.append(value)
            continue
        name, sizes = capture
        if value.device != device:  # type: ignore[attr-defined]
            raise UnsupportedDevice(
                f"captured tensor '{name}' is on {value.device}, q is on {device}. "  # type: ignore[attr-defined]
                f"Move it with {name}.to(q.device) before building the variant."
            )
        shape = value.shape  # type: ignore[attr-defined]
        for dim, least, index in sizes:
            if shape[dim] < least:
                raise too_short(name, dim, shape[dim], index, least)
        check_memory(**{f"captured tensor '{name}'": value})  # type: ignore[arg-type]
        words += value.data_ptr(), *shape, *value.stride()  # type: ignore[attr-defined]
    return words
