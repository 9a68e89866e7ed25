"""KernelSpec: the complete description of one kernel to generate, and the choice of family and tiles."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

from jitgen.abi import ARGS_OF_LAYOUT, PAGE_ARGS, SCALE_ARGS, ArgField
from jitgen.ir_nodes import attr_bytes
from jitgen.program import Program, reads_pages
from jitgen.records import record
from jitgen.target import CompileTarget

CPU_DTYPES = ("float32", "bfloat16", "float16")
CUDA_DTYPES = ("bfloat16", "float16")
STORED_DTYPES = ("float8_e4m3fn", "float8_e5m2", "int8")  # of K and V in a cache, besides the dtype of Q
FP8_DTYPE = "float8_e4m3fn"  # of Q, K and V; the output has one of FP8_OUT_DTYPES
FP8_OUT_DTYPES = ("bfloat16", "float16")
MAX_CPU_HEAD_DIM = 512
MLA_DIMS = (576, 512)  # head dims of absorbed multi-head latent attention: a row holds its value and 64 rotated elements
MLA_FAMILIES = ("mla", "mla_decode", "sm80_mla")  # the kernels for them on GPUs


@record
class Tiles:
    """Rows of Q and of K/V one step works on, and the warps and pipeline stages behind it (0 where it does not apply)."""

    tile_q: int
    tile_kv: int
    num_warps: int = 0
    num_stages: int = 0


@record
class KernelSpec:
    """One kernel. Equal specs are one module; lengths, batch sizes, head counts and captured values are not in here."""

    family: str  # 'cpu', 'sm80', 'sm90', 'sm90_wide', 'sm90_fp8', 'decode', 'mla', 'mla_decode' or 'sm80_mla'
    program: Program
    dtype: str
    head_dim: int
    head_dim_v: int
    tiles: Tiles
    target: CompileTarget
    layout: str = "dense"  # 'dense', 'ragged' or 'paged': how requests and their keys are addressed
    kv_dtype: str = ""  # of K and V where it is one of STORED_DTYPES; FP8_DTYPE of a dense CPU kernel: of Q too; empty: dtype
    out_dtype: str = ""  # of the output; empty: dtype
    rows: Any = None  # transforms of K and V inside of a decode kernel: kv_decode.DecodeRows
    # A dense bias comes by the copy engine, which asks for aligned rows, K and V of a paged sm90 kernel in boxes of pages of a
    # multiple of 8 keys; False: by loads.
    copies: bool = True

    @cached_property
    def digest(self) -> str:
        """Identity of the spec under one generator. The names of captures are left out: renaming one changes the text of
        the source and nothing it does, so the module built before is used."""
        tiles = (self.tiles.tile_q, self.tiles.tile_kv, self.tiles.num_warps, self.tiles.num_stages)
        dtypes = (self.dtype, self.kv_dtype) if self.kv_dtype else (self.dtype,)
        shape: tuple[object, ...] = (
            self.family, self.layout, self.program.id, *dtypes, self.head_dim, self.head_dim_v, tiles
        )  # fmt: skip
        if self.out_dtype:
            shape += (self.out_dtype,)
        if not self.copies:
            shape += ("loads",)
        if self.rows is not None:
            shape += self.rows.shape()
        return hashlib.sha256(attr_bytes(shape)).hexdigest()[:32]

    @cached_property
    def reads_pages(self) -> bool:
        """Whether its hooks, transforms of rows included, read where keys lie in a paged cache."""
        rows = () if self.rows is None else self.rows.roots()
        return bool(reads_pages(*self.program.roots(), *rows))

    @property
    def own_args(self) -> tuple[ArgField, ...]:
        """Fields of ``struct Args`` without the captures."""
        own = ARGS_OF_LAYOUT[self.layout] + (SCALE_ARGS if self.kv_dtype and self.layout != "dense" else ())
        own += () if self.rows is None else self.rows.args
        return own + PAGE_ARGS if self.reads_pages else own

    @property
    def label(self) -> str:
        """Short description for progress lines and logs."""
        dims = f"{self.head_dim}" if self.head_dim == self.head_dim_v else f"{self.head_dim}/{self.head_dim_v}"
        layout = "" if self.layout == "dense" else f" {self.layout}"
        stored = f" from {self.kv_dtype}" if self.kv_dtype else ""
        out = f" to {self.out_dtype}" if self.out_dtype else ""
        rows = f", {' and '.join(self.rows.names)} transformed" if self.rows is not None else ""
        loads = "" if self.copies else ", by loads"
        return f"attention {self.family}{layout} {self.dtype}{stored}{out} hd{dims}{rows}{loads}"
