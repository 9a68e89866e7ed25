"""The FlashInfer shim on the device: every entry point against attention by definition, and CUDA graphs."""

from __future__ import annotations

import warnings

import pytest
import torch
from compat_reference import assert_near, exact, paged_batch

from jitgen.compat import flashinfer
from jitgen.errors import ShapeMismatch

HEADS, DIM, PAGE = (8, 2), 64, 16
TOLERANCE = 2e-2  # outputs are bfloat16, of values up to about 4
LSE_TOLERANCE = 2e-3
OPTIONS = {  # few: every one is some kernels to compile, and the variants have tests of their own
    "window_cap_alibi": (
        {"window_left": 40, "logits_soft_cap": 5.0, "pos_encoding_mode": "ALIBI"},
        {"window_left": 40, "cap": 5.0, "pos": "ALIBI"},
    ),
    "rope": ({"pos_encoding_mode": "ROPE_LLAMA"}, {"pos": "ROPE_LLAMA"}),
}


@pytest.fixture
def workspace():
    return torch.empty(1024, dtype=torch.uint8, device="cuda")


def batch_of(q_lens, kv_lens, **options):
    return paged_batch(q_lens, kv_lens, heads=HEADS, dim=DIM, page_size=PAGE, dtype=torch.bfloat16, **options)


def check(got, want, *, rope=False):
    tolerance = 4 * TOLERANCE if rope else TOLERANCE  # rotated keys are rounded to bfloat16 once more
    assert_near(got[0].cpu(), want[0], tolerance)
    assert_near(got[1].cpu(), want[1], 40 * LSE_TOLERANCE if rope else LSE_TOLERANCE)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_batch_decode(workspace, layout):
    lengths = [1, 15, 16, 17, 0, 300, 2000]
    batch = batch_of([1] * len(lengths), lengths, layout=layout, form="joined")
    here = batch.on_gpu()
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, layout)
    wrapper.plan(*here.tables, *HEADS, DIM, PAGE, q_data_type=torch.bfloat16)
    check(wrapper.run(here.q, here.cache, return_lse=True), batch.expected())
    sinks, kept = torch.randn(8), [0, 1, 2, 3, 5, 6]  # a request without keys has nothing but its sink
    got = wrapper.run(here.q, here.cache, return_lse=True, sinks=sinks.cuda(), v_scale=0.5)
    want = batch.expected(sinks=sinks)
    check([t[kept] for t in got], (want[0][kept] * 0.5, want[1][kept]))


@pytest.mark.parametrize(("options", "meaning"), OPTIONS.values(), ids=OPTIONS)
def test_batch_decode_options(workspace, options, meaning):
    batch = batch_of([1] * 4, [1, 40, 300, 2000])
    here = batch.on_gpu()
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace)
    wrapper.plan(*here.tables, *HEADS, DIM, PAGE, q_data_type=torch.bfloat16, **options)
    got = wrapper.run(here.q, here.cache, return_lse=True)
    check(got, batch.expected(**meaning), rope="ROPE_LLAMA" in options.values())


@pytest.mark.parametrize(("options", "meaning"), OPTIONS.values(), ids=OPTIONS)
def test_paged_and_ragged_prefill(workspace, options, meaning):
    batch = batch_of([5, 1, 0, 133, 300], [9, 70, 6, 140, 1000])
    here, want = batch.on_gpu(), batch.expected(causal=True, **meaning)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace)
    wrapper.plan(here.qo_indptr, *here.tables, *HEADS, DIM, PAGE, causal=True, q_data_type="bfloat16", **options)
    check(wrapper.run(here.q, here.cache, return_lse=True), want, rope="ROPE_LLAMA" in options.values())
    kv_indptr = torch.tensor([0, *map(len, batch.keys)]).cumsum(0).int()
    ragged = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace)
    ragged.plan(here.qo_indptr, kv_indptr, *HEADS, DIM, causal=True, q_data_type="bfloat16", **options)
    got = ragged.run(here.q, torch.cat(batch.keys).cuda(), torch.cat(batch.values).cuda(), return_lse=True)
    check(got, want, rope="ROPE_LLAMA" in options.values())


