"""Prefill of ragged batches on CUDA against the oracle in float64: lengths, pages, heads, head dims, hooks, cut requests."""

from __future__ import annotations

import math

import pytest
import torch
from norm_cases import Sigmoid, StickBreaking
from serving_batch import Batch, poisoned

import jitgen
from jitgen.serving_balance import NEVER_CUT, PlanShape, balance, read_plan

DEVICE = "cuda"
# Rows and keys: one row, ends of tiles of 64 and 128 packed rows and of 64 keys, no rows, no keys, short rows on long keys
LENGTHS = [(1, 1), (33, 33), (0, 40), (64, 65), (17, 1000), (127, 128), (128, 300), (129, 129), (257, 700), (5, 2049)]
# Largest relative error, in units of the last place of the dtype: the weights and the output are rounded once each.
ULPS = 0.5
TANH_ULPS = 1.0  # tanh.approx is good to 2**-11
LSE = {"atol": 1e-4, "rtol": 1e-5}
TANH_LSE = {"atol": 5e-3, "rtol": 1e-5}


def layout_of(page_size):
    return {"layout": "paged", "page_size": page_size} if page_size else {"layout": "ragged"}


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def make_batch(lengths=LENGTHS, heads=8, kv_heads=2, head_dim=64, head_dim_v=0, dtype=torch.bfloat16, seed=0):
    return Batch(lengths, heads, kv_heads, head_dim, head_dim_v, dtype, DEVICE, seed)


def attend(batch, plan, page_size, *, has_lse=True, **options):
    """Output and logsumexp of a call, into buffers full of NaN; page_size 0: ragged keys."""
    out, lse = poisoned(plan, batch.q)
    lse = lse if has_lse else None
    if page_size == 0:
        jitgen.ragged_attention(batch.q, *batch.ragged(), plan, out=out, lse=lse, **options)
    else:
        k, v, lists = batch.pages(page_size)
        jitgen.paged_attention(batch.q, (k, v), batch.csr(lists), plan, out=out, lse=lse, **options)
    return out, lse


def assert_close(batch, got, want, ulps=ULPS, lse_tolerance=LSE):
    (out, lse), (exact, exact_lse) = got, want
    assert not out.isnan().any()
    error = ((out.double() - exact).norm() / exact.norm()).item()
    allowed = ulps * torch.finfo(batch.dtype).eps
    assert error <= allowed, f"relative error {error:.3g}, allowed {allowed:.3g}"
    of_row = (out.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1).clamp_min(1e-30)
    assert of_row.max() <= 4 * allowed, f"row {of_row.argmax()}: relative error {of_row.max():.3g}"
    if lse is not None:
        torch.testing.assert_close(lse.double(), exact_lse, **lse_tolerance)


def check(batch, variant, family, page_size, *, expected=None, **tolerances):
    plan = batch.plan(variant, **layout_of(page_size), family=family, max_kv_len=4096)
    want = expected or batch.expected(variant)
    has_lse = not want[1].isnan().any()
    assert_close(batch, attend(batch, plan, page_size, has_lse=has_lse), want, **tolerances)


# ---- lengths, pages, heads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [0, 1, 3, 8, 16, 48, 64, 128, 256])
@pytest.mark.parametrize("mask", [None, causal], ids=["full", "causal"])
def test_requests_of_every_length_are_attended(family, page_size, mask):
    check(make_batch(), mask, family, page_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim, head_dim_v", [(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)])
@pytest.mark.parametrize("page_size", [0, 16])
def test_every_head_dim_is_taken(family, head_dim, head_dim_v, dtype, page_size):
    batch = make_batch([(70, 300), (200, 200), (3, 2100)], head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype)
    check(batch, causal, family, page_size)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 4), (8, 1), (16, 1), (6, 2), (7, 1), (12, 1), (40, 1)])
def test_query_heads_share_kv_heads(family, heads, kv_heads):
    check(make_batch([(20, 300), (130, 130), (1, 77)], heads, kv_heads), causal, family, 16)


