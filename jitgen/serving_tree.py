"""Shared prefixes from the tree in which an engine keeps them: which runs of requests share which nodes, level by level."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

Path = Sequence[tuple[Hashable, Sequence[int]]]  # nodes from the root on: what tells them apart, and their pages


@dataclass(frozen=True, slots=True)
class SharedRun:
    """Requests ``begin`` to ``end`` share the pages from ``first`` to ``last`` of their lists, at a level."""

    level: int
    begin: int
    end: int
    first: int
    last: int


def shared_runs_of(paths: Sequence[Path], full_pages: Sequence[int], most_levels: int, min_pages: int) -> list[SharedRun]:
    """Runs of neighbouring requests that share at least ``min_pages`` pages beyond what they share at the levels above.

    ``full_pages`` bounds what of each request may be shared. Cost: in nodes, not in pages.
    """
    found: list[SharedRun] = []

    def divide(begin: int, end: int, depth: int, level: int, first: int) -> None:
        """Requests that have their first ``depth`` nodes in common, the pages before ``first`` at levels above."""
        if end - begin < 2 or level == most_levels:
            return
        depth = _common_depth(paths[begin:end], depth)
        last = min(sum(len(pages) for _, pages in paths[begin][:depth]), *full_pages[begin:end])
        if last - first >= min_pages:
            found.append(SharedRun(level, begin, end, first, last))
            level, first = level + 1, last
        at = begin
        while at < end:
            after = at + 1
            if depth < len(paths[at]):
                name = paths[at][depth][0]
                while after < end and depth < len(paths[after]) and paths[after][depth][0] == name:
                    after += 1
            if after - at < end - begin:
                divide(at, after, depth, level, first)
            at = after

    divide(0, len(paths), 0, 0, 0)
    return found


def _common_depth(paths: Sequence[Path], depth: int) -> int:
    """Nodes that all paths begin with, of which ``depth`` are known."""
    shortest = min(len(path) for path in paths)
    while depth < shortest and all(path[depth][0] == paths[0][depth][0] for path in paths):
        depth += 1
    return depth
