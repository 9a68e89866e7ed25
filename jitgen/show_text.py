"""The report of jitgen show as text, and the facts in it as plain values."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from jitgen.cli_text import counted, field, paint
from jitgen.ir import Expr, walk
from jitgen.ir_text import to_text
from jitgen.program import NormProgram, Program, RowProgram, Slot
from jitgen.rotary import Rope
from jitgen.show_kernel import Kernel
from jitgen.show_sizes import Sizes
from jitgen.show_tiles import Tiling

MAX_TEXT_NODES = 2000  # an expression whose parts are shared can be longer as text than any reader wants
CLASS_MEANING = {
    "none": "skipped: their keys and values are not read",
    "partial": "the mask is evaluated for each element",
    "full": "computed without looking at the mask",
}
IR_NAMES = {"bool": "bool", "i32": "int", "i64": "int (64 bits)", "f32": "float"}


@dataclass(frozen=True)
class Report:
    """Everything that is shown: the variant, what it captures now, its kernel, and the tiles of a request."""

    target: str
    program: Program
    values: list[Any]
    kernel: Kernel
    head_dims: tuple[int, int]  # of the tensors; the kernel's may be larger
    sizes: Sizes
    tiling: Tiling


# ---- facts ----------------------------------------------------------------------------------------------------------


def hooks_of(program: Program) -> list[tuple[str, str]]:
    """Name and expression of every hook that is there."""
    names = [s.name for s in program.slots]
    roots = [("score", program.score), ("mask", program.mask), ("sink", program.sink)]
    if program.norm is not None:
        roots += norm_roots(program.norm)
    roots += [("output", program.output), ("lse", program.lse)]
    found = [(name, expression(root, names)) for name, root in roots if root is not None]
    if program.rows is None:
        return found
    rows = [(name, getattr(program.rows, name)) for name in "qkv"]
    return [*((f"{name} rows", row_text(p, names)) for name, p in rows if not p.is_empty), *found]


def row_text(row: RowProgram, names: list[str]) -> str:
    """What becomes of the element o of a row at position q_idx, step by step."""
    steps = []
    if row.before is not None:
        steps.append(expression(row.before, names))
    if row.rope is not None:
        at = "" if row.position is None else f" at {expression(row.position, names)}"
        steps.append(f"rotated by {rope_text(row.rope)}{at}")
    if row.after is not None:
        steps.append(expression(row.after, names))
    return ", then ".join(steps)


def rope_text(rope: Rope) -> str:
    """The parameters of a rotation that are not the usual ones."""
    shown = [
        f"{f.name}={'a table' if f.name == 'cos_sin' else repr(getattr(rope, f.name))}"
        for f in fields(rope)
        if getattr(rope, f.name) is not f.default and getattr(rope, f.name) != f.default
    ]
    return f"Rope({', '.join(shown)})"


def norm_roots(norm: NormProgram) -> list[tuple[str, Expr | None]]:
    """Expressions of a softmax replacement."""
    states = zip(norm.state_names, norm.next_state, strict=True)
    return [
        ("weight", norm.weight),
        ("rescale", norm.rescale),
        *((f"next {name}", root) for name, root in states),
        ("finalize", norm.finalize),
        ("norm lse", norm.lse),
        *zip((*(f"merged {name}" for name in norm.state_names), "scale of a", "scale of b"), norm.merge, strict=False),
    ]


def expression(root: Expr, names: list[str]) -> str:
    """An expression without the parentheses around all of it."""
    size: dict[Expr, int] = {}
    for node in walk(root):
        size[node] = 1 + sum(size[a] for a in node.args)
    if size[root] > MAX_TEXT_NODES:
        return f"an expression of {len(size)} operations, too long to print; --source shows it"
    text = to_text(root, names)
    return text[1:-1] if is_enclosed(text) else text


def is_enclosed(text: str) -> bool:
    """Whether the first parenthesis closes at the very end."""
    if not text.startswith("("):
        return False
    depth = 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return i == len(text) - 1
    return False


def captures_of(program: Program, values: list[Any]) -> list[dict[str, object]]:
    """Every captured value with its type."""
    found = []
    for slot, value in zip(program.slots, values, strict=True):
        facts = {"name": slot.name, "kind": slot.kind, "dtype": IR_NAMES.get(slot.dtype, slot.dtype)}
        if isinstance(value, torch.Tensor):
            facts |= {"shape": list(value.shape), "device": str(value.device)}
            facts |= {"layout": slot.layout, "sorted": slot.is_sorted}
        else:
            facts["value"] = value
        found.append(facts)
    return found


def kernel_facts(kernel: Kernel) -> dict[str, object]:
    """Everything that identifies a kernel."""
    spec = kernel.spec
    return {
        "family": spec.family,
        "dtype": spec.dtype,
        "out_dtype": spec.out_dtype or spec.dtype,
        "head_dim": spec.head_dim,
        "head_dim_v": spec.head_dim_v,
        "tile_q": spec.tiles.tile_q,
        "tile_kv": spec.tiles.tile_kv,
        "warps": spec.tiles.num_warps,
        "stages": spec.tiles.num_stages,
        "arch": spec.target.arch,
        "compiler": spec.target.compiler,
        "flags": list(spec.target.flags),
        "program": spec.program.id,
        "key": kernel.key,
        "entry": str(kernel.entry) if kernel.entry else None,
    }


# ---- text -----------------------------------------------------------------------------------------------------------


def print_report(report: Report) -> None:
    """Sections of the report, top down: what the user wrote, what it captures, the kernel, the tiles."""
    program, values = report.program, report.values
    print(paint(report.target, "bold"))
    hooks = hooks_of(program)
    print_section("hooks", hooks or [("none", "plain softmax attention")])
    if program.norm is not None:
        starts = zip(program.norm.state_names, program.norm.state_init, strict=True)
        state = ", ".join(f"{name} from {start:g}" for name, start in starts)
        print(field("state", f"{state or 'none'}; keys in {program.norm.order} order"))
        print(field("plans", plans_text(program.norm)))
    if program.slots:
        rows = [(s.name, capture_text(s, v)) for s, v in zip(program.slots, values, strict=True)]
        print_section("captured: launch arguments, a new value compiles nothing", rows)
    print_section("kernel", kernel_rows(report.kernel) + input_rows(report))
    print_tiles(program, report.sizes, report.tiling)


def plans_text(norm: NormProgram) -> str:
    """Whether plans cut long requests along their keys for a norm, and why not."""
    if norm.merges:
        return "cut long requests along their keys"
    but = ", except in decode on a GPU, where parts are added: it has no state and no factor" if norm.adds_up else ""
    return f"do not cut requests along their keys, as it has no merge(a, b){but}"


def print_section(title: str, rows: list[tuple[str, str]]) -> None:
    print("\n" + paint(title, "bold"))
    width = max(10, *(len(name) + 2 for name, _ in rows))
    for name, text in rows:
        print(field(name, text, name_width=width))


def capture_text(slot: Slot, value: Any) -> str:
    """Type and value of a capture."""
    if not isinstance(value, torch.Tensor):
        return f"{IR_NAMES.get(slot.dtype, slot.dtype)}, now {value!r}"
    what = f"{slot.dtype} tensor {list(value.shape)} on {value.device}"
    if slot.layout != layout_of_contiguous(slot.rank):
        what += f", strides {list(value.stride())}"
    return what + (", declared ascending" if slot.is_sorted else "")


def layout_of_contiguous(rank: int) -> str:
    return "s" * (rank - 1) + "c" * (rank > 0)


def input_rows(report: Report) -> list[tuple[str, str]]:
    """What a call copies before the kernel can read it."""
    spec, found = report.kernel.spec, []
    if report.program.rows is not None:
        found.append(("first", "kernels of their own write the transformed rows to copies"))
    if report.head_dims != (spec.head_dim, spec.head_dim_v):
        found.append(("copies", "q, k and v in each call, with zeros up to the head dim of the kernel"))
    elif spec.target.kind == "cuda":
        found.append(("copies", "inputs whose rows are not contiguous, or whose other strides are no multiples of 16 bytes"))
    return found


def kernel_rows(kernel: Kernel) -> list[tuple[str, str]]:
    spec = kernel.spec
    dims = f"{spec.head_dim}" if spec.head_dim == spec.head_dim_v else f"{spec.head_dim}, head_dim_v {spec.head_dim_v}"
    tiles = f"{spec.tiles.tile_q} query rows x {spec.tiles.tile_kv} keys"
    if spec.tiles.num_warps:
        tiles += f", {counted(spec.tiles.num_warps, 'warp')}, {counted(spec.tiles.num_stages, 'stage')}"
    stored = str(kernel.entry) if kernel.entry else "no: the first call compiles it"
    return [
        ("family", f"{spec.family}, {spec.dtype}{f' to {spec.out_dtype}' if spec.out_dtype else ''}, head_dim {dims}"),
        ("tile", tiles),
        ("target", f"{spec.target.arch}; {spec.target.compiler or 'no compiler found'}"),
        ("key", kernel.key),
        ("stored", kernel.problem or stored),
    ]


def print_tiles(program: Program, sizes: Sizes, tiling: Tiling) -> None:
    """Counts of the tile classes, of all heads together."""
    heads = counted(sizes.num_q_heads, "head")
    if sizes.num_kv_heads != sizes.num_q_heads:
        heads += f" on {sizes.num_kv_heads} KV {'head' if sizes.num_kv_heads == 1 else 'heads'}"
    first = f", first q_idx {sizes.q_offset}" if sizes.q_offset else ""
    title = f"tiles: {sizes.q_len} queries x {sizes.kv_len} keys, {heads}{first}"
    print("\n" + paint(title, "bold"))
    if tiling.kinds is None:
        print(field("unknown", tiling.problem, style="yellow"))
        return
    total = tiling.kinds.numel()
    for name, count in tiling.counts().items():
        print(f"  {name:<9} {count:>8} {100 * count / total:5.1f} %  {CLASS_MEANING[name]}")
    if program.mask is not None and tiling.counts()["partial"] == total > 1:
        hint = "No tile is decided: the mask is hard to bound. See 'Adding a variant' in the README."
        print(field("", hint, style="yellow"))
