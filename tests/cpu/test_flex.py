"""jitgen.flex_attention against torch's: signature, conventions, BlockMask, torch.compile."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
from torch.nn.attention import flex_attention as flex

import jitgen
from jitgen import errors, runtime

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def inputs(batch=2, heads=4, kv_heads=4, q_len=130, kv_len=130, head_dim=64, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, heads, q_len, head_dim), (batch, kv_heads, kv_len, head_dim), (batch, kv_heads, kv_len, head_dim))
    return tuple(torch.randn(s, generator=generator).to(dtype) for s in shapes)


def assert_same(got, want):
    torch.testing.assert_close(got, want, atol=5e-6, rtol=1e-5)


def test_signature_is_the_one_of_torch():
    theirs, ours = (list(inspect.signature(f).parameters.values()) for f in (flex.flex_attention, jitgen.flex_attention))
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == [(p.name, p.kind, p.default) for p in theirs]
    assert [p.name for p in ours[len(theirs) :]] == ["mask_mod"]


@pytest.mark.parametrize("q_len, kv_len", [(130, 130), (65, 200), (200, 65)])
def test_positions_count_from_the_first_query_row(q_len, kv_len):
    q, k, v = inputs(q_len=q_len, kv_len=kv_len)

    def bias(score, b, h, q_idx, kv_idx):
        return score + 0.01 * (q_idx - kv_idx) * (h + 1)

    mask = flex.create_block_mask(causal, None, None, q_len, kv_len, device="cpu")
    want, aux = flex.flex_attention(q, k, v, bias, mask, return_aux=flex.AuxRequest(lse=True))
    got, got_lse = jitgen.flex_attention(q, k, v, bias, mask, return_lse=True)
    assert_same(got, want)
    assert_same(got_lse, aux.lse)
    assert_same(jitgen.flex_attention(q, k, v, bias, mask_mod=causal), want)


@pytest.mark.parametrize("block_size", [128, (64, 128), 32])
def test_block_masks_of_any_block_size_are_taken_as_they_are(block_size):
    q, k, v = inputs(q_len=300, kv_len=300)
    doc = torch.arange(300) // 70

    def document(b, h, q_idx, kv_idx):
        return (doc[q_idx] == doc[kv_idx]) & ((b == 0) | (q_idx >= kv_idx)) & ((h < 2) | (kv_idx % 3 != 0))

    mask = flex.create_block_mask(document, 2, 4, 300, 300, device="cpu", BLOCK_SIZE=block_size)
    assert_same(jitgen.flex_attention(q, k, v, block_mask=mask), flex.flex_attention(q, k, v, block_mask=mask))


def test_blocks_that_a_block_mask_drops_stay_dropped():
    q, k, v = inputs(q_len=256, kv_len=256)
    mask = flex.create_block_mask(causal, None, None, 256, 256, device="cpu", BLOCK_SIZE=64)
    keep = torch.tensor([[[1, 1, 1, 1]]], dtype=torch.int32)
    thinned = flex.BlockMask.from_kv_blocks(keep, mask.kv_indices, BLOCK_SIZE=64, mask_mod=causal)
    blocks = thinned.to_dense()[0, 0].bool()
    assert blocks.sum() == 4  # one a row: torch's eager function looks at mask_mod alone, so it is no oracle here
    kept = blocks.repeat_interleave(64, 0).repeat_interleave(64, 1) & torch.ones(256, 256).tril().bool()
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=kept)
    assert_same(jitgen.flex_attention(q, k, v, block_mask=thinned), want)


def test_a_new_block_mask_of_the_same_form_builds_nothing():
    q, k, v = inputs()
    for seed in range(3):
        doc = torch.randint(0, 3, (130,), generator=torch.Generator().manual_seed(seed)).sort().values

        def document(b, h, q_idx, kv_idx, doc=doc):
            return doc[q_idx] == doc[kv_idx]

        mask = flex.create_block_mask(document, None, None, 130, 130, device="cpu")
        before = len(runtime.loaded_kernels())
        assert_same(jitgen.flex_attention(q, k, v, block_mask=mask), flex.flex_attention(q, k, v, block_mask=mask))
        assert seed == 0 or len(runtime.loaded_kernels()) == before


def test_masks_combined_by_torch_trace():
    q, k, v = inputs()

    def window(width, b, h, q_idx, kv_idx):
        return q_idx - kv_idx <= width

    both = flex.and_masks(causal, functools.partial(window, 17))
    either = flex.or_masks(both, lambda b, h, q_idx, kv_idx: kv_idx < 5)
    mask = flex.create_block_mask(either, None, None, 130, 130, device="cpu")
    assert_same(jitgen.flex_attention(q, k, v, mask_mod=either), flex.flex_attention(q, k, v, block_mask=mask))


def test_grouped_query_attention_must_be_asked_for():
    q, k, v = inputs(heads=8, kv_heads=2)
    with pytest.raises(errors.ShapeMismatch, match=r"key has 2 heads, query has 8.*enable_gqa=True"):
        jitgen.flex_attention(q, k, v)
    assert_same(jitgen.flex_attention(q, k, v, enable_gqa=True), flex.flex_attention(q, k, v, enable_gqa=True))
    other = (t.transpose(1, 2) for t in (q, k[:, :, :100], v[:, :, :100]))  # lengths where the heads belong
    with pytest.raises(errors.ShapeMismatch, match=r"key has 100 heads, query .* \[batch, heads, length, head_dim\]\?"):
        jitgen.flex_attention(*other)


def test_a_block_mask_in_the_place_of_a_function_is_told_where_it_goes():
    q, k, v = inputs()
    mask = flex.create_block_mask(causal, None, None, q.shape[2], k.shape[2], device="cpu")
    with pytest.raises(errors.VariantError, match=r"mask_mod is a BlockMask, .* its mask_mod, .* to jitgen\.flex_attention\.$"):
        jitgen.attention(q, k, v, mask_mod=mask)
    lists = jitgen.BlockSparse.bsr(torch.tensor([0, 1]), torch.tensor([0]), (32, 32), (32, 32))
    with pytest.raises(errors.VariantError, match=r"mask_mod is a BlockSparse, .* to jitgen\.block_sparse_attention\.$"):
        jitgen.Variant(mask_mod=lists)


def test_return_aux_gives_the_logsumexp():
    q, k, v = inputs()
    out, aux = jitgen.flex_attention(q, k, v, return_aux=flex.AuxRequest(lse=True))
    want, want_aux = flex.flex_attention(q, k, v, return_aux=flex.AuxRequest(lse=True))
    assert_same(out, want)
    assert_same(aux.lse, want_aux.lse)
    assert jitgen.flex_attention(q, k, v, return_aux=flex.AuxRequest())[1].lse is None
    with pytest.raises(errors.VariantError, match="max_scores"):
        jitgen.flex_attention(q, k, v, return_aux=flex.AuxRequest(max_scores=True))


def test_a_block_mask_for_other_lengths_is_refused():
    q, k, v = inputs()
    mask = flex.create_block_mask(causal, None, None, 128, 128, device="cpu")
    with pytest.raises(errors.ShapeMismatch, match="made for q_len 128 and kv_len 128, the inputs have 130 and 130"):
        jitgen.flex_attention(q, k, v, block_mask=mask)


def test_family_of_kernel_options_is_read_and_tiles_of_others_are_not():
    q, k, v = inputs()
    want = jitgen.flex_attention(q, k, v)
    assert torch.equal(jitgen.flex_attention(q, k, v, kernel_options={"BLOCK_M": 64, "FAMILY": "cpu"}), want)
    with pytest.raises(errors.VariantError, match="family='sm80' needs cuda tensors"):
        jitgen.flex_attention(q, k, v, kernel_options={"FAMILY": "SM80"})


# ---- torch.compile ----------------------------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """An attention layer whose slopes a graph must not freeze."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = torch.rand(4)
        self.score_mod = self.alibi

    def alibi(self, score, b, h, q_idx, kv_idx):
        return score + self.slopes[h] * (kv_idx - q_idx)

    def forward(self, q, k, v):
        out, lse = jitgen.flex_attention(q * 2, k, v, score_mod=self.score_mod, mask_mod=causal, return_lse=True)
        return out + 1, lse


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_module_holds_one_operator_and_sees_changed_captures(dynamic):
    torch._dynamo.reset()
    q, k, v = inputs()
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with torch.no_grad():
        for slopes in (layer.slopes, torch.zeros(4)):
            layer.slopes.copy_(slopes)
            for got, want in zip(compiled(q, k, v), layer(q, k, v), strict=True):
                assert_same(got, want)


