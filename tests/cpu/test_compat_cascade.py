"""flashinfer.cascade and flashinfer.pod of the shim: merging of states, shared prefixes, prefill beside decode."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from compat_reference import WORKSPACE, assert_near, exact, paged_batch

from jitgen.compat import flashinfer
from jitgen.compat.flashinfer import _wrapper
from jitgen.errors import ShapeMismatch, UnsupportedOption


def merged_by_hand(v, s):
    """States [n, states, H, D] and [n, states, H] in float64."""
    weight = torch.nan_to_num((s.double() - s.double().amax(1, keepdim=True)).exp2())
    total = weight.sum(1)
    out = torch.nan_to_num((torch.nan_to_num(v.double()) * weight[..., None]).sum(1) / total[..., None])
    return out, s.double().amax(1) + total.log2()


def random_states(n=7, states=3, heads=5, dim=16):
    v, s = torch.randn(n, states, heads, dim), 20 * torch.randn(n, states, heads)
    v[0, 1], s[0, 1] = math.nan, -math.inf  # a state without keys may hold anything
    v[1], s[1] = math.nan, -math.inf
    return v, s


def test_merge_states_is_the_weighted_mean():
    v, s = random_states()
    out, lse = flashinfer.merge_states(v, s)
    want, want_lse = merged_by_hand(v, s)
    assert_near(out, want)
    assert_near(lse, want_lse, 1e-4)


def test_merge_state_keeps_dtypes():
    v, s = random_states(states=2)
    out, lse = flashinfer.merge_state(v[:, 0].bfloat16(), s[:, 0], v[:, 1].bfloat16(), s[:, 1])
    want, want_lse = merged_by_hand(v.bfloat16(), s)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert_near(out, want, 2e-2)
    assert_near(lse, want_lse, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_merge_in_place_updates_s_of_any_dtype(dtype):
    v, s = random_states(states=2)
    s = s.to(dtype)
    mask = torch.arange(7) % 2 == 0
    target, logs = v[:, 0].clone(), s[:, 0].clone()
    flashinfer.merge_state_in_place(target, logs, v[:, 1], s[:, 1], mask)
    want, want_lse = merged_by_hand(v, s)
    assert_near(target[mask], want[mask])
    assert_near(logs[mask], want_lse[mask], 0.3 if dtype == torch.bfloat16 else 1e-4)
    assert torch.equal(target[~mask].nan_to_num(), v[~mask, 0].nan_to_num())
    assert torch.equal(logs[~mask], s[~mask, 0])
    flashinfer.merge_state_in_place(target, logs, v[:, 1], s[:, 1])


def test_merge_refuses_states_that_do_not_fit():
    v, s = random_states()
    with pytest.raises(ShapeMismatch, match="state b has v"):
        flashinfer.merge_state(v[:, 0], s[:, 0], v[:, 1], s[:5, 1])
    with pytest.raises(ShapeMismatch, match="outs has shape"):
        flashinfer.merge_states(v, s[:, :2])


# ---- cascade --------------------------------------------------------------------------------------------------------------

Q_LENS = [3, 1, 5, 2]
LEVELS = [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1], [2], [3]]]  # groups of requests at each level
KV_LENS = [[37], [11, 0], [9, 1, 130, 4]]
OPTIONS = {
    "plain": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "window": ({"causal": True, "window_left": 12}, {"causal": True, "window_left": 12}),
    "alibi": ({"causal": True, "pos_encoding_mode": "ALIBI"}, {"causal": True, "pos": "ALIBI"}),
    "rope": ({"causal": True, "pos_encoding_mode": "ROPE_LLAMA"}, {"causal": True, "pos": "ROPE_LLAMA"}),
    "cap": ({"logits_soft_cap": 1.5, "sm_scale": 0.6}, {"cap": 1.5, "scale": 0.6}),
}


def cascade_tables(levels):
    """One cache for all levels, tables by level, and the keys of each request, joined over levels."""
    batches = [
        paged_batch([sum(Q_LENS[r] for r in group) for group in level], kv_lens, seed=i)
        for i, (level, kv_lens) in enumerate(levels)
    ]
    caches = [torch.cat(parts) for parts in zip(*(b.cache for b in batches), strict=True)]
    first = [0, *itertools.accumulate(b.cache[0].shape[0] for b in batches)]
    tables = [
        [b.qo_indptr for b in batches], [b.indptr for b in batches],
        [b.indices + page for b, page in zip(batches, first, strict=False)], [b.last_page_len for b in batches],
    ]  # fmt: skip
    keys = [[], [], [], []]
    for (level, _), batch in zip(levels, batches, strict=True):
        for g, group in enumerate(level):
            for r in group:
                keys[r].append((batch.keys[g], batch.values[g]))
    return tuple(caches), tables, [tuple(map(torch.cat, zip(*k, strict=True))) for k in keys]


@pytest.mark.parametrize(("options", "meaning"), OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("num_levels", [1, 2, 3])
def test_cascade_is_attention_over_the_whole_context(options, meaning, num_levels):
    levels = list(zip(LEVELS, KV_LENS, strict=True))[-num_levels:]
    cache, tables, keys = cascade_tables(levels)
    q = torch.randn(sum(Q_LENS), 4, 16)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(num_levels, WORKSPACE)
    wrapper.plan(*tables, 4, 2, 16, 4, q_data_type=torch.float32, **options)
    ends = torch.tensor([0, *Q_LENS]).cumsum(0)
    # the definition counts ALiBi's rows from the last level's first; another count changes only the logsumexp
    want = torch.cat([exact(q[ends[r] : ends[r + 1]], *keys[r], **meaning)[0] for r in range(4)])
    assert_near(wrapper.run(q, cache), want)
    wrapper.end_forward()


@pytest.mark.parametrize("options", [OPTIONS["causal"], OPTIONS["window"], OPTIONS["rope"]], ids=["causal", "window", "rope"])
def test_cascade_for_graphs_keeps_its_buffers(options):
    buffers = [[torch.zeros(n, dtype=torch.int32) for n in (groups + 1, groups + 1, 200, groups)] for groups in (1, 2, 4)]
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(3, WORKSPACE, "NHD", True, *map(list, zip(*buffers, strict=True)))
    q, ends = torch.randn(sum(Q_LENS), 4, 16), torch.tensor([0, *Q_LENS]).cumsum(0)
    plans = None
    for kv_lens in (KV_LENS, [[5], [3, 80], [4, 70, 5, 2]], [[90], [0, 1], [3, 1, 300, 9]]):
        cache, tables, keys = cascade_tables(list(zip(LEVELS, kv_lens, strict=True)))
        wrapper.plan(*tables, 4, 2, 16, 4, q_data_type=torch.float32, **options[0])
        want = torch.cat([exact(q[ends[r] : ends[r + 1]], *keys[r], **options[1])[0] for r in range(4)])
        assert_near(wrapper.run(q, cache), want)
        now = [[h.plan for h in level._plans._held.values()] for level in wrapper._levels] + [[*wrapper._plans._held.values()]]
        assert any(now)
        assert plans is None or plans == now  # what a graph has captured serves on
        plans = now


def test_cascade_over_a_cache_of_8_bits():
    levels = list(zip(LEVELS, KV_LENS, strict=True))
    cache, tables, keys = cascade_tables(levels)
    q = torch.randn(sum(Q_LENS), 4, 16)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(3, WORKSPACE)
    wrapper.plan(*tables, 4, 2, 16, 4, causal=True, q_data_type=torch.float32, kv_data_type=torch.float8_e4m3fn)
    parts = tuple(t.to(torch.float8_e4m3fn) for t in (cache if isinstance(cache, tuple) else cache.unbind(1)))
    ends = torch.tensor([0, *Q_LENS]).cumsum(0)
    read = [[t.to(torch.float8_e4m3fn).float() for t in pair] for pair in keys]
    want = torch.cat([exact(q[ends[r] : ends[r + 1]], *read[r], causal=True)[0] for r in range(4)])
    assert_near(wrapper.run(q, parts), want)


def test_cascade_needs_a_table_for_each_level():
    _, tables, _ = cascade_tables(list(zip(LEVELS, KV_LENS, strict=True)))
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, WORKSPACE)
    with pytest.raises(ShapeMismatch, match="lists of 3, 3, 3, 3 levels, the wrapper has 2"):
        wrapper.plan(*tables, 4, 2, 16, 4)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_decode_with_a_shared_prefix(layout):
    batch = paged_batch([1, 1, 1], [5, 0, 70], layout=layout)
    k, v = torch.randn(29, 2, 16), torch.randn(29, 2, 16)
    shared = (k, v) if layout == "NHD" else (k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous())
    wrapper = flashinfer.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(WORKSPACE, layout)
    wrapper.begin_forward(*batch.tables, 4, 2, 16, 4, data_type=torch.float32)
    want = [exact(batch.q[b : b + 1], torch.cat((k, batch.keys[b])), torch.cat((v, batch.values[b])))[0] for b in range(3)]
    assert_near(wrapper.forward(batch.q, *shared, batch.cache), torch.cat(want))
    wrapper.end_forward()


@pytest.mark.parametrize("causal", [False, True])
def test_prefill_with_a_shared_prefix(causal):
    batch = paged_batch([3, 1, 5], [5, 9, 70])
    k, v = torch.randn(29, 2, 16), torch.randn(29, 2, 16)
    wrapper = flashinfer.BatchPrefillWithSharedPrefixPagedKVCacheWrapper(WORKSPACE)
    wrapper.begin_forward(batch.qo_indptr, *batch.tables, 4, 2, 16, 4)
    out = wrapper.forward(batch.q, k, v, batch.cache, causal=causal, sm_scale=0.4)
    want = [
        exact(batch.q[batch.rows(b)], torch.cat((k, batch.keys[b])), torch.cat((v, batch.values[b])), causal=causal, scale=0.4)[
            0
        ]
        for b in range(3)
    ]
    assert_near(out, torch.cat(want))


# ---- prefill beside decode ------------------------------------------------------------------------------------------------


def test_pod_returns_both_parts_with_their_logsumexps():
    batch = paged_batch([1, 1, 1], [5, 40, 0])
    q, k, v = torch.randn(17, 4, 16), torch.randn(30, 2, 16), torch.randn(30, 2, 16)
    wrapper = flashinfer.PODWithPagedKVCacheWrapper(WORKSPACE)
    wrapper.plan(*batch.tables, 4, 2, 16, 4, window_left=9, q_data_type=torch.float32)
    prefill, decode = wrapper.run(q, k, v, batch.q, batch.cache, causal_p=True, return_lse_p=True, return_lse_d=True)
    for got, want in ((prefill, exact(q, k, v, causal=True)), (decode, batch.expected(window_left=9))):
        assert_near(got[0], want[0])
        assert_near(got[1], want[1])
    with pytest.raises(UnsupportedOption, match=r"run\(\) got 3 for decode, plan\(\) 9"):
        wrapper.run(q, k, v, batch.q, batch.cache, window_left_d=3)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("one_cache", [False, True])
@pytest.mark.parametrize("padding", [0, 3])
def test_batch_pod_is_prefill_and_decode(causal, one_cache, padding):
    # decode rows come in twos: without a causal mask the first sees all keys too
    both = paged_batch([5, 9, 2, 2, 2], [8, 40, 5, 70, 2])
    split = [0, 2, 5]
    parts = []
    for lo, hi in itertools.pairwise(split):
        rows, pages = both.qo_indptr[lo : hi + 1] - both.qo_indptr[lo], both.indptr[lo : hi + 1] - both.indptr[lo]
        indices = both.indices[both.indptr[lo] : both.indptr[hi]]
        parts.append((rows, pages, torch.cat((indices, indices[:1])), both.last_page_len[lo:hi]))
    cache_d = both.cache if one_cache else tuple(t.clone() for t in both.cache)
    wrapper = flashinfer.BatchPODWithPagedKVCacheWrapper(WORKSPACE)
    wrapper.plan(*parts[0], *parts[1], 4, 2, 16, 4, q_data_type=torch.float32)
    q_p = torch.cat((both.q[:14], torch.randn(padding, 4, 16)))
    want, want_lse = both.expected(causal=[causal, causal, False, False, False])
    for _ in range(2):
        prefill, decode = wrapper.run(q_p, both.cache, both.q[14:], cache_d, causal_p=causal, return_lse=True)
        for i, w in enumerate((want, want_lse)):
            assert_near(prefill[i][:14], w[:14])
            assert_near(decode[i], w[14:])


def test_pods_refuse_what_differs_from_their_plan():
    batch = paged_batch([5, 1], [8, 40])
    tables = [(batch.qo_indptr[:2], batch.indptr[:2], batch.indices[:2], batch.last_page_len[:1]),
              (batch.qo_indptr[1:] - 5, batch.indptr[1:] - 2, batch.indices[2:], batch.last_page_len[1:])]  # fmt: skip
    wrapper = flashinfer.BatchPODWithPagedKVCacheWrapper(WORKSPACE)
    wrapper.plan(*tables[0], *tables[1], 4, 2, 16, 4, q_data_type=torch.float32)
    with pytest.raises(ShapeMismatch, match=r"q_p has 4 rows, the plan has 5\. Plan again"):
        wrapper.run(batch.q[:4], batch.cache, batch.q[5:], batch.cache)
    decode = paged_batch([1], [9])
    pod = flashinfer.PODWithPagedKVCacheWrapper(WORKSPACE)
    pod.plan(*decode.tables, 4, 2, 16, 4, q_data_type=torch.float32)
    prefill = torch.randn(7, 4, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 16)
    with pytest.raises(UnsupportedOption, match="kv_layout_d='HND', the wrapper was made for 'NHD'"):
        pod.run(*prefill, decode.q, decode.cache, kv_layout_d="HND")


def test_batch_pod_with_a_custom_mask():
    both = paged_batch([5, 1], [8, 40])
    tables = [
        (both.qo_indptr[:2], both.indptr[:2], both.indices[:2], both.last_page_len[:1]),
        (both.qo_indptr[1:] - 5, both.indptr[1:] - 2, both.indices[2:], both.last_page_len[1:]),
    ]
    mask = torch.rand(5, 8) < 0.6
    wrapper = flashinfer.BatchPODWithPagedKVCacheWrapper(WORKSPACE)
    wrapper.plan(*tables[0], *tables[1], 4, 2, 16, 4, q_data_type=torch.float32)
    prefill, decode = wrapper.run(both.q[:5], both.cache, both.q[5:], both.cache, custom_mask_p=mask.flatten())
    want = both.expected(mask=[mask, None])[0]
    assert_near(prefill, want[:5])
    assert_near(decode, want[5:])
    prefill, decode = wrapper.run(both.q[:5], both.cache, both.q[5:], both.cache)  # the mask was that of the other call
    want = both.expected()[0]
    assert_near(prefill, want[:5])
    assert_near(decode, want[5:])


def test_options_of_earlier_plans_are_let_go():
    q, cache = torch.randn(3, 4, 16), torch.randn(2, 2, 4, 2, 16)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, WORKSPACE)
    level = [torch.tensor([0, 3]), torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([4])]
    for _ in range(_wrapper.MAX_OVERRIDDEN + 10):
        wrapper.plan(*[[t, t] for t in level], 4, 2, 16, 4, pos_encoding_mode="ROPE_LLAMA", q_data_type=torch.float32)
        wrapper.run(q, cache)
    assert all(len(each._overridden) <= _wrapper.MAX_OVERRIDDEN for each in wrapper._levels)
