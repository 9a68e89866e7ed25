"""Machine code of compiled CUDA modules as text."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest

from jitgen import toolchain


@lru_cache(maxsize=1)
def find_cuobjdump() -> str | None:
    """The disassembler: the toolkit's, the one that the extra 'test' installs, or one on PATH."""
    toolkit = toolchain.find_toolkit()
    roots = [*([toolkit.root] if toolkit else []), *toolchain.pypi_roots()]
    places = [*(str(root / "bin") for root in roots), os.environ["PATH"]]
    return shutil.which("cuobjdump", path=os.pathsep.join(places))


def disassemble(binary: Path, *options: str) -> str:
    """SASS of a cubin or fat binary; the test is skipped where there is no disassembler."""
    program = find_cuobjdump()
    if program is None:
        pytest.skip("no cuobjdump: pip install -e '.[test]'")
    # it starts nvdisasm, which is beside it
    environ = {**os.environ, "PATH": os.pathsep.join((str(Path(program).parent), os.environ["PATH"]))}
    done = subprocess.run([program, "-sass", *options, str(binary)], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    return done.stdout
