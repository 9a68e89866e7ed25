"""What tracing a variant yields: one canonical expression per hook, and the captures they read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import field, replace
from functools import cached_property, lru_cache
from typing import Any

from jitgen.errors import ShapeMismatch
from jitgen.ir import Expr, serialize, walk
from jitgen.ir_nodes import attr_bytes
from jitgen.ir_ops import PAGE_OPS
from jitgen.records import record

# Element types a captured tensor may have, and the IR type an element is widened to when it is read.
ELEMENT_TO_IR = {
    "bool": "bool", "uint8": "i32", "int8": "i32", "int16": "i32", "int32": "i32", "int64": "i64",
    "float16": "f32", "bfloat16": "f32", "float32": "f32", "float64": "f32",
}  # fmt: skip


@record
class Slot:
    """Signature of one captured value. Values, sizes and addresses are launch arguments and not part of it."""

    kind: str  # 'scalar' or 'tensor'
    dtype: str  # scalar: IR type; tensor: element type, a key of ELEMENT_TO_IR
    rank: int = 0
    layout: str = ""  # one letter a dimension: c (stride 1), 0 (stride 0), s (any other stride)
    is_sorted: bool = False  # declared by jitgen.sorted: ascending along its only dimension
    name: str = field(default="", compare=False)  # the user's name, for generated text and messages only

    def signature(self) -> tuple[object, ...]:
        return (self.kind, self.dtype, self.rank, self.layout, self.is_sorted)


@record
class NormProgram:
    """A softmax replacement (jitgen.OnlineNorm): see variants section of the README.

    ``weight``, ``rescale`` and ``next_state`` read ``score``, ``kv_idx``, row reductions and ``state`` leaves;
    ``finalize`` reads ``o``, ``d`` and ``state``; ``lse`` reads ``state``; ``merge`` reads the states of two parts of the keys,
    which have 'a.' and 'b.' in front of their names.
    """

    state_names: tuple[str, ...]
    state_init: tuple[float, ...]
    weight: Expr
    rescale: Expr
    next_state: tuple[Expr, ...]
    finalize: Expr
    lse: Expr | None
    order: str  # 'any', 'forward' or 'reverse'
    merge: tuple[Expr, ...] = ()  # the state of both, then what O of each is multiplied by; empty: parts cannot be joined

    @property
    def merges(self) -> bool:
        """Whether results over parts of the keys can be joined."""
        return bool(self.merge)

    @property
    def has_order(self) -> bool:
        """Whether the keys of a part must follow each other: neither two warps nor two parts may take turns."""
        return self.order != "any" or any(n.op == "row_cumsum" for n in walk(*self.roots()))

    @property
    def division(self) -> tuple[object, ...]:
        """What of a norm decides how a plan cuts requests, and how much memory it has for the parts."""
        return (self.merges, self.has_order, len(self.state_names)) if self.merges else (False, self.adds_up)

    @property
    def adds_up(self) -> bool:
        """Whether results over parts of the keys may just be added."""
        carries = any(n.op == "row_cumsum" for n in walk(*self.roots()))
        return not self.state_names and not carries and self.rescale.is_const and self.rescale.attr == 1.0

    def roots(self) -> tuple[Expr | None, ...]:
        return (self.weight, self.rescale, *self.next_state, self.finalize, self.lse, *self.merge)

    def over(self, new: Callable[[Expr | None], Any]) -> NormProgram:
        """The same norm of ``new`` expressions."""
        next_state, merge = (tuple(map(new, roots)) for roots in (self.next_state, self.merge))
        finalize, lse = new(self.finalize), new(self.lse)
        return NormProgram(
            self.state_names, self.state_init, new(self.weight), new(self.rescale), next_state, finalize, lse, self.order, merge
        )


@record
class RowProgram:
    """What a transform makes of one row: ``before`` a rotation, the ``position`` it is by, and ``after`` it.

    Expressions of the element ``o`` of the row, its place ``d``, ``b``, ``kv_h`` (the head of the row, also of a query) and
    ``q_idx`` (the position of the row). None stands for the element as it is, and for that position.
    """

    before: Expr | None = None
    rope: Any = None  # a jitgen.Rope
    position: Expr | None = None
    after: Expr | None = None

    @property
    def is_empty(self) -> bool:
        """Whether rows stay as they are."""
        return self.before is None and self.rope is None

    def roots(self) -> tuple[Expr | None, ...]:
        return (self.before, self.position, self.after)


@record
class RowHooks:
    """Transforms of the rows of q, k and v, in front of everything else."""

    q: RowProgram = RowProgram()
    k: RowProgram = RowProgram()
    v: RowProgram = RowProgram()

    @property
    def changes_keys(self) -> bool:
        """Whether rows of k or v are transformed, and not of q alone."""
        return not (self.k.is_empty and self.v.is_empty)

    def roots(self) -> tuple[Expr | None, ...]:
        return (*self.q.roots(), *self.k.roots(), *self.v.roots())

    def kinds(self) -> tuple[object, ...]:
        """What of the rotations is compiled in."""
        return tuple(None if p.rope is None else p.rope.kind for p in (self.q, self.k, self.v))


@record(eq=False)
class Program:
    """The hooks of one variant as expressions. Absent hooks are None. Compared by identity; ``id`` is the content."""

    score: Expr | None = None
    mask: Expr | None = None
    sink: Expr | None = None
    norm: NormProgram | None = None
    output: Expr | None = None
    lse: Expr | None = None
    slots: tuple[Slot, ...] = ()
    rows: RowHooks | None = None  # seen by nothing that asks for ``roots``, the hooks of logits and results
    value: Expr | None = None  # in a decode kernel, the factor of a key's value, in place of a transform: see kv_decode.py
    sink_slot: int | None = None  # of a sink that is a tensor of one logit a head: no part of what is compiled

    def roots(self) -> tuple[Expr | None, ...]:
        found = (self.score, self.mask, self.sink, self.output, self.lse, *(self.norm.roots() if self.norm else ()))
        return found if self.value is None else (*found, self.value)

    @property
    def can_split(self) -> bool:
        """Whether attention over parts of the keys can be joined."""
        return self.norm is None or self.norm.merges

    @cached_property
    def id(self) -> str:
        """Content digest: the same for every way of writing the same variant, in every process."""
        head: tuple[object, ...] = tuple(s.signature() for s in self.slots)
        if self.norm is not None:
            head += (self.norm.state_names, self.norm.state_init, self.norm.order)
        if self.rows is not None:
            head += (self.rows.kinds(),)
        return hashlib.sha256(attr_bytes(head) + serialize(all_roots(self))).hexdigest()[:32]


@lru_cache(maxsize=256)
def without_rows(program: Program) -> Program:
    """The program for rows that have been transformed."""
    return program if program.rows is None else replace(program, rows=None)


def uses_index(program: Program, name: str) -> bool:
    """Whether any hook reads the index ``name``."""
    return any(n.op == "index" and n.attr == name for n in walk(*program.roots()))


def all_roots(program: Program) -> tuple[Expr | None, ...]:
    """The hooks of logits, results and rows."""
    return program.roots() if program.rows is None else (*program.roots(), *program.rows.roots())


def reads_pages(*roots: Expr | None) -> str:
    """The name that these expressions read of where a key lies in a paged cache, 'kv_slot' or 'page'; empty for none."""
    return next((n.op for n in walk(*roots) if n.op in PAGE_OPS), "")


def direct_indices(program: Program) -> tuple[tuple[int, int, str], ...]:
    """(slot, dimension, index) of what the host checks: that a tensor reaches as far as b, h, kv_h, q_idx, kv_idx or d do.

    Generated code does not clamp these. Any other index is clamped in the kernel, which takes one entry: index 'any'.
    """
    found: dict[tuple[int, int, str], None] = {}
    for node in walk(*program.roots()):
        if node.op == "load":
            for dim, index in enumerate(node.args):
                direct = index.op == "index" and index.attr in ("b", "h", "kv_h", "q_idx", "kv_idx", "d")
                found[(int(str(node.attr)), dim, str(index.attr) if direct else "any")] = None
    return tuple(found)


@lru_cache(maxsize=256)
def number_indices(program: Program) -> tuple[tuple[int, int, Expr], ...]:
    """(slot, dimension, index) where a tensor is indexed by a captured or a literal number alone, such as that of a layer."""
    loads = [n for n in walk(*program.roots()) if n.op == "load"]
    return tuple((int(str(n.attr)), dim, i) for n in loads for dim, i in enumerate(n.args) if i.op in ("scalar", "const"))


def check_numbers(program: Program, values: Sequence[Any]) -> None:
    """Numbers that index tensors are inside of these, as Python has it: generated code would clamp them.

    Errors:  ShapeMismatch.
    """
    for slot, dim, index in number_indices(program):
        size = values[slot].shape[dim]
        own = index.op == "scalar"
        number = values[int(str(index.attr))] if own else index.attr
        if size and not -size <= number < size:
            name = f"'{program.slots[int(str(index.attr))].name}', which is {number}," if own else f"the number {number}"
            raise ShapeMismatch(
                f"captured tensor '{program.slots[slot].name}' has size {size} along axis {dim}, and {name} indexes it there, "
                f"expected {-size} to {size - 1}."
            )


def check_sink(program: Program, values: Sequence[Any], num_q_heads: int) -> None:
    """A sink that is a tensor has no logits but those of the heads: more are those of another model, or of all ranks.

    Errors:  ShapeMismatch.
    """
    if program.sink_slot is not None and values[program.sink_slot].shape[0] > num_q_heads:
        raise ShapeMismatch(
            f"sink has {values[program.sink_slot].shape[0]} logits, q has {num_q_heads} heads. Expected one a head: slice it, "
            "or pass (b, h) -> logit to read a part of it."
        )


def too_short(name: str, dim: int, size: int, index: str, least: int, where: str = "") -> ShapeMismatch:
    """The error for a captured tensor with fewer entries than a hook reads; ``index`` is one of direct_indices."""
    if index == "any":
        return ShapeMismatch(
            f"captured tensor '{name}' is empty along axis {dim}, and a hook reads it there. Give it at least one entry."
        )
    return ShapeMismatch(
        f"captured tensor '{name}' has size {size} along axis {dim}, which {index} indexes up to {least - 1}{where}. "
        f"Give it at least {least} entries there, or clamp the index."
    )
