"""Packed bits, trees of draft tokens, and merging of partial results."""

from __future__ import annotations

import math

import pytest
import torch
from serving_batch import Batch

import jitgen
from jitgen.errors import InvalidType, ShapeMismatch, UnsupportedDtype

LENGTHS = [(5, 40), (1, 33), (0, 9), (50, 57), (3, 3)]


def kept_of(lengths, seed=0):
    """A random mask of every request, in which each row keeps a key."""
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(q, k, generator=generator) < 0.5 for q, k in lengths]
    for mask in masks:
        mask[:, 0] = True
    return masks


def attend(batch, plan):
    k, v, lists = batch.pages(16)
    return jitgen.paged_attention(batch.q, (k, v), batch.block_table(lists), plan, return_lse=True)


def exact(batch, masks):
    """Masked attention written out in float64."""
    outs, lses = [], []
    group = batch.num_q_heads // batch.num_kv_heads
    for b, (mask, q) in enumerate(zip(masks, batch.q.split([n for n, _ in batch.lengths]), strict=True)):
        k, v = (t.double().repeat_interleave(group, 1) for t in (batch.k[b], batch.v[b]))
        logits = torch.einsum("qhd,khd->hqk", q.double(), k) / math.sqrt(batch.head_dim)
        logits = logits.masked_fill(~mask, -math.inf)
        outs.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1).nan_to_num(), v))
        lses.append(logits.logsumexp(-1).T)
    return torch.cat(outs), torch.cat(lses)


def assert_close(got, want):
    assert (got[0].double() - want[0]).abs().max().item() <= 5e-6
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=2e-5)


def packed_mask(batch, masks):
    return jitgen.pack_mask(torch.cat([m.flatten() for m in masks]), batch.q_indptr().diff(), batch.kv_len())


# ---- packed bits -----------------------------------------------------------------------------------------------------------


def test_bits_are_packed_from_the_lowest_and_requests_begin_on_a_byte():
    mask = torch.tensor([True, False, False, True] + [True] * 9 + [False, True])
    packed, byte_indptr = jitgen.pack_mask(mask, torch.tensor([2, 0, 1, 1]), torch.tensor([2, 5, 9, 2]))
    assert byte_indptr.tolist() == [0, 1, 1, 3, 4]
    assert packed.tolist() == [0b1001, 0xFF, 0b1, 0b10]


def test_packed_bits_mean_the_bool_mask():
    batch, masks = Batch(LENGTHS), kept_of(LENGTHS)
    plan = batch.plan(jitgen.bit_mask(*packed_mask(batch, masks)))
    assert_close(attend(batch, plan), exact(batch, masks))


def test_bits_of_the_next_step_come_with_its_lengths():
    batch = Batch(LENGTHS)
    plan = batch.plan(jitgen.bit_mask(*packed_mask(batch, kept_of(LENGTHS))))
    other = Batch([(7, 20), (2, 90)], seed=1)
    masks = kept_of(other.lengths, seed=1)
    packed, byte_indptr = packed_mask(other, masks)
    plan.update(other.q_indptr(), other.kv_len(), packed=packed, byte_indptr=byte_indptr)
    assert_close(attend(other, plan), exact(other, masks))


def test_bits_combine_with_other_masks():
    def causal(b, h, q_idx, kv_idx):
        return kv_idx <= q_idx

    batch, masks = Batch(LENGTHS), kept_of(LENGTHS)
    plan = batch.plan(jitgen.and_masks(causal, jitgen.bit_mask(*packed_mask(batch, masks))))
    below = [m & (torch.arange(k) <= torch.arange(q)[:, None] + k - q) for m, (q, k) in zip(masks, LENGTHS, strict=True)]
    assert_close(attend(batch, plan), exact(batch, below))


def test_packing_refuses_a_mask_of_another_size():
    with pytest.raises(ShapeMismatch, match=r"shape \(7,\), expected \[8\]"):
        jitgen.pack_mask(torch.ones(7, dtype=torch.bool), torch.tensor([2]), torch.tensor([4]))


def test_bit_mask_refuses_other_tensors():
    with pytest.raises(InvalidType, match=r"byte_indptr is a list, expected a torch\.Tensor"):
        jitgen.bit_mask(torch.ones(8, dtype=torch.uint8), [0, 1])
    with pytest.raises(UnsupportedDtype, match="packed has dtype bool, expected uint8"):
        jitgen.bit_mask(torch.ones(8, dtype=torch.bool), torch.tensor([0, 1]))
    with pytest.raises(ShapeMismatch, match=r"byte_indptr \(1, 2\), expected rank 1"):
        jitgen.bit_mask(torch.ones(8, dtype=torch.uint8), torch.tensor([[0, 1]]))


# ---- trees -----------------------------------------------------------------------------------------------------------------

