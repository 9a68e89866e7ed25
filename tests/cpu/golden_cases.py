"""Sources that are kept under review: few, and between them they take every branch of every template both ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

import jitgen
from jitgen.families import cpu_tiles, cuda_spec
from jitgen.kv_decode import rows_in_decode, with_value_factor
from jitgen.mask_tiles import render_mask_tiles
from jitgen.program import Program, without_rows
from jitgen.render import Source, render_kernel
from jitgen.serving_place import ChosenLists, finishing, place
from jitgen.spec import KernelSpec, Tiles
from jitgen.target import cpu_target, cuda_target


class Sigmoid(jitgen.OnlineNorm):
    """Weights sigmoid(score), no denominator and no logsumexp."""

    state = {}  # noqa: RUF012
    order = "any"

    def update(self, s, st):
        return torch.sigmoid(s), 1.0, st

    def finalize(self, o, st):
        return o


class StickBreaking(jitgen.OnlineNorm):
    """Each key, from the last to the first, takes its share of what the later ones left over."""

    state = {"carry": 0.0}  # noqa: RUF012
    order = "reverse"

    def update(self, s, st):
        left = -torch.nn.functional.softplus(s)
        after = jitgen.row_cumsum(left) - left
        weight = torch.exp(torch.nn.functional.logsigmoid(s) + st["carry"] + after)
        return weight, 1.0, {"carry": st["carry"] + jitgen.row_sum(left)}

    def finalize(self, o, st):
        return o

    def lse(self, st):
        return st["carry"]


class MergedSigmoid(Sigmoid):
    """Parts are added."""

    def merge(self, a, b):
        return {}, 1.0, 1.0


class MergedStickBreaking(StickBreaking):
    """What the keys of a left over is shared by those of b."""

    def merge(self, a, b):
        return {"carry": a["carry"] + b["carry"]}, 1.0, torch.exp(a["carry"])


class MergedSoftmax(jitgen.OnlineNorm):
    """Softmax without care for rows without keys."""

    state = {"largest": -1e30, "total": 0.0}  # noqa: RUF012

    def update(self, s, st):
        largest = torch.maximum(st["largest"], jitgen.row_max(s))
        weight, factor = torch.exp(s - largest), torch.exp(st["largest"] - largest)
        return weight, factor, {"largest": largest, "total": st["total"] * factor + jitgen.row_sum(weight)}

    def finalize(self, o, st):
        return o / st["total"]

    def lse(self, st):
        return torch.log(st["total"]) + st["largest"]

    def merge(self, a, b):
        largest = torch.maximum(a["largest"], b["largest"])
        of_a, of_b = torch.exp(a["largest"] - largest), torch.exp(b["largest"] - largest)
        return {"largest": largest, "total": a["total"] * of_a + b["total"] * of_b}, of_a, of_b


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def plain() -> jitgen.Variant:
    return jitgen.Variant()


def window() -> jitgen.Variant:
    width = 256
    return jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx - kv_idx < width))


def every_hook() -> jitgen.Variant:
    cap, doc, sinks, gate = 50.0, torch.zeros(4096, dtype=torch.int32), torch.zeros(8), torch.zeros(8)

    def soft_cap(score, b, h, q_idx, kv_idx):
        return cap * torch.tanh(score / cap)

    def same_document(b, h, q_idx, kv_idx):
        return (doc[q_idx] == doc[kv_idx]) & (kv_idx <= q_idx)

    return jitgen.Variant(
        score_mod=soft_cap,
        mask_mod=same_document,
        sink=sinks,
        output_transform=lambda o, lse, b, h, q_idx: o * torch.sigmoid(gate[h]),
        lse_transform=lambda lse, b, h, q_idx: lse * 1.4426950408889634,
    )


def alibi_sink() -> jitgen.Variant:
    slopes, sinks = torch.zeros(8), torch.zeros(8)

    def alibi(score, b, h, q_idx, kv_idx):
        return score + slopes[h] * (kv_idx - q_idx)

    return jitgen.Variant(score_mod=alibi, sink=sinks, lse_transform=lambda lse, b, h, q_idx: lse * 1.4426950408889634)


def sigmoid() -> jitgen.Variant:
    return jitgen.Variant(softmax=Sigmoid)


def alibi_pruned_sigmoid() -> jitgen.Variant:
    slopes, kept = torch.zeros(8), torch.ones(8, dtype=torch.bool)

    def alibi(score, b, h, q_idx, kv_idx):
        return score + slopes[h] * (kv_idx - q_idx)

    return jitgen.Variant(score_mod=alibi, mask_mod=lambda b, h, q_idx, kv_idx: kept[h], softmax=Sigmoid)


def stick_breaking() -> jitgen.Variant:
    return jitgen.Variant(mask_mod=causal, softmax=StickBreaking)


def merged_softmax() -> jitgen.Variant:
    return jitgen.Variant(mask_mod=causal, softmax=MergedSoftmax)


def merged_stick_breaking() -> jitgen.Variant:
    return jitgen.Variant(mask_mod=causal, softmax=MergedStickBreaking)


def merged_sigmoid() -> jitgen.Variant:
    return jitgen.Variant(softmax=MergedSigmoid)


def segments() -> jitgen.Variant:
    start = torch.zeros(4096, dtype=torch.int32)
    return jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: (kv_idx >= start[q_idx]) & (kv_idx <= q_idx))


def alibi_sigmoid() -> jitgen.Variant:
    slopes = torch.zeros(8)
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + slopes[h] * (kv_idx - q_idx), softmax=Sigmoid)


def soft_cap() -> jitgen.Variant:
    cap = 50.0
    return jitgen.Variant(score_mod=lambda score, b, h, q_idx, kv_idx: cap * torch.tanh(score / cap))


def relative() -> jitgen.Variant:
    table, slopes = torch.zeros(8, 128), torch.zeros(8)

    def biased(score, b, h, q_idx, kv_idx):
        return score + table[h, torch.clamp(q_idx - kv_idx, 0, 127)] + slopes[h] * (kv_idx - q_idx)

    return jitgen.Variant(score_mod=biased)


def capped_relative() -> jitgen.Variant:
    cap, table = 50.0, torch.zeros(8, 128)

    def biased(score, b, h, q_idx, kv_idx):
        return cap * torch.tanh(score / cap) + table[h, torch.clamp(torch.abs(q_idx - kv_idx), 0, 127)]

    return jitgen.Variant(score_mod=biased)


def biases() -> jitgen.Variant:
    table, dense, slopes = torch.zeros(8, 128), torch.zeros(8, 512, 512, dtype=torch.float16), torch.zeros(8)

    def biased(score, b, h, q_idx, kv_idx):
        distance = torch.clamp(q_idx - kv_idx, 0, 127)
        return score + table[h, distance] + dense[h, q_idx, kv_idx] + slopes[h] * (kv_idx - q_idx)

    return jitgen.Variant(score_mod=biased, mask_mod=causal)


def capped_keys() -> jitgen.Variant:
    cap, gains = 50.0, torch.zeros(8, 512)
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx: cap * torch.tanh(s * gains[h, kv_idx] / cap),
        mask_mod=causal,
    )


def capped_dense() -> jitgen.Variant:
    cap, dense = 50.0, torch.zeros(8, 512, 512)
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: cap * torch.tanh((s + dense[h, q_idx, kv_idx]) / cap))


def key_bias() -> jitgen.Variant:
    bias, doc = torch.zeros(2, 512), torch.zeros(512, dtype=torch.int32)
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx: s + bias[b, kv_idx],
        mask_mod=lambda b, h, q_idx, kv_idx: doc[q_idx] == doc[kv_idx],
    )


def decay() -> jitgen.Variant:
    table = torch.zeros(128)
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s * table[torch.clamp(q_idx - kv_idx, 0, 127)])


def dense_bias() -> jitgen.Variant:
    dense = torch.zeros(2, 8, 512, 512)
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + dense[b, h, q_idx, kv_idx])


def copied_bias() -> jitgen.Variant:
    dense = torch.zeros(2, 1, 512, 512, dtype=torch.bfloat16).expand(2, 8, 512, 512)
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + 2.0 * dense[b, h, q_idx, kv_idx], mask_mod=causal)


def copied_documents() -> jitgen.Variant:
    dense, document = torch.zeros(512, 512, dtype=torch.float16), jitgen.sorted(torch.zeros(512, dtype=torch.int32))
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx: s + dense[q_idx, kv_idx] + 0.5 * (kv_idx - q_idx),
        mask_mod=lambda b, h, q_idx, kv_idx: document[q_idx] == document[kv_idx],
    )


def forgetting() -> jitgen.Variant:
    gates = torch.zeros(8, 512)
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + gates[h, q_idx] - gates[h, kv_idx], mask_mod=causal)


def documents() -> jitgen.Variant:
    doc = jitgen.sorted(torch.zeros(512, dtype=torch.int32))
    return jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: (doc[q_idx] == doc[kv_idx]) & (kv_idx <= q_idx))


def scaled_documents() -> jitgen.Variant:
    scales, doc = torch.zeros(8), jitgen.sorted(torch.zeros(512, dtype=torch.int32))
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx: s * scales[h],
        mask_mod=lambda b, h, q_idx, kv_idx: (doc[q_idx] == doc[kv_idx]) & (kv_idx <= q_idx),
    )


def capped_documents() -> jitgen.Variant:
    cap, doc = 50.0, jitgen.sorted(torch.zeros(512, dtype=torch.int32))
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx: cap * torch.tanh(s / cap),
        mask_mod=lambda b, h, q_idx, kv_idx: (doc[q_idx] == doc[kv_idx]) & (kv_idx <= q_idx),
    )


def packed() -> jitgen.Variant:
    """Reads where rows and keys of a request lie among those of all."""
    bias, gate = torch.zeros(4096), torch.zeros(4096, 8)
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx, *, kv_off: s + bias[kv_off + kv_idx],
        sink=lambda b, h, *, q_off: bias[q_off],
        output_transform=lambda o, lse, b, h, q_idx, *, q_tok: o * gate[q_tok, h],
    )


def rotated() -> jitgen.Variant:
    rope = jitgen.Rope()
    return jitgen.Variant(k_transform=lambda k, b, h, pos: rope(k, pos))


def normed_rows() -> jitgen.Variant:
    rope, weight = jitgen.Rope(cos_sin=torch.zeros(512, 64)), torch.zeros(128)
    return jitgen.Variant(
        k_transform=lambda k, b, h, pos: rope(k * torch.rsqrt((k * k).mean() + 1e-6) * weight, pos),
        v_transform=lambda v, b, h, pos: v * weight,
    )


def slot_scales() -> jitgen.Variant:
    """Reads where keys lie in a paged cache."""
    ks, zero, vs = torch.zeros(4096, 8), torch.zeros(4096), torch.zeros(4096, 8)
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx, *, kv_slot, kv_h: s * ks[kv_slot, kv_h],
        k_transform=lambda k, b, kv_h, kv_idx, *, kv_slot: k - zero[kv_slot],
        v_transform=lambda v, b, kv_h, kv_idx, *, kv_slot: v * vs[kv_slot, kv_h],
    )


def evicted() -> jitgen.Variant:
    kept, vs = torch.ones(256, dtype=torch.bool), torch.zeros(4096)
    return jitgen.Variant(
        mask_mod=lambda b, h, q_idx, kv_idx, *, page: (kv_idx <= q_idx) & kept[page],
        v_transform=lambda v, b, kv_h, kv_idx, *, kv_slot: v * vs[kv_slot],
    )


def slot_weights() -> jitgen.Variant:
    weight = torch.zeros(4096, 8)
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx, *, kv_slot, kv_h: s * weight[kv_slot, kv_h], mask_mod=causal)


class Case(NamedTuple):
    """A source to generate: a kernel of a family, or with family mask_tiles the module behind jitgen.mask_tiles."""

    make: Callable[[], jitgen.Variant]
    family: str
    dtype: str = ""
    head_dims: tuple[int, int] = (0, 0)
    layout: str = "dense"
    kv_dtype: str = ""
    isa: str = "portable"  # of a CPU kernel


CASES: dict[str, Case] = {
    "plain__cpu__float32": Case(plain, "cpu", "float32", (64, 64)),
    "packed__cpu__float32": Case(packed, "cpu", "float32", (64, 64)),
    "every_hook__cpu_amx__bfloat16": Case(every_hook, "cpu", "bfloat16", (128, 128), isa="amx"),
    "sigmoid__cpu__float16": Case(sigmoid, "cpu", "float16", (192, 128)),
    "every_hook__cpu_paged__float32": Case(every_hook, "cpu", "float32", (128, 128), "paged"),
    "sigmoid__cpu_amx_ragged__bfloat16": Case(sigmoid, "cpu", "bfloat16", (64, 64), "ragged", isa="amx"),
    "plain__sm80__float16": Case(plain, "sm80", "float16", (192, 128)),
    "plain__sm80__bfloat16": Case(plain, "sm80", "bfloat16", (256, 256)),
    "every_hook__sm80__bfloat16": Case(every_hook, "sm80", "bfloat16", (64, 64)),
    "soft_cap__sm80__bfloat16": Case(soft_cap, "sm80", "bfloat16", (256, 256)),
    "window__sm80__float16": Case(window, "sm80", "float16", (256, 256)),
    "window_hd512__sm80__bfloat16": Case(window, "sm80", "bfloat16", (512, 512)),
    "window__sm90_wide__bfloat16": Case(window, "sm90_wide", "bfloat16", (512, 512)),
    "sigmoid__sm90_wide_ragged__float16": Case(sigmoid, "sm90_wide", "float16", (512, 512), "ragged"),
    "every_hook__sm90_wide_paged__bfloat16": Case(every_hook, "sm90_wide", "bfloat16", (512, 512), "paged"),
    "merged_sigmoid_hd512__sm80__float16": Case(merged_sigmoid, "sm80", "float16", (512, 512)),
    "merged_sigmoid_hd512__sm80_ragged__float16": Case(merged_sigmoid, "sm80", "float16", (512, 512), "ragged"),
    "every_hook_hd512__sm80_paged__bfloat16": Case(every_hook, "sm80", "bfloat16", (512, 512), "paged"),
    "stick_breaking__sm80__bfloat16": Case(stick_breaking, "sm80", "bfloat16", (128, 128)),
    "alibi_sink__sm80__bfloat16": Case(alibi_sink, "sm80", "bfloat16", (128, 128)),
    "segments__sm80_paged__bfloat16": Case(segments, "sm80", "bfloat16", (128, 128), "paged"),
    "alibi_sigmoid__sm80_ragged__float16": Case(alibi_sigmoid, "sm80", "float16", (64, 64), "ragged"),
    "alibi_sink__sm80_ragged__float16": Case(alibi_sink, "sm80", "float16", (128, 128), "ragged"),
    "plain__sm90__bfloat16": Case(plain, "sm90", "bfloat16", (128, 128)),
    "every_hook__sm90__bfloat16": Case(every_hook, "sm90", "bfloat16", (64, 64)),
    "alibi_pruned_sigmoid__sm90__float16": Case(alibi_pruned_sigmoid, "sm90", "float16", (128, 128)),
    "plain__sm90_fp8__float8_e4m3fn": Case(plain, "sm90_fp8", "float8_e4m3fn", (128, 128)),
    "every_hook__sm90_fp8__float8_e4m3fn": Case(every_hook, "sm90_fp8", "float8_e4m3fn", (64, 64)),
    "alibi_sink__sm90_fp8__float8_e4m3fn": Case(alibi_sink, "sm90_fp8", "float8_e4m3fn", (128, 128)),
    "documents__sm90_fp8__float8_e4m3fn": Case(documents, "sm90_fp8", "float8_e4m3fn", (128, 128)),
    "window__sm90_fp8__float8_e4m3fn": Case(window, "sm90_fp8", "float8_e4m3fn", (64, 64)),
    "capped_documents__sm90_fp8__float8_e4m3fn": Case(capped_documents, "sm90_fp8", "float8_e4m3fn", (64, 64)),
    "relative__sm90__bfloat16": Case(relative, "sm90", "bfloat16", (128, 128)),
    "capped_relative__sm90__float16": Case(capped_relative, "sm90", "float16", (64, 64)),
    "soft_cap__sm90__bfloat16": Case(soft_cap, "sm90", "bfloat16", (128, 128)),
    "capped_keys__sm90__bfloat16": Case(capped_keys, "sm90", "bfloat16", (128, 128)),
    "capped_dense__sm90__float16": Case(capped_dense, "sm90", "float16", (128, 128)),
    "key_bias__sm90__bfloat16": Case(key_bias, "sm90", "bfloat16", (128, 128)),
    "biases__sm90__float16": Case(biases, "sm90", "float16", (128, 128)),
    "decay__sm90__bfloat16": Case(decay, "sm90", "bfloat16", (128, 128)),
    "copied_bias__sm90__bfloat16": Case(copied_bias, "sm90", "bfloat16", (128, 128)),
    "copied_documents__sm90__float16": Case(copied_documents, "sm90", "float16", (64, 64)),
    "dense_bias__sm90__bfloat16": Case(dense_bias, "sm90", "bfloat16", (128, 128)),
    "forgetting__sm90__bfloat16": Case(forgetting, "sm90", "bfloat16", (128, 128)),
    "documents__sm90__bfloat16": Case(documents, "sm90", "bfloat16", (128, 128)),
    "scaled_documents__sm90__bfloat16": Case(scaled_documents, "sm90", "bfloat16", (128, 128)),
    "window__sm90__bfloat16": Case(window, "sm90", "bfloat16", (128, 128)),
    "biases__sm90_ragged__float16": Case(biases, "sm90", "float16", (128, 128), "ragged"),
    "packed__sm80_ragged__bfloat16": Case(packed, "sm80", "bfloat16", (128, 128), "ragged"),
    "plain__sm90_ragged__bfloat16": Case(plain, "sm90", "bfloat16", (128, 128), "ragged"),
    "window__sm90_paged__bfloat16": Case(window, "sm90", "bfloat16", (128, 128), "paged"),
    "documents__sm90_ragged__bfloat16": Case(documents, "sm90", "bfloat16", (128, 128), "ragged"),
    "segments__sm90_paged_rows__bfloat16": Case(segments, "sm90", "bfloat16", (128, 128), "paged_rows"),
    "every_hook__sm90_paged__bfloat16": Case(every_hook, "sm90", "bfloat16", (64, 64), "paged"),
    "alibi_pruned_sigmoid__sm90_ragged__float16": Case(alibi_pruned_sigmoid, "sm90", "float16", (128, 128), "ragged"),
    "plain__decode__bfloat16": Case(plain, "decode", "bfloat16", (128, 128), "paged"),
    "window__decode__float16": Case(window, "decode", "float16", (64, 64), "ragged"),
    "soft_cap__decode__float16": Case(soft_cap, "decode", "float16", (96, 96), "paged"),
    "every_hook__decode__bfloat16": Case(every_hook, "decode", "bfloat16", (256, 256), "paged"),
    "alibi_pruned_sigmoid__decode__bfloat16": Case(alibi_pruned_sigmoid, "decode", "bfloat16", (128, 128), "paged"),
    "rotated__decode__bfloat16": Case(rotated, "decode", "bfloat16", (128, 128), "paged"),
    "normed_rows__decode_states__float16": Case(normed_rows, "decode", "float16", (128, 128), "paged_states"),
    "window__cpu_states__float32": Case(window, "cpu", "float32", (64, 64), "paged_states"),
    "plain__sm90_states__bfloat16": Case(plain, "sm90", "bfloat16", (128, 128), "paged_states"),
    "window__decode_states__bfloat16": Case(window, "decode", "bfloat16", (128, 128), "ragged_states"),
    "alibi_sink__decode_chosen__bfloat16": Case(alibi_sink, "decode", "bfloat16", (128, 128), "paged_chosen"),
    "plain__merge__bfloat16": Case(plain, "merge", "bfloat16", (128, 128), "states"),
    "plain__merge_outs__float16": Case(plain, "merge_outs", "float16", (96, 96), "outs"),
    "plain__merge_outs__bfloat16": Case(plain, "merge_outs", "bfloat16", (128, 128), "outs"),
    "every_hook__merge__float16": Case(every_hook, "merge", "float16", (64, 64), "states"),
    "plain__merge_cpu__float32": Case(plain, "merge_cpu", "float32", (64, 64), "states"),
    "every_hook__merge_cpu__bfloat16": Case(every_hook, "merge_cpu", "bfloat16", (128, 128), "states"),
    "soft_cap__cpu_paged_stored__bfloat16": Case(soft_cap, "cpu", "bfloat16", (64, 64), "paged", "float8_e4m3fn"),
    "plain__cpu_amx_e4m3__bfloat16": Case(plain, "cpu", "bfloat16", (64, 64), "dense", "float8_e4m3fn", "amx"),
    "plain__cpu_ragged_stored__float32": Case(plain, "cpu", "float32", (64, 64), "ragged", "int8"),
    "window__decode_stored__float16": Case(window, "decode", "float16", (64, 64), "ragged", "float8_e5m2"),
    "sigmoid__decode_stored__bfloat16": Case(sigmoid, "decode", "bfloat16", (128, 128), "paged", "int8"),
    "merged_softmax__cpu_states__float32": Case(merged_softmax, "cpu", "float32", (64, 64), "paged_states"),
    "merged_softmax__merge_cpu__float32": Case(merged_softmax, "merge_cpu", "float32", (64, 64), "states"),
    "merged_stick_breaking__merge__bfloat16": Case(merged_stick_breaking, "merge", "bfloat16", (128, 128), "states"),
    "merged_stick_breaking__decode__bfloat16": Case(merged_stick_breaking, "decode", "bfloat16", (128, 128), "paged"),
    "merged_softmax__decode_states__bfloat16": Case(merged_softmax, "decode", "bfloat16", (128, 128), "paged_states"),
    "merged_sigmoid__sm80_ragged__float16": Case(merged_sigmoid, "sm80", "float16", (64, 64), "ragged"),
    "merged_softmax__sm90_states__bfloat16": Case(merged_softmax, "sm90", "bfloat16", (128, 128), "paged_states"),
    "plain__mla__bfloat16": Case(plain, "mla", "bfloat16", (576, 512), "paged"),
    "window__mla__bfloat16": Case(window, "mla", "bfloat16", (576, 512), "paged"),
    "plain__sm80_mla__float16": Case(plain, "sm80_mla", "float16", (576, 512), "paged"),
    "window__sm80_mla__bfloat16": Case(window, "sm80_mla", "bfloat16", (576, 512), "paged"),
    "alibi_sink__mla__float16": Case(alibi_sink, "mla", "float16", (576, 512), "paged"),
    "plain__mla_decode__bfloat16": Case(plain, "mla_decode", "bfloat16", (576, 512), "paged"),
    "window__mla_decode__float16": Case(window, "mla_decode", "float16", (576, 512), "paged"),
    "alibi_sink__mla_decode__bfloat16": Case(alibi_sink, "mla_decode", "bfloat16", (576, 512), "paged"),
    "slot_weights__sm90_paged__bfloat16": Case(slot_weights, "sm90", "bfloat16", (128, 128), "paged"),
    "slot_scales__decode__bfloat16": Case(slot_scales, "decode", "bfloat16", (128, 128), "paged"),
    "window__mask_tiles": Case(window, "mask_tiles"),
    "evicted__decode__bfloat16": Case(evicted, "decode", "bfloat16", (64, 64), "paged"),
    "evicted__mask_tiles": Case(evicted, "mask_tiles"),
}
TARGETS = {
    "sm80": partial(cuda_target, "8.0"),
    "sm90": partial(cuda_target, "9.0a"),
    "sm90_wide": partial(cuda_target, "9.0a"),
    "sm90_fp8": partial(cuda_target, "9.0a"),
    "decode": partial(cuda_target, "9.0a"),
    "merge": partial(cuda_target, "9.0"),
    "merge_outs": partial(cuda_target, "9.0"),
    "merge_cpu": partial(cpu_target, "portable"),
    "mla": partial(cuda_target, "9.0a"),
    "mla_decode": partial(cuda_target, "9.0a"),
    "sm80_mla": partial(cuda_target, "8.0"),
}


def case_program(name: str) -> Program:
    """The traced variant of a case; for mask_tiles, of its mask alone."""
    case = CASES[name]
    program = case.make().trace().program
    if case.layout.endswith("_states"):
        return place(program)[0]
    if case.layout.endswith("_chosen"):
        return place(program, ChosenLists(16, is_even=False))[0]
    if case.layout == "states":
        return finishing(program)
    return Program(mask=program.mask, slots=program.slots) if case.family == "mask_tiles" else program


def case_spec(name: str) -> KernelSpec:
    """The kernel of a case. Of the target only the architecture matters: nothing of it shows in the source."""
    case, program = CASES[name], case_program(name)
    if case.family == "cpu":
        tiles, target = cpu_tiles(*case.head_dims, case.layout), cpu_target(case.isa)
        return KernelSpec("cpu", program, case.dtype, *case.head_dims, tiles, target, case.layout, case.kv_dtype)
    target = TARGETS[case.family]()
    if case.family == "merge_cpu":
        return KernelSpec("merge_cpu", program, case.dtype, *case.head_dims, Tiles(0, 0), target, case.layout)
    program = with_value_factor(program) if case.family == "decode" else program
    bare, layout = without_rows(program), case.layout.removesuffix("_chosen").removesuffix("_rows")
    spec = cuda_spec(bare, case.dtype, case.head_dims, case.family, target, layout=layout, kv_dtype=case.kv_dtype)
    spec = replace(spec, copies=False) if case.layout.endswith("_rows") else spec
    transforms = program.rows is not None and program.rows.changes_keys
    return spec if not transforms else replace(spec, rows=rows_in_decode(program, case.dtype, *case.head_dims))


def case_source(name: str) -> Source:
    """The generated translation unit of a case."""
    if CASES[name].family == "mask_tiles":
        return render_mask_tiles(case_program(name))
    return render_kernel(case_spec(name))
