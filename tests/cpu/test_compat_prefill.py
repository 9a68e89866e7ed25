"""flashinfer.prefill and flashinfer.attention of the shim against attention by definition."""

from __future__ import annotations

import math

import pytest
import torch
from compat_reference import WORKSPACE, assert_near, exact, paged_batch

from jitgen.compat import flashinfer
from jitgen.errors import InvalidType, ShapeMismatch, UnsupportedDtype, UnsupportedOption

Q_LENS, KV_LENS = [5, 1, 0, 33, 70, 4], [9, 1, 6, 40, 130, 0]
OPTIONS = {
    "plain": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "window": ({"window_left": 3}, {"window_left": 3}),  # not causal
    "causal_window": ({"causal": True, "window_left": 7}, {"causal": True, "window_left": 7}),
    "cap": ({"logits_soft_cap": 1.5, "causal": True}, {"cap": 1.5, "causal": True}),
    "alibi_cap": ({"pos_encoding_mode": "ALIBI", "logits_soft_cap": 2.0}, {"pos": "ALIBI", "cap": 2.0}),
    "rope": ({"pos_encoding_mode": "ROPE_LLAMA", "causal": True}, {"pos": "ROPE_LLAMA", "causal": True}),
    "scale": ({"sm_scale": 0.7}, {"scale": 0.7}),
}  # what plan() takes, and the same for the definition


def planned(batch, *, heads=(4, 2), dim=16, layout="NHD", **options):
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(WORKSPACE, layout)
    wrapper.plan(batch.qo_indptr, *batch.tables, *heads, dim, batch.page_size, q_data_type=batch.q.dtype, **options)
    return wrapper


def ragged(batch):
    return torch.cat(batch.keys), torch.cat(batch.values), torch.tensor([0, *map(len, batch.keys)]).cumsum(0).int()


def random_masks(q_lens, kv_lens, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(n, m, generator=g) < 0.6 for n, m in zip(q_lens, kv_lens, strict=True)]


@pytest.mark.parametrize(("options", "meaning"), OPTIONS.values(), ids=OPTIONS)
def test_paged_prefill_is_attention_by_definition(options, meaning):
    batch = paged_batch(Q_LENS, KV_LENS, heads=(6, 2))
    out, lse = planned(batch, heads=(6, 2), **options).run(batch.q, batch.cache, return_lse=True)
    want, want_lse = batch.expected(**meaning)
    assert_near(out, want)
    assert_near(lse, want_lse)


@pytest.mark.parametrize(("options", "meaning"), OPTIONS.values(), ids=OPTIONS)
def test_ragged_prefill_is_attention_by_definition(options, meaning):
    batch = paged_batch(Q_LENS, KV_LENS, dim_v=24)
    k, v, kv_indptr = ragged(batch)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(WORKSPACE)
    wrapper.plan(batch.qo_indptr, kv_indptr, 4, 2, 16, 24, q_data_type="float32", **options)
    out, lse = wrapper.run_return_lse(batch.q, k, v)
    want, want_lse = batch.expected(**meaning)
    assert_near(out, want)
    assert_near(lse, want_lse)


@pytest.mark.parametrize(("options", "meaning"), OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("q_len", "kv_len"), [(33, 70), (1, 5), (9, 4)])
def test_single_prefill_is_attention_by_definition(options, meaning, q_len, kv_len):
    q, k, v = torch.randn(q_len, 6, 16), torch.randn(kv_len, 2, 16), torch.randn(kv_len, 2, 24)
    out, lse = flashinfer.single_prefill_with_kv_cache_return_lse(q, k, v, **options)
    want, want_lse = exact(q, k, v, **meaning)
    assert_near(out, want)
    assert_near(lse, want_lse)
    hnd = (k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous())
    assert_near(flashinfer.single_prefill_with_kv_cache(q, *hnd, kv_layout="HND", **options), want)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 5])
def test_joined_cache_of_every_layout(layout, page_size):
    batch = paged_batch(Q_LENS, KV_LENS, layout=layout, form="joined", page_size=page_size, dim_v=16)
    assert_near(planned(batch, layout=layout, causal=True).run(batch.q, batch.cache), batch.expected(causal=True)[0])


