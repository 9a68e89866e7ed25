"""Pictures of a mask: colours by class, true proportions, a PNG that decoders accept, and text without colours."""

from __future__ import annotations

import struct
import sys
import zlib

import pytest
import torch

from jitgen import show_mask
from jitgen.mask_tiles import TILE_FULL, TILE_NONE, TILE_PARTIAL
from jitgen.show_mask import FULL, KEPT, SKIPPED, WASTED, MaskMap


def causal_map(length: int = 64, tile: int = 16) -> MaskMap:
    """A causal mask with exact classes."""
    at = torch.arange(length)
    tiles = torch.arange(length // tile)
    off_diagonal = torch.where(tiles[:, None] > tiles, TILE_FULL, TILE_NONE)
    classes = torch.where(tiles[:, None] == tiles, TILE_PARTIAL, off_diagonal)
    return MaskMap(length, length, tile, tile, classes.to(torch.uint8), at[:, None] >= at)


def decode_png(data: bytes) -> torch.Tensor:
    """Pixels of a PNG without filters, every checksum verified."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        body = data[at + 4 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size]) == (zlib.crc32(body),)
        chunks[body[:4]] = body[4:]
        at += 12 + size
    width, height, *kind = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert kind == [8, 2, 0, 0, 0]
    rows = torch.frombuffer(bytearray(zlib.decompress(chunks[b"IDAT"])), dtype=torch.uint8).view(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


@pytest.mark.parametrize(
    ("row", "column", "colour"), [(40, 2, FULL), (2, 40, SKIPPED), (20, 17, KEPT), (17, 20, WASTED)], ids=str
)
def test_colour_tells_class_and_element(row, column, colour):
    assert tuple(show_mask.pixels(causal_map(), 64, 64)[row, column].tolist()) == colour


def test_pixel_of_many_elements_blends_kept_and_masked():
    mask = MaskMap(32, 32, 32, 32, torch.full((1, 1), TILE_PARTIAL), torch.arange(32) % 2 == torch.zeros(32, 1))
    middle = [round((a + b) / 2) for a, b in zip(KEPT, WASTED, strict=True)]
    found = show_mask.pixels(mask, 4, 4)[1, 1].tolist()
    assert all(abs(a - b) <= 1 for a, b in zip(found, middle, strict=True))


def test_png_decodes_to_the_picture_with_tile_borders(tmp_path):
    path = tmp_path / "mask.png"
    width, height = show_mask.write_png(causal_map(), path)
    image = decode_png(path.read_bytes())
    assert tuple(image.shape) == (height, width, 3) == (1024, 1024, 3)
    assert tuple(image[2 * 256 + 40, 40].tolist()) == FULL
    assert tuple(image[256, 40].tolist()) == show_mask.LINE


@pytest.mark.parametrize(
    ("q_len", "kv_len", "size"),
    [(64, 64, (64, 64)), (2048, 2048, (96, 96)), (1024, 4096, (24, 96)), (64, 65536, (12, 96)), (1, 4096, (1, 96))],
)
def test_picture_keeps_proportions_until_it_would_be_a_hair(q_len, kv_len, size):
    mask = MaskMap(q_len, kv_len, 64, 64, torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.bool))
    assert show_mask.picture_size(mask, 96, 100, 12) == size


def test_positions_of_a_long_mask_are_spread_over_it():
    positions = show_mask.sample_positions(1 << 20)
    assert len(positions) == 2048 and positions[0] < 512 and positions[-1] >= (1 << 20) - 512
    assert (positions.diff() == 512).all()


def test_picture_without_colours_is_half_blocks():
    mask = causal_map(4, 4)
    assert show_mask.terminal_picture(mask, 80, 40, colour=False) == ["█▄  ", "███▄"]


def test_picture_with_colours_ends_every_line_uncoloured():
    lines = show_mask.terminal_picture(causal_map(), 80, 40, colour=True)
    assert len(lines) == 32
    assert all(line.endswith("\x1b[0m") and line.count("▀") == 64 for line in lines)


@pytest.mark.parametrize(
    ("colour", "index"), [((0, 0, 0), 16), ((255, 255, 255), 231), ((128, 128, 128), 244), (KEPT, 75)], ids=str
)
def test_palette_entry_is_the_nearest(colour, index):
    assert show_mask.palette_index(*colour) == index


def test_tiles_are_drawn_as_text_where_they_fit(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    show_mask.print_mask(causal_map(), 3)
    text = capsys.readouterr().out
    assert "of head 3" in text and "\x1b" not in text
    assert text.endswith("tiles: · skipped, ▒ partial, █ full\n  ▒···\n  █▒··\n  ██▒·\n  ███▒\n")
    assert show_mask.tile_lines(causal_map(), columns=3, lines=40) is None
