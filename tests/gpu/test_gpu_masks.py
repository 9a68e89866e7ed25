"""Masks that the sm90 kernel applies by bits, against float64: runs that begin and end anywhere in a tile, and documents."""

from __future__ import annotations

import pytest
import torch
from gallery.rounding import check_attention, largest_error, rounding_error

import jitgen
from jitgen import reference
from jitgen.bench.workloads import document_ids

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="the sm90 family needs compute capability 9.0",
)

LENGTHS = [(1, 1), (1, 300), (65, 65), (193, 500), (777, 777)]  # q_len, kv_len
HEADS = 4


def documents(kv_len, longest):
    """Ascending ids of documents of random lengths."""
    lengths = torch.randint(1, longest + 1, (kv_len,), generator=torch.Generator().manual_seed(1))
    return torch.repeat_interleave(torch.arange(kv_len), lengths)[:kv_len].cuda()


def window(width):
    return lambda kv_len: lambda b, h, q, k: (k <= q) & (q - k < width)


def window_of_a_head(kv_len):
    widths = (torch.arange(HEADS, device="cuda") * 50 + 3).int()
    return lambda b, h, q, k: (k <= q) & (q - k < widths[h])


def last_key_of_a_row(kv_len):
    ends = (torch.arange(kv_len, device="cuda") * 7 % kv_len).int()
    return lambda b, h, q, k: (k < ends[q]) & (k > q - 200)


def of_documents(mask, longest=40, dtype=torch.int32):
    """A mask over document ids, which are far apart in 64 bits."""

    def make(kv_len):
        ids = documents(kv_len, longest)
        doc = jitgen.sorted(ids * 10**10 if dtype == torch.int64 else ids.to(dtype))
        return lambda b, h, q, k: mask(doc, q, k)

    return make


def same(doc, q, k):
    return (doc[q] == doc[k]) & (k <= q)


MASKS = {
    "window_of_5": window(5),
    "window_of_128": window(128),
    "window_beyond_all": window(1 << 62),
    "window_of_a_head": window_of_a_head,
    "both_sides": lambda kv_len: lambda b, h, q, k: (k <= q + 100) & (q - k <= 100),
    "sinks": lambda kv_len: lambda b, h, q, k: (k <= q) & ((q - k < 100) | (k < 5)),
    "prefix": lambda kv_len: lambda b, h, q, k: (k <= q) | (k < 77),
    "two_diagonals": lambda kv_len: lambda b, h, q, k: (k == q) | (k == q - 3),
    "all_but_the_diagonal": lambda kv_len: lambda b, h, q, k: (k != q) & (k <= q + 3),
    "last_key_of_a_row": last_key_of_a_row,
    "documents": of_documents(same),
    "documents_of_one_token": of_documents(same, longest=1),
    "long_documents_in_64_bits": of_documents(same, longest=400, dtype=torch.int64),
    "documents_both_ways": of_documents(lambda doc, q, k: doc[q] == doc[k]),
    "documents_in_a_window": of_documents(lambda doc, q, k: same(doc, q, k) & (q - k < 9)),
    "documents_before": of_documents(lambda doc, q, k: (doc[k] < doc[q]) | (k == q)),
    "other_documents": of_documents(lambda doc, q, k: (doc[k] != doc[q]) & (k <= q)),
}


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", MASKS)
def test_masks_by_bits_are_the_oracle(name, head_dim):
    torch.manual_seed(0)
    for q_len, kv_len in LENGTHS:
        q = torch.randn(2, HEADS, q_len, head_dim, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(2, 2, kv_len, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        variant = jitgen.Variant(mask_mod=MASKS[name](kv_len))
        where = f"q_len {q_len}, kv_len {kv_len}"
        got = check_attention(variant, q, k, v, where, family="sm90")
        assert torch.equal(got, jitgen.attention(q, k, v, variant, family="sm90")), where


def mixed_documents(kv_len):
    doc = jitgen.sorted(document_ids(kv_len).cuda())
    return lambda b, h, q, k: same(doc, q, k)


def blind(mask):
    """A mask of which rows from 2000 on see nothing: all rows that CTAs begin with, and whose Q they copy without asking."""

    def make(kv_len):
        inner = mask(kv_len)
        return lambda b, h, q, k: inner(b, h, q, k) & (q < 2000)

    return make


MANY = {
    "window": window(1025),
    "documents": mixed_documents,
    "blind": blind(window(1025)),
    "blind_documents": blind(mixed_documents),
}


# Groups of rows skip KV tiles at both ends of a query tile, and CTAs take many of them: documents at head_dim 64 once hung.
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("mask", MANY.values(), ids=MANY)
def test_many_query_tiles_are_those_of_a_small_launch(mask, head_dim):
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 32, 4096, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    variant = jitgen.Variant(mask_mod=mask(4096))
    for _ in range(5):
        got = jitgen.attention(q, k, v, variant, family="sm90")
    few = [x[1:2, 5:7].contiguous() for x in (q, k, v)]
    assert torch.equal(got[1:2, 5:7], jitgen.attention(*few, variant, family="sm90"))
    want = reference.attention(*few, variant)
    allowed = 1.5 * rounding_error(*few, variant, want, "absolute") + torch.finfo(q.dtype).eps * 1e-2
    assert largest_error(got[1:2, 5:7], want) <= allowed