def test_head_dim_of_values_differs():
    batch = paged_batch([5, 2], [9, 20], dim=24, dim_v=16)
    out = planned(batch, dim=24, head_dim_vo=16).run(batch.q, batch.cache)
    assert_near(out, batch.expected()[0])


# ---- custom masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window_left", [-1, 4])
def test_custom_masks_take_the_place_of_causal(packed, window_left):
    # bits of a request start at a byte of their own: none of these sizes is a multiple of 8
    q_lens, kv_lens = [3, 5, 7, 1], [3, 9, 31, 13]
    batch, masks = paged_batch(q_lens, kv_lens), random_masks(q_lens, kv_lens)
    masks[1][2] = False  # a row without keys
    joined = torch.cat([m.flatten() for m in masks])
    bits_indptr = torch.tensor([0, *(m.numel() for m in masks)]).cumsum(0)
    options = {"custom_mask": joined}
    if packed:
        options = {"packed_custom_mask": flashinfer.segment_packbits(joined, bits_indptr, bitorder="little")[0]}
    want, want_lse = batch.expected(mask=masks, window_left=window_left)
    out, lse = planned(batch, causal=True, window_left=window_left, **options).run(batch.q, batch.cache, return_lse=True)
    assert_near(out, want)
    assert_near(lse, want_lse)
    k, v, kv_indptr = ragged(batch)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(WORKSPACE)
    wrapper.plan(batch.qo_indptr, kv_indptr, 4, 2, 16, q_data_type=torch.float32, window_left=window_left, **options)
    assert_near(wrapper.run(batch.q, k, v), want)


@pytest.mark.parametrize("packed", [False, True])
def test_custom_mask_of_a_single_request(packed):
    q, k, v = torch.randn(7, 4, 16), torch.randn(13, 2, 16), torch.randn(13, 2, 16)
    (mask,) = random_masks([7], [13])
    given = {"packed_custom_mask": flashinfer.packbits(mask, "little")} if packed else {"custom_mask": mask}
    assert_near(flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True, **given), exact(q, k, v, mask=mask)[0])


def test_fully_masked_rows_are_zero_with_infinite_lse():
    batch = paged_batch([2, 2], [5, 9])
    out, lse = planned(batch, custom_mask=torch.zeros(28, dtype=torch.bool)).run(batch.q, batch.cache, return_lse=True)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


@pytest.mark.parametrize("wrapper_kind", ["paged", "ragged"])
def test_wrongly_sized_masks_are_refused(wrapper_kind):
    batch = paged_batch([3, 5], [3, 9])
    kv_indptr = ragged(batch)[2]
    if wrapper_kind == "paged":
        wrapper, tables = flashinfer.BatchPrefillWithPagedKVCacheWrapper(WORKSPACE), (*batch.tables, 4, 2, 16, 4)
    else:
        wrapper, tables = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(WORKSPACE), (kv_indptr, 4, 2, 16)
    with pytest.raises(ShapeMismatch, match="custom_mask has 53 elements, expected 54"):
        wrapper.plan(batch.qo_indptr, *tables, custom_mask=torch.ones(53, dtype=torch.bool))
    with pytest.raises(ShapeMismatch, match=r"packed_custom_mask has 7 elements of torch.uint8, expected 8"):
        wrapper.plan(batch.qo_indptr, *tables, packed_custom_mask=torch.ones(7, dtype=torch.uint8))


def test_a_plan_without_a_mask_forgets_the_last_one():
    batch = paged_batch([3, 5], [3, 9])
    k, v, kv_indptr = ragged(batch)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(WORKSPACE)
    masks = random_masks([3, 5], [3, 9])
    wrapper.plan(
        batch.qo_indptr, kv_indptr, 4, 2, 16, q_data_type=torch.float32, custom_mask=torch.cat([m.flatten() for m in masks])
    )
    assert_near(wrapper.run(batch.q, k, v), batch.expected(mask=masks)[0])
    wrapper.plan(batch.qo_indptr, kv_indptr, 4, 2, 16, q_data_type=torch.float32)
    assert_near(wrapper.run(batch.q, k, v), batch.expected()[0])