def test_custom_masks(workspace):
    window_left = 20
    q_lens, kv_lens = [3, 70, 1, 130], [30, 99, 600, 131]
    batch = batch_of(q_lens, kv_lens)
    masks = [torch.rand(n, m) < 0.5 for n, m in zip(q_lens, kv_lens, strict=True)]
    here, joined = batch.on_gpu(), torch.cat([m.flatten() for m in masks])
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace)
    wrapper.plan(
        here.qo_indptr, *here.tables, *HEADS, DIM, PAGE, custom_mask=joined.cuda(), window_left=window_left,
        q_data_type=torch.bfloat16,
    )  # fmt: skip
    check(wrapper.run(here.q, here.cache, return_lse=True), batch.expected(mask=masks, window_left=window_left))


@pytest.mark.parametrize("q_len", [1, 200])
def test_single_request(q_len):
    options, meaning = {"window_left": 40, "pos_encoding_mode": "ROPE_LLAMA"}, {"window_left": 40, "pos": "ROPE_LLAMA"}
    q, k, v = (torch.randn(n, h, DIM).bfloat16() for n, h in ((q_len, 8), (333, 2), (333, 2)))
    here = [t.cuda() for t in (q, k, v)]
    got = flashinfer.single_prefill_with_kv_cache(*here, causal=True, return_lse=True, **options)
    check(got, exact(q, k, v, causal=True, **meaning), rope=True)
    if q_len == 1:
        got = flashinfer.single_decode_with_kv_cache(here[0][0], *here[1:], return_lse=True, **options)
        check([t[None] for t in got], exact(q, k, v, **meaning), rope=True)


def test_replays_follow_the_plan(workspace):
    buffers = [torch.zeros(n, dtype=torch.int32, device="cuda") for n in (5, 600, 4)]
    wrapper = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(workspace, *buffers)
    first = batch_of([1] * 4, [2000, 3000, 1000, 1500])
    cache = tuple(torch.zeros(700, *t.shape[1:], dtype=t.dtype, device="cuda") for t in first.cache)
    q, out = first.q.cuda(), torch.full((4, 8, DIM), torch.nan, dtype=torch.bfloat16, device="cuda")

    def plan(batch):
        wrapper.plan(*batch.tables, *HEADS, DIM, PAGE, q_data_type=torch.bfloat16, window_left=900)
        for place, t in zip(cache, batch.cache, strict=True):
            place[: len(t)] = t.cuda()
        q.copy_(batch.q)

    plan(first)
    wrapper.run(q, cache, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        wrapper.run(q, cache, out=out)
    for seed, lengths in enumerate(([1, 0, 17, 3000], [2999, 16, 16, 15], [5, 6, 7, 8])):
        batch = batch_of([1] * 4, lengths, seed=seed)
        plan(batch)
        out.fill_(torch.nan)
        graph.replay()
        assert_near(out.cpu(), batch.expected(window_left=900)[0], TOLERANCE)


def test_plan_and_run_wait_for_nothing(workspace):
    batch = batch_of([1] * 4, [1, 40, 300, 2000]).on_gpu()
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace)
    prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace)

    def step():
        decode.plan(*batch.tables, *HEADS, DIM, PAGE, q_data_type=torch.bfloat16)
        prefill.plan(batch.qo_indptr, *batch.tables, *HEADS, DIM, PAGE, q_data_type=torch.bfloat16)
        return decode.run(batch.q, batch.cache), prefill.run(batch.q, batch.cache)

    step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_append_and_rotation_can_be_captured():
    indptr, indices = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, 3, 4], [5, 0, 2, 7]))
    batch_indices, positions = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, -1, 1], [40, 0, 3]))
    k, cache = torch.randn(3, 2, DIM, device="cuda"), torch.zeros(9, PAGE, 2, DIM, device="cuda")

    def step():
        q, rotated = flashinfer.apply_rope_pos_ids(k, k, positions.clamp(min=0))
        flashinfer.append_paged_kv_cache(rotated, q, batch_indices, positions, (cache, cache.clone()), indices, indptr, None)
        return rotated

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rotated = step()
    cache.zero_()
    positions.copy_(torch.tensor([17, 0, 9]))
    graph.replay()
    want = torch.zeros_like(cache)
    want[0, 1], want[7, 9] = rotated[0], rotated[2]
    assert torch.equal(cache, want)


