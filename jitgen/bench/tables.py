"""Tables of throughput: cells against contenders, variants against plain attention, ours against each peer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jitgen.bench.report import SuiteReport, Table
from jitgen.bench.results import Result, best_peer, by_cell, geometric_mean, names, speed_up, speed_ups
from jitgen.bench.workloads import keys_of_area

PLAIN = ("causal", "full")
SAME_AREA = "full of the area"  # over so many keys that it visits as much: workloads.same_area
NONE = "-"
MEAN = "geometric mean (least, greatest; cells)"


def rate_unit(device: str) -> tuple[str, float]:
    """Name of the unit of throughput on a device, and how many of it are one TFLOP/s."""
    return ("TFLOP/s", 1.0) if device == "cuda" else ("GFLOP/s", 1e3)


def ms_text(ms: float | None) -> str:
    """Milliseconds with four digits or so."""
    if ms is None:
        return NONE
    return f"{ms:.{4 if ms < 1 else 3 if ms < 10 else 2 if ms < 100 else 1}f}"


def rate_text(tflops: float | None, device: str) -> str:
    return NONE if tflops is None else f"{tflops * rate_unit(device)[1]:.1f}"


def ratio_text(ratio: float | None) -> str:
    return NONE if ratio is None else f"{ratio:.3f}"


def stacked(contender: str) -> str:
    """A contender's name in two lines, to keep its column narrow."""
    return contender.replace("-", "\n", 1)


def detail_lines(results: Sequence[Result], device: str) -> list[str]:
    """All there is to say about each contender, one line each, with the speed-up of each of ours over it."""
    lines = []
    for cell, contest in by_cell(results).items():
        lines.append(f"  {cell.label}")
        ours = [result for result in contest.values() if result.is_ours]
        for name, result in contest.items():
            if result.samples is None:
                lines.append(f"    {name:<12} {result.status}: {result.reason}")
                continue
            q1, q3 = (ms_text(value) for value in result.samples.quartiles)
            parts = [
                f"{ms_text(result.ms):>8} ms [{q1}, {q3}]",
                f"{rate_text(result.tflops, device)} {rate_unit(device)[0]}",
                f"{len(result.samples.values)} samples",
                f"first call {result.first_call_s:.1f} s" if result.first_call_s is not None else "",
                f"error {result.error.relative:.1g}" if result.error else "",
            ]
            parts += [f"{one.contender} {ratio_text(speed_up(one, result))}x" for one in ours if not result.is_ours]
            lines.append(f"    {name:<12} " + ", ".join(part for part in parts if part))
    return lines


# ---- plain attention ------------------------------------------------------------------------------------------------


def throughput_tables(title: str, results: Sequence[Result], device: str) -> tuple[Table, ...]:
    """Milliseconds; throughput; our speed-up over the best peer of each cell; means over each peer."""
    ours, all_names = names(results, ours=True), names(results)
    times, rates, ratios = [], [], []
    for cell, contest in by_cell(results).items():
        shown = [contest.get(name) for name in all_names]
        times.append((cell.label, *[ms_text(result.ms if result else None) for result in shown]))
        rates.append((cell.label, *[rate_text(result.tflops if result else None, device) for result in shown]))
        best = best_peer(contest)
        if best:
            over = [ratio_text(speed_up(contest.get(name), best)) for name in ours]
            ratios.append((cell.label, best.contender, ms_text(best.ms), *over))
    heads = [stacked(name) for name in all_names]
    return (
        Table(f"{title}: ms", ("cell", *heads), tuple(times)),
        Table(f"{title}: {rate_unit(device)[0]}", ("cell", *heads), tuple(rates)),
        Table(f"{title}: speed of ours over the best", ("cell", "best peer", "its ms", *ours), tuple(ratios), left=2),
        speed_up_table(f"{title}: speed of ours over each peer, {MEAN}", results),
    )


def speed_up_table(title: str, results: Sequence[Result]) -> Table:
    """One line per peer, and last the best peer of each cell; one column for each of ours."""
    ours, peers = names(results, ours=True), names(results, ours=False)
    rows = []
    for peer in (*peers, None):
        found = [list(speed_ups(results, name, peer).values()) for name in ours]
        if any(found):
            rows.append((peer or "best of the cell", *[mean_text(values) for values in found]))
    return Table(title, ("peer", *ours), tuple(rows))


def mean_text(values: Sequence[float]) -> str:
    """Geometric mean with range and count."""
    mean = geometric_mean(values)
    return NONE if mean is None else f"{mean:.3f} ({min(values):.3f}, {max(values):.3f}; {len(values)})"


# ---- variants -------------------------------------------------------------------------------------------------------


