"""Show what becomes of a variant: expressions, captures, tile classes, kernel, key, and the generated source.

TARGET is module:name or path.py:name. The name may have dots; it stands for a jitgen.Variant, a score_mod, a mask_mod,
an OnlineNorm, or a class or object with hooks. Nothing is compiled but a small module that classifies the mask's tiles.

examples:
  jitgen show examples/01_softcap.py:causal_window --q-len 2048 --mask
  jitgen show mymodule:MyVariant --head-dim 128 --dtype bfloat16 --arch 9.0a --source
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jitgen.cli_text import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", type=target_text, nargs="?", help="module:name or path.py:name")
    kernel = parser.add_argument_group("the kernel")
    kernel.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU, else cpu")
    kernel.add_argument("--arch", metavar="ARCH", type=arch_text, help="CUDA architecture such as 9.0a; needs no GPU")
    families = ("cpu", "sm80", "sm90", "sm90_wide", "sm90_fp8")
    kernel.add_argument("--family", choices=families, help="default: the one a call would choose")
    dtypes = ("float32", "bfloat16", "float16", "float8_e4m3fn")
    kernel.add_argument("--dtype", choices=dtypes, help="default: float32 on cpu, bfloat16 on cuda")
    kernel.add_argument("--head-dim", metavar="N", type=head_dim, default=128, help="default: 128")
    kernel.add_argument("--head-dim-v", metavar="N", type=head_dim, help="default: as --head-dim")
    sizes = parser.add_argument_group("the tiles")
    sizes.add_argument("--q-len", metavar="N", type=positive, help="default: 2048, or what captured tensors allow")
    sizes.add_argument("--kv-len", metavar="N", type=positive, help="default: as --q-len")
    sizes.add_argument("--heads", metavar="N", type=positive, help="query heads; default: as captured tensors, or 1")
    sizes.add_argument("--kv-heads", metavar="N", type=positive, help="default: as --heads")
    sizes.add_argument("--head", metavar="N", type=int, default=0, help="the head that --mask draws; default: 0")
    sizes.add_argument("--request", metavar="N", type=int, default=0, help="the batch index; default: 0")
    sizes.add_argument("--q-index", choices=("local", "absolute"), help="what q_idx counts; default: absolute")
    output = parser.add_argument_group("output")
    output.add_argument("--mask", metavar="FILE.png", nargs="?", const="-", help="draw the mask, here or as a picture")
    output.add_argument("--source", action="store_true", help="print the generated source")
    output.add_argument("--line-numbers", action="store_true", help="number the lines of --source")
    output.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    if args.target is None and args.mask is not None and ":" in args.mask:  # 'show --mask TARGET'
        args.target, args.mask = args.mask, "-"
    if args.target is None:
        args.usage_error("TARGET is missing: module:name or path.py:name")
    if args.mask not in (None, "-") and Path(args.mask).suffix != ".png":
        args.usage_error(f"--mask {args.mask}: expected a name that ends in .png, or none to draw in the terminal")
    from jitgen.show import show

    return show(args)


def target_text(text: str) -> str:
    where, colon, name = text.rpartition(":")
    if not colon or not where or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not module:name or path.py:name")
    return text


def arch_text(text: str) -> str:
    import re

    if not re.fullmatch(r"[1-9][0-9]?\.[0-9][af]?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an architecture; write it like 8.0, 9.0 or 9.0a")
    return text


def head_dim(text: str) -> int:
    number = positive(text)
    if number % 8 or number > 512:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 8 up to 512")
    return number
