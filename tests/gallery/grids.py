"""Masks over pictures and films: neighbourhoods and tiles in two and three dimensions, sparse blocks."""

from __future__ import annotations

import math

import torch

import jitgen
from gallery.case import Sizes, case


def neighbours(q_axis, kv_axis, radius, length):
    """Whether a coordinate lies in the window around another, the window shifted inside the axis."""
    centre = q_axis.clamp(radius, length - 1 - radius)
    return (centre - kv_axis).abs() <= radius


@case("NATTEN 2-D")
def neighbourhood(z: Sizes) -> jitgen.Variant:
    width, radius = 16, 2
    height = -(-z.num_positions // width)

    def mask(b, h, q_idx, kv_idx):
        rows = neighbours(q_idx // width, kv_idx // width, radius, height)
        columns = neighbours(q_idx % width, kv_idx % width, radius, width)
        return rows & columns

    return jitgen.Variant(mask_mod=mask)


@case("tiled NATTEN")
def tiled_neighbourhood(z: Sizes) -> jitgen.Variant:
    width, tile, radius = 16, 4, 3
    height = tile * -(-z.num_positions // (width * tile))

    def coordinates(index):
        tile_id, inside = index // (tile * tile), index % (tile * tile)
        tiles_across = width // tile
        row = tile_id // tiles_across * tile + inside // tile
        return row, tile_id % tiles_across * tile + inside % tile

    def mask(b, h, q_idx, kv_idx):
        q_row, q_column = coordinates(q_idx)
        kv_row, kv_column = coordinates(kv_idx)
        return neighbours(q_row, kv_row, radius, height) & neighbours(q_column, kv_column, radius, width)

    return jitgen.Variant(mask_mod=mask)


def every_other_bit(x):
    """Bits 0, 2, 4, … of a 32-bit number, moved together."""
    x = x & 0x55555555
    x = (x | (x >> 1)) & 0x33333333
    x = (x | (x >> 2)) & 0x0F0F0F0F
    x = (x | (x >> 4)) & 0x00FF00FF
    return (x | (x >> 8)) & 0x0000FFFF


@case("Morton NATTEN")
def morton_neighbourhood(z: Sizes) -> jitgen.Variant:
    radius = 2
    side = 1 << ((z.num_positions - 1).bit_length() + 1) // 2

    def mask(b, h, q_idx, kv_idx):
        columns = neighbours(every_other_bit(q_idx), every_other_bit(kv_idx), radius, side)
        rows = neighbours(every_other_bit(q_idx >> 1), every_other_bit(kv_idx >> 1), radius, side)
        return rows & columns

    return jitgen.Variant(mask_mod=mask)


@case("sliding tile 2-D")
def sliding_tile(z: Sizes) -> jitgen.Variant:
    width, tile, reach = 16, 4, 1
    tiles_across = width // tile
    num_text = 9
    tiles_down = max(3, (z.num_positions - num_text) // (width * tile))
    num_image = tiles_across * tiles_down * tile * tile

    def mask(b, h, q_idx, kv_idx):
        q_tile, kv_tile = q_idx // (tile * tile), kv_idx // (tile * tile)
        row = (q_tile // tiles_across).clamp(reach, tiles_down - 1 - reach)
        column = (q_tile % tiles_across).clamp(reach, tiles_across - 1 - reach)
        near = (torch.abs(row - kv_tile // tiles_across) <= reach) & (torch.abs(column - kv_tile % tiles_across) <= reach)
        image = (q_idx < num_image) & (kv_idx < num_image) & near
        to_text = (q_idx < num_image) & (kv_idx >= num_image)
        return image | to_text | (q_idx >= num_image)

    return jitgen.Variant(mask_mod=mask)


@case("sliding tile 3-D")
def sliding_tile_film(z: Sizes) -> jitgen.Variant:
    tile_tokens, grid, reach = 8, (4, 3, 3), (1, 1, 0)
    frames, rows, columns = grid
    num_film = tile_tokens * frames * rows * columns

    def coordinates(index):
        t = index // tile_tokens
        return t // (rows * columns), t % (rows * columns) // columns, t % columns

    def mask(b, h, q_idx, kv_idx):
        keep = (q_idx < num_film) & (kv_idx < num_film)
        for x, y, n, r in zip(coordinates(q_idx), coordinates(kv_idx), grid, reach, strict=True):
            keep = keep & ((x.clamp(r, n - 1 - r) - y).abs() <= r)
        return keep | (kv_idx >= num_film) | (q_idx >= num_film)

    return jitgen.Variant(mask_mod=mask)


@case("SVG spatial head")
def spatial_head(z: Sizes) -> jitgen.Variant:
    prompt, frame = 10, 32
    width = math.floor(1.7 * frame)

    def mask(b, h, q_idx, kv_idx):
        near = torch.abs(q_idx - kv_idx) < width
        return (kv_idx < prompt) | (q_idx < prompt) | near

    return jitgen.Variant(mask_mod=mask)


@case("SVG temporal head")
def temporal_head(z: Sizes) -> jitgen.Variant:
    prompt, num_frames, width = 10, 12, 3

    def mask(b, h, q_idx, kv_idx):
        near = torch.abs((q_idx - prompt) % num_frames - (kv_idx - prompt) % num_frames) < width
        return (kv_idx < prompt) | (q_idx < prompt) | near

    return jitgen.Variant(mask_mod=mask)


@case("video sparse attention")
def listed_blocks(z: Sizes) -> jitgen.Variant:
    block = 16
    num_blocks = -(-z.num_positions // block)
    chosen = z.ints(0, num_blocks, z.batch, z.num_q_heads, num_blocks, 4, dtype=torch.int64)

    def mask(b, h, q_idx, kv_idx):
        return (chosen[b, h, q_idx // block] == kv_idx // block).any(-1)

    return jitgen.Variant(mask_mod=mask)


@case("BigBird")
def big_bird(z: Sizes) -> jitgen.Variant:
    block = 8
    num_blocks = -(-z.num_positions // block)
    random_blocks = z.ints(0, num_blocks, num_blocks, 3)

    def mask(b, h, q_idx, kv_idx):
        q_block, kv_block = q_idx // block, kv_idx // block
        window = (q_block - kv_block).abs() <= 1
        whole = (q_block == 0) | (kv_block == 0)
        return window | whole | (random_blocks[q_block] == kv_block).any()

    return jitgen.Variant(mask_mod=mask)


@case("vertical lines and slashes")
def vertical_slash(z: Sizes) -> jitgen.Variant:
    vertical = z.ints(0, z.num_positions, z.num_q_heads, 5)
    slash = z.ints(0, z.num_positions // 2, z.num_q_heads, 6)

    def mask(b, h, q_idx, kv_idx):
        listed = (vertical[h] == kv_idx).any(-1) | (slash[h] == q_idx - kv_idx).any(-1)
        return (kv_idx <= q_idx) & listed

    return jitgen.Variant(mask_mod=mask)
