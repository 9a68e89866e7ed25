"""flashinfer.decode of the shim against attention by definition."""

from __future__ import annotations

import pytest
import torch
from compat_reference import WORKSPACE, assert_near, exact, paged_batch

from jitgen.compat import flashinfer
from jitgen.errors import ShapeMismatch, UnsupportedDtype, UnsupportedOption, VariantError

LENGTHS = [1, 3, 4, 5, 0, 37, 130]
OPTIONS = {
    "plain": {},
    "window": {"window_left": 3},
    "window_0": {"window_left": 0},
    "cap": {"logits_soft_cap": 1.5},
    "alibi": {"pos_encoding_mode": "ALIBI"},
    "alibi_cap": {"pos_encoding_mode": "ALIBI", "logits_soft_cap": 2.0},
    "rope": {"pos_encoding_mode": "ROPE_LLAMA", "rope_scale": 2.0, "rope_theta": 500.0},
    "scale": {"sm_scale": 0.7},
}
NAMES = {
    "logits_soft_cap": "cap", "pos_encoding_mode": "pos", "sm_scale": "scale", "rope_theta": "theta",
    "window_left": "window_left", "rope_scale": "rope_scale",
}  # fmt: skip


def by_definition(options):
    return {NAMES[name]: value for name, value in options.items()}


def decode(batch, cache=None, *, heads=(4, 2), dim=16, layout="NHD", run=None, **options):
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(WORKSPACE, layout)
    wrapper.plan(*batch.tables, *heads, dim, batch.page_size, q_data_type=batch.q.dtype, **options)
    return wrapper.run(batch.q, batch.cache if cache is None else cache, return_lse=True, **(run or {}))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_batch_decode_is_attention_by_definition(options):
    batch = paged_batch([1] * len(LENGTHS), LENGTHS)
    out, lse = decode(batch, **options)
    want, want_lse = batch.expected(**by_definition(options))
    assert_near(out, want)
    assert_near(lse, want_lse)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_single_decode_is_attention_by_definition(options):
    q, k, v = torch.randn(6, 16), torch.randn(37, 2, 16), torch.randn(37, 2, 24)
    out, lse = flashinfer.single_decode_with_kv_cache(q, k, v, return_lse=True, **options)
    want, want_lse = exact(q[None], k, v, **by_definition(options))
    assert_near(out, want[0])
    assert_near(lse, want_lse[0])
    hnd = (k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous())
    assert_near(flashinfer.single_decode_with_kv_cache(q, *hnd, kv_layout="HND", **options), want[0])