def test_requests_without_keys_get_zeros(family):
    batch = make_batch([(5, 0), (70, 70), (40, 0)])
    plan = batch.plan(None, family=family)
    out, lse = attend(batch, plan, 16)
    empty = torch.tensor([True] * 5 + [False] * 70 + [True] * 40, device=DEVICE)
    assert (out[empty] == 0).all() and (lse[empty] == -math.inf).all()
    assert (out[~empty] != 0).any() and lse[~empty].isfinite().all()


def test_rows_count_from_the_first_query_or_from_the_end_of_the_keys(family):
    batch = make_batch([(70, 40), (33, 300), (200, 1)])
    variant = jitgen.Variant(mask_mod=causal, q_index="local")
    check(batch, variant, family, 0, expected=batch.expected(variant, q_index="local"))


def test_rows_past_the_last_request_are_left_alone(family):
    batch = make_batch([(40, 40), (20, 50)])
    plan = batch.plan(causal, room=100, family=family)
    k, v, lists = batch.pages(16)
    q = torch.cat([batch.q, torch.full((100, *batch.q.shape[1:]), math.nan, dtype=batch.dtype, device=DEVICE)])
    out, lse = poisoned(plan, q)
    jitgen.paged_attention(q, (k, v), batch.csr(lists), plan, out=out, lse=lse)
    assert_close(batch, (out[:60], lse[:60]), batch.expected(causal))
    assert out[60:].isnan().all() and lse[60:].isnan().all()


