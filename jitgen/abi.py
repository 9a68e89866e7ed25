"""The launch ABI: what Python packs and generated code reads, said once.

A launch passes one pointer to a struct of 8-byte fields. Python packs it with :mod:`struct`, the template prints the same
list as ``struct Args``, so the two cannot disagree.
"""

from __future__ import annotations

from jitgen.records import record


@record
class ArgField:
    """One field of ``struct Args``. ``format`` is its letter for the struct module: P pointer, q int64, d double."""

    ctype: str
    name: str
    comment: str = ""  # what the name does not say: a shape, a unit, what a special value means
    format: str = "q"

    @property
    def declaration(self) -> str:
        """The field as a member of the struct."""
        return f"{self.ctype} {self.name};   // {self.comment}" if self.comment else f"{self.ctype} {self.name};"


def pointer(ctype: str, name: str, comment: str = "") -> ArgField:
    """A field that holds an address."""
    return ArgField(f"{ctype}*", name, comment, "P")


def _int(name: str, comment: str = "") -> ArgField:
    return ArgField("int64_t", name, comment, "q")


def _strides(tensors: str, axes: str, **comments: str) -> tuple[ArgField, ...]:
    """Strides in elements; ``comments`` by axis."""
    names = [f"{t}_stride_{axis}" for t in tensors for axis in axes]
    return tuple(_int(name, comments.get(name[-1], "")) for name in names)


# Keys of a page, so that dividing by them is a product and a shift: x / size = x * magic >> shift.
DIVISOR_ARGS = (_int("key_page_size"), _int("key_page_magic"), _int("key_page_shift"))

DENSE_ARGS: tuple[ArgField, ...] = (
    pointer("const void", "q", "[batch, num_q_heads, q_len, head_dim]"),
    pointer("const void", "k", "[batch, num_kv_heads, kv_len, head_dim]"),
    pointer("const void", "v", "[batch, num_kv_heads, kv_len, head_dim_v]"),
    pointer("void", "o", "[batch, num_q_heads, q_len, head_dim_v]"),
    pointer("float", "lse", "[batch, num_q_heads, q_len], contiguous; null when not wanted"),
    pointer("void", "workspace", "device scratch a family asks for; null otherwise"),
    _int("stream", "CUDA stream"),
    _int("num_threads", "CPU threads; 0: the OpenMP default"),
    _int("batch"),
    _int("num_q_heads"),
    _int("num_kv_heads"),
    _int("q_len"),
    _int("kv_len"),
    _int("q_offset", "q_idx of row 0"),
    ArgField("double", "scale", "multiplies q . k", "d"),
    *_strides("qkvo", "bhsd", b="elements"),
)

SERVING_ARGS: tuple[ArgField, ...] = (
    pointer("const void", "q", "[total_q, num_q_heads, head_dim]: the rows of all requests, one after the other"),
    pointer("const void", "k", "ragged [total_kv, num_kv_heads, head_dim]; paged [pages, page_size, num_kv_heads, head_dim]"),
    pointer("const void", "v", "as k, with head_dim_v"),
    pointer("void", "o", "[total_q, num_q_heads, head_dim_v]"),
    pointer("float", "lse", "[total_q, num_q_heads], contiguous; null when not wanted"),
    pointer("void", "workspace", "partial results of requests that were cut; null when a family needs none"),
    pointer("const void", "plan", "what the planner wrote for these lengths"),
    pointer("const int", "q_indptr", "[batch + 1] first row of each request in q"),
    pointer("const int", "kv_len", "[batch] keys of each request"),
    pointer("const int", "kv_start", "[batch] ragged: first row in k; paged: first of its pages; null: b * page_list_stride"),
    pointer("const int", "pages", "page numbers in logical order; null when ragged"),
    _int("stream", "CUDA stream"),
    _int("num_threads", "CPU threads; 0: the OpenMP default"),
    _int("batch"),
    _int("num_q_heads"),
    _int("num_kv_heads"),
    _int("total_q", "rows of q"),
    _int("page_size", "keys of a page; 0 when ragged"),
    _int("num_pages", "pages of the cache, or rows of k when ragged: bound of what may be addressed"),
    _int("page_list_stride", "entries between the page lists of two requests in a block table; 0 with kv_start"),
    _int("head_list_stride", "entries between the page lists of two KV heads of a request; 0: they share one"),
    _int("local_rows", "1: q_idx of a request's row i is i; 0: kv_len - q_len + i"),
    _int("num_ctas", "CTAs the plan was made for"),
    _int("class_rows", "requests of more rows (q_len * num_q_heads / num_kv_heads) are left to the prefill kernel"),
    _int("split", "1: a long request may be cut into pieces; 0: never; more, on the CPU: keys of a piece"),
    _int("programmatic", "1: the launch may overlap the end of the kernel before it, which must trigger its dependents"),
    ArgField("double", "scale", "multiplies q . k", "d"),
    *_strides("qo", "sh", s="elements"),
    *_strides("kv", "psh", p="elements between pages; 0 when ragged"),
)

