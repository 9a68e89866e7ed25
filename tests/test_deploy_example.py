"""The deployment example works from end to end, as its Dockerfile would run it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jitgen import prebuild, toolchain

FOLDER = Path(__file__).parent.parent / "examples" / "deploy"


@pytest.mark.skipif(toolchain.find_cxx() is None, reason="no C++ compiler on this machine")
def test_smoke_script_runs(tmp_path: Path) -> None:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**os.environ, "PATH": path, "TMPDIR": str(tmp_path)}
    done = subprocess.run(["bash", str(FOLDER / "smoke.sh")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("deployment works\n")


def test_manifest_asks_for_what_the_dockerfile_builds() -> None:
    (archs,) = re.findall(r"prebuild /src/kernels.toml --arch (\S+)", (FOLDER / "Dockerfile").read_text())
    units = prebuild.plan([FOLDER / "kernels.toml"], archs=archs.split(","))
    assert {unit.arch for unit in units} == set(archs.split(","))
    assert {unit.what.split(":")[1] for unit in units} == {"capped", "biased"}
