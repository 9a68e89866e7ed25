"""Pictures of a mask: in the terminal with half blocks, or as a PNG file.

A picture shows both what the mask keeps, in blue, and how its tiles are classified: full tiles are dark blue, skipped
tiles are grey, and in tiles that are visited with the mask kept elements are light blue and the others, wasted, yellow.
"""

from __future__ import annotations

import ctypes
import shutil
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from jitgen.cli_text import has_colour, paint, terminal_width
from jitgen.mask_tiles import TILE_FULL, TILE_PARTIAL

FULL, KEPT, WASTED, SKIPPED, LINE = (24, 60, 156), (112, 172, 255), (255, 220, 128), (220, 220, 220), (160, 160, 160)
LEGEND = ((FULL, "full tile"), (KEPT, "kept in a partial tile"), (WASTED, "masked there"), (SKIPPED, "skipped tile"))
CLASS_CHARS = "·▒█"
TERMINAL_LINES = 12, 40  # least and most
PNG_SIDE = 1024  # pixels of the longer side, about
LEAST_SIDE = {"terminal": 12, "png": 64}  # pixels: a thinner strip is widened, out of proportion
LEAST_GRID = 8  # pixels: lines between smaller tiles would hide the mask


@dataclass(frozen=True)
class MaskMap:
    """One head's mask.

    Shapes:  classes uint8 [q_tiles, kv_tiles] of TILE_NONE, TILE_PARTIAL or TILE_FULL; kept bool [rows, columns],
             evenly spread over the mask (all of its elements when it is small).
    """

    q_len: int
    kv_len: int
    tile_q: int
    tile_kv: int
    classes: torch.Tensor
    kept: torch.Tensor


def sample_positions(length: int, limit: int = 2048) -> torch.Tensor:
    """At most ``limit`` positions spread evenly over [0, length), ascending; all of them where they are few enough."""
    if length <= limit:
        return torch.arange(length)
    return (torch.arange(limit) * 2 + 1) * length // (2 * limit)


# ---- colours --------------------------------------------------------------------------------------------------------


def pixels(mask: MaskMap, height: int, width: int) -> torch.Tensor:
    """The mask as colours.

    Shapes:  uint8 [height, width, 3].
    """
    share = torch.nn.functional.adaptive_avg_pool2d(mask.kept[None].float(), (height, width))[0, ..., None]
    blended = torch.tensor(WASTED) * (1 - share) + torch.tensor(KEPT) * share
    tile_row = centres(mask.q_len, height) // mask.tile_q
    tile_col = centres(mask.kv_len, width) // mask.tile_kv
    kind = mask.classes[tile_row][:, tile_col][..., None]
    plain = torch.where(kind == TILE_FULL, torch.tensor(FULL), torch.tensor(SKIPPED))
    return torch.where(kind == TILE_PARTIAL, blended, plain.float()).round().to(torch.uint8)


def centres(length: int, count: int) -> torch.Tensor:
    """Position at the middle of each of ``count`` equal parts of [0, length)."""
    return (torch.arange(count) * 2 + 1) * length // (2 * count)


# ---- terminal -------------------------------------------------------------------------------------------------------


def print_mask(mask: MaskMap, head: int) -> None:
    """Draw as large as the terminal allows, with a legend; without colours, the tiles separately if there is room."""
    columns = terminal_width() - 2
    lines = max(TERMINAL_LINES[0], min(TERMINAL_LINES[1], shutil.get_terminal_size((100, 30)).lines - 4))
    title = paint("mask", "bold") + f" of head {head}: queries down, keys to the right"
    print(f"\n{title}; tiles of {mask.tile_q} x {mask.tile_kv}")
    for line in terminal_picture(mask, columns, lines, has_colour()):
        print(f"  {line}")
    if has_colour():
        print("  " + "   ".join(f"\x1b[38;5;{palette_index(*c)}m██\x1b[0m {name}" for c, name in LEGEND))
        return
    tiles = tile_lines(mask, columns, lines)
    if tiles is not None:
        print("\ntiles: · skipped, ▒ partial, █ full")
        print("\n".join(f"  {line}" for line in tiles))


