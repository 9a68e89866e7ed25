"""flashinfer.mla of the shim against float64."""

from __future__ import annotations

import math

import pytest
import torch
from mla_cases import SCALE, reference

from jitgen.compat import flashinfer
from jitgen.errors import ShapeMismatch, UnsupportedDtype, UnsupportedOption

HEADS, PAGE_SIZE = 8, 16
KV_LEN, Q_LEN = [37, 5, 70], [1, 2, 3]


def make_call(joined: bool):
    generator = torch.Generator().manual_seed(3)
    rows, cache = (torch.randn(s, generator=generator) for s in ((sum(Q_LEN), HEADS, 576), (12, PAGE_SIZE, 576)))
    counts = [-(-n // PAGE_SIZE) for n in KV_LEN]
    tables = [torch.tensor([0, *torch.tensor(x).cumsum(0).tolist()], dtype=torch.int32) for x in (Q_LEN, counts)]
    indices = torch.randperm(12, generator=generator)[: sum(counts)].int()
    parts = (rows[..., :512], rows[..., 512:], cache[..., :512], cache[..., 512:])
    return (
        rows,
        cache,
        (*tables, indices, torch.tensor(KV_LEN).int()),
        parts if joined else tuple(t.contiguous() for t in parts),
    )


def make_wrapper(tables, causal):
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(torch.empty(16, dtype=torch.uint8))
    wrapper.plan(*tables, HEADS, 512, 64, PAGE_SIZE, causal, SCALE, torch.float32, torch.float32)
    return wrapper


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("joined", [False, True])
def test_run_is_attention_over_compressed_keys(joined, causal):
    rows, cache, tables, parts = make_call(joined)
    wrapper = make_wrapper(tables, causal)
    out, lse = wrapper.run(*parts, return_lse=True)
    natural = wrapper.run(*parts, return_lse=True, return_lse_base_on_e=True)[1]
    q_indptr, kv_indptr, indices, _ = tables
    for b, (n, q_len) in enumerate(zip(KV_LEN, Q_LEN, strict=True)):
        mine = slice(int(q_indptr[b]), int(q_indptr[b + 1]))
        keys = cache[indices[kv_indptr[b] : kv_indptr[b + 1]].long()].flatten(0, 1)[:n]
        seen = torch.arange(n)[None] <= torch.arange(q_len)[:, None] + n - q_len if causal else None
        want, want_lse = reference(rows[mine], keys, SCALE, seen)
        assert (out[mine].double() - want).abs().max() < 1e-4
        assert (natural[mine].double() - want_lse).abs().max() < 1e-4
        assert (lse[mine].double() - want_lse / math.log(2)).abs().max() < 1e-4


def test_results_are_written_where_they_are_asked_for():
    _, _, tables, parts = make_call(True)
    wrapper = make_wrapper(tables, True)
    out, lse = torch.empty(6, HEADS, 512), torch.empty(6, HEADS)
    assert wrapper.run(*parts, out=out, lse=lse, return_lse=True)[0] is out
    assert torch.equal(wrapper.run(*parts), out)


def test_what_does_not_fit_is_refused():
    _, _, tables, parts = make_call(False)
    wrapper = make_wrapper(tables, True)
    with pytest.raises(ShapeMismatch, match=r"q_pe has shape \(6, 8, 32\), the plan says \[\*, 8, 64\]"):
        wrapper.run(parts[0], parts[1][..., :32], *parts[2:])
    with pytest.raises(UnsupportedDtype, match=r"ckv_cache has dtype torch.float16, the plan says torch.float32"):
        wrapper.run(*parts[:2], parts[2].half(), parts[3])
    with pytest.raises(UnsupportedOption, match="belong to the cutlass back end"):
        wrapper.run(*parts, kv_len=tables[3])
    with pytest.raises(UnsupportedOption, match=r"bmm1_scale=2.0 of run\(\) is for other back ends"):
        wrapper.run(*parts, bmm1_scale=2.0)
    with pytest.raises(UnsupportedOption, match="ckv_scale"):
        wrapper.run(*parts, ckv_scale=0.5)
    with pytest.raises(UnsupportedOption, match=r"o_scale is 2\.0, and latent caches have no scales here\. Multiply"):
        wrapper.run(*parts, o_scale=2.0)
    with pytest.raises(UnsupportedOption, match=r"kpe_scale is a tensor of shape \(3,\)"):
        wrapper.run(*parts, kpe_scale=torch.ones(3))
    with pytest.raises(ShapeMismatch, match=r"kv_indptr has shape \(2,\), expected"):
        short = (tables[0], tables[1][:2], *tables[2:])
        wrapper.plan(*short, HEADS, 512, 64, PAGE_SIZE, True, SCALE, torch.float32, torch.float32)
    with pytest.raises(ShapeMismatch, match="head_dim_ckv is 256, head_dim_kpe 64, expected 512 and 64"):
        wrapper.plan(*tables, HEADS, 256, 64, PAGE_SIZE, True, SCALE, torch.float32, torch.float32)
