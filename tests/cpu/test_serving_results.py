"""The serving calls on the CPU against the oracle in float64: layouts, lengths, cache forms, dtypes, hooks, splits."""

from __future__ import annotations

import math

import pytest
import torch
from gallery import CASES, Sizes
from serving_batch import Batch, poisoned

import jitgen
from jitgen.target import detect_cpu

PAGE = 16
# decode and prefill, no keys, no rows, and every length at which a page ends or begins
EDGES = [(1, 1), (1, PAGE - 1), (1, PAGE), (1, PAGE + 1), (1, 700), (0, 40), (1, 0), (0, 0), (3, 300), (50, 50), (130, 391)]
TOLERANCE = 5e-6  # float32, values of size 1


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def assert_is_the_oracle(batch, got, want, tolerance=TOLERANCE):
    (out, lse), (exact, exact_lse) = got, want
    assert not out.isnan().any()
    assert (out.double() - exact).abs().max().item() <= tolerance
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=2e-5)


def call_paged(batch, plan, page_size=PAGE, **options):
    k, v, lists = batch.pages(page_size)
    out, lse = poisoned(plan, batch.q)
    jitgen.paged_attention(batch.q, (k, v), batch.csr(lists), plan, out=out, lse=lse, return_lse=True, **options)
    return out, lse


def call_ragged(batch, plan, **options):
    out, lse = poisoned(plan, batch.q)
    jitgen.ragged_attention(batch.q, *batch.ragged(), plan, out=out, lse=lse, return_lse=True, **options)
    return out, lse


CALLS = {"paged": call_paged, "ragged": call_ragged}


# ---- lengths, pages, heads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", CALLS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_requests_of_every_length_are_attended(layout, is_causal):
    edges = [(rows, keys) for rows, keys in EDGES if rows <= keys or not is_causal]
    batch, variant = Batch(edges), jitgen.Variant(mask_mod=causal) if is_causal else None
    plan = batch.plan(variant, layout=layout)
    assert_is_the_oracle(batch, CALLS[layout](batch, plan), batch.expected(variant))


@pytest.mark.parametrize("page_size", [1, 3, 16, 64, 256, 1000])
def test_pages_of_every_size_are_read(page_size):
    batch = Batch([(1, 700), (1, 256), (20, 300), (2, 2), (1, 999)])
    plan = batch.plan(causal)
    assert_is_the_oracle(batch, call_paged(batch, plan, page_size), batch.expected(causal))


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (8, 8), (8, 1), (24, 1), (50, 1), (6, 2)])
def test_query_heads_share_kv_heads(heads, kv_heads):
    batch = Batch([(1, 300), (5, 77), (60, 130)], heads, kv_heads)
    plan = batch.plan(causal)
    assert_is_the_oracle(batch, call_paged(batch, plan), batch.expected(causal))


@pytest.mark.parametrize("head_dim, head_dim_v", [(8, 8), (40, 72), (128, 64), (192, 128), (256, 256)])
@pytest.mark.parametrize("layout", CALLS)
def test_every_head_dim_is_taken(layout, head_dim, head_dim_v):
    batch = Batch([(1, 140), (9, 70), (33, 33)], head_dim=head_dim, head_dim_v=head_dim_v)
    plan = batch.plan(layout=layout)
    assert_is_the_oracle(batch, CALLS[layout](batch, plan), batch.expected())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", CALLS)
def test_short_dtypes_lose_no_more_than_rounding(layout, dtype):
    batch = Batch([(1, 700), (40, 300), (3, 16)], head_dim=64, dtype=dtype)
    plan = batch.plan(causal, layout=layout)
    (out, lse), (exact, exact_lse) = CALLS[layout](batch, plan), batch.expected(causal)
    unit = torch.finfo(dtype).eps / 2
    allowed = 1.01 * unit * exact.abs() + 1e-6  # of the output: products and sums are in float32
    if dtype == torch.bfloat16 and detect_cpu().isa == "amx":
        batch.v = [v.abs() for v in batch.v]
        allowed += 1.01 * unit * batch.expected(causal)[0]  # of the weights
    assert ((out.double() - exact).abs() <= allowed).all()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=2e-5)


def test_an_empty_batch_is_no_error():
    batch = Batch([])
    plan = batch.plan(room=4)
    cache = torch.zeros(1, 2, PAGE, 2, 16)
    out = jitgen.paged_attention(batch.q, cache, torch.zeros(0, 1, dtype=torch.int32), plan)
    assert out.shape == (0, 4, 16)


def test_rows_past_the_last_request_are_left_alone():
    batch = Batch([(1, 40), (2, 50)])
    plan = batch.plan(room=8)
    k, v, lists = batch.pages(PAGE)
    q = torch.cat([batch.q, torch.full((5, *batch.q.shape[1:]), math.nan)])
    out, lse = poisoned(plan, q)
    jitgen.paged_attention(q, (k, v), batch.csr(lists), plan, out=out, lse=lse)
    assert_is_the_oracle(batch, (out[:3], lse[:3]), batch.expected())
    assert out[3:].isnan().all() and lse[3:].isnan().all()


