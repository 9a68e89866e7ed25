"""Cascade.of_tree: prefixes that an engine keeps in a tree of nodes with pages, against requests that share nothing."""

from __future__ import annotations

import pytest
import torch
from serving_batch import Batch

import jitgen
from jitgen.errors import ShapeMismatch
from jitgen.serving_tree import shared_runs_of

SIZE = 4


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def path_of(*nodes):
    """A path from (name, number of pages), whose pages are numbered by name."""
    return [(name, [(name, i) for i in range(count)]) for name, count in nodes]


def runs_of(paths, most_levels, min_pages=2):
    full = [sum(len(pages) for _, pages in path) for path in paths]
    return [tuple(vars_of(r)) for r in shared_runs_of(paths, full, most_levels, min_pages)]


def vars_of(run):
    return run.level, run.begin, run.end, run.first, run.last


def test_runs_nest():
    paths = [
        path_of(("system", 3), ("task", 2), (1, 1)),
        path_of(("system", 3), ("task", 2), (2, 4)),
        path_of(("system", 3), ("other", 1), (3, 1)),
        path_of(("alone", 9)),
    ]
    assert runs_of(paths, 1) == [(0, 0, 3, 0, 3)]
    assert runs_of(paths, 2) == [(0, 0, 3, 0, 3), (1, 0, 2, 3, 5)]
    assert runs_of(paths, 0) == []


def test_what_is_too_short_for_a_level_is_left_to_the_next():
    paths = [path_of(("begin", 1), (name, 3), (i, 1)) for i, name in enumerate("aabb")]
    assert runs_of(paths, 1) == [(0, 0, 2, 0, 4), (0, 2, 4, 0, 4)]
    assert runs_of(paths, 1, min_pages=5) == []


def test_only_neighbours_share_and_only_full_pages():
    a, b = path_of(("a", 4), (1, 1)), path_of(("b", 4), (2, 1))
    assert runs_of([a, b, a, b], 1) == []
    assert [vars_of(r) for r in shared_runs_of([a, a], [3, 5], 1, 2)] == [(0, 0, 2, 0, 3)]


def test_a_request_that_ends_inside_of_another_shares_what_it_has():
    short, long = path_of(("a", 4)), path_of(("a", 4), ("b", 3))
    assert runs_of([short, long, long], 2) == [(0, 0, 3, 0, 4), (1, 1, 3, 4, 7)]


@pytest.mark.parametrize("max_levels", [1, 2, 3])
def test_attention_over_a_tree_is_that_over_whole_requests(max_levels):
    shared = {"system": 5, "left": 3, "right": 4}
    requests = [("system", "left"), ("system", "left"), ("system", "right"), ("system", "right"), ("system",), ()]
    own = [5, 9, 1, 30, 7, 12]
    q_lens = [1, 2, 1, 1, 3, 1]
    lengths = [(q, SIZE * sum(shared[n] for n in names) + keys) for q, names, keys in zip(q_lens, requests, own, strict=True)]
    batch = Batch(lengths, head_dim=16)
    first = {}
    for b, names in enumerate(requests):  # requests with the same nodes have the same keys there
        at = 0
        for name in names:
            rows = slice(at, at + SIZE * shared[name])
            for kind, t in (("k", batch.k[b]), ("v", batch.v[b])):
                t[rows] = first.setdefault((name, kind), t[rows].clone())
            at += SIZE * shared[name]
    k, v, lists = batch.pages(SIZE)
    pages_of, paths = {}, []
    for pages, names in zip(lists, requests, strict=True):
        path, at = [], 0
        for name in names:
            path.append((name, pages_of.setdefault(name, pages[at : at + shared[name]])))
            at += shared[name]
        paths.append([*path, (object(), pages[at:])])
    cascade = jitgen.Cascade.of_tree(
        batch.q_indptr(), paths, [n for _, n in lengths], SIZE, min_pages=2, max_levels=max_levels
    )
    assert len(cascade.levels) == max_levels
    variant = jitgen.Variant(mask_mod=causal)
    plan = jitgen.Plan(6, 9, 4, 2, 16, dtype=torch.float32, variant=variant, levels=3, device="cpu").update(cascade)
    got = jitgen.paged_attention(batch.q, (k, v), cascade, plan, return_lse=True)
    for a, b in zip(got, batch.expected(variant), strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=2e-5)


def test_a_path_must_hold_the_keys():
    with pytest.raises(ShapeMismatch, match="request 1 has kv_len 9, and its path 2 pages of 4"):
        jitgen.Cascade.of_tree(torch.tensor([0, 1, 2]), [[(1, [0])], [(2, [1, 2])]], [4, 9], SIZE)
    with pytest.raises(ShapeMismatch, match="Expected batch \\+ 1"):
        jitgen.Cascade.of_tree(torch.tensor([0, 1]), [], [], SIZE)