def picture_size(mask: MaskMap, max_width: int, max_height: int, least: int) -> tuple[int, int]:
    """Height and width in pixels inside the limits: the mask's proportions, at most one pixel per element."""
    scale = min(1.0, max_width / mask.kv_len, max_height / mask.q_len)
    height, width = (max(round(length * scale), min(length, least)) for length in (mask.q_len, mask.kv_len))
    return min(height, max_height), min(width, max_width)


def terminal_picture(mask: MaskMap, columns: int, lines: int, colour: bool) -> list[str]:
    """Lines of text; a character is two pixels, one above the other."""
    height, width = picture_size(mask, columns, 2 * lines, LEAST_SIDE["terminal"])
    if colour:
        return colour_lines(pixels(mask, height, width))
    share = torch.nn.functional.adaptive_avg_pool2d(mask.kept[None].float(), (height, width))[0]
    return half_block_lines([[s >= 0.5 for s in row] for row in share.tolist()])


def half_block_lines(rows: list[list[bool]]) -> list[str]:
    """Two rows of pixels in a line, without colours."""
    if len(rows) % 2:
        rows = [*rows, [False] * len(rows[0])]
    return [
        "".join(" ▄▀█"[2 * above + below] for above, below in zip(rows[i], rows[i + 1], strict=True))
        for i in range(0, len(rows), 2)
    ]


def colour_lines(image: torch.Tensor) -> list[str]:
    """Two rows of pixels in a line: the upper half block's own colour and its background, of the 256-colour palette."""
    rows = [[palette_index(*p) for p in row] for row in image.tolist()]
    lines = []
    for i in range(0, len(rows), 2):
        below = rows[i + 1] if i + 1 < len(rows) else [None] * len(rows[i])
        text, last = "", None
        for cell in zip(rows[i], below, strict=True):
            if cell != last:
                text += f"\x1b[38;5;{cell[0]}m" + ("\x1b[49m" if cell[1] is None else f"\x1b[48;5;{cell[1]}m")
                last = cell
            text += "▀"
        lines.append(text + "\x1b[0m")
    return lines


def palette_index(red: int, green: int, blue: int) -> int:
    """Nearest entry of the 256-colour palette: its greys from 232, its 6 x 6 x 6 cube from 16."""
    if red == green == blue and 8 <= red <= 238:
        return 232 + round((red - 8) / 10)
    r, g, b = (0 if c < 48 else 1 if c < 115 else (c - 35) // 40 for c in (red, green, blue))
    return 16 + 36 * r + 6 * g + b


def tile_lines(mask: MaskMap, columns: int, lines: int) -> list[str] | None:
    """One character per tile, or None where there are more tiles than room."""
    if mask.classes.shape[0] > lines or mask.classes.shape[1] > columns:
        return None
    return ["".join(CLASS_CHARS[kind] for kind in row) for row in mask.classes.tolist()]


# ---- PNG ------------------------------------------------------------------------------------------------------------


def write_png(mask: MaskMap, path: Path) -> tuple[int, int]:
    """Write the picture, tile borders drawn where tiles are large enough; returns its width and height."""
    longer = max(mask.q_len, mask.kv_len)
    zoom = max(1, PNG_SIDE // longer)
    height, width = picture_size(mask, PNG_SIDE, PNG_SIDE, LEAST_SIDE["png"])
    image = pixels(mask, height, width).repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    draw_grid(image, mask)
    path.write_bytes(encode_png(image))
    return image.shape[1], image.shape[0]


def draw_grid(image: torch.Tensor, mask: MaskMap) -> None:
    """Draw tile borders into the image."""
    for axis, (length, tile) in enumerate(((mask.q_len, mask.tile_q), (mask.kv_len, mask.tile_kv))):
        size = image.shape[axis]
        if tile * size < LEAST_GRID * length:
            continue
        for border in range(tile, length, tile):
            image.select(axis, min(size - 1, border * size // length))[:] = torch.tensor(LINE, dtype=torch.uint8)


def encode_png(image: torch.Tensor) -> bytes:
    """An RGB image as a PNG file.

    Shapes:  image uint8 [height, width, 3].
    Source:  Portable Network Graphics specification, third edition; every row has filter type 0.
    """
    height, width = image.shape[:2]
    rows = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), image.reshape(height, 3 * width)], 1).contiguous()
    raw = ctypes.string_at(rows.data_ptr(), rows.numel())

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")