def test_operator_passes_torchs_own_checks():
    from jitgen.op import attention_op, register
    from jitgen.recipes import constant

    q, k, v = inputs()
    handle = register({"score_mod": constant(None), "mask_mod": constant(causal)})
    for want_lse in (False, True):
        arguments = (q, k, v, [], [], handle, "flex", 0.1, want_lse, None, None)
        torch.library.opcheck(attention_op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiled_call_matches_the_layout_of_the_fake_kernel():
    torch._dynamo.reset()
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs())

    def call(q, k, v):
        return jitgen.flex_attention(q, k, v, mask_mod=causal)

    with torch.no_grad():
        got = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)
    assert got.stride() == call(q, k, v).stride()
    assert_same(got, call(q, k, v))


@pytest.mark.parametrize("mask, shown", [(causal, "<function causal"), (torch.ones(8, 8), r"a tensor of shape \(8, 8\)")])
def test_what_is_no_block_mask_is_refused(mask, shown):
    with pytest.raises(errors.VariantError, match=f"block_mask is {shown}.*A function goes to mask_mod="):
        jitgen.flex_attention(*inputs(), block_mask=mask)


def test_what_is_no_tensor_is_refused():
    q, k, v = inputs()
    with pytest.raises(TypeError, match=r"q is a list, expected a torch\.Tensor"):
        jitgen.flex_attention([q], k, v)
