"""flashinfer.gemm: refused; jitgen generates attention only."""

from __future__ import annotations

from typing import Any, NoReturn

from jitgen.errors import UnsupportedOption


def bmm_fp8(*args: Any, **options: Any) -> NoReturn:
    """Refused."""
    raise UnsupportedOption("bmm_fp8: jitgen generates no matrix products. Use torch._scaled_mm.")


class SegmentGEMMWrapper:
    """Refused when it is made; the class exists so that code which names it can be imported."""

    def __init__(self, *args: Any, **options: Any) -> None:
        raise UnsupportedOption("SegmentGEMMWrapper: jitgen generates no matrix products. Use torch._grouped_mm.")

    def run(self, *args: Any, **options: Any) -> NoReturn:
        """Refused."""
        raise UnsupportedOption("SegmentGEMMWrapper: jitgen generates no matrix products. Use torch._grouped_mm.")