# Requests in parts, each of which leaves a state: o and lse are float, and have a row for every row of every part.
STATES_ARGS = (*SERVING_ARGS, pointer("const int", "state_row", "[batch] first row of each entry in o and lse"))

# Behind the fields of the layout where K and V are stored in 8 bits.
SCALE_ARGS: tuple[ArgField, ...] = (
    pointer("const float", "k_scale", "what a stored key is multiplied by; null: 1"),
    pointer("const float", "v_scale", "as k_scale, of a value"),
    *(_int(f"{t}_scale_stride_{axis}", "elements between slots; 0: a slot has none of its own" if axis == "s" else "")
      for t in "kv" for axis in "sh"),
    ArgField("double", "k_factor", "multiplies all of k_scale", "d"),
    ArgField("double", "v_factor", "as k_factor, of v_scale", "d"),
)  # fmt: skip

# Behind the scales where hooks read page or kv_slot. Kernels that read copies of keys have no page table of their own.
PAGE_ARGS: tuple[ArgField, ...] = (
    pointer("const int", "key_pages", "page numbers of the cache in logical order"),
    pointer("const int", "key_page_start", "[batch] first of each request; null: b * key_page_stride"),
    _int("key_page_stride", "entries between the page lists of two requests in a block table"),
    _int("key_page_head_stride", "entries between the page lists of two KV heads of a request; 0: they share one"),
    *DIVISOR_ARGS,
)

MERGE_ARGS: tuple[ArgField, ...] = (
    pointer("const float", "states", "[state rows, num_q_heads, head_dim_v], contiguous"),
    pointer("const float", "state_lse", "[state rows, num_q_heads], contiguous"),
    pointer("void", "o", "[total_q, num_q_heads, head_dim_v]"),
    pointer("float", "lse", "[total_q, num_q_heads], contiguous; null when not wanted"),
    pointer("const int", "row_state", "[num_levels, level_stride] state of each row of q at each level; negative: none"),
    pointer("const int", "row_request", "[total_q] request of each row of q"),
    pointer("const int", "q_indptr", "[batch + 1] first row of each request in q"),
    pointer("const int", "kv_len", "[batch] keys of each request, at all levels"),
    _int("stream", "CUDA stream"),
    _int("num_threads", "CPU threads; 0: the OpenMP default"),
    _int("batch"),
    _int("num_q_heads"),
    _int("num_kv_heads"),
    _int("total_q", "rows of q"),
    _int("num_levels"),
    _int("level_stride", "entries between the levels of row_state"),
    _int("local_rows", "1: q_idx of a request's row i is i; 0: kv_len - q_len + i"),
    ArgField("double", "scale", "multiplies q . k", "d"),
    _int("o_stride_s", "elements"),
    _int("o_stride_h"),
)

# States that a caller has: outputs with their logsumexps.
MERGE_OUTS_ARGS: tuple[ArgField, ...] = (
    pointer("const void", "first", "[rows, num_heads, head_dim_v]: the first state of each row"),
    pointer("const float", "first_lse", "[rows, num_heads]"),
    pointer("const void", "others", "[rows, num_states - 1, num_heads, head_dim_v]: those behind it"),
    pointer("const float", "other_lse", "[rows, num_states - 1, num_heads]"),
    pointer("void", "o", "[rows, num_heads, head_dim_v], contiguous"),
    pointer("float", "lse", "[rows, num_heads], contiguous"),
    _int("stream", "CUDA stream"),
    _int("rows"),
    _int("num_heads"),
    _int("num_states"),
    *(_int(f"first_stride_{axis}", "elements" if axis == "s" else "") for axis in "sh"),
    *(_int(f"first_lse_stride_{axis}") for axis in "sh"),
    *(_int(f"other_stride_{axis}", "n: from one state to the next" if axis == "n" else "") for axis in "snh"),
    *(_int(f"other_lse_stride_{axis}") for axis in "snh"),
    ArgField("double", "exponents", "exponents of two in a unit of a logsumexp", "d"),
)

ARGS_OF_LAYOUT = {  # by KernelSpec.layout
    "dense": DENSE_ARGS,
    "ragged": SERVING_ARGS,
    "paged": SERVING_ARGS,
    "ragged_states": STATES_ARGS,
    "paged_states": STATES_ARGS,
    "states": MERGE_ARGS,
    "outs": MERGE_OUTS_ARGS,
}


def divisor_words(size: int) -> tuple[int, int, int]:
    """Values for DIVISOR_ARGS; right for dividends from 0 to 2**31 - 1."""
    bits = (size - 1).bit_length()
    return size, -(-(1 << (31 + bits)) // size), 31 + bits


def pack_format(fields: tuple[ArgField, ...]) -> str:
    """Format string for struct.pack: native 8-byte fields in order."""
    return "@" + "".join(f.format for f in fields)