def test_plans_with_masks_of_one_size_share_a_jitgen_plan():
    batch = paged_batch([3, 5], [3, 9])
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(WORKSPACE)
    for seed in (1, 2, 3):
        masks = random_masks([3, 5], [3, 9], seed)
        joined = torch.cat([m.flatten() for m in masks])
        wrapper.plan(batch.qo_indptr, *batch.tables, 4, 2, 16, 4, q_data_type=torch.float32, custom_mask=joined)
        assert_near(wrapper.run(batch.q, batch.cache), batch.expected(mask=masks)[0])
    assert len(wrapper._plans._held) == 1


def test_rows_beyond_those_of_a_captured_call_are_refused():
    buffers = [torch.zeros(n, dtype=torch.int32) for n in (3, 3, 64, 2)]
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(WORKSPACE, "NHD", True, *buffers)
    small, large = paged_batch([3, 5], [3, 9]), paged_batch([3, 6], [3, 9])
    wrapper.plan(small.qo_indptr, *small.tables, 4, 2, 16, 4, q_data_type=torch.float32)
    wrapper.run(small.q, small.cache)
    with pytest.raises(ShapeMismatch, match=r"the plan has 9 query rows, an earlier run\(\) .* had 8"):
        wrapper.plan(large.qo_indptr, *large.tables, 4, 2, 16, 4, q_data_type=torch.float32)


def test_mask_in_the_buffers_of_a_graph_wrapper():
    buffers = [torch.zeros(n, dtype=torch.int32) for n in (3, 3, 64, 2)]
    masks_at = (torch.zeros(256, dtype=torch.uint8), torch.zeros(3, dtype=torch.int32))
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(WORKSPACE, "NHD", True, *buffers, *masks_at)
    for kv_lens in ([3, 9], [30, 17]):
        batch, masks = paged_batch([3, 5], kv_lens), random_masks([3, 5], kv_lens)
        joined = torch.cat([m.flatten() for m in masks])
        wrapper.plan(batch.qo_indptr, *batch.tables, 4, 2, 16, 4, q_data_type=torch.float32, custom_mask=joined)
        assert_near(wrapper.run(batch.q, batch.cache), batch.expected(mask=masks)[0])
        assert wrapper._planned.options.bits is masks_at[0]


# ---- calls ----------------------------------------------------------------------------------------------------------------


def test_window_of_run_overrides_the_plan():
    batch = paged_batch([5, 3], [9, 40])
    wrapper = planned(batch, causal=True, window_left=2)
    for window in (6, -1):
        out = wrapper.run(batch.q, batch.cache, window_left=window)
        assert_near(out, batch.expected(causal=True, window_left=window)[0])
    assert_near(wrapper.run(batch.q, batch.cache), batch.expected(causal=True, window_left=2)[0])


def test_scales_and_sinks_hold_for_ragged_keys():
    batch = paged_batch([5, 3], [9, 40])
    k, v, kv_indptr = ragged(batch)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(WORKSPACE)
    wrapper.plan(batch.qo_indptr, kv_indptr, 4, 2, 16, q_data_type=torch.float32, causal=True)
    out, lse = wrapper.run(batch.q, k, v, q_scale=2.0, k_scale=0.5, v_scale=6.0, o_scale=2.0, sinks=sinks, return_lse=True)
    want, want_lse = batch.expected(causal=True, sinks=sinks)
    assert_near(out, want * 3)
    assert_near(lse, want_lse)


def test_single_prefill_with_scales_by_head():
    q, k, v = torch.randn(7, 4, 16), torch.randn(13, 2, 16), torch.randn(13, 2, 16)
    sq, sk, sv = torch.rand(4) + 0.5, torch.rand(2) + 0.5, torch.rand(2) + 0.5
    want = exact(q * sq[:, None], k * sk[:, None], v * sv[:, None], causal=True)[0]
    assert_near(flashinfer.single_prefill_with_kv_cache(q, k, v, sq, sk, sv, causal=True), want)
    assert flashinfer.single_prefill_with_kv_cache(q, k, v, o_dtype="float16").dtype == torch.float16


