"""Plan.explain: what the planner did, as a table."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING

import torch

from jitgen.program import Program
from jitgen.runtime import fields_of
from jitgen.serving_balance import TAIL_PIECES, PlanRecord, read_plan
from jitgen.serving_kernels import ask
from jitgen.spec import MLA_FAMILIES

if TYPE_CHECKING:
    from jitgen.serving_kernels import KernelClass
    from jitgen.serving_plan import Plan

PIECE_FIELDS = 8  # of jitgen_pieces: request, KV head, first query head, heads, first row, rows, first key, end key


def explain(plan: Plan, program: Program, values: list[object], rows: int) -> str:
    """The text of Plan.explain."""
    q_indptr, kv_len = (t.cpu() for t in plan.request_lengths)
    batch = plan.num_requests
    total = f"{batch} request{'s' if batch != 1 else ''}, {int(q_indptr[-1])} query rows, {int(kv_len.sum())} keys"
    heads = f"{plan.num_q_heads} query heads on {plan.num_kv_heads} KV heads"
    entries = ""
    if plan.entries is not None:
        kind = "parts" if plan.entries.chosen is None else "lists"
        entries = f"in {int((plan.kv_len > 0).sum())} {kind}; "  # type: ignore[operator]
    lines = [f"{total}; {entries}{heads}; split {plan.split}; {plan.device}"]
    if program.norm is not None and not program.can_split:
        whole = [c.name for c in plan.classes if not (c.name == "decode" and program.norm.adds_up)]
        lines += [f"{' and '.join(whole)}: requests are not cut, as the norm has no merge(a, b)"] if whole else []
    for c in plan.classes:
        lines += (_explain_host if c.plan is None else _explain_device)(plan, c, program, values, rows)
    return "\n".join(lines)


# ---- CUDA: what the planner wrote ------------------------------------------------------------------------------------------


def _explain_device(plan: Plan, c: KernelClass, program: Program, values: list[object], rows: int) -> list[str]:
    shares = c.num_ctas
    if c.name in MLA_FAMILIES:  # whose CTAs take a share by twos
        shares = ask(c.kernel, "jitgen_num_shares", c.pack(plan, program, values, plan.max_batch, plan.max_tokens), plan)
    record = read_plan(c.plan.cpu().numpy().tobytes(), shares)  # type: ignore[union-attr]
    if not record.tiles:
        return [f"{c.name}: no request"]
    if record.given_out.tail_groups:
        return [f"{c.name}: {_given_out(record, c.num_ctas)}"]
    return [f"{c.name}: {_summary(record)}", *_shares_table(record, rows)]


def _given_out(record: PlanRecord, num_ctas: int) -> str:
    at, count = record.given_out, len(record.tiles)
    return (
        f"{count} tiles in each of {at.whole_groups + at.tail_groups} groups of heads, {record.length} units for {num_ctas} "
        f"CTAs that take work as they come free; in the last {at.tail_groups} groups the longest tile first, in up to "
        f"{TAIL_PIECES} pieces where one is much longer than a CTA's part of the rest"
    )


def _summary(record: PlanRecord) -> str:
    loads = share_loads(record)
    mean = sum(loads) / len(loads)
    return (
        f"{len(record.tiles)} tiles, {record.length} units on {record.used} CTAs; "
        f"units of a CTA {min(loads)} to {max(loads)}, the heaviest {max(loads) / mean - 1:.1%} above the mean"
    )


def share_loads(record: PlanRecord) -> list[int]:
    """Places on the line that each share in use takes."""
    return [record.shares[c + 1].line - record.shares[c].line for c in range(record.used)]


def _shares_table(record: PlanRecord, rows: int) -> list[str]:
    loads = share_loads(record)
    heaviest = sorted(range(record.used), key=lambda c: (-loads[c], c))[:rows]
    lines = ["   CTA   units    load   begins at request, tile, head group, unit"]
    most = max(loads)
    for c in sorted(heaviest):
        at = record.shares[c]
        tile = record.tiles[at.tile] if at.tile < len(record.tiles) else None
        place = "-" if tile is None else f"{tile.request}, {tile.index}, {at.group}, {at.unit}"
        lines.append(f"{c:6d} {loads[c]:7d} {loads[c] / most:7.0%}   {place}")
    if len(heaviest) < record.used:
        lines.append(f"   ... {record.used - len(heaviest)} more, none with more units")
    return lines


# ---- the CPU: the pieces that a call would make ----------------------------------------------------------------------------


def _explain_host(plan: Plan, c: KernelClass, program: Program, values: list[object], rows: int) -> list[str]:
    pieces = host_pieces(plan, c, program, values)
    if not len(pieces):
        return ["cpu: no request"]
    work = (pieces[:, 3] * pieces[:, 5] + 8) * (pieces[:, 7] - pieces[:, 6]).clamp(min=0)  # 8: what reading a key costs
    items = len({tuple(p) for p in pieces[:, :6].tolist()})
    threads = torch.get_num_threads()
    largest = int(work.max()) / max(int(work.sum()), 1)
    lines = [
        f"cpu: {items} items in {len(pieces)} pieces for {threads} threads; the largest piece is {largest:.1%} of the work, "
        f"a thread's part {1 / threads:.1%}",
        " piece    work   request  KV head  query heads       rows           keys",
    ]
    order = work.argsort(descending=True, stable=True)[:rows].sort().values
    for i in order.tolist():
        b, kv_h, head, heads, row, count, first, end = pieces[i].tolist()
        of = f"{head}..{head + heads - 1}", f"{row}..{row + count - 1}", f"{first}..{end - 1}" if end > first else "none"
        lines.append(
            f"{i:6d} {int(work[i]) / max(int(work.sum()), 1):7.1%} {b:9d} {kv_h:8d} {of[0]:>12} {of[1]:>10} {of[2]:>14}"
        )
    if len(order) < len(pieces):
        lines.append(f"   ... {len(pieces) - len(order)} more, none larger")
    return lines


def host_pieces(plan: Plan, c: KernelClass, program: Program, values: list[object]) -> torch.Tensor:
    """The pieces of a call on the CPU, int32 [pieces, PIECE_FIELDS]."""
    count = _call_pieces(plan, c, program, values, torch.empty(0, PIECE_FIELDS, dtype=torch.int32, device="cpu"))
    pieces = torch.empty(count, PIECE_FIELDS, dtype=torch.int32, device="cpu")
    _call_pieces(plan, c, program, values, pieces)
    return pieces


def _call_pieces(plan: Plan, c: KernelClass, program: Program, values: list[object], out: torch.Tensor) -> int:
    # the module leaves the number of pieces in the arguments themselves, in the field that says how many there is room for
    packed = c.pack(plan, program, values, plan.batch, plan.max_tokens, room=out)
    arguments = ctypes.create_string_buffer(packed, len(packed))
    code = c.kernel.function("jitgen_pieces")(arguments)
    if code:
        c.kernel.raise_error(code)
    names = [f.name for f in fields_of(c.kernel.spec)]
    return int.from_bytes(arguments.raw[8 * names.index("num_ctas") :][:8], sys.byteorder)
