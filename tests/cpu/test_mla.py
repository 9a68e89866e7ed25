"""Absorbed latent attention (MLA) on the CPU, and what a plan for it refuses."""

from __future__ import annotations

import pytest
import torch
from mla_cases import check_mla

import jitgen
from jitgen.errors import PlanMismatch, ShapeMismatch, VariantError


@pytest.mark.parametrize("form", ["joined", "pair"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_and_drafts(form, dtype):
    check_mla("cpu", dtype, [37, 1, 150], [1, 1, 4], heads=16, page_size=16, form=form)


def test_pages_of_one_key_without_mask():
    check_mla("cpu", torch.float32, [5, 70], [2, 1], heads=8, page_size=1, mask=False)


def test_scores_sinks_and_masks():
    check_mla("cpu", torch.float32, [37, 700], [1, 3], heads=16, page_size=16, hooks=True)


def make_plan(**given):
    options = {"head_dim_v": 512, "dtype": torch.float32, "device": "cpu", **given}
    return jitgen.Plan(2, 4, 16, options.pop("num_kv_heads", 1), 576, **options)


def test_plan_refuses_more_key_heads_and_ragged_keys():
    for given in ({"num_kv_heads": 2}, {"layout": "ragged"}):
        with pytest.raises(ShapeMismatch, match="one key head, layout 'paged'"):
            make_plan(**given)


def test_call_refuses_other_caches_and_asks_for_the_scale():
    plan, q, table = make_plan(), torch.zeros(1, 16, 576), torch.zeros(1, 1, dtype=torch.int32)
    plan.update(torch.tensor([0, 1], dtype=torch.int32), torch.tensor([3], dtype=torch.int32))
    with pytest.raises(VariantError, match="scale has no default for latent attention"):
        jitgen.paged_attention(q, torch.zeros(2, 16, 576), table, plan)
    with pytest.raises(PlanMismatch, match="head_dim 448 and 384"):
        jitgen.paged_attention(q, torch.zeros(2, 16, 448), table, plan, scale=1.0)
    with pytest.raises(ShapeMismatch, match="the cache has parts of shapes"):
        jitgen.paged_attention(q, (torch.zeros(2, 16, 512), torch.zeros(2, 8, 64)), table, plan, scale=1.0)
