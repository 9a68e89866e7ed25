"""split='fixed': requests are cut at the same keys whatever stands beside them, so their results are the same bits."""

from __future__ import annotations

import pytest
import torch
from serving_batch import Batch, poisoned

import jitgen
from jitgen import serving_segments
from jitgen.errors import PlanMismatch

LENGTHS = [(1, 700), (1, 64), (1, 0), (2, 129), (0, 30), (1, 1500), (40, 300), (1, 65), (3, 3)]
slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


VARIANTS = {
    "plain": None,
    "alibi": jitgen.Variant(
        score_mod=lambda score, b, h, q_idx, kv_idx: score + slopes[h] * (kv_idx - q_idx), mask_mod=causal
    ),
    "finished": jitgen.Variant(mask_mod=causal, sink=slopes, output_transform=lambda o, lse, b, h, q_idx: o * (b + 1)),
}


@pytest.fixture(params=["cut by the kernel", "in segments"], autouse=True)
def way(request, monkeypatch):
    """The CPU's own kernel cuts requests itself; GPUs do it by segments, whose tables are the same everywhere."""
    if request.param == "in segments":
        monkeypatch.setattr(serving_segments, "cuts_itself", lambda device: False)
    return request.param


def attend(batch, variant, layout, room=0, kv_split=256):
    options = {"split": "fixed", "kv_split": kv_split, "max_kv_len": 1500}
    plan = batch.plan(variant, room=room, layout="ragged" if layout == "ragged" else "paged", **options)
    out, lse = poisoned(plan, batch.q)
    if layout == "ragged":
        jitgen.ragged_attention(batch.q, *batch.ragged(), plan, out=out, lse=lse)
    else:
        k, v, lists = batch.pages(16)
        table = batch.csr(lists) if layout == "paged" else batch.block_table(lists)
        jitgen.paged_attention(batch.q, (k, v), table, plan, out=out, lse=lse)
    return out, lse


@pytest.mark.parametrize("layout", ["paged", "ragged", "dense table"])
@pytest.mark.parametrize("name", VARIANTS)
def test_results_are_the_oracles(name, layout):
    lengths = LENGTHS if name == "plain" else [(rows, max(rows, keys)) for rows, keys in LENGTHS]  # they read q_idx
    batch = Batch(lengths)
    out, lse = attend(batch, VARIANTS[name], layout, room=3)
    want, want_lse = batch.expected(VARIANTS[name])
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("layout", ["paged", "ragged"])
@pytest.mark.parametrize("rows, keys", [(1, 1400), (2, 513), (1, 20), (40, 600)])
def test_neighbours_do_not_change_a_bit(layout, rows, keys):
    mine = Batch([(rows, keys)], seed=3)
    alone, alone_lse = attend(mine, causal, layout)
    for seed, others in ((1, [(1, 1500)] * 9), (2, [(1, 5), (33, 40), (1, 1000)])):
        crowd = Batch([*others, (rows, keys), *others], seed=seed)
        at, first = len(others), sum(n for n, _ in others)
        crowd.q[first : first + rows], crowd.k[at], crowd.v[at] = mine.q, mine.k[0], mine.v[0]
        out, lse = attend(crowd, causal, layout, room=seed)
        assert torch.equal(out[first : first + rows], alone) and torch.equal(lse[first : first + rows], alone_lse)


def test_segments_cut_where_kv_split_says(way):
    batch = Batch([(1, 600), (1, 100), (9, 700), (0, 5), (2, 256)])
    plan = batch.plan(None, split="fixed", kv_split=256, max_kv_len=768)
    if way == "cut by the kernel":
        assert plan.segments is None
        return
    lengths = plan.segments.kv_len[: 3 * 6].view(3, 6)[:, :5]
    # 9 rows of 2 heads are 18 packed rows, which the decode kernel takes; 17 rows would stay whole
    assert lengths.tolist() == [[256, 100, 256, 5, 256], [256, 0, 256, 0, 0], [88, 0, 188, 0, 0]]
    assert plan.segments.kv_base[:17].view(-1).tolist() == [0] * 6 + [256] * 5 + [0] + [512] * 5
    states = plan.segments.row_state
    assert states[0].tolist() == list(range(13)) and (states[1] >= 0).tolist() == [True, False] + [True] * 9 + [False] * 2
    live = states[states >= 0]
    assert live.unique().numel() == live.numel() and int(live.max()) < plan.segments.state_rows


def test_pieces_are_whole_pages(way):
    batch = Batch([(1, 600)])
    if way == "in segments":
        with pytest.raises(PlanMismatch, match="kv_split is 250, and pages have 16 keys"):
            attend(batch, None, "paged", kv_split=250)
