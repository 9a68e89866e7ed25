"""The planner's arithmetic on the host: the same integers as kernel_templates/include/jitgen/plan.cuh, and its buffer.

It is the oracle that the planner kernel is tested against, and what ``Plan.explain`` reads a plan with.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

NEVER_CUT = 0x7FFFFFFF  # as least_piece: items stay whole
NOT_FOR_MANY = 0x7FFFFFFF  # as many_items: only items that must not be cut are given out
PLAN_THREADS = 1024  # more tiles are sorted by powers of two
TAIL_PIECES = 4  # of an item that is given out in pieces, at most
_HEADER = struct.Struct("@iiI4iI2i6i")
_TILE = struct.Struct("@8iI3i")
_SHARE = struct.Struct("@iiiI8iI3iIi2i")
SHARES_AT = _HEADER.size
SHORT_ITEM = 16  # units: kShortItem


@dataclass(frozen=True)
class PlanShape:
    """What a kernel asks of its planner; see PlanShape in plan.cuh."""

    tile_rows: int
    unit_keys: int
    pack: int
    groups: int
    class_pack: int
    least_rows: int
    most_rows: int
    least_keys: int
    fixed_cost: int
    least_piece: int
    whole_items: int
    many_items: int
    shares: int
    beside_key: int = 0
    beside_row: int = 0
    least_shares: int = 1


@dataclass(frozen=True)
class PlanTile:
    """Some packed rows of one request, in every head group, and the keys [begin, end) that they see."""

    request: int
    q_start: int
    q_len: int
    kv_len: int
    index: int
    count: int
    begin: int
    end: int
    line: int
    # of the place of the same number in the order of the last groups, where items are given out
    at: int = 0
    at_pieces: int = 0
    pieces: int = 0

    def units(self, unit_keys: int) -> int:
        """Units its keys are visited in; they begin at a multiple of 16 keys."""
        return max(1, -(-(self.end - (self.begin & ~15)) // unit_keys))


@dataclass(frozen=True)
class Share:
    """Where the part of the line of one CTA begins; past the last one, ``tile`` is the number of tiles."""

    tile: int
    group: int
    unit: int
    line: int


@dataclass(frozen=True)
class GivenOut:
    """Groups whose items are given out one after the other, and behind them together; see PlanHeader in plan.cuh."""

    whole_groups: int = 0
    tail_groups: int = 0
    places: int = 0
    least_units: int = 0
    pieces: int = 0


@dataclass(frozen=True)
class PlanRecord:
    """A plan: its tiles, where each share begins (one more entry than shares asked for), or which items are given out."""

    tiles: tuple[PlanTile, ...]
    shares: tuple[Share, ...]
    used: int  # shares that have a part of the line
    length: int
    given_out: GivenOut = GivenOut()

    def items(self, shape: PlanShape) -> list[tuple[int, int, int, int]]:
        """Items in the order they are given out: (tile, group, pieces, slot of the first of several)."""
        at, count = self.given_out, len(self.tiles)
        found = [(tile, group, 1, -1) for group in range(at.whole_groups) for tile in reversed(range(count))]
        for place in self.tiles if at.tail_groups else ():
            pieces = place.at_pieces
            first = place.pieces * at.tail_groups
            found += [(place.at, at.whole_groups + g, pieces, first + g * pieces) for g in range(at.tail_groups)]
        return found

    def segments(self, shape: PlanShape, c: int) -> list[tuple[int, int, int, int]]:
        """What share c works on: (tile, group, first unit, end unit), in order."""
        at, end = self.shares[c], self.shares[c + 1]
        tile, group, unit, found = at.tile, at.group, at.unit, []
        while tile < len(self.tiles) and (tile, group) != (end.tile, end.group):
            found.append((tile, group, unit, self.tiles[tile].units(shape.unit_keys)))
            tile, group = self.next_item(tile, group, shape.groups)
            unit = 0
        if tile < len(self.tiles) and end.unit > unit:
            found.append((tile, group, unit, end.unit))
        return found

    def next_item(self, tile: int, group: int, groups: int) -> tuple[int, int]:
        """The item after (tile, group) on the line: tiles inside groups inside requests."""
        at = self.tiles[tile]
        if at.index + 1 < at.count:
            return tile + 1, group
        return (tile + 1, 0) if group + 1 == groups else (tile - at.index, group + 1)


Visible = Callable[[int, int, int], tuple[int, int]]  # request, first query, last query -> keys [begin, end)


def balance(q_len: Sequence[int], kv_len: Sequence[int], shape: PlanShape, visible: Visible | None = None) -> PlanRecord:
    """The plan for these lengths. Without ``visible`` every row sees every key.

    Cost:    Python: microseconds per tile and per share.
    """
    tiles = _make_tiles(q_len, kv_len, shape, visible or (lambda b, first, last: (0, kv_len[b])))
    places = tiles[-1].line + _cost(tiles[-1], shape) if tiles else 0
    length = places * shape.groups
    in_class = {t.request for t in tiles}
    beside = sum(_work_beside(rows, kv_len[b], shape) for b, rows in enumerate(q_len) if b not in in_class)
    used = shares_in_use(shape, length, tiles, beside)
    requests = [t.request for t in tiles if t.index == 0]
    first_tile = {tiles[i].request: i for i in range(len(tiles)) if tiles[i].index == 0}
    starts = [tiles[first_tile[b]].line for b in requests] + [places]
    line = _Line(tiles, requests, first_tile, starts)
    shares = tuple(_share_start(line, shape, length, used, c) for c in range(shape.shares + 1))
    given_out = _give_out(tiles, places, shape)
    return PlanRecord(tuple(tiles), shares, used, length, given_out)


def _give_out(tiles: list[PlanTile], places: int, shape: PlanShape) -> GivenOut:
    """Fills in the order of the last groups where items are given out."""
    items = len(tiles) * shape.groups
    if not (shape.many_items and items and (shape.least_piece == NEVER_CUT or items >= shape.many_items * shape.shares)):
        return GivenOut()
    costs = [_cost(tile, shape) for tile in tiles]
    tail = min(-(-3 * shape.shares * max(costs) // (2 * places)), shape.groups)
    least = NEVER_CUT if shape.least_piece == NEVER_CUT else 24 if items >= 4 * shape.shares else 48
    found = GivenOut(shape.groups - tail, tail, places, least)
    order = list(reversed(range(len(tiles))))
    is_short = len(tiles) <= PLAN_THREADS
    order.sort(key=lambda i: -(_weight(tiles[i], shape) if is_short else tiles[i].units(shape.unit_keys).bit_length()))
    line = pieces = 0
    for place, i in enumerate(order):
        wanted = _pieces_wanted(tiles[i], line, place * tail, found, shape)
        has_room = (pieces + wanted) * tail <= TAIL_PIECES * shape.shares
        tiles[place] = replace(tiles[place], at=i, at_pieces=wanted if has_room else 1, pieces=pieces)
        line += costs[i]
        pieces += wanted if wanted > 1 else 0
    return replace(found, pieces=pieces)


def _weight(tile: PlanTile, shape: PlanShape) -> int:
    """How long a tile takes among others: rows that it lacks count three quarters."""
    rows = min(tile.q_len * shape.pack - tile.index * shape.tile_rows, shape.tile_rows)
    return tile.units(shape.unit_keys) * (shape.tile_rows + 3 * rows)


def _pieces_wanted(tile: PlanTile, line: int, before: int, given_out: GivenOut, shape: PlanShape) -> int:
    """Pieces of a tile that is given out after so many items of the last groups, and ``line`` places of each of these."""
    units, part = tile.units(shape.unit_keys), 8 * (given_out.places - line) * given_out.tail_groups
    wanted = -(-(8 if 2 * before < shape.shares else 5) * (units + shape.fixed_cost) * shape.shares // part)
    return max(min(wanted, TAIL_PIECES, units // given_out.least_units), 1)


def _work_beside(q_len: int, kv_len: int, shape: PlanShape) -> int:
    """What a request outside of the class costs another kernel, in 2^-20 of a unit: see work_beside in plan.cuh."""
    return (shape.beside_key + q_len * shape.class_pack * shape.beside_row) * kv_len if q_len > 0 else 0


def shares_in_use(shape: PlanShape, length: int, tiles: Sequence[PlanTile], beside: int = 0) -> int:
    """Shares that have a part of the line: fewer where equal items are cut alike so, or none gets longer.

    ``beside``: work of another kernel at the same time, in 2^-20 of a unit.
    """
    if length == 0:
        return 0
    wanted = shape.shares
    if beside:
        wanted = max(shape.shares * length // (length + (beside >> 20) + 1), shape.least_shares)
    items = len(tiles) * shape.groups
    costs = {_cost(tile, shape) for tile in tiles}
    is_better = all(tile.count > 1 or max(costs) <= max(SHORT_ITEM, shape.whole_items) for tile in tiles)
    if len(costs) == 1 and is_better:
        even = (wanted + items // 2) // items * items
        even -= items if even > shape.shares else 0
        if even == 0 and shape.whole_items:
            even = next(n for n in range(wanted, 0, -1) if items % n == 0)
        if 16 * even >= 15 * wanted:
            return min(even, length)
    largest = -(-length // wanted)
    return -(-length // largest)


def _cost(tile: PlanTile, shape: PlanShape) -> int:
    return shape.fixed_cost + tile.units(shape.unit_keys)


def _make_tiles(q_len: Sequence[int], kv_len: Sequence[int], shape: PlanShape, visible: Visible) -> list[PlanTile]:
    tiles: list[PlanTile] = []
    line = q_start = 0
    for b, rows in enumerate(q_len):
        in_class = rows > 0 and shape.least_rows <= rows * shape.class_pack <= shape.most_rows and kv_len[b] >= shape.least_keys
        count = -(-rows * shape.pack // shape.tile_rows) if in_class else 0
        for index in range(count):
            last_row = min((index + 1) * shape.tile_rows, rows * shape.pack) - 1
            begin, end = visible(b, index * shape.tile_rows // shape.pack, last_row // shape.pack)
            tiles.append(PlanTile(b, q_start, rows, kv_len[b], index, count, begin, end, line))
            line += _cost(tiles[-1], shape)
        q_start += rows
    return tiles


@dataclass(frozen=True)
class _Line:
    tiles: list[PlanTile]
    requests: list[int]  # that have tiles
    first_tile: dict[int, int]
    starts: list[int]  # places before each of them, in one group; then all places


def _share_start(line: _Line, shape: PlanShape, length: int, used: int, c: int) -> Share:
    end = Share(len(line.tiles), 0, 0, length)
    if c >= used:
        return end
    x = c * length // used
    i = bisect_right(line.starts, x // shape.groups, hi=len(line.requests)) - 1
    b = line.requests[i]
    places = line.starts[i + 1] - line.starts[i]
    group, x = divmod(x - line.starts[i] * shape.groups, places)
    first, count = line.first_tile[b], line.tiles[line.first_tile[b]].count
    tile = first
    while tile + 1 < first + count and line.tiles[tile + 1].line - line.starts[i] <= x:
        tile += 1
    x -= line.tiles[tile].line - line.starts[i]
    unit, units = max(0, x - shape.fixed_cost), line.tiles[tile].units(shape.unit_keys)
    if unit < shape.least_piece or units - unit < shape.least_piece:
        if unit * 2 > units:
            tile, group = PlanRecord(tuple(line.tiles), (), used, length).next_item(tile, group, shape.groups)
            if tile == len(line.tiles):
                return end
        unit = 0
    at = line.tiles[tile]
    k = line.requests.index(at.request)
    start, places = line.starts[k], line.starts[k + 1] - line.starts[k]
    place = start * shape.groups + group * places + (at.line - start) + shape.fixed_cost + unit
    return Share(tile, group, unit, place)


def cuts_nothing(header: bytes) -> bool:
    """Whether the plan that begins with this gives its items out, and all of them whole."""
    *_, tail_groups, _, _, pieces = _HEADER.unpack_from(header, 0)[:10]
    return tail_groups > 0 and pieces == 0


def read_plan(buffer: bytes, shares: int) -> PlanRecord:
    """A plan buffer, copied from the device, made for this many shares."""
    num_tiles, used, length, _, _, *given_out = _HEADER.unpack_from(buffer, 0)[:10]
    tiles_at = SHARES_AT + _SHARE.size * (shares + 1)
    tiles = tuple(PlanTile(*_TILE.unpack_from(buffer, tiles_at + i * _TILE.size)) for i in range(num_tiles))
    starts = tuple(Share(*_SHARE.unpack_from(buffer, SHARES_AT + c * _SHARE.size)[:4]) for c in range(shares + 1))
    return PlanRecord(tiles, starts, used, length, GivenOut(*given_out))
