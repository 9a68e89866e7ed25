"""Variants that read where keys lie in a paged cache: what is stored by slot or by page, beside the keys."""

from __future__ import annotations

import torch

import jitgen
from gallery.case import Cache, paged_case


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


@paged_case("vLLM: scales by token and head of an int8 or fp8 cache")
def slot_scales(c: Cache) -> jitgen.Variant:
    ks, vs = (t.contiguous() / 64 for t in c.floats(c.num_slots, 2 * c.num_kv_heads).chunk(2, -1))
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx, *, kv_slot, kv_h: s * ks[kv_slot, kv_h],
        mask_mod=causal,
        v_transform=lambda v, b, kv_h, kv_idx, *, kv_slot: v * vs[kv_slot, kv_h],
    )


@paged_case("scales and offsets by token of a cache, both of keys")
def slot_offsets(c: Cache) -> jitgen.Variant:
    scale, zero = c.floats(c.num_slots), c.floats(c.num_slots + 1)
    return jitgen.Variant(
        k_transform=lambda k, b, kv_h, kv_idx, *, kv_slot: (k - zero[kv_slot]) * scale[kv_slot], mask_mod=causal
    )


@paged_case("a bias by token, as of compressed caches that stand for several keys each")
def slot_bias(c: Cache) -> jitgen.Variant:
    count = c.floats(c.num_slots)
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx, *, kv_slot: s + torch.log(count[kv_slot]), mask_mod=causal)


@paged_case("H2O, SnapKV: tokens that were evicted from shared pages")
def evicted_slots(c: Cache) -> jitgen.Variant:
    kept = c.bools(0.7, c.num_slots)
    return jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx, *, kv_slot: (kv_idx <= q_idx) & kept[kv_slot])


@paged_case("pages that some heads do not look at")
def pages_by_head(c: Cache) -> jitgen.Variant:
    kept = c.bools(0.7, c.num_pages, 64)
    return jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx, *, page: (kv_idx <= q_idx) & kept[page, h])


@paged_case("a temperature by page, and a window beside it")
def page_scales(c: Cache) -> jitgen.Variant:
    warmth, width = c.floats(c.num_pages), 150
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx, *, page, kv_slot: s * warmth[page] + 0.01 * (kv_slot % 7),
        mask_mod=lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx - kv_idx < width),
    )


class Sigmoid(jitgen.OnlineNorm):
    """Weights sigmoid(score), no denominator and no logsumexp."""

    def update(self, s, st):
        return torch.sigmoid(s), 1.0, st


@paged_case("sigmoid attention with a bias by token")
def slot_sigmoid(c: Cache) -> jitgen.Variant:
    bias = c.floats(c.num_slots)
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx, *, kv_slot: s - bias[kv_slot], softmax=Sigmoid)