def test_pages_that_the_mask_hides_need_not_exist(family):
    width, page_size = 40, 8

    def window(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (q_idx - kv_idx < width)

    batch = make_batch([(40, 700), (33, 500)])
    k, v, lists = batch.pages(page_size)
    freed = [[-1 if (j + 1) * page_size <= keys - rows - width else p for j, p in enumerate(pages)]
             for pages, (rows, keys) in zip(lists, batch.lengths, strict=True)]  # fmt: skip
    plan = batch.plan(window, family=family)
    got = jitgen.paged_attention(batch.q, (k, v), batch.csr(freed), plan, return_lse=True)
    assert_close(batch, got, batch.expected(window))


@pytest.mark.parametrize("page_size", [0, 1, 16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rows_behind_the_last_one_need_no_keys(family, head_dim, page_size):
    """A tile of rows that is not full: the mask would show all keys to those that it does not have."""
    kv_len = 3000

    def mask(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & ((q_idx - kv_idx < 200) | (q_idx >= kv_len))

    check(make_batch([(15, kv_len)] * 70 + [(40, kv_len), (1, kv_len)], head_dim=head_dim), mask, family, page_size)


def test_gaps_between_requests_are_not_read(family):
    batch = make_batch([(40, 100), (70, 300)])
    gap = torch.full((37, 2, 64), math.nan, dtype=batch.dtype, device=DEVICE)
    k, v = (torch.cat([t[0], gap, t[1], gap]) for t in (batch.k, batch.v))
    plan = batch.plan(causal, layout="ragged", family=family)
    plan.update(batch.q_indptr(), batch.kv_len(), kv_indptr=batch.ints([0, 137, 437]))
    got = jitgen.ragged_attention(batch.q, k, v, plan, return_lse=True)
    assert_close(batch, got, batch.expected(causal))


@pytest.mark.parametrize("page_size", [0, 16, 48])
def test_the_last_of_many_items_are_given_out_in_pieces(family, page_size):
    """Results are those of whole items, the same every time, though CTAs take pieces as they come free."""
    batch = make_batch([(1500, 9000), (900, 8500), (1, 50), (900, 9000)], heads=32, kv_heads=8)
    plan = batch.plan(causal, **layout_of(page_size), family=family, max_kv_len=9216)
    for c in plan.classes:
        record = read_plan(c.plan.cpu().numpy().tobytes(), c.num_ctas)
        assert (record.given_out.tail_groups > 0 and any(tile.pieces for tile in record.tiles)) == (family == "sm90")
    got = attend(batch, plan, page_size)
    assert_close(batch, got, batch.expected(causal))
    for _ in range(4):
        again = attend(batch, plan, page_size)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


SHORT = [(128, 128 * (1 + 7 * i % 5)) for i in range(60)]


@pytest.mark.parametrize(
    ("lengths", "kv_heads", "is_cut"),
    [
        ([*SHORT[:30], (128, 12000), *SHORT[30:]], 4, True),  # one that all others together would not last as long as
        (SHORT, 4, False),
        ([(700, 900), (40, 5000), (1, 77), (900, 1500), *SHORT[:9]], 8, False),
        ([(33, 200), (40, 1000), (1, 130)] * 350 + [(33, 3000)], 1, False),  # more than are sorted but by powers of two
    ],
    ids=["one long", "short", "mixed", "many tiles"],
)
def test_planner_gives_out_the_items_of_the_host(lengths, kv_heads, is_cut):
    """And what the kernel makes of them is attention, the same every time."""
    batch = make_batch(lengths, heads=4 * kv_heads, kv_heads=kv_heads)
    plan = batch.plan(layout="ragged", family="sm90")
    (c,) = plan.classes
    tiles = c.kernel.spec.tiles
    shape = PlanShape(tiles.tile_q, tiles.tile_kv, 4, kv_heads, 4, c.class_rows + 1, NEVER_CUT, 0, 2, 8, 0, 2, c.num_ctas)
    record = read_plan(c.plan.cpu().numpy().tobytes(), c.num_ctas)
    assert record == balance([q for q, _ in lengths], [k for _, k in lengths], shape)
    assert record.given_out.tail_groups and any(pieces > 1 for _, _, pieces, _ in record.items(shape)) == is_cut
    got = attend(batch, plan, 0)
    assert_close(batch, got, batch.expected())
    for _ in range(4):
        again = attend(batch, plan, 0)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("page_size", [1, 12, 16])
def test_a_plan_need_not_know_the_page_size(family, page_size):
    batch = make_batch()
    plan = batch.plan(causal, family=family)
    assert_close(batch, attend(batch, plan, page_size), batch.expected(causal))


def test_cache_and_query_are_read_by_their_strides(family):
    batch = make_batch([(40, 200), (129, 129)])
    plan = batch.plan(causal, family=family)
    k, v, lists = batch.pages(16)
    pair = torch.stack([k, v], 1).transpose(2, 3).contiguous()  # [pages, 2, heads, page_size, head_dim]
    wide = torch.full((*batch.q.shape[:2], 3 * 64), math.nan, dtype=batch.dtype, device=DEVICE)
    wide[..., 64:128] = batch.q
    out = torch.full((batch.total_q, 8, 2 * 64), math.nan, dtype=batch.dtype, device=DEVICE)
    table = batch.block_table(lists)
    jitgen.paged_attention(wide[..., 64:128], pair, table, plan, kv_layout="HND", out=out[..., :64])
    assert_close(batch, (out[..., :64], None), batch.expected(causal))
    assert out[..., 64:].isnan().all()


# ---- hooks -----------------------------------------------------------------------------------------------------------------


def variants(device):
    """Hooks that read the row, the column, the head, the request; masks that bound keys from both sides, or by rows."""
    window, cap = 100, 20.0
    slopes, sinks, gate = (torch.linspace(-1, 1, 8, device=device) for _ in range(3))
    doc = (torch.arange(4096, device=device) // 150).int()
    start = (torch.arange(4096, device=device) // 150 * 150).int()
    widths = torch.tensor([5, 30, 100, 1000, 17, 64, 65, 3], device=device)
    padding = torch.tensor([0, 3, 70], device=device)

    def windowed(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (q_idx - kv_idx < window)

    return {
        "window": jitgen.Variant(mask_mod=windowed),
        "window_per_head": jitgen.Variant(mask_mod=lambda b, h, q, kv: (kv <= q) & (q - kv < widths[h])),
        "documents": jitgen.Variant(mask_mod=lambda b, h, q, kv: (doc[q] == doc[kv]) & (kv <= q)),
        "starts": jitgen.Variant(mask_mod=lambda b, h, q, kv: (kv >= start[q]) & (kv <= q)),
        "padding": jitgen.Variant(mask_mod=lambda b, h, q, kv: (kv >= padding[b]) & (kv <= q)),
        "alibi": jitgen.Variant(score_mod=lambda s, b, h, q, kv: s + slopes[h] * (kv - q), mask_mod=causal),
        "soft_cap": jitgen.Variant(score_mod=lambda s, b, h, q, kv: cap * torch.tanh(s / cap), mask_mod=windowed),
        "negative": jitgen.Variant(score_mod=lambda s, b, h, q, kv: -2 * s, mask_mod=causal),
        "sink": jitgen.Variant(sink=sinks, mask_mod=causal),
        "transforms": jitgen.Variant(
            mask_mod=causal,
            output_transform=lambda o, lse, b, h, q: o * torch.sigmoid(gate[h] + 0.1 * lse) * (1 + 0.01 * q),
            lse_transform=lambda lse, b, h, q: lse * 2 + h + q,
        ),
        "sigmoid": jitgen.Variant(mask_mod=causal, softmax=Sigmoid),
        "stick_breaking": jitgen.Variant(mask_mod=causal, softmax=StickBreaking),
    }


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("name", list(variants("cpu")))
def test_variant_means_the_same_as_in_the_oracle(family, name, page_size):
    tolerances = {"ulps": TANH_ULPS, "lse_tolerance": TANH_LSE} if name == "soft_cap" else {}
    check(make_batch([(40, 300), (133, 133), (17, 2500)]), variants(DEVICE)[name], family, page_size, **tolerances)


# ---- cut requests --------------------------------------------------------------------------------------------------------


LONG = [(40, 4000), (5, 30), (64, 2000), (100, 3000)]


def pieces_of(plan):
    """Items that the plan cuts: shares that begin inside one."""
    buffer = plan.classes[0].plan
    shares = plan.classes[0].num_ctas
    return int((buffer[16 : 16 + 20 * shares].view(shares, 20)[:, 2] > 0).sum())


@pytest.mark.parametrize("page_size", [0, 16])
def test_long_requests_are_cut_and_joined_the_same_every_time(family, page_size):
    batch, variant = make_batch(LONG, head_dim=128), variants(DEVICE)["transforms"]
    plan = batch.plan(variant, **layout_of(page_size), family=family)
    assert pieces_of(plan) > 0
    got = attend(batch, plan, page_size)
    assert_close(batch, got, batch.expected(variant))
    again = attend(batch, plan, page_size)
    assert torch.equal(got[0], again[0]) and torch.equal(got[1], again[1])


def test_sinks_count_once_in_cut_requests(family):
    check(make_batch(LONG), variants(DEVICE)["sink"], family, 16)


def test_requests_are_not_cut_where_that_is_asked_for(family):
    batch = make_batch(LONG)
    plan = batch.plan(causal, family=family, split="none")
    assert pieces_of(plan) == 0
    k, v, lists = batch.pages(16)
    together = jitgen.paged_attention(batch.q, (k, v), batch.csr(lists), plan)
    assert_close(batch, (together, None), batch.expected(causal))
    at = 0
    for b, (rows, keys) in enumerate(LONG):
        plan.update(batch.ints([0, rows]), batch.ints([keys]))
        alone = jitgen.paged_attention(batch.q[at : at + rows], (k, v), batch.csr([lists[b]]), plan)
        assert torch.equal(alone, together[at : at + rows])
        at += rows


def test_plan_and_calls_are_captured_in_a_graph(family):
    batch, other = make_batch([(40, 300), (200, 200)]), make_batch([(140, 200), (100, 1000)], seed=1)
    pages, table = other.pages(16)[:2], other.block_table(other.pages(16)[2])
    q_indptr, kv_len, q = batch.q_indptr(), batch.kv_len(), batch.q.clone()
    tables = torch.zeros_like(table)
    plan = jitgen.Plan(2, 240, 8, 2, 64, variant=causal, family=family, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.update(q_indptr, kv_len)
        out, lse = jitgen.paged_attention(q, pages, tables, plan, return_lse=True)
    for tensor, value in ((q_indptr, other.q_indptr()), (kv_len, other.kv_len()), (q, other.q), (tables, table)):
        tensor.copy_(value)
    graph.replay()
    assert_close(other, (out, lse), other.expected(causal))