# ---- forms of the cache and of the table -----------------------------------------------------------------------------------


def cache_forms(k, v):
    """The same cache in every form that a call takes."""
    pair = torch.stack([k, v], 1)
    wide = torch.full((*k.shape[:3], 2 * k.shape[3] + 8), math.nan)
    wide[..., : k.shape[3]], wide[..., k.shape[3] : -8] = k, v
    return {
        "pair": ((k, v), "NHD"),
        "one": (pair, "NHD"),
        "pair HND": ((k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()), "HND"),
        "one HND": (pair.transpose(2, 3).contiguous(), "HND"),
        "HND seen as NHD": ((k.transpose(1, 2).contiguous().transpose(1, 2), v), "NHD"),
        "columns of one": ((wide[..., : k.shape[3]], wide[..., k.shape[3] : -8]), "NHD"),
        "every other page": ((torch.stack([k, k + 1], 1)[:, 0], v), "NHD"),
    }


@pytest.mark.parametrize("form", cache_forms(*torch.zeros(2, 1, 1, 1, 8)))
def test_cache_is_read_in_every_form(form):
    batch = Batch([(1, 100), (20, 45), (1, 7)])
    k, v, lists = batch.pages(PAGE)
    cache, kv_layout = cache_forms(k, v)[form]
    got = jitgen.paged_attention(batch.q, cache, batch.csr(lists), batch.plan(), kv_layout=kv_layout, return_lse=True)
    assert_is_the_oracle(batch, got, batch.expected())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_table_is_read_in_every_form(dtype):
    batch = Batch([(1, 100), (20, 45), (0, 0), (1, 7)])
    k, v, lists = batch.pages(PAGE)
    plan = batch.plan().update(batch.q_indptr(dtype), batch.kv_len(dtype))
    table = batch.block_table(lists, dtype)
    forms = [batch.csr(lists, dtype), table, jitgen.PageTable.csr(*batch.csr(lists, dtype)), jitgen.PageTable.dense(table),
             torch.cat([table, table], 1)[:, : table.shape[1]], table.T.contiguous().T]  # fmt: skip
    for form in forms:
        got = jitgen.paged_attention(batch.q, (k, v), form, plan, return_lse=True)
        assert_is_the_oracle(batch, got, batch.expected())


def test_pages_outside_a_window_need_not_exist():
    width = 40
    batch = Batch([(1, 700), (3, 500)])
    k, v, lists = batch.pages(PAGE)
    freed = [[-1 if (j + 1) * PAGE <= keys - rows - width + 1 - PAGE else p for j, p in enumerate(pages)]
             for pages, (rows, keys) in zip(lists, batch.lengths, strict=True)]  # fmt: skip
    assert sum(p == -1 for pages in freed for p in pages) > 40

    def window(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (q_idx - kv_idx < width)

    got = jitgen.paged_attention(batch.q, (k, v), batch.csr(freed), batch.plan(window), return_lse=True)
    assert_is_the_oracle(batch, got, batch.expected(window))


def test_lengths_of_last_pages_give_the_number_of_keys():
    batch = Batch([(1, 1), (1, 15), (1, 16), (1, 17), (1, 0), (1, 300)])
    table = jitgen.PageTable.csr(*batch.csr(batch.pages(PAGE)[2]))
    last = batch.ints([1, 15, 16, 1, 0, 12])
    assert table.kv_len(last, PAGE).tolist() == [1, 15, 16, 17, 0, 300]


def test_ragged_requests_need_not_fill_their_part_of_k():
    batch = Batch([(2, 40), (1, 30)])
    gap = [torch.full((7, *t.shape[1:]), math.nan) for t in (batch.k[0], batch.v[0])]
    k, v = torch.cat([batch.k[0], gap[0], batch.k[1]]), torch.cat([batch.v[0], gap[1], batch.v[1]])
    plan = batch.plan(layout="ragged").update(batch.q_indptr(), batch.kv_len(), kv_indptr=batch.ints([0, 47, 77]))
    got = jitgen.ragged_attention(batch.q, k, v, plan, return_lse=True)
    assert_is_the_oracle(batch, got, batch.expected())


# ---- hooks -----------------------------------------------------------------------------------------------------------------

HOOK_CASES = [
    "alibi", "soft_cap", "gemma2", "gpt_oss", "softmax_one", "sliding_window", "causal_per_request", "padding", "tree_verify",
    "window_per_head", "sigmoid", "stick_breaking", "written_softmax", "joined_stick_breaking", "joined_power", "gated_output",
    "base_two", "query_bias",
]  # fmt: skip


@pytest.mark.parametrize("name", HOOK_CASES)
@pytest.mark.parametrize("layout", CALLS)
def test_variant_means_the_same_as_in_the_oracle(layout, name):
    z = Sizes(101, 301, batch=4)
    batch = Batch([(1, 301), (101, 301), (5, 64), (1, 1)], z.num_q_heads, z.num_kv_heads, z.head_dim)
    variant = CASES[name].make(z)
    program = variant.trace().program
    want, exact_lse = batch.expected(variant)
    plan = batch.plan(variant, layout=layout)
    has_lse = program.norm is None or program.norm.lse is not None
    call = jitgen.ragged_attention if layout == "ragged" else jitgen.paged_attention
    k, v, lists = batch.pages(PAGE)
    inputs = batch.ragged() if layout == "ragged" else ((k, v), batch.csr(lists))
    got = call(batch.q, *inputs, plan, return_lse=has_lse)
    out = got[0] if has_lse else got
    assert not out.isnan().any()
    assert (out.double() - want).abs().max().item() <= 2e-5 * max(1.0, want.abs().max().item())
    if has_lse:
        torch.testing.assert_close(got[1].double(), exact_lse, rtol=1e-5, atol=2e-5)


def test_rows_may_count_from_the_first_query():
    bias = torch.randn(50)
    variant = jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + bias[q_idx], q_index="local",
                             mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx + 3)  # fmt: skip
    batch = Batch([(50, 20), (1, 60), (0, 5)])
    assert_is_the_oracle(batch, call_paged(batch, batch.plan(variant)), batch.expected(variant, q_index="local"))