PARENTS = [[-1, 0, 0, 1, 1, 2], [-1, -1, 0, 1, 2]]


def ancestors(parents, size):
    visible = torch.zeros(size, size, dtype=torch.bool)
    for i, parent in enumerate(parents):
        visible[i, i] = True
        if parent >= 0:
            visible[i] |= visible[parent]
    return visible


def tree_masks(lengths, visible):
    masks = []
    for (q, k), tree in zip(lengths, visible, strict=True):
        mask = torch.ones(q, k, dtype=torch.bool)
        mask[:, k - q :] = tree[:q, :q]
        masks.append(mask)
    return masks


def test_draft_tokens_see_the_context_and_their_ancestors():
    lengths = [(6, 300), (6, 6), (6, 70)]
    tree = ancestors(PARENTS[0], 6)
    batch = Batch(lengths)
    got = attend(batch, batch.plan(jitgen.tree_mask(tree)))
    assert_close(got, exact(batch, tree_masks(lengths, [tree] * 3)))


def test_every_request_may_have_its_own_tree():
    lengths = [(6, 300), (5, 70)]
    trees = torch.stack([ancestors(p, 6) for p in PARENTS])
    batch = Batch(lengths)
    got = attend(batch, batch.plan(jitgen.tree_mask(trees)))
    assert_close(got, exact(batch, tree_masks(lengths, trees)))


def test_tree_mask_refuses_other_tensors():
    with pytest.raises(InvalidType, match=r"visible is a list, expected a torch\.Tensor"):
        jitgen.tree_mask([[True]])
    with pytest.raises(UnsupportedDtype, match="visible has dtype int64, expected bool"):
        jitgen.tree_mask(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ShapeMismatch, match=r"visible has shape \(3, 4\)"):
        jitgen.tree_mask(torch.ones(3, 4, dtype=torch.bool))


# ---- merging ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["e", 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_of_the_keys_merge_to_the_whole(base, dtype):
    batch = Batch([(4, 200)], dtype=dtype)
    parts = [(0, 70), (70, 71), (71, 200)]
    states = []
    for begin, end in parts:
        part = Batch([(4, end - begin)], dtype=dtype)
        part.q, part.k, part.v = batch.q, [batch.k[0][begin:end]], [batch.v[0][begin:end]]
        states.append(attend(part, part.plan()))
    unit = 1.0 if base == "e" else math.log(2)
    outs, lses = (torch.stack(s, 1) for s in zip(*states, strict=True))
    out, lse = jitgen.merge_states(outs, lses / unit, base=base)
    want, want_lse = batch.expected()
    tolerance = 5e-6 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps  # parts are rounded too
    assert out.dtype == dtype and (out.double() - want).abs().max().item() <= tolerance
    torch.testing.assert_close(lse.double() * unit, want_lse, rtol=1e-5, atol=2e-5)
    assert torch.equal(out, jitgen.merge_states([o for o, _ in states], [lse / unit for _, lse in states], base=base)[0])
    both = jitgen.merge_state(*states[0], *states[1])
    three = jitgen.merge_state(*both, *states[2])
    assert (three[0].double() - want).abs().max().item() <= 2 * tolerance


def test_parts_without_keys_are_left_out():
    out, lse = torch.randn(3, 2, 8), torch.randn(3, 2)
    nothing, empty = torch.full_like(out, math.nan), torch.full_like(lse, -math.inf)
    got = jitgen.merge_state(out, lse, nothing, empty)
    assert torch.equal(got[0], out) and torch.equal(got[1], lse)
    got = jitgen.merge_state(nothing, empty, nothing, empty)
    assert torch.equal(got[0], torch.zeros_like(out)) and torch.equal(got[1], empty)


def test_merging_refuses_what_does_not_fit():
    out, lse = torch.zeros(3, 2, 8), torch.zeros(3, 2)
    with pytest.raises(InvalidType, match=r"lses\[1\] is a float, expected a torch\.Tensor"):
        jitgen.merge_states([out, out], [lse, 1.0])
    with pytest.raises(ShapeMismatch, match="base=10 is not a base"):
        jitgen.merge_state(out, lse, out, lse, base=10)
    with pytest.raises(ShapeMismatch, match=r"outs has states of shapes \[\(3, 2, 8\), \(4, 2, 8\)\]"):
        jitgen.merge_states([out, torch.zeros(4, 2, 8)], [lse, lse])
    with pytest.raises(ShapeMismatch, match=r"outputs of shapes \(3, 2, 8\) and \(4, 2, 8\)"):
        jitgen.merge_state(out, lse, torch.zeros(4, 2, 8), torch.zeros(4, 2))
    with pytest.raises(UnsupportedDtype, match="lses has dtype float64, expected float32"):
        jitgen.merge_state(out, lse.double(), out, lse.double())