@pytest.mark.parametrize("form", ["pair", "joined"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_every_cache_layout_is_read(layout, form, page_size):
    batch = paged_batch([1] * len(LENGTHS), LENGTHS, layout=layout, form=form, page_size=page_size)
    out, lse = decode(batch, layout=layout)
    want, want_lse = batch.expected()
    assert_near(out, want)
    assert_near(lse, want_lse)


def test_cache_of_any_strides_and_int64_tables_are_read():
    batch = paged_batch([1, 1], [9, 6])
    wide = tuple(torch.full((*t.shape[:3], 40), torch.nan) for t in batch.cache)
    views = tuple(w[..., :16] for w in wide)
    for view, t in zip(views, batch.cache, strict=True):
        view.copy_(t)
    batch.indptr, batch.indices, batch.last_page_len = (t.long() for t in batch.tables)
    assert_near(decode(batch, views)[0], batch.expected()[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_dtype_names(dtype):
    batch = paged_batch([1, 1, 1], [5, 64, 200], dtype=dtype)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(WORKSPACE)
    wrapper.plan(*batch.tables, 4, 2, 16, 4, data_type=str(dtype).removeprefix("torch."), q_data_type=None)
    out = wrapper.run(batch.q, batch.cache)
    assert out.dtype == dtype
    assert_near(out, batch.expected()[0], 2e-2)


def test_output_dtype_of_the_plan():
    batch = paged_batch([1, 1], [5, 9], dtype=torch.bfloat16)
    out, _ = decode(batch, o_data_type="float32")
    assert out.dtype == torch.float32
    assert_near(out, batch.expected()[0], 2e-2)


@pytest.mark.parametrize("window_left", [-1, 2])
def test_several_rows_a_request_are_causal(window_left):
    batch = paged_batch([3, 3, 3], [3, 7, 40])
    out, lse = decode(batch, q_len_per_req=3, window_left=window_left)
    want, want_lse = batch.expected(causal=True, window_left=window_left)
    assert_near(out, want)
    assert_near(lse, want_lse)


def test_right_window():
    batch = paged_batch([3, 3], [7, 40])
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(WORKSPACE)
    wrapper.plan(*batch.tables, 4, 2, 16, 4, q_data_type=torch.float32, q_len_per_req=3, window_right=1)
    masks = [torch.arange(m) <= torch.arange(3)[:, None] + m - 3 + 1 for m in (7, 40)]
    assert_near(wrapper.run(batch.q, batch.cache), batch.expected(mask=masks)[0])


def test_scales_of_inputs_as_numbers_and_tensors():
    batch = paged_batch([1, 1], [5, 9])
    want = batch.expected(scale=0.25 * 2 * 0.5)[0] * 3
    assert_near(decode(batch, run={"q_scale": 2.0, "k_scale": 0.5, "v_scale": 3.0})[0], want)
    per_head = {"q_scale": torch.full((4,), 2.0), "k_scale": torch.tensor([0.5, 0.5]), "v_scale": torch.tensor([3.0, 3.0])}
    assert_near(decode(batch, run=per_head)[0], want)


def test_what_changes_between_calls_and_plans_is_seen():
    batch = paged_batch([1, 1], [5, 9])
    want, wrapper = batch.expected()[0], flashinfer.BatchDecodeWithPagedKVCacheWrapper(WORKSPACE)
    number, by_head = torch.tensor(2.0), torch.ones(2)
    for factor in (2.0, 3.0):
        wrapper.plan(*batch.tables, 4, 2, 16, 4, q_data_type=torch.float32)
        number.fill_(factor)
        by_head.fill_(factor)
        for v_scale in (factor, number, by_head):
            assert_near(wrapper.run(batch.q, batch.cache, v_scale=v_scale), want * factor)
        assert_near(wrapper.run(batch.q, batch.cache), want)
    for sinks in (torch.zeros(4), torch.ones(4)):
        assert_near(wrapper.run(batch.q, batch.cache, sinks=sinks), batch.expected(sinks=sinks)[0])
    wrapper.plan(*batch.tables, 4, 2, 16, 4, q_data_type=torch.float32, sm_scale=0.7)
    assert_near(wrapper.run(batch.q, batch.cache), batch.expected(scale=0.7)[0])


def test_sinks_are_used():
    batch = paged_batch([1, 1, 1], [5, 9, 0])
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    out, lse = decode(batch, run={"sinks": sinks})
    want, want_lse = batch.expected(sinks=sinks)
    assert_near(out, want)
    assert_near(lse[:2], want_lse[:2])


def test_window_of_run_overrides_the_plan():
    batch = paged_batch([1, 1], [5, 9])
    assert_near(decode(batch, window_left=1, run={"window_left": 4})[0], batch.expected(window_left=4)[0])
    assert_near(decode(batch, window_left=1, run={"window_left": -1})[0], batch.expected()[0])


def test_forward_overrides_the_plan_and_positional_options_warn():
    batch = paged_batch([1, 1], [5, 9])
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(WORKSPACE)
    with pytest.warns(DeprecationWarning, match="by name"):
        wrapper.begin_forward(*batch.tables, 4, 2, 16, 4, "NONE", 1, None, torch.float32)
    assert_near(wrapper.run(batch.q, batch.cache), batch.expected(window_left=1)[0])
    out, lse = wrapper.forward_return_lse(batch.q, batch.cache, "ALIBI", logits_soft_cap=2.0)
    want, want_lse = batch.expected(pos="ALIBI", cap=2.0)
    assert_near(out, want)
    assert_near(lse, want_lse)
    wrapper.end_forward()


def test_out_and_lse_are_written():
    batch = paged_batch([1, 1], [5, 9])
    out, lse = torch.full((2, 4, 16), torch.nan), torch.full((2, 4), torch.nan)
    got = decode(batch, run={"out": out, "lse": lse})
    want, want_lse = batch.expected()
    assert got[0] is out and got[1] is lse
    assert_near(out, want)
    assert_near(lse, want_lse)


def test_batch_of_no_request():
    batch = paged_batch([], [])
    out, lse = decode(batch)
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4)


def test_plan_after_plan_serves_another_batch():
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(WORKSPACE)
    for lengths in ([5, 9], [40], [1, 2, 3, 70, 0]):
        batch = paged_batch([1] * len(lengths), lengths)
        wrapper.plan(*batch.tables, 4, 2, 16, 4, q_data_type=torch.float32)
        for _ in range(2):
            assert_near(wrapper.run(batch.q, batch.cache), batch.expected()[0])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_graph_wrapper_keeps_its_buffers(dtype):
    buffers = [torch.zeros(n, dtype=dtype) for n in (4, 64, 3)]
    wrapper = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(WORKSPACE, *buffers)
    for lengths in ([5, 9, 1], [70, 0, 16]):
        batch = paged_batch([1, 1, 1], lengths)
        wrapper.plan(*batch.tables, 4, 2, 16, 4, q_data_type=torch.float32)
        assert torch.equal(buffers[0].int(), batch.indptr)
        assert wrapper._paged_kv_indices_buf is buffers[1]
        assert_near(wrapper.run(batch.q, batch.cache), batch.expected()[0])
    with pytest.raises(ShapeMismatch, match=r"the plan has 2 requests, the buffers .* are for 3"):
        wrapper.plan(*paged_batch([1, 1], [5, 9]).tables, 4, 2, 16, 4)
    with pytest.raises(ShapeMismatch, match="paged_kv_indices has 75 entries, its CUDA graph buffer has 64"):
        wrapper.plan(*paged_batch([1, 1, 1], [100, 100, 100]).tables, 4, 2, 16, 4)


def test_fast_plan_reads_the_buffers_of_a_graph_wrapper():
    batch = paged_batch([1, 1, 1], [5, 9, 30])
    buffers = [torch.zeros(n, dtype=torch.int32) for n in (4, 64, 3)]
    wrapper = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(WORKSPACE, *buffers)
    for buffer, table in zip(buffers, batch.tables, strict=True):
        buffer[: len(table)] = table
    flashinfer.fast_decode_plan(wrapper, None, None, None, 4, 2, 16, 4, q_data_type=torch.float32)
    assert_near(wrapper.run(batch.q, batch.cache), batch.expected()[0])


def test_workspace_size_is_that_of_the_plan():
    batch = paged_batch([1, 1], [5, 9])
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(WORKSPACE)
    assert wrapper.workspace_size(*batch.tables, 4, 2, 16, 4, q_data_type="float32") == (0, 0)  # the CPU needs none
    assert wrapper.workspace_size(*batch.tables, 4, 2, 16, 4, "NONE", -1, None, torch.float32) == (0, 0)
    prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(WORKSPACE)
    by_position = (None, None, None, True, "NONE", False, None, -1, None, None, None, torch.float32)
    assert prefill.workspace_size(batch.qo_indptr, *batch.tables, 4, 2, 16, 4, *by_position) == (0, 0)


REFUSED = [
    (dict(backend="cudnn"), UnsupportedOption, "backend='cudnn' is not one of auto, fa2, fa3"),
    (dict(jit_args=["name"]), UnsupportedOption, "jitgen.Variant"),
    (dict(kv_layout="HDN"), UnsupportedOption, "kv_layout='HDN' is not known"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED, ids=[next(iter(r[0])) for r in REFUSED])
def test_constructor_refuses(options, error, message):
    with pytest.raises(error, match=message):
        flashinfer.BatchDecodeWithPagedKVCacheWrapper(WORKSPACE, **options)


def test_misaligned_workspace_is_refused():
    with pytest.raises(ShapeMismatch, match="multiple of 16 bytes"):
        flashinfer.BatchDecodeWithPagedKVCacheWrapper(WORKSPACE[1:])


def test_run_refuses_what_does_not_fit_the_plan():
    batch = paged_batch([1, 1], [5, 9])
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(WORKSPACE)
    with pytest.raises(VariantError, match=r"run\(\) came before plan\(\)"):
        wrapper.run(batch.q, batch.cache)
    wrapper.plan(*batch.tables, 4, 2, 16, 4, q_data_type=torch.float32)
    with pytest.raises(UnsupportedDtype, match=r"q has dtype torch.float16, the plan says torch.float32"):
        wrapper.run(batch.q.half(), batch.cache)
    with pytest.raises(ShapeMismatch, match=r"q has shape \(2, 3, 16\), the plan says \[rows, 4, 16\]"):
        wrapper.run(batch.q[:, :3], batch.cache)
    with pytest.raises(ShapeMismatch, match="q has 1 rows, the plan has 2"):
        wrapper.run(batch.q[:1], batch.cache)
    with pytest.raises(ShapeMismatch, match=r"k has shape .*, the plan says \[pages, 4, 2, 16\]"):
        wrapper.run(batch.q, tuple(t[:, :3] for t in batch.cache))
    with pytest.raises(ShapeMismatch, match="sinks has shape"):
        wrapper.run(batch.q, batch.cache, sinks=torch.zeros(3))
    with pytest.raises(UnsupportedOption, match="NVFP4"):
        wrapper.run(batch.q, batch.cache, kv_cache_sf=(batch.q, batch.q))
    with pytest.raises(UnsupportedOption, match="jit_args"):
        wrapper.run(batch.q, batch.cache, batch.q)
    with pytest.raises(UnsupportedDtype, match=r"q_data_type is torch.float8_e4m3fn"):
        wrapper.plan(*batch.tables, 4, 2, 16, 4, q_data_type="float8_e4m3fn")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
def test_caches_of_8_bits_with_scales(dtype):
    batch = paged_batch([1, 1, 1], [5, 64, 200])
    cache = tuple((t * 20).nan_to_num().round().to(dtype) for t in batch.cache)
    k_scale, v_scale = 0.06, 0.04
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(WORKSPACE)
    wrapper.plan(*batch.tables, 4, 2, 16, 4, q_data_type=torch.float32, kv_data_type=dtype)
    out = wrapper.run(batch.q, cache, k_scale=k_scale, v_scale=v_scale)
    batch.cache = cache[0].float() * k_scale, cache[1].float() * v_scale
    exact = flashinfer.BatchDecodeWithPagedKVCacheWrapper(WORKSPACE)
    exact.plan(*batch.tables, 4, 2, 16, 4, q_data_type=torch.float32)
    assert_near(out, exact.run(batch.q, batch.cache).double())
    with pytest.raises(UnsupportedDtype, match=r"k has dtype torch.float32, the plan says"):
        wrapper.run(batch.q, batch.cache)


def test_pages_have_keys():
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(WORKSPACE)
    batch = paged_batch([1, 1], [5, 9])
    with pytest.raises(ShapeMismatch, match="page_size is 0, expected the number of keys"):
        wrapper.plan(*batch.tables, 4, 2, 16, 0)
