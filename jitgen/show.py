"""jitgen show: collects what becomes of a variant and prints it, as text or as JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jitgen.cli_text import paint
from jitgen.dense_split import pays
from jitgen.errors import VariantError
from jitgen.program import reads_pages, without_rows
from jitgen.show_kernel import Choice, kernel_of, spec_of
from jitgen.show_sizes import sizes_of
from jitgen.show_target import load_variant
from jitgen.show_text import Report, captures_of, hooks_of, kernel_facts, print_report
from jitgen.show_tiles import tiling_of


def show(args: argparse.Namespace) -> int:
    """Print the report that the arguments ask for; returns the exit code."""
    variant = load_variant(args.target)
    traced = variant.trace()
    program, values = traced.program, traced.values()
    sizes = sizes_of(program, values, args, variant.q_index)
    choice = Choice(
        device=args.device,
        arch=args.arch,
        family=args.family,
        dtype=args.dtype,
        head_dim=args.head_dim,
        head_dim_v=args.head_dim_v or args.head_dim,
        q_len=sizes.q_len,
        rows=sizes.q_len * sizes.num_q_heads // sizes.num_kv_heads,
        is_short=pays((1, sizes.num_q_heads, sizes.q_len, 0), (1, sizes.num_kv_heads, sizes.kv_len, 0)),
    )
    kernel = kernel_of(spec_of(without_rows(program), choice))
    tiling = tiling_of(program, values, kernel.spec.tiles, sizes)
    report = Report(args.target, program, values, kernel, (choice.head_dim, choice.head_dim_v), sizes, tiling)
    if args.json:
        print(json.dumps(as_data(report, args.source), indent=1))
    else:
        print_report(report)
    if args.mask is not None:
        draw_mask(report, None if args.mask == "-" else Path(args.mask), quiet=args.json)
    if args.source and not args.json:
        print_source(kernel.source.text, args.line_numbers)
    return 0


def as_data(report: Report, with_source: bool) -> dict[str, object]:
    """The whole report as plain values."""
    return {
        "target": report.target,
        "hooks": dict(hooks_of(report.program)),
        "captures": captures_of(report.program, report.values),
        "kernel": kernel_facts(report.kernel),
        "tiles": {**report.sizes.as_data(), **report.tiling.as_data()},
        **({"source": report.kernel.source.text} if with_source else {}),
    }


def draw_mask(report: Report, path: Path | None, *, quiet: bool) -> None:
    """The mask of one head as a picture, in a file or (path None) in the terminal."""
    from jitgen.show_mask import print_mask, write_png
    from jitgen.show_tiles import mask_map

    program, sizes, kinds = report.program, report.sizes, report.tiling.kinds
    if program.mask is None:
        raise VariantError(f"{report.target} has no mask_mod, so there is no mask to draw. Every tile is full.")
    name = reads_pages(program.mask)
    if name:
        raise VariantError(f"the mask of {report.target} cannot be drawn: it reads {name}, which a call's page table says.")
    if kinds is None:
        raise VariantError(f"the mask cannot be drawn, for its tiles could not be classified: {report.tiling.problem}")
    mask = mask_map(program, report.values, report.kernel.spec.tiles, sizes, kinds)
    if path is not None:
        try:
            width, height = write_png(mask, path)
        except OSError as error:
            raise VariantError(f"{path} cannot be written: {error.strerror}. Name another file.") from error
        print("" if quiet else f"\nwrote {path}: head {sizes.head}, {width} x {height} pixels\n", end="")
    elif not quiet:
        print_mask(mask, sizes.head)


def print_source(text: str, numbered: bool) -> None:
    """The generated source, comments dimmed, lines numbered on request."""
    lines = text.rstrip("\n").split("\n")
    width = len(str(len(lines)))
    print()
    for number, line in enumerate(lines, start=1):
        code, mark, comment = line.partition("//")
        shown = code + paint(mark + comment, "dim")
        print(f"{paint(f'{number:>{width}}', 'cyan')}  {shown}" if numbered else shown)
