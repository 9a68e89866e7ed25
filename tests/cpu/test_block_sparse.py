"""Block lists against attention with the mask written out."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import jitgen
from jitgen import block_lists, block_sparse
from jitgen.errors import ShapeMismatch, UnsupportedDtype, VariantError


def inputs(q_len, kv_len, heads=(4, 2), dim=16, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, heads[0], q_len, dim, generator=g),
        torch.randn(batch, heads[1], kv_len, dim, generator=g),
        torch.randn(batch, heads[1], kv_len, dim, generator=g),
    )


def exact(q, k, v, keep, bias=0.0):
    """Attention in float64; keep broadcasts to [batch, heads, q_len, kv_len]."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    logits = q.double() @ k.mT / q.shape[-1] ** 0.5 + bias
    logits = logits.masked_fill(~keep, -torch.inf)
    return torch.nan_to_num(logits.softmax(-1)) @ v, logits.logsumexp(-1)


def lists(chosen):
    """BSR of a mask of blocks [block rows, block columns], or of several [heads, ...]."""
    counts = chosen.sum(-1)
    ends = counts.flatten().cumsum(0).view(counts.shape)
    begins = (ends - counts)[..., :1]
    return torch.cat([begins, ends], -1).int(), chosen.nonzero()[:, -1].int()


def random_blocks(*shape, density=0.4, seed=0):
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    chosen[..., -1, :] = False  # a block row without blocks
    return chosen


def spread(chosen, rows, columns, q_len):
    return chosen.repeat_interleave(rows, -2).repeat_interleave(columns, -1)[..., :q_len, :]


def check(blocks, qkv, keep, bias=0.0, **hooks):
    out, lse = jitgen.block_sparse_attention(*qkv, blocks, return_lse=True, **hooks)
    want, want_lse = exact(*qkv, keep, bias)
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse.double(), want_lse.expand(lse.shape), atol=2e-5, rtol=2e-5)


SHAPES = [(1, 1, 13, 17), (16, 16, 70, 96), (64, 64, 200, 256), (128, 32, 300, 320), (3, 7, 31, 70), (32, 16, 150, 48)]