def variant_tables(title: str, results: Sequence[Result], device: str) -> tuple[Table, ...]:
    """Each variant of ours beside our plain kernels, per visited area, and beside FlexAttention and the best peer."""
    rows: dict[str, list[tuple[str, ...]]] = {}
    for cell, contest in by_cell(results).items():
        flex, best = contest.get("flex"), best_peer(contest)
        for result in contest.values():
            if not result.is_ours or (result.ms is None and not result.is_fault):
                continue
            rows.setdefault(cell.shape_label, []).append((
                cell.variant_label,
                result.contender,
                ms_text(result.ms),
                rate_text(result.tflops, device),
                f"{100 * result.block_pairs / cell.length**2:.1f}",
                *[ratio_text(area_ratio(result, results, plain)) for plain in ("causal", SAME_AREA)],
                ms_text(flex.ms if flex else None),
                ratio_text(speed_up(result, flex)),
                best.contender if best else NONE,
                ms_text(best.ms if best else None),
                ratio_text(speed_up(result, best)),
            ))  # fmt: skip
    columns = (
        "variant", "ours", "ms", rate_unit(device)[0], "visited\n%", "area speed\n/our causal", "/ our full\nof the area",
        "flex\nms", "ours\n/flex", "best\npeer", "best\nms", "ours\n/best",
    )  # fmt: skip
    area = "area: pairs in 128 x 128 blocks that hold an unmasked one; full N: over N keys, as many as make a variant's area"
    return (
        *(Table(f"{title}, {shape}\n{area}", columns, tuple(lines), left=2) for shape, lines in rows.items()),
        area_table(title, results),
        speed_up_table(f"{title}: speed of ours over each peer, {MEAN}", results),
    )


def area_ratio(result: Result, results: Sequence[Result], plain: str) -> float | None:
    """Visited area a millisecond, relative to a plain kernel of ours: the same contender's, if it has one."""
    variant, num_keys = plain, 0
    if plain == SAME_AREA:
        variant, num_keys = "full", keys_of_area(result.block_pairs, result.cell.length)
    wanted = replace(result.cell.shape, variant=variant, num_keys=num_keys)
    found = [other for other in results if other.is_ours and other.cell == wanted and other.area_speed]
    found.sort(key=lambda other: other.contender != result.contender)
    return result.area_speed / found[0].area_speed if found and result.area_speed and found[0].area_speed else None


def area_ratios(results: Sequence[Result], contender: str, plain: str) -> dict[str, float]:
    """Area speeds relative to plain, by label of the cell, of all variants that are not plain."""
    found = {}
    for result in results:
        if result.contender == contender and result.cell.variant not in PLAIN:
            ratio = area_ratio(result, results, plain)
            if ratio is not None:
                found[result.cell.label] = ratio
    return found


def area_table(title: str, results: Sequence[Result]) -> Table:
    """Area speed of all variants relative to our plain kernels."""
    ours = names(results, ours=True)
    rows = [
        (f"our {plain}", *[mean_text(list(area_ratios(results, name, plain).values())) for name in ours])
        for plain in (*PLAIN, SAME_AREA)
    ]
    return Table(f"{title}: speed per visited area over our plain kernels, {MEAN}", ("plain", *ours), tuple(rows))


# ---- reports --------------------------------------------------------------------------------------------------------


def make_report(
    suite: str, device: str, tables: tuple[Table, ...], results: Sequence[Result], notes: Sequence[str]
) -> SuiteReport:
    """Tables with the notes on who was left out, and all figures for JSON."""
    return SuiteReport(
        suite=suite,
        device=device,
        tables=tables,
        notes=(*notes, *refusals(results)),
        data={"results": [result.to_json() for result in results], "summary": summary(results)},
        faults=tuple(
            f"{result.contender}, {result.cell.label}: {result.status}: {result.reason}"
            for result in results
            if result.is_fault
        ),
    )


def refusals(results: Sequence[Result]) -> list[str]:
    """Peers without times, once for each reason, with the cells."""
    found: dict[tuple[str, str], list[str]] = {}
    for result in results:
        if result.samples is None and not result.is_fault:
            why = result.reason if result.status == "unsupported" else f"{result.status}: {result.reason}"
            found.setdefault((result.contender, why), []).append(result.cell.label)
    notes = []
    for (contender, why), labels in found.items():
        shown = ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")
        notes.append(f"{contender}: {why} ({shown})")
    return notes


def summary(results: Sequence[Result]) -> dict[str, object]:
    """Speed-ups by cell and their geometric means, and area speeds relative to our plain kernels."""
    found: dict[str, object] = {}
    for ours in names(results, ours=True):
        over: dict[str, object] = {}
        for peer in (*names(results, ours=False), None):
            ratios = speed_ups(results, ours, peer)
            over[peer or "best"] = {"geometric_mean": geometric_mean(ratios.values()), "cells": ratios}
        areas = {plain: area_ratios(results, ours, plain) for plain in (*PLAIN, SAME_AREA)}
        area = {plain: {"geometric_mean": geometric_mean(ratios.values()), "cells": ratios} for plain, ratios in areas.items()}
        found[ours] = {"speed_up_over": over, "area_speed_over_our": area}
    return found