def test_a_soft_cap_below_0_is_none():
    batch = paged_batch([5, 3], [9, 40])
    want = batch.expected(causal=True)[0]
    assert_near(planned(batch, causal=True, logits_soft_cap=-1.0).run(batch.q, batch.cache), want)
    q, k, v = torch.randn(5, 4, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 16)
    assert_near(flashinfer.single_prefill_with_kv_cache(q, k, v, logits_soft_cap=-1.0), exact(q, k, v)[0])
    assert_near(flashinfer.single_decode_with_kv_cache(q[0], k, v, logits_soft_cap=-1.0), exact(q[:1], k, v)[0][0])


def test_single_requests_name_what_does_not_fit():
    q, k, v = torch.randn(5, 4, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 16)
    with pytest.raises(UnsupportedDtype, match=r"k has dtype torch.float8_e5m2, q has torch.float32. .*8 bits in a paged"):
        flashinfer.single_decode_with_kv_cache(q[0], k.to(torch.float8_e5m2), v)
    with pytest.raises(ShapeMismatch, match=r"q has shape \(4, 16\), expected \[q_len, num_q_heads, head_dim\]"):
        flashinfer.single_prefill_with_kv_cache(q[0], k, v)
    with pytest.raises(ShapeMismatch, match=r"k has shape \(16,\), expected 3 axes in the layout HND"):
        flashinfer.single_prefill_with_kv_cache(q, k[0, 0], v, kv_layout="HND")


def test_sink_wrapper_makes_the_hooks_of_a_scale_once():
    batch = paged_batch([5, 3], [9, 40])
    wrapper = flashinfer.BatchAttentionWithAttentionSinkWrapper(WORKSPACE)
    wrapper.plan(batch.qo_indptr, *batch.tables, 4, 2, 16, 4, q_data_type=torch.float32)
    sinks = torch.zeros(4)
    for scale in (0.5, 0.25, 0.5):
        want = batch.expected(sinks=sinks, scale=scale)[0]
        assert_near(wrapper.run(batch.q, batch.cache, sinks, scale), want)
    assert len(wrapper._ready) == 2
    with pytest.raises(InvalidType, match="takes no argument 'window', expected one of pos_encoding_mode"):
        flashinfer.BatchAttentionWithAttentionSinkWrapper(WORKSPACE, window=3)


def test_sink_wrapper_takes_the_sinks_by_position():
    batch = paged_batch([5, 3], [9, 40])
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    wrapper = flashinfer.BatchAttentionWithAttentionSinkWrapper(
        WORKSPACE, q_data_type=torch.float32, head_dim_qk=16, window_left=3
    )
    wrapper.plan(batch.qo_indptr, *batch.tables, 4, 2, 16, 4, causal=True, window_left=3, q_data_type=torch.float32)
    out, lse = wrapper.run(batch.q, batch.cache, sinks, 0.5, return_lse=True)
    want, want_lse = batch.expected(causal=True, window_left=3, sinks=sinks, scale=0.5)
    assert_near(out, want)
    assert_near(lse, want_lse)
    assert_near(wrapper.run(batch.q, batch.cache, sinks=sinks), batch.expected(causal=True, window_left=3, sinks=sinks)[0])


def test_sizes_of_workspaces_take_no_options_that_there_are_none_of():
    batch = paged_batch([5, 3], [9, 40])
    wrappers = [
        (flashinfer.BatchPrefillWithPagedKVCacheWrapper, (batch.qo_indptr, *batch.tables, 4, 2, 16, 4)),
        (flashinfer.BatchPrefillWithRaggedKVCacheWrapper, (batch.qo_indptr, batch.qo_indptr, 4, 2, 16)),
        (flashinfer.BatchDecodeWithPagedKVCacheWrapper, (*batch.tables, 4, 2, 16, 4)),
    ]
    for wrapper, given in wrappers:
        made = wrapper(WORKSPACE)
        assert len(made.workspace_size(*given, window_left=3, q_data_type="float32")) == 2
        with pytest.raises(InvalidType, match=r"workspace_size\(\) takes no option 'window', expected one of "):
            made.workspace_size(*given, window=3)