@pytest.mark.parametrize(("rows", "columns", "q_len", "kv_len"), SHAPES)
@pytest.mark.parametrize("with_bits", [False, True])
def test_listed_blocks_and_their_bits(rows, columns, q_len, kv_len, with_bits):
    chosen = random_blocks(-(-q_len // rows), kv_len // columns)
    indptr, indices = lists(chosen)
    keep, mask = spread(chosen, rows, columns, q_len), None
    if with_bits:
        mask = torch.rand(len(indices), rows, columns) < 0.5
        each = torch.zeros(chosen.shape[0], rows, chosen.shape[1], columns, dtype=torch.bool)
        each[chosen.nonzero()[:, 0], :, chosen.nonzero()[:, 1]] = mask
        keep = each.flatten(2).flatten(0, 1)[:q_len]
    blocks = jitgen.BlockSparse.bsr(indptr, indices, (q_len, kv_len), (rows, columns), mask=mask)
    check(blocks, inputs(q_len, kv_len), keep)


@pytest.mark.parametrize("per_query_head", [False, True])
def test_each_head_may_have_its_own_list(per_query_head):
    chosen = random_blocks(4 if per_query_head else 2, 5, 6)
    blocks = jitgen.BlockSparse.bsr(*lists(chosen), (70, 96), (16, 16), per_query_head=per_query_head)
    keep = spread(chosen, 16, 16, 70)
    check(blocks, inputs(70, 96), keep if per_query_head else keep.repeat_interleave(2, 0))


def test_blocks_go_with_other_hooks():
    chosen, slopes = random_blocks(5, 6), torch.tensor([0.5, 0.25, 0.125, 0.0625])
    blocks = jitgen.BlockSparse.bsr(*lists(chosen), (70, 96), (16, 16))
    row, key = torch.arange(70)[:, None] + 26, torch.arange(96)
    check(
        blocks, inputs(70, 96), spread(chosen, 16, 16, 70) & (key <= row), bias=slopes[:, None, None] * (key - row),
        mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx,
        score_mod=lambda score, b, h, q_idx, kv_idx: score + slopes[h] * (kv_idx - q_idx),
    )  # fmt: skip


def test_blocks_of_any_sizes():
    row_sizes, column_sizes = torch.tensor([[70, 1, 0, 129], [100, 50, 25, 25]]), torch.tensor([[64, 36, 200], [1, 298, 1]])
    chosen = random_blocks(2, 4, 3, density=0.6)
    blocks = jitgen.BlockSparse.variable(chosen, row_sizes, column_sizes, (200, 300))
    keep = torch.stack([
        chosen[h].repeat_interleave(row_sizes[h], 0).repeat_interleave(column_sizes[h], 1) for h in range(2)
    ])  # fmt: skip
    check(blocks, inputs(200, 300), keep.repeat_interleave(2, 0))


def test_a_block_mask_of_torch():
    def window(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (q_idx - kv_idx < 100)

    block_mask = create_block_mask(window, None, None, 300, 400, device="cpu", BLOCK_SIZE=64)
    row, key = torch.arange(300)[:, None], torch.arange(400)
    check(jitgen.BlockSparse.of(block_mask), inputs(300, 400), (key <= row) & (row - key < 100))


def test_serving_calls_take_the_mask():
    chosen = random_blocks(5, 6)
    blocks = jitgen.BlockSparse.bsr(*lists(chosen), (70, 96), (16, 16))
    q, k, v = (t[0].transpose(0, 1).contiguous() for t in inputs(70, 96))
    plan = jitgen.Plan(1, 70, 4, 2, 16, dtype=torch.float32, variant=jitgen.Variant(mask_mod=blocks.mask_mod), device="cpu",
                       layout="ragged")  # fmt: skip
    plan.update(torch.tensor([0, 70]), kv_indptr=torch.tensor([0, 96]))
    out = jitgen.ragged_attention(q, k, v, plan)
    want, _ = exact(*(t.transpose(0, 1)[None] for t in (q, k, v)), spread(chosen, 16, 16, 70))
    torch.testing.assert_close(out.double(), want[0].transpose(0, 1), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("rows, columns, q_len, kv_len", [(1, 16, 13, 32), (16, 16, 70, 96), (128, 32, 300, 320)])
@pytest.mark.parametrize("hooks", ["none", "sink and cap"])
def test_lists_are_walked_by_the_serving_kernels_too(monkeypatch, rows, columns, q_len, kv_len, hooks):
    used = []
    monkeypatch.setattr(block_lists, "is_hopper", lambda device: used.append(device) or True)
    chosen = random_blocks(-(-q_len // rows), kv_len // columns)
    blocks = jitgen.BlockSparse.bsr(*lists(chosen), (q_len, kv_len), (rows, columns))
    q, k, v = (t.half() for t in inputs(q_len, kv_len, dim=64, batch=1))
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    keep = spread(chosen, rows, columns, q_len)
    for _ in range(2):
        if hooks == "none":
            out, lse = jitgen.block_sparse_attention(q, k, v, blocks, return_lse=True)
            want, want_lse = exact(q, k, v, keep)
        else:
            sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
            cap = lambda score, b, h, q_idx, kv_idx: 1.5 * torch.tanh(score / 1.5)  # noqa: E731
            out, lse = jitgen.block_sparse_attention(q, k, v, blocks, score_mod=cap, sink=sinks, return_lse=True)
            variant = blocks.variant(cap, None, sinks)
            want, want_lse = jitgen.reference.attention(q, k, v, variant, return_lse=True)
        torch.testing.assert_close(out.double(), want.double(), atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(lse.double(), want_lse.double(), atol=2e-3, rtol=2e-3)
    assert used and blocks.lists.plans


def test_hooks_made_for_each_call_share_a_plan(monkeypatch):
    monkeypatch.setattr(block_lists, "is_hopper", lambda device: True)
    monkeypatch.setattr(block_sparse, "MAX_VARIANTS", 3)
    blocks = jitgen.BlockSparse.bsr(*lists(random_blocks(5, 6)), (70, 96), (16, 16))
    q, k, v = (t.half() for t in inputs(70, 96, dim=64, batch=1))
    for step in range(1, 6):
        gains = torch.rand(4)

        def scaled(score, b, h, q_idx, kv_idx, gains=gains, step=step):
            return score * gains[h] + step

        out, lse = jitgen.block_sparse_attention(q, k, v, blocks, score_mod=scaled, return_lse=True)
        want, want_lse = jitgen.reference.attention(q, k, v, blocks.variant(scaled), return_lse=True)
        torch.testing.assert_close(out.double(), want.double(), atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(lse.double(), want_lse.double(), atol=2e-3, rtol=2e-3)
    assert len(blocks.lists.plans) == 1
    assert len(blocks._variants) <= 3


def test_hooks_that_read_positions_keep_to_the_mask(monkeypatch):
    monkeypatch.setattr(block_lists, "is_hopper", lambda device: True)
    chosen = random_blocks(5, 6)
    blocks = jitgen.BlockSparse.bsr(*lists(chosen), (70, 96), (16, 16))
    q, k, v = (t.half() for t in inputs(70, 96, dim=64, batch=1))

    def far(score, b, h, q_idx, kv_idx):
        return score - 0.01 * (q_idx - kv_idx)

    def causal(b, h, q_idx, kv_idx):
        return kv_idx <= q_idx

    for mask in (None, causal):
        out = jitgen.block_sparse_attention(q, k, v, blocks, score_mod=far, mask_mod=mask)
        want = jitgen.reference.attention(q, k, v, blocks.variant(far, mask))
        torch.testing.assert_close(out.double(), want.double(), atol=2e-3, rtol=2e-3)
    assert not blocks.lists.plans


def test_walked_lists_know_their_positions():
    chosen = random_blocks(5, 6)
    blocks = jitgen.BlockSparse.bsr(*lists(chosen), (70, 96), (16, 16))
    q, k, v = (t.half() for t in inputs(70, 96, dim=64, batch=1))

    def far(score, b, h, q_idx, kv_idx):
        return score - 0.01 * (q_idx - kv_idx)

    out, _ = blocks.lists.attend(q, k, v, jitgen.Variant(score_mod=far), None, None, False)
    want = jitgen.reference.attention(q, k, v, blocks.variant(far))
    torch.testing.assert_close(out.double(), want.double(), atol=2e-3, rtol=2e-3)


def test_wrong_lists_are_named():
    indptr, indices = lists(random_blocks(5, 6))
    with pytest.raises(ShapeMismatch, match=r"outside 0 \.\. 5"):
        jitgen.BlockSparse.bsr(indptr, indices + 3, (70, 96), (16, 16))
    with pytest.raises(ShapeMismatch, match="or one twice in a block row"):
        jitgen.BlockSparse.bsr(torch.tensor([0, 2, 2, 2, 2, 2]), torch.tensor([3, 3]), (70, 96), (16, 16))
    for wrong in ([0, 2, 1, 2, 2, 2], [0, 1, 2, 2, 2, 9], [-1, 1, 2, 2, 2, 2]):
        with pytest.raises(ShapeMismatch, match="or indptr falls or ends behind the 2 indices"):
            jitgen.BlockSparse.bsr(torch.tensor(wrong), torch.tensor([3, 4]), (70, 96), (16, 16))
    with pytest.raises(ShapeMismatch, match=r"block is \(0, 16\), expected a positive number"):
        jitgen.BlockSparse.bsr(indptr, indices, (70, 96), (0, 16))
    with pytest.raises(VariantError, match="block_mask is a Tensor, expected torch's BlockMask"):
        jitgen.BlockSparse.of(indptr)
    with pytest.raises(ShapeMismatch, match="blocks have 20 columns, which must divide it"):
        jitgen.BlockSparse.bsr(indptr, indices, (70, 96), (16, 20))
    with pytest.raises(ShapeMismatch, match=r"indptr has shape \(6,\), expected \[8\]"):
        jitgen.BlockSparse.bsr(indptr, indices, (100, 96), (16, 16))
    with pytest.raises(UnsupportedDtype, match="indices has dtype float32"):
        jitgen.BlockSparse.bsr(indptr, indices.float(), (70, 96), (16, 16))
    with pytest.raises(ShapeMismatch, match=r"expected .* of uint8"):
        jitgen.BlockSparse.bsr(indptr, indices, (70, 96), (16, 16), packed_mask=torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(ShapeMismatch, match="mask has 3 elements, expected"):
        jitgen.BlockSparse.bsr(indptr, indices, (70, 96), (16, 16), mask=torch.zeros(3, dtype=torch.bool))


def test_sizes_that_do_not_sum_to_the_lengths_are_named():
    sizes = torch.tensor([[50, 50]])
    with pytest.raises(ShapeMismatch, match="do not sum to q_len 90 and kv_len 100"):
        jitgen.BlockSparse.variable(torch.ones(1, 2, 2, dtype=torch.bool), sizes, sizes, (90, 100))
    with pytest.raises(ShapeMismatch, match=r"Expected \[heads, rows, columns\]"):
        jitgen.BlockSparse.variable(torch.ones(1, 3, 2, dtype=torch.bool), sizes, sizes, (100, 100))


def test_calls_need_the_lengths_of_the_blocks():
    blocks = jitgen.BlockSparse.bsr(*lists(random_blocks(5, 6)), (70, 96), (16, 16))
    with pytest.raises(ShapeMismatch, match="q has 71 rows and k 96"):
        jitgen.block_sparse_attention(*inputs(71, 96), blocks)
    with pytest.raises(VariantError, match=r"expected a jitgen\.BlockSparse"):
        jitgen.block_sparse_attention(*inputs(70, 96), torch.zeros(1))
