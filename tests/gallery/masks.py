"""Masks over sequences: causal, windows, prefixes, documents, trees."""

from __future__ import annotations

import torch
from torch.nn.attention.flex_attention import and_masks, or_masks

import jitgen
from gallery.case import Sizes, case


def causal_mask(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


@case("noop")
def plain(z: Sizes) -> jitgen.Variant:
    return jitgen.Variant()


@case("causal")
def causal(z: Sizes) -> jitgen.Variant:
    return jitgen.Variant(mask_mod=causal_mask)


@case("sliding window")
def sliding_window(z: Sizes) -> jitgen.Variant:
    width = 23

    def window(b, h, q_idx, kv_idx):
        return q_idx - kv_idx <= width

    return jitgen.Variant(mask_mod=and_masks(causal_mask, window))


@case("dilated window")
def dilated_window(z: Sizes) -> jitgen.Variant:
    reach, step = 40, 3

    def mask(b, h, q_idx, kv_idx):
        distance = torch.abs(q_idx - kv_idx)
        return (distance <= reach) & ((q_idx - kv_idx) % step == 0)

    return jitgen.Variant(mask_mod=mask)


@case("prefix LM")
def prefix_lm(z: Sizes) -> jitgen.Variant:
    prefix = 19

    def in_prefix(b, h, q_idx, kv_idx):
        return kv_idx < prefix

    return jitgen.Variant(mask_mod=or_masks(in_prefix, causal_mask))


@case("batchify")
def batched_causal(z: Sizes) -> jitgen.Variant:
    length = 21

    def batched(inner):
        def mask(b, h, q_idx, kv_idx):
            same = q_idx // length == kv_idx // length
            return same & inner(b, h, q_idx % length, kv_idx % length)

        return mask

    return jitgen.Variant(mask_mod=batched(causal_mask))


@case("block diffusion")
def block_diffusion(z: Sizes) -> jitgen.Variant:
    half, block = z.num_positions // 2, 8

    def mask(b, h, q_idx, kv_idx):
        q_noised, kv_noised = q_idx < half, kv_idx < half
        q_block, kv_block = q_idx % half // block, kv_idx % half // block
        diagonal = (q_block == kv_block) & (q_noised == kv_noised)
        from_clean = (q_block > kv_block) & q_noised
        among_clean = (q_block >= kv_block) & ~q_noised
        return diagonal | (~kv_noised & (from_clean | among_clean))

    return jitgen.Variant(mask_mod=mask)


@case("document mask around another mask")
def document_causal(z: Sizes) -> jitgen.Variant:
    document, starts = z.documents(29)

    def within_documents(inner):
        def mask(b, h, q_idx, kv_idx):
            same = document[q_idx] == document[kv_idx]
            q_local = q_idx - starts[document[q_idx]]
            kv_local = kv_idx - starts[document[kv_idx]]
            return same & inner(b, h, q_local, kv_local)

        return mask

    return jitgen.Variant(mask_mod=within_documents(causal_mask))


@case("packed causal documents")
def packed_documents(z: Sizes) -> jitgen.Variant:
    document, starts = z.documents(33)

    def mask(b, h, q_idx, kv_idx):
        return (kv_idx >= starts[document[q_idx]]) & (kv_idx <= q_idx)

    return jitgen.Variant(mask_mod=mask)


@case("documents that share a prefix document")
def shared_prefix_documents(z: Sizes) -> jitgen.Variant:
    document, starts = z.documents(27)
    num_documents = len(starts) - 1
    prefix_of = z.tensor([max(0, d - d % 3) for d in range(num_documents)], torch.int32)

    def mask(b, h, q_idx, kv_idx):
        own = document[q_idx]
        prefix = prefix_of[own]
        in_own = (kv_idx >= starts[own]) & (kv_idx <= q_idx)
        in_prefix = (kv_idx >= starts[prefix]) & (kv_idx < starts[prefix + 1])
        return in_own | (in_prefix & (prefix != own))

    return jitgen.Variant(mask_mod=mask)


@case("cross attention to images")
def image_cross_attention(z: Sizes) -> jitgen.Variant:
    num_images = 5
    image_of = z.ints(0, num_images, z.num_positions)
    edges = [z.num_positions * i // num_images for i in range(num_images + 1)]
    interval = z.tensor(edges, torch.int32).unfold(0, 2, 1).contiguous()

    def mask(b, h, q_idx, kv_idx):
        allowed = interval[image_of[kv_idx]]
        return (q_idx >= allowed[0]) & (q_idx < allowed[1])

    return jitgen.Variant(mask_mod=mask)


@case("Longformer")
def longformer(z: Sizes) -> jitgen.Variant:
    reach, is_global = 11, z.bools(0.05, z.num_positions)

    def mask(b, h, q_idx, kv_idx):
        near = (q_idx - kv_idx).abs() <= reach
        return near | is_global[q_idx] | is_global[kv_idx]

    return jitgen.Variant(mask_mod=mask)


@case("tree-causal verification after a prefix")
def tree_causal(z: Sizes) -> jitgen.Variant:
    prefix, nodes = z.num_positions // 2, z.num_positions // 3
    ancestors = z.bools(0.4, nodes, nodes)

    def mask(b, h, q_idx, kv_idx):
        in_prefix = kv_idx < prefix
        in_tree = (kv_idx >= prefix) & (kv_idx < prefix + nodes)
        node, query = (kv_idx - prefix).clamp(0, nodes - 1), q_idx.clamp(0, nodes - 1)
        return in_prefix | (in_tree & ancestors[query, node])

    return jitgen.Variant(mask_mod=mask)


@case("JetSpec training")
def speculative_training(z: Sizes) -> jitgen.Variant:
    prefix, chunk = 45, 6

    def mask(b, h, q_idx, kv_idx):
        position = kv_idx - prefix
        same_chunk = q_idx // chunk == position // chunk
        return (kv_idx < prefix) | ((kv_idx >= prefix) & same_chunk & (position % chunk <= q_idx % chunk))

    return jitgen.Variant(mask_mod=mask)


@case("dilated window by Python's own operators", forks=True)
def dilated_by_branches(z: Sizes) -> jitgen.Variant:
    reach, step = 30, 4

    def mask(b, h, q_idx, kv_idx):
        if kv_idx > q_idx:
            return False
        return 0 <= q_idx - kv_idx <= reach and (q_idx - kv_idx) % step == 0

    return jitgen.Variant(mask_mod=mask)