def test_tables_are_tensors_of_integers():
    batch = paged_batch([1, 1], [9, 40])
    tables = {"paged_kv_indptr": batch.indptr, "paged_kv_indices": batch.indices, "paged_kv_last_page_len": batch.last_page_len}
    prefill, decode = (kind(WORKSPACE) for kind in (flashinfer.BatchPrefillWithPagedKVCacheWrapper,
                                                    flashinfer.BatchDecodeWithPagedKVCacheWrapper))  # fmt: skip
    for i, name in enumerate(("qo_indptr", *tables)):
        for wrong, error in ((lambda t: t.tolist(), InvalidType), (lambda t: t.float(), UnsupportedDtype)):
            given = {"qo_indptr": batch.qo_indptr, **tables}
            given[name] = wrong(given[name])
            with pytest.raises(error, match=rf"^{name} .* expected a torch.Tensor of int32|^{name} has dtype torch.float32"):
                prefill.plan(**given, num_qo_heads=4, num_kv_heads=2, head_dim_qk=16, page_size=4)
            if i:
                with pytest.raises(error, match=name.removeprefix("paged_kv_")):
                    decode.plan(*list(given.values())[1:], 4, 2, 16, 4)
    with pytest.raises(InvalidType, match="num_qo_heads is '4' of type str"):
        decode.plan(*tables.values(), "4", 2, 16, 4)


def test_batch_attention():
    batch = paged_batch(Q_LENS, KV_LENS)
    wrapper = flashinfer.BatchAttention(device="cpu")
    kv_len = torch.tensor(KV_LENS, dtype=torch.int32)
    wrapper.plan(
        batch.qo_indptr, batch.indptr, batch.indices, kv_len, 4, 2, 16, 16, 4, causal=True,
        q_data_type=torch.float32, kv_data_type=torch.float32,
    )  # fmt: skip
    out, lse = wrapper.run(batch.q, batch.cache, v_scale=2.0)
    want, want_lse = batch.expected(causal=True)
    assert_near(out, want * 2, 4e-5)
    assert_near(lse, want_lse)
    assert_near(wrapper.run(batch.q, batch.cache, logits_soft_cap=1.5)[0], batch.expected(causal=True, cap=1.5)[0])
    with pytest.raises(UnsupportedOption, match="profiler"):
        wrapper.run(batch.q, batch.cache, profiler_buffer=torch.empty(1))


@pytest.mark.parametrize("given", [False, True])
def test_base_and_layout_of_the_logsumexp(given):
    batch = paged_batch([5, 3], [9, 40])
    k, v, kv_indptr = ragged(batch)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(WORKSPACE)
    wrapper.plan(batch.qo_indptr, kv_indptr, 4, 2, 16, q_data_type=torch.float32)
    want = batch.expected()[1]
    lse = torch.full((4, 8), torch.nan) if given else None
    for run, where in ((wrapper.run, (k, v)), (planned(batch).run, (batch.cache,))):
        got = run(batch.q, *where, return_lse=True, lse_base="ln", lse_layout="HN", lse=lse)[1]
        assert got.is_contiguous() and (lse is None or got is lse)
        assert_near(got, want.T * math.log(2))
        assert_near(run(batch.q, *where, return_lse=True, lse_layout="HN")[1], want.T)
        assert_near(run(batch.q, *where, return_lse=True)[1], want)
        with pytest.raises(UnsupportedOption, match="lse_base='e' is not known"):
            run(batch.q, *where, lse_base="e")


def test_padding_rows_are_not_written_and_splits_change_nothing():
    batch = paged_batch([5, 3], [9, 400])
    q, out = torch.cat((batch.q, batch.q[:2])), torch.full((10, 4, 16), 7.0)
    for options in ({}, {"disable_split_kv": True}, {"fixed_split_size": 2}):
        planned(batch, **options).run(q, batch.cache, out=out)
        assert_near(out[:8], batch.expected()[0])
        assert (out[8:] == 7).all()