def test_block_sparse_finds_wrong_columns_without_a_wait(workspace):
    chosen = torch.rand(5, 6) < 0.5
    chosen[0, 0] = True
    indices = chosen.nonzero()[:, 1].int()
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), chosen.sum(1).cumsum(0))).int()
    q, k, v = (torch.randn(n, h, DIM).bfloat16() for n, h in ((300, 8), (384, 2), (384, 2)))
    wrapper = flashinfer.BlockSparseAttentionWrapper(workspace)
    wrapper.plan(indptr, indices.cuda(), 300, 384, 64, 64, *HEADS, DIM, q_data_type=torch.bfloat16)
    got = wrapper.run(q.cuda(), k.cuda(), v.cuda(), return_lse=True)
    check(got, exact(q, k, v, mask=chosen.repeat_interleave(64, 0).repeat_interleave(64, 1)[:300]))
    indices[0] = 6
    with pytest.raises(ShapeMismatch, match="a block column outside"):
        wrapper.plan(indptr, indices.cuda(), 300, 384, 64, 64, *HEADS, DIM, q_data_type=torch.bfloat16)
        torch.cuda.synchronize()
        wrapper.run(q.cuda(), k.cuda(), v.cuda())


def test_cascade_and_shared_prefix(workspace):
    own = batch_of([1, 1, 1], [5, 70, 0])
    prefix = batch_of([3], [500], seed=1)
    pages = own.cache[0].shape[0]
    cache = tuple(torch.cat(t).cuda() for t in zip(own.cache, prefix.cache, strict=True))
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace)
    wrapper.plan(
        [prefix.qo_indptr, own.qo_indptr], [prefix.indptr, own.indptr], [prefix.indices + pages, own.indices],
        [prefix.last_page_len, own.last_page_len], *HEADS, DIM, PAGE, causal=True, window_left=100, q_data_type=torch.bfloat16,
    )  # fmt: skip
    want = [
        exact(
            own.q[b : b + 1],
            torch.cat((prefix.keys[0], own.keys[b])),
            torch.cat((prefix.values[0], own.values[b])),
            window_left=100,
        )
        for b in range(3)
    ]
    assert_near(wrapper.run(own.q.cuda(), cache).cpu(), torch.cat([w[0] for w in want]), TOLERANCE)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_decode_with_a_prefix_that_has_no_pages(workspace, layout):
    batch = batch_of([1] * 5, [5, 0, 70, 300, 16], layout=layout)
    k, v = (torch.randn(333, HEADS[1], DIM, dtype=torch.bfloat16) for _ in range(2))
    shared = (k, v) if layout == "NHD" else (k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous())
    wrapper = flashinfer.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(workspace, layout)
    wrapper.begin_forward(*(t.cuda() for t in batch.tables), *HEADS, DIM, PAGE, data_type=torch.bfloat16)
    got = wrapper.forward(batch.q.cuda(), *(t.cuda() for t in shared), tuple(t.cuda() for t in batch.cache))
    want = [exact(batch.q[b : b + 1], torch.cat((k, batch.keys[b])), torch.cat((v, batch.values[b])))[0] for b in range(5)]
    assert_near(got.cpu(), torch.cat(want), TOLERANCE)


@pytest.mark.parametrize("causal", [False, True])
def test_prefill_with_a_prefix_that_has_no_pages(workspace, causal):
    batch = batch_of([3, 100, 17], [5, 170, 70])
    k, v = (torch.randn(333, HEADS[1], DIM, dtype=torch.bfloat16) for _ in range(2))
    wrapper = flashinfer.BatchPrefillWithSharedPrefixPagedKVCacheWrapper(workspace)
    wrapper.begin_forward(batch.qo_indptr.cuda(), *(t.cuda() for t in batch.tables), *HEADS, DIM, PAGE)
    cache = tuple(t.cuda() for t in batch.cache)
    got = wrapper.forward(batch.q.cuda(), k.cuda(), v.cuda(), cache, causal=causal, sm_scale=0.1)
    want = [
        exact(q, torch.cat((k, keys)), torch.cat((v, values)), causal=causal, scale=0.1)[0]
        for q, keys, values in ((batch.q[batch.rows(b)], batch.keys[b], batch.values[b]) for b in range(3))
    ]
    assert_near(got.cpu(), torch.cat(want), TOLERANCE)
