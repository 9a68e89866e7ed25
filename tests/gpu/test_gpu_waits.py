"""What is said to wait for nothing returns while the device is busy with what it was given before."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch

import jitgen

BUSY = 1 << 28  # clock cycles: a seventh of a second and more; what is measured takes a few ms of the host
SIZES = ((256, 256), (128, 128))


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def plan_and_call() -> Callable[[], object]:
    plan = jitgen.Plan(2, 8, 4, 2, 64, dtype=torch.bfloat16, page_size=16, device="cuda")
    q, cache = torch.randn(2, 4, 64, device="cuda").bfloat16(), torch.randn(8, 2, 16, 2, 64, device="cuda").bfloat16()
    table, q_indptr, kv_len = torch.arange(8, device="cuda").int().view(2, 4), ints(0, 1, 2), ints(40, 50)
    return lambda: jitgen.paged_attention(q, cache, table, plan.update(q_indptr, kv_len))


def few_rows() -> Callable[[], object]:
    """Steps of a cache that grows: the keys are divided anew."""
    q, cache = torch.randn(1, 4, 1, 64, device="cuda").bfloat16(), torch.randn(1, 4, 3000, 64, device="cuda").bfloat16()
    lengths = itertools.count(2000)

    def step() -> object:
        keys = cache[:, :, : next(lengths)]
        return jitgen.attention(q, keys, keys)

    return step


def rows() -> Callable[[], object]:
    q, turn = torch.randn(1, 4, 64, 64, device="cuda").bfloat16(), jitgen.Rope()
    variant = jitgen.Variant(q_transform=lambda q, b, h, q_idx: turn(q, q_idx))
    return lambda: jitgen.attention(q, q, q, variant)


def blocks(indptr: torch.Tensor, **given: torch.Tensor) -> Callable[[], object]:
    indices = ints(0, 1, 1)
    return lambda: jitgen.BlockSparse.bsr(indptr, indices, *SIZES, **given)


def variable_blocks() -> Callable[[], object]:
    chosen, sizes = torch.ones(2, 2, 2, dtype=torch.bool, device="cuda"), torch.full((2, 2), 128, device="cuda")
    return lambda: jitgen.BlockSparse.variable(chosen, sizes, sizes, SIZES[0])


def levels() -> Callable[[], object]:
    table = torch.arange(8, device="cuda").int().view(2, 4)
    given = [(ints(0, 2), table[:1], ints(32)), (ints(0, 1, 2), table, ints(8, 18))]
    return lambda: jitgen.Cascade(given)


def tree() -> Callable[[], object]:
    shared = ("a", list(range(10)))
    paths, q_indptr = [[shared, ("b", [20, 21])], [shared, ("c", [22])]], ints(0, 1, 2)
    return lambda: jitgen.Cascade.of_tree(q_indptr, paths, [190, 170], 16)


def sample() -> Callable[[], object]:
    logits, seeds = torch.randn(4, 1000, device="cuda"), torch.arange(4, device="cuda")
    return lambda: jitgen.sample(logits, seed=seeds, top_p=0.9)


CALLS = {
    "plan": plan_and_call,
    "few rows": few_rows,
    "rows": rows,
    "blocks": lambda: blocks(ints(0, 2, 3)),
    "blocks of heads": lambda: blocks(ints(0, 2, 3)[None]),
    "bits of blocks": lambda: blocks(ints(0, 2, 3), mask=torch.ones(3, 128, 128, dtype=torch.bool, device="cuda")),
    "variable blocks": variable_blocks,
    "levels": levels,
    "tree": tree,
    "sample": sample,
    "merge": lambda: partial(
        jitgen.merge_states, torch.randn(4, 3, 2, 64, device="cuda").bfloat16(), torch.zeros(4, 3, 2, device="cuda")
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_host_goes_on_while_the_device_is_busy(name):
    call = CALLS[name]()
    for _ in range(2):  # first uses wait: of operations of torch's, of memory that the host shares with the device
        call()
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY)
    end = torch.cuda.Event()
    end.record()
    call()
    is_busy = not end.query()
    torch.cuda.synchronize()
    assert is_busy