def test_captures_are_replaced_by_name():
    slopes, width = torch.randn(4), 30
    variant = jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + slopes[h] * (q_idx - kv_idx),
                             mask_mod=lambda b, h, q_idx, kv_idx: q_idx - kv_idx < width)  # fmt: skip
    batch, others = Batch([(1, 200), (5, 64)]), torch.randn(4)
    plan = batch.plan(variant)
    plan.update(batch.q_indptr(), batch.kv_len(), width=90)
    got = call_paged(batch, plan, slopes=others)
    assert_is_the_oracle(batch, got, batch.expected(variant.bind(slopes=others, width=90)), 2e-5)


def test_layers_with_one_mask_share_a_plan():
    cap = 5.0
    capped = jitgen.Variant(mask_mod=causal, score_mod=lambda s, b, h, q_idx, kv_idx: cap * torch.tanh(s / cap))
    batch = Batch([(1, 200), (30, 64)])
    plan = batch.plan(jitgen.Variant(mask_mod=causal))
    assert_is_the_oracle(batch, call_paged(batch, plan, variant=capped), batch.expected(capped))
    assert_is_the_oracle(batch, call_paged(batch, plan), batch.expected(causal))


def test_scale_is_taken_from_the_call():
    batch = Batch([(1, 200), (30, 64)])
    for scale in (0.7, -0.3):
        assert_is_the_oracle(batch, call_paged(batch, batch.plan(), scale=scale), batch.expected(scale=scale))


# ---- splitting -------------------------------------------------------------------------------------------------------------

LONG = [(1, 9000), (1, 5), (2, 3000), (40, 1500)]


@pytest.fixture
def many_threads():
    """More threads than this machine may have: more pieces."""
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "split", [{}, {"split": "fixed", "kv_split": 600}, {"split": "none"}], ids=["balanced", "fixed", "none"]
)
@pytest.mark.parametrize("layout", CALLS)
def test_cut_requests_are_merged(many_threads, layout, split):
    batch = Batch(LONG)
    plan = batch.plan(causal, layout=layout, **split)
    got = CALLS[layout](batch, plan)
    assert_is_the_oracle(batch, got, batch.expected(causal))
    again = CALLS[layout](batch, plan)
    assert torch.equal(got[0], again[0]) and torch.equal(got[1], again[1])


def test_sinks_and_output_hooks_see_the_merged_row(many_threads):
    sinks, gate = torch.randn(4), torch.randn(4)
    variant = jitgen.Variant(sink=sinks, output_transform=lambda o, lse, b, h, q_idx: o * torch.sigmoid(gate[h] + lse),
                             lse_transform=lambda lse, b, h, q_idx: lse * 2.0)  # fmt: skip
    batch = Batch(LONG)
    assert_is_the_oracle(batch, call_paged(batch, batch.plan(variant)), batch.expected(variant))


def test_fixed_pieces_do_not_depend_on_the_rest_of_the_batch(many_threads):
    batch = Batch(LONG)
    plan = batch.plan(causal, split="fixed", kv_split=512)
    k, v, lists = batch.pages(PAGE)
    together = jitgen.paged_attention(batch.q, (k, v), batch.csr(lists), plan)
    at = 0
    for b, (rows, keys) in enumerate(LONG):
        plan.update(batch.ints([0, rows]), batch.ints([keys]))
        alone = jitgen.paged_attention(batch.q[at : at + rows], (k, v), batch.csr([lists[b]]), plan)
        assert torch.equal(alone, together[at : at + rows])
        at += rows
