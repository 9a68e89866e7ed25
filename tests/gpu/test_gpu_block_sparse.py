"""Block lists on CUDA against attention with the mask written out: walked by the serving kernels, and as a mask."""

from __future__ import annotations

import pytest
import torch

import jitgen
from jitgen.block_lists import is_hopper

DEVICE = "cuda"
SHAPES = [  # rows and columns of a block, q_len, kv_len
    (128, 128, 1000, 1152), (16, 16, 70, 96), (64, 32, 300, 320), (1, 16, 33, 512), (256, 64, 1500, 1472), (7, 24, 200, 240),
]  # fmt: skip


def inputs(q_len, kv_len, heads=(8, 2), dim=128, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(q_len)
    shapes = ((heads[0], q_len), (heads[1], kv_len), (heads[1], kv_len))
    return [torch.randn(1, *shape, dim, generator=g).to(DEVICE, dtype) for shape in shapes]


def random_blocks(*shape, density=0.4):
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < density
    chosen[..., -1, :] = False  # a block row without blocks
    counts = chosen.sum(-1)
    ends = counts.flatten().cumsum(0).view(counts.shape)
    indptr = torch.cat([(ends - counts)[..., :1], ends], -1).int()
    return chosen, indptr.to(DEVICE), chosen.nonzero()[:, -1].int().to(DEVICE)


def assert_is_exact(qkv, blocks, keep, **hooks):
    q, k, v = qkv
    out, lse = jitgen.block_sparse_attention(q, k, v, blocks, return_lse=True, **hooks)
    k, v = (t.double().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    logits = (q.double() @ k.mT / q.shape[-1] ** 0.5).masked_fill(~keep.to(DEVICE), -torch.inf)
    want = torch.nan_to_num(logits.softmax(-1)) @ v
    assert not out.isnan().any()
    assert ((out.double() - want).norm() / want.norm()).item() <= 0.5 * torch.finfo(q.dtype).eps
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("rows, columns, q_len, kv_len", SHAPES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_lists_of_whole_blocks(rows, columns, q_len, kv_len, head_dim):
    chosen, indptr, indices = random_blocks(-(-q_len // rows), kv_len // columns)
    blocks = jitgen.BlockSparse.bsr(indptr, indices, (q_len, kv_len), (rows, columns))
    keep = chosen.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:q_len]
    qkv = inputs(q_len, kv_len, dim=head_dim)
    masks = [(keep, None)]
    if q_len <= kv_len:
        row, key = torch.arange(q_len)[:, None] + kv_len - q_len, torch.arange(kv_len)
        masks.append((keep & (key <= row), lambda b, h, q_idx, kv_idx: kv_idx <= q_idx))
    for kept, mask in masks:
        assert_is_exact(qkv, blocks, kept, mask_mod=mask)
    are_walked = columns % 16 == 0 and is_hopper(torch.device(DEVICE))
    assert len(blocks.lists.plans) == are_walked
    blocks.lists = None
    for kept, mask in masks:
        assert_is_exact(qkv, blocks, kept, mask_mod=mask)


@pytest.mark.skipif(not torch.cuda.is_available() or not is_hopper(torch.device(DEVICE)), reason="needs sm_90")
def test_walked_lists_know_their_positions():
    _, indptr, indices = random_blocks(8, 9)
    blocks = jitgen.BlockSparse.bsr(indptr, indices, (1000, 1152), (128, 128))
    slopes = torch.logspace(-1, -3, 8, base=2, device=DEVICE)
    alibi = lambda score, b, h, q_idx, kv_idx: score + slopes[h] * (kv_idx - q_idx)  # noqa: E731
    qkv = inputs(1000, 1152)
    out, _ = blocks.lists.attend(*qkv, jitgen.Variant(score_mod=alibi), None, None, False)
    want = jitgen.reference.attention(*qkv, blocks.variant(alibi))
    assert ((out.double() - want).norm() / want.norm()).item() <= 0.5 * torch.finfo(out.dtype).eps


@pytest.mark.skipif(not torch.cuda.is_available() or not is_hopper(torch.device(DEVICE)), reason="needs sm_90")
@pytest.mark.parametrize("long_row", [False, True])
def test_calls_merge_nothing_where_nothing_is_cut(long_row):
    """The host learns it after the first call. A row that lists everything is cut, as no others last as long."""
    q_len, kv_len = 2048, 12800
    chosen = torch.rand(16, 100, generator=torch.Generator().manual_seed(3)) < 0.05
    chosen[7] |= long_row
    counts = chosen.sum(1)
    indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int().to(DEVICE)
    blocks = jitgen.BlockSparse.bsr(indptr, chosen.nonzero()[:, 1].int().to(DEVICE), (q_len, kv_len), (128, 128))
    qkv = inputs(q_len, kv_len, (32, 8))
    want = jitgen.attention(*qkv, mask_mod=blocks.mask_mod).float()
    first = jitgen.block_sparse_attention(*qkv, blocks)
    assert ((first.float() - want).norm() / want.norm()).item() <= torch.finfo(first.dtype).eps  # both are rounded
    for _ in range(3):
        torch.cuda.synchronize()
        assert torch.equal(jitgen.block_sparse_attention(*qkv, blocks), first)
    ((plan, *_),) = blocks.lists.plans.values()
    assert plan.is_whole != long_row


def test_lists_of_each_head():
    chosen, indptr, indices = random_blocks(2, 8, 9)
    blocks = jitgen.BlockSparse.bsr(indptr, indices, (1000, 1152), (128, 128))
    keep = chosen.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :1000].repeat_interleave(4, 0)
    assert_is_exact(inputs(1000, 1152), blocks, keep)


def test_a_graph_walks_lists_as_a_call_does():
    _, indptr, indices = random_blocks(8, 9)
    blocks = jitgen.BlockSparse.bsr(indptr, indices, (1000, 1152), (128, 128))
    qkv = inputs(1000, 1152)
    jitgen.block_sparse_attention(*qkv, blocks)  # compiles, and plans
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = jitgen.block_sparse_attention(*qkv, blocks)
    for seed in range(3):
        for t in qkv:
            t.copy_(torch.randn(t.shape, generator=torch.Generator().manual_seed(seed)).to(t))
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, jitgen.block_sparse_attention(*qkv, blocks))
    assert len(blocks.lists.plans) == 1


def test_a_capture_before_any_call_is_refused():
    _, indptr, indices = random_blocks(8, 9)
    blocks = jitgen.BlockSparse.bsr(indptr, indices, (1000, 1152), (128, 128))
    qkv, graph = inputs(1000, 1152), torch.cuda.CUDAGraph()
    with pytest.raises(jitgen.errors.PlanMismatch, match="Make the call once"), torch.cuda.graph(graph):
        qkv[0].mul_(1.0)  # an empty graph is warned about
        jitgen.block_sparse_attention(*qkv, blocks)


def test_a_column_that_does_not_exist_is_found_later():
    _, indptr, indices = random_blocks(8, 9)
    with pytest.raises(jitgen.errors.ShapeMismatch, match="block column outside"):  # at once, if the device is quick
        blocks = jitgen.BlockSparse.bsr(indptr, indices + 3, (1000, 1152), (128, 128))
        torch.cuda.synchronize()
        jitgen.block_sparse_attention(*inputs(1000, 1152), blocks)
