"""Calls of a plan with a variant of their own: whether its mask is the plan's, and requests are cut as the plan cuts them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from jitgen.errors import PlanMismatch
from jitgen.ir import TRUE, Expr, renumbered, walk
from jitgen.ir_text import to_text
from jitgen.program import Program, Slot

Tensor = torch.Tensor
Mask = tuple[Expr | None, tuple[Slot, ...]]  # over captures numbered in an order of their own, and these
SHOWN = 300  # characters of a mask in an error


def match_mask(own: Program, other: Program) -> tuple[tuple[int, int], ...]:
    """Pairs of slots, of a plan's program and of a call's, that hold what the mask reads.

    Captures are numbered by first use in a program, which the other hooks have a part in. So those of the masks are matched by
    their names, as they have where a function is the mask of both; else by their order.

    Errors:  PlanMismatch if the masks are not the same expression, or requests are cut differently.
    """
    match_norm(own, other)
    for order in (_by_name, _by_use):
        mine, theirs = order(own), order(other)
        if _mask_over(own, mine) == _mask_over(other, theirs):
            return tuple(zip(mine, theirs, strict=True))
    raise PlanMismatch(
        "the variant's mask is not the one the plan was made for: the plan has looked for visible keys with its own "
        f"({_shown(own)}, the call has {_shown(other)}). Make a plan with variant= for every mask."
    )


def _by_use(program: Program) -> list[int]:
    """Slots that the mask reads, in the order of its expression."""
    nodes = walk(None if program.mask is TRUE else program.mask)
    return list(dict.fromkeys(int(str(n.attr)) for n in nodes if n.op in ("scalar", "load")))


def _by_name(program: Program) -> list[int]:
    return sorted(_by_use(program), key=lambda slot: program.slots[slot].name)


def _mask_over(program: Program, order: Sequence[int]) -> Mask:
    """The mask, with captures numbered in this order, and what is compiled in of them."""
    mask = None if program.mask is TRUE else program.mask
    number = {slot: i for i, slot in enumerate(order)}
    return (None if mask is None else renumbered((mask,), number)[mask]), tuple(program.slots[slot] for slot in order)


def _shown(program: Program) -> str:
    """A mask as text in which captures go by their number and type."""
    if program.mask is None or program.mask is TRUE:
        return "no mask"
    names = [""] * len(program.slots)
    for i, slot in enumerate(_by_use(program)):
        _, dtype, rank, layout, is_sorted = program.slots[slot].signature()
        shape = f" {'sorted ' if is_sorted else ''}{layout}" if rank else ""
        names[slot] = f"<{i}: {dtype}{shape}>"
    return to_text(program.mask, names, SHOWN)


def match_norm(own: Program, program: Program) -> None:
    """Requests are cut, and their parts joined, as the plan was made for."""
    if (program.norm is None) != (own.norm is None):
        kinds = ("softmax", "a softmax replacement")
        has, planned = kinds if program.norm is None else kinds[::-1]
        raise PlanMismatch(
            f"the variant has {has}, the plan was made for one that has {planned}: their parts are joined differently. "
            "Make a plan with variant= for each."
        )
    if program.norm is not None and program.norm.division != own.norm.division:  # type: ignore[union-attr]
        raise PlanMismatch(
            "the variant replaces softmax by another OnlineNorm than the plan's, and the two are not cut alike: they "
            "differ in merge(a, b), order or the number of values of the state. Make a plan with variant= for each."
        )


def check_values(planned: Sequence[Any], pairs: tuple[tuple[int, int], ...], program: Program, values: Sequence[Any]) -> None:
    """What the mask of a call reads is what ``update`` saw: the planner has looked for visible keys with it."""
    for own, i in pairs:
        before, now = planned[own], values[i]
        if before is now:
            continue
        same = before.data_ptr() == now.data_ptr() if isinstance(now, Tensor) else before == now
        if not same:
            name = program.slots[i].name
            shown = "another tensor" if isinstance(now, Tensor) else f"{now!r}"
            was = "" if isinstance(before, Tensor) else f" ({before!r})"
            raise PlanMismatch(
                f"the mask reads '{name}', which is {shown} now and was planned with its former value{was}. "
                "Call plan.update again after changing it."
            )
