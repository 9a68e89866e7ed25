"""Absorbed latent attention (MLA): the kernel of Hopper, and the one of all GPUs."""

from __future__ import annotations

import pytest
import torch
from mla_cases import SCALE, check_mla

import jitgen
from jitgen.errors import VariantError

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not IS_HOPPER, reason="needs compute capability 9.0")


@pytest.fixture(params=[pytest.param("mla", marks=needs_hopper), pytest.param("mla_decode", marks=needs_hopper), "sm80_mla"])
def family(request):
    return request.param


def make_plan(family, **given):
    """Of four requests, and their lengths."""
    plan = jitgen.Plan(4, 4, 128, 1, 576, head_dim_v=512, device="cuda", page_size=64, family=family, **given)
    plan.update(torch.arange(5, device="cuda").int(), torch.tensor([6000, 100, 6400, 3333], device="cuda").int())
    return plan


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["joined", "pair"])
def test_one_request(family, dtype, form):
    check_mla("cuda", dtype, [300], [1], form=form, mask=False, family=family)


@pytest.mark.parametrize("page_size", [1, 2, 3, 4, 8, 16, 24, 64, 128])
def test_odd_lengths(family, page_size):
    check_mla("cuda", torch.bfloat16, [1, 63, 64, 65, 129, 1000, 2047], [1] * 7, page_size=page_size, family=family)


@pytest.mark.parametrize("heads", [8, 16, 32, 64, 128])
def test_heads_and_drafts(family, heads):
    check_mla("cuda", torch.bfloat16, [5, 700, 64, 333], [5, 1, 3, 2], heads=heads, family=family)


@pytest.mark.parametrize(
    "heads, q_lens",
    [(1, [1, 1, 1]), (4, [2, 1, 2]), (8, [1, 1, 1]), (12, [1, 1, 1]), (16, [1, 1, 1]), (16, [2, 2, 1]), (24, [1, 1, 1])],
)
@pytest.mark.parametrize("hooks", [False, True], ids=["causal", "hooks"])
@needs_hopper
def test_few_rows(heads, q_lens, hooks):
    """Tiles of 8, 16 and 32 rows; 4096 keys are cut."""
    check_mla("cuda", torch.bfloat16, [70, 4096, 333], q_lens, heads=heads, family="mla_decode", hooks=hooks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_skewed_batch_is_cut_and_joined(family, dtype):
    check_mla("cuda", dtype, [20_000, 17, 900, 4096, 33, 12_345], [1] * 6, heads=128, family=family)


@pytest.mark.parametrize("lengths", [[3001] * 16, [201] * 96, [700] * 5], ids=["alike", "whole", "few"])
def test_equal_requests_are_cut_alike_or_not_at_all(family, lengths):
    check_mla("cuda", torch.bfloat16, lengths, [1] * len(lengths), family=family)


@pytest.mark.parametrize("heads", [64, 128])
def test_a_request_alone_is_cut_for_all_ctas(family, heads):
    check_mla("cuda", torch.bfloat16, [40_001], [1], heads=heads, family=family)


def test_whole_requests(family):
    check_mla("cuda", torch.bfloat16, [3000, 17, 900], [1] * 3, split="none", family=family)


def test_maximum_that_grows_late(family):
    check_mla("cuda", torch.float16, [700, 1500], [1, 1], spread=6.0, family=family)


def test_a_request_without_keys(family):
    check_mla("cuda", torch.bfloat16, [0, 100], [1, 1], mask=False, family=family)


def test_results_repeat_bit_by_bit(family):
    q, cache = (torch.randn(s, device="cuda").bfloat16() for s in ((4, 128, 576), (400, 64, 576)))
    table = torch.randperm(400, device="cuda").view(4, 100).int()
    plan = make_plan(family, dtype=q.dtype)
    first = jitgen.paged_attention(q, cache, table, plan, scale=SCALE)
    for _ in range(5):
        assert torch.equal(jitgen.paged_attention(q, cache, table, plan, scale=SCALE), first)


def test_explain_shows_the_shares(family):
    text = make_plan(family).explain()
    assert f"{family}: 4 tiles" in text and "the heaviest" in text


def test_scores_sinks_and_masks(family):
    check_mla("cuda", torch.float16, [5, 700, 64, 333], [5, 1, 3, 2], hooks=True, family=family)


def test_hooks_that_see_whole_rows_are_refused():
    with pytest.raises(VariantError, match="hook output_transform is not available with head dims"):
        jitgen.Plan(
            1, 1, 128, 1, 576, head_dim_v=512, device="cuda",
            variant=jitgen.Variant(output_transform=lambda o, lse, b, h, q_idx: o * 2),
        )  # fmt: skip
