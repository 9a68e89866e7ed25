"""flashinfer.sparse of the shim against attention with the mask written out."""

from __future__ import annotations

import pytest
import torch
from compat_reference import WORKSPACE, assert_near, exact

from jitgen.compat import flashinfer
from jitgen.errors import ShapeMismatch, UnsupportedDtype, UnsupportedOption, VariantError


def random_blocks(num_rows, num_columns, density=0.4, seed=0):
    g = torch.Generator().manual_seed(seed)
    chosen = torch.rand(num_rows, num_columns, generator=g) < density
    chosen[-1] = False  # a block row without blocks
    indices = chosen.nonzero()[:, 1].int()
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), chosen.sum(1).cumsum(0))).int()
    return chosen, indptr, indices


def spread(chosen, rows, columns, num_rows):
    """Mask of elements from a mask of blocks."""
    return chosen.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:num_rows]


def inputs(num_rows, num_keys, heads=(6, 2), dim=16):
    return torch.randn(num_rows, heads[0], dim), torch.randn(num_keys, heads[1], dim), torch.randn(num_keys, heads[1], dim)


SHAPES = [(1, 1, 13, 17), (16, 16, 70, 96), (64, 64, 200, 256), (128, 32, 300, 320), (3, 7, 31, 70)]


@pytest.mark.parametrize(("R", "C", "M", "N"), SHAPES)
@pytest.mark.parametrize("causal", [False, True])
def test_block_sparse_is_attention_under_the_mask(R, C, M, N, causal):
    chosen, indptr, indices = random_blocks(-(-M // R), N // C)
    q, k, v = inputs(M, N)
    keep = spread(chosen, R, C, M)
    if causal:
        keep = keep & (torch.arange(N) <= torch.arange(M)[:, None] + N - M)
    wrapper = flashinfer.BlockSparseAttentionWrapper(WORKSPACE)
    wrapper.plan(indptr, indices, M, N, R, C, 6, 2, 16, causal=causal, q_data_type="float32")
    out, lse = wrapper.run(q, k, v, return_lse=True)
    want, want_lse = exact(q, k, v, mask=keep)
    assert_near(out, want)
    assert_near(lse, want_lse)


@pytest.mark.parametrize(("R", "C", "M", "N"), SHAPES)
@pytest.mark.parametrize("packed", [False, True])
def test_bits_choose_elements_of_listed_blocks(R, C, M, N, packed):
    chosen, indptr, indices = random_blocks(-(-M // R), N // C)
    q, k, v = inputs(M, N)
    mask = torch.rand(len(indices), R, C) < 0.5
    keep = torch.zeros(chosen.shape[0], R, chosen.shape[1], C, dtype=torch.bool)
    keep[chosen.nonzero()[:, 0], :, chosen.nonzero()[:, 1]] = mask
    keep = keep.flatten(2).flatten(0, 1)[:M]
    given = {"packed_mask": flashinfer.packbits(mask, "little")} if packed else {"mask": mask}
    wrapper = flashinfer.BlockSparseAttentionWrapper(WORKSPACE)
    wrapper.plan(indptr, indices, M, N, R, C, 6, 2, 16, q_data_type="float32", **given)
    assert_near(wrapper.run(q, k, v), exact(q, k, v, mask=keep)[0])


def test_block_sparse_options_scales_and_results():
    chosen, indptr, indices = random_blocks(5, 6)
    q, k, v = inputs(70, 96)
    keep = spread(chosen, 16, 16, 70)
    wrapper = flashinfer.BlockSparseAttentionWrapper(WORKSPACE)
    wrapper.plan(
        indptr, indices, 70, 96, 16, 16, 6, 2, 16, q_data_type=torch.float32, logits_soft_cap=1.5, sm_scale=0.6,
        pos_encoding_mode="ALIBI",
    )  # fmt: skip
    out, lse = torch.full_like(q, torch.nan), torch.full((70, 6), torch.nan)
    got = wrapper.run(q, k, v, 2.0, torch.full((2,), 0.5), 3.0, out=out, lse=lse, return_lse=True)
    want, want_lse = exact(q, k, v, mask=keep, cap=1.5, scale=0.6, pos="ALIBI")
    assert got[0] is out and got[1] is lse
    assert_near(out, want * 3, 5e-5)
    assert_near(lse, want_lse)
    assert_near(wrapper.forward(q, k, v), exact(q, k, v, mask=keep)[0])
    wrapper.plan(indptr, indices, 70, 96, 16, 16, 6, 2, 16, q_data_type="bfloat16", o_data_type="float32")
    out = wrapper.run(*(t.bfloat16() for t in (q, k, v)))
    assert out.dtype == torch.float32
    assert_near(out, exact(*(t.bfloat16() for t in (q, k, v)), mask=keep)[0], 2e-2)


def test_the_first_block_column_outside_is_found():
    _, indptr, indices = random_blocks(5, 6)
    wrapper = flashinfer.BlockSparseAttentionWrapper(WORKSPACE)
    for wrong in (6, -1):  # 6 is N / C itself
        indices[0] = wrong
        with pytest.raises(ShapeMismatch, match=r"a block column outside 0 .. 5 \(kv_len 96, blocks of 16\)"):
            wrapper.plan(indptr, indices, 70, 96, 16, 16, 6, 2, 16)


def test_block_sparse_refuses():
    _, indptr, indices = random_blocks(5, 6)
    wrapper = flashinfer.BlockSparseAttentionWrapper(WORKSPACE)
    with pytest.raises(VariantError, match=r"run\(\) came before plan\(\)"):
        wrapper.run(*inputs(70, 96))
    with pytest.raises(ShapeMismatch, match="N is 95, C is 16"):
        wrapper.plan(indptr, indices, 70, 95, 16, 16, 6, 2, 16)
    with pytest.raises(ShapeMismatch, match=r"indptr has shape \(6,\), expected \[7\] for M=90 and R=16"):
        wrapper.plan(indptr, indices, 90, 96, 16, 16, 6, 2, 16)
    with pytest.raises(ShapeMismatch, match="mask has 7 elements"):
        wrapper.plan(indptr, indices, 70, 96, 16, 16, 6, 2, 16, mask=torch.ones(7, dtype=torch.bool))
    with pytest.raises(ShapeMismatch, match="packed_mask has 7 elements"):
        wrapper.plan(indptr, indices, 70, 96, 16, 16, 6, 2, 16, packed_mask=torch.ones(7, dtype=torch.uint8))
    with pytest.raises(UnsupportedOption, match="apply_rope"):
        wrapper.plan(indptr, indices, 70, 96, 16, 16, 6, 2, 16, pos_encoding_mode="ROPE_LLAMA")
    for name in ("block_mask", "q2k_indices", "kv_splits"):
        with pytest.raises(UnsupportedOption, match=rf"{name} was given.*jitgen.flex_attention\(block_mask=...\)"):
            wrapper.plan(indptr, indices, 70, 96, 16, 16, 6, 2, 16, **{name: object()})
    wrapper.plan(indptr, indices, 70, 96, 16, 16, 6, 2, 16, q_data_type=torch.float32)
    with pytest.raises(ShapeMismatch, match=r"q has shape \(69, 6, 16\), the plan says \(70, 6, 16\)"):
        wrapper.run(*inputs(69, 96))
    with pytest.raises(UnsupportedDtype, match=r"q has dtype torch.float16, the plan says torch.float32"):
        wrapper.run(*(t.half() for t in inputs(70, 96)))


# ---- blocks of any sizes --------------------------------------------------------------------------------------------------


def random_sizes(heads, blocks, total, seed):
    """Sizes that sum to ``total`` for each head, some of them 0."""
    g = torch.Generator().manual_seed(seed)
    cuts = torch.randint(0, total + 1, (heads, blocks - 1), generator=g).sort(1).values
    cuts[:, 1] = cuts[:, 0]
    return torch.nn.functional.pad(cuts, (1, 0)).diff(dim=1, append=torch.full((heads, 1), total))


def test_variable_blocks_name_tensors_without_their_axes():
    wrapper = flashinfer.VariableBlockSparseAttentionWrapper(WORKSPACE)
    sizes = torch.full((2, 1), 8)
    wrapper.plan(torch.ones(2, 1, 1, dtype=torch.bool), sizes, sizes, 6, 2, 16, q_data_type=torch.float32)
    q, k, v = (t.transpose(0, 1) for t in inputs(8, 8))
    with pytest.raises(ShapeMismatch, match=r"q has shape \(16,\), expected \[heads, rows, head_dim\]"):
        wrapper.run(q[0, 0], k, v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("q_len", "kv_len", "blocks"), [(50, 70, 4), (200, 333, 5), (64, 128, 3)])
def test_variable_blocks_are_attention_under_the_mask(q_len, kv_len, blocks, causal):
    g = torch.Generator().manual_seed(q_len)
    chosen = torch.rand(2, blocks, blocks + 1, generator=g) < 0.5
    rows, columns = random_sizes(2, blocks, q_len, 1), random_sizes(2, blocks + 1, kv_len, 2)
    q, k, v = inputs(q_len, kv_len)
    wrapper = flashinfer.VariableBlockSparseAttentionWrapper(WORKSPACE)
    wrapper.plan(chosen, rows.int(), columns.int(), 6, 2, 16, causal=causal, q_data_type=torch.float32)
    out, lse = wrapper.run(*(t.transpose(0, 1) for t in (q, k, v)), return_lse=True)
    for h in range(6):
        keep = chosen[h // 3].repeat_interleave(rows[h // 3], 0).repeat_interleave(columns[h // 3], 1)
        if causal:
            keep = keep & (torch.arange(kv_len) <= torch.arange(q_len)[:, None] + kv_len - q_len)
        want, want_lse = exact(q[:, h : h + 1], k[:, h // 3 : h // 3 + 1], v[:, h // 3 : h // 3 + 1], mask=keep)
        assert_near(out[h], want[:, 0])
        assert_near(lse[h], want_lse[:, 0])


def test_variable_blocks_that_do_not_fit_are_refused():
    chosen = torch.ones(2, 3, 4, dtype=torch.bool)
    rows, columns = torch.full((2, 3), 10), torch.full((2, 4), 10)
    q, k, v = (t.transpose(0, 1) for t in inputs(31, 40))
    wrapper = flashinfer.VariableBlockSparseAttentionWrapper(WORKSPACE)
    wrapper.plan(chosen, rows, columns, 6, 2, 16, q_data_type=torch.float32)
    with pytest.raises(ShapeMismatch, match="do not sum to q_len 31 and kv_len 40"):
        wrapper.run(q, k, v)
    with pytest.raises(ShapeMismatch, match="block_mask_map has shape"):
        wrapper.plan(chosen[:, :2], rows, columns, 6, 2, 16)