def test_forward_overrides_the_plan():
    batch = paged_batch([5, 3], [9, 40])
    wrapper = planned(batch)
    assert_near(
        wrapper.forward(batch.q, batch.cache, causal=True, window_left=2), batch.expected(causal=True, window_left=2)[0]
    )
    assert_near(wrapper.forward_return_lse(batch.q, batch.cache)[1], batch.expected()[1])
    k, v, kv_indptr = ragged(batch)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(WORKSPACE)
    wrapper.begin_forward(batch.qo_indptr, kv_indptr, 4, 2, 16, q_data_type=torch.float32)
    assert_near(wrapper.forward(batch.q, k, v, True, "NONE", False, 2), batch.expected(causal=True, window_left=2)[0])


def test_batch_of_no_request():
    batch = paged_batch([], [])
    out, lse = planned(batch, causal=True).run(batch.q, batch.cache, return_lse=True)
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4)


def test_positional_order_differs_between_the_two_wrappers():
    batch = paged_batch([5, 3], [9, 40])
    k, v, kv_indptr = ragged(batch)
    by_position = (None, None, None, True, "NONE", False)  # head_dim_vo to use_fp16_qk_reduction
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(WORKSPACE)
    wrapper.plan(batch.qo_indptr, kv_indptr, 4, 2, 16, *by_position, 3, 2.0, 0.5, q_data_type=torch.float32)
    want = batch.expected(causal=True, window_left=3, cap=2.0, scale=0.5)[0]
    assert_near(wrapper.run(batch.q, k, v), want)
    paged = flashinfer.BatchPrefillWithPagedKVCacheWrapper(WORKSPACE)
    hints = {"max_sequence_kv": 40, "seq_lens": torch.tensor([9, 40]), "uniform_q_len": 5}
    paged.plan(batch.qo_indptr, *batch.tables, 4, 2, 16, 4, *by_position, 0.5, 3, 2.0, q_data_type=torch.float32, **hints)
    assert_near(paged.run(batch.q, batch.cache), want)
    kept = (paged._causal, paged._window_left, paged._logits_soft_cap, paged._sm_scale)
    assert kept == (True, 3, 2.0, 0.5)  # vLLM reads them


@pytest.mark.parametrize("name", ["prefix_len_ptr", "token_pos_in_items_ptr", "max_item_len_ptr"])
def test_multi_item_scoring_is_refused(name):
    batch = paged_batch([5, 3], [9, 40])
    with pytest.raises(UnsupportedOption, match="mask_mod"):
        planned(batch, **{name: torch.zeros(2)})
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(WORKSPACE)
    with pytest.raises(UnsupportedOption, match="mask_mod"):
        wrapper.plan(batch.qo_indptr, ragged(batch)[2], 4, 2, 16, **{name: torch.zeros(2)})


def test_plan_and_run_refuse_what_they_cannot_do():
    batch = paged_batch([5, 3], [9, 40])
    with pytest.raises(UnsupportedOption, match="pos_encoding_mode='ROPE' is not known"):
        planned(batch, pos_encoding_mode="ROPE")
    with pytest.raises(ShapeMismatch, match="num_qo_heads is 5, num_kv_heads is 2"):
        planned(batch, heads=(5, 2))
    with pytest.raises(UnsupportedOption, match="use_fp16_softmax=True changes the result"):
        planned(batch).run(batch.q, batch.cache, use_fp16_softmax=True)
    with pytest.raises(ShapeMismatch, match="q has 7 rows, the plan has 8"):
        planned(batch).run(batch.q[:7], batch.cache)
    with pytest.raises(ShapeMismatch, match=r"qo_indptr has shape \(2,\), expected \[3\]"):
        flashinfer.BatchPrefillWithPagedKVCacheWrapper(WORKSPACE).plan(batch.qo_indptr[:2], *batch.tables, 4, 2, 16, 4)
