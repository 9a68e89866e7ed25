"""Pictures of a mask: in the terminal with half blocks, or as a PNG file.

A picture shows both what the mask keeps and how its tiles are classified: full tiles are white, tiles that are skipped are
grey, and in tiles that are visited with the mask the kept elements are blue and the others pale.
"""

from __future__ import annotations

import ctypes
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

TILE_NONE, TILE_PARTIAL, TILE_FULL = 0, 1, 2
CLASS_NAMES = ("none", "partial", "full")
WHITE, GREY, BLUE, PALE, LINE = (255, 255, 255), (96, 96, 96), (32, 96, 224), (200, 216, 240), (168, 168, 168)
CLASS_CHARS = "·▒█"
PNG_SIDE = 1024  # pixels of the longer side, about
LEAST_GRID = 8  # pixels: lines between smaller tiles would hide the mask


@dataclass(frozen=True)
class MaskMap:
    """One head's mask.

    Shapes:  classes uint8 [q_tiles, kv_tiles] of TILE_NONE, TILE_PARTIAL or TILE_FULL; kept bool [rows, columns], evenly
             spread over the mask (all of its elements when it is small).
    """

    q_len: int
    kv_len: int
    tile_q: int
    tile_kv: int
    classes: torch.Tensor
    kept: torch.Tensor

    def counts(self) -> dict[str, int]:
        """Number of tiles of each class."""
        found = torch.bincount(self.classes.flatten().long(), minlength=3).tolist()
        return dict(zip(CLASS_NAMES, found, strict=True))


def sample_positions(length: int, limit: int = 2048) -> torch.Tensor:
    """At most ``limit`` positions spread evenly over [0, length), ascending; all of them where they are few enough."""
    if length <= limit:
        return torch.arange(length)
    return (torch.arange(limit) * 2 + 1) * length // (2 * limit)


# ---- colours --------------------------------------------------------------------------------------------------------------


def pixels(mask: MaskMap, height: int, width: int) -> torch.Tensor:
    """The mask as colours.

    Shapes:  uint8 [height, width, 3].
    """
    share = torch.nn.functional.adaptive_avg_pool2d(mask.kept[None].float(), (height, width))[0, ..., None]
    blended = torch.tensor(PALE) * (1 - share) + torch.tensor(BLUE) * share
    tile_row = centres(mask.q_len, height) // mask.tile_q
    tile_col = centres(mask.kv_len, width) // mask.tile_kv
    kind = mask.classes[tile_row][:, tile_col][..., None]
    plain = torch.where(kind == TILE_FULL, torch.tensor(WHITE), torch.tensor(GREY))
    return torch.where(kind == TILE_PARTIAL, blended, plain.float()).round().to(torch.uint8)


def centres(length: int, count: int) -> torch.Tensor:
    """Position at the middle of each of ``count`` equal parts of [0, length)."""
    return (torch.arange(count) * 2 + 1) * length // (2 * count)


# ---- terminal -------------------------------------------------------------------------------------------------------------


def picture_size(mask: MaskMap, max_width: int, max_height: int) -> tuple[int, int]:
    """Height and width in pixels: the mask's proportions, at most one pixel per element, inside the limits."""
    scale = min(1.0, max_width / mask.kv_len, max_height / mask.q_len)
    return max(1, round(mask.q_len * scale)), max(1, round(mask.kv_len * scale))


def terminal_picture(mask: MaskMap, columns: int, lines: int, colour: bool) -> list[str]:
    """Lines of text; a character is two pixels, one above the other."""
    height, width = picture_size(mask, columns, 2 * lines)
    if colour:
        return colour_lines(pixels(mask, height, width))
    share = torch.nn.functional.adaptive_avg_pool2d(mask.kept[None].float(), (height, width))[0]
    shades = (share * 4).round().int().tolist()
    if height == 1:
        return ["".join(" ░▒▓█"[s] for s in shades[0])]
    return half_block_lines([[2 * s >= 4 for s in row] for row in shades])


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


# ---- PNG ------------------------------------------------------------------------------------------------------------------


def write_png(mask: MaskMap, path: Path) -> tuple[int, int]:
    """Write the picture, tile borders drawn where tiles are large enough; returns its width and height."""
    longer = max(mask.q_len, mask.kv_len)
    zoom = max(1, PNG_SIDE // longer)
    height, width = picture_size(mask, PNG_SIDE, PNG_SIDE)
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
