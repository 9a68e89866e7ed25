"""The README tells the truth: its Python runs, its table of environment variables is that of env.py.

JITGEN_ACCEPT=1 rewrites the table.
"""

from __future__ import annotations

import os
import re
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

import jitgen
import jitgen.compat
from jitgen import env
from jitgen.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TEXT = README.read_text()
TABLE = re.compile(r"(<!-- begin: environment variables .*? -->\n)(.*?)(?=<!-- end: environment var)", re.DOTALL)
SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def environment_table() -> str:
    rows = [f"| `{v.name}` | {v.values} | {v.default} | {v.meaning} |" for v in env.VARIABLES]
    return "\n".join(["| variable | values | default | meaning |", "|---|---|---|---|", *rows]) + "\n"


def test_table_of_environment_variables_equals_env_py():
    text = TEXT
    if os.environ.get("JITGEN_ACCEPT") == "1":
        text = TABLE.sub(lambda found: found.group(1) + environment_table(), text)
        README.write_text(text)
    assert TABLE.search(text).group(2) == environment_table()


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_python_of_readme_runs(number):
    if "transformers" in SNIPPETS[number]:
        pytest.importorskip("transformers", minversion="5.17")
    names: dict[str, object] = {}
    exec(compile(SNIPPETS[number], f"{README.name}[{number}]", "exec"), names)
    assert names["out"].isfinite().all()


def test_readme_has_an_example_of_at_most_twelve_lines():
    assert SNIPPETS
    assert sum(1 for line in SNIPPETS[0].splitlines() if line.strip()) <= 12


def test_every_example_is_named_in_the_readme():
    examples = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert examples == set(re.findall(r"^\| `(\d\d_\w+\.py)` \|", TEXT, re.MULTILINE))


def test_table_of_commands_is_that_of_the_command_line():
    assert set(COMMANDS) == set(re.findall(r"^\| `jitgen (\w+)", TEXT, re.MULTILINE))


def test_extras_in_the_readme_exist():
    named = set(re.findall(r"'\.\[(\w+)\]'", TEXT))
    assert named and named <= set(metadata.metadata("jitgen").get_all("Provides-Extra"))


def test_names_of_the_package_in_the_readme_exist():
    others = ("cache", "kernel_templates", "prebuilt")  # packages, and the group of entry points
    named = {name for name in re.findall(r"\bjitgen\.([a-zA-Z_]+)", TEXT) if name not in others}
    assert not {name for name in named if not hasattr(jitgen, name)}


def test_files_named_in_the_readme_exist():
    named = set(re.findall(r"`((?:[\w.]+/)*[\w]+\.(?:py|jinja|h|cuh))`", TEXT)) - {"path.py"}
    places = (ROOT, ROOT / "jitgen", ROOT / "examples", ROOT / "kernel_templates" / "attention")
    assert not {name for name in named if not any((place / name).is_file() for place in places)}


def test_ci_runs_the_commands_of_the_readme():
    extract = re.search(r"< <\((sed .*)\)$", (ROOT / ".ci/run").read_text(), re.MULTILINE).group(1)
    commands = subprocess.run(["bash", "-c", extract], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    blocks = re.findall(r"^```sh\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert commands == "".join(blocks)
    assert [re.match(r"pip install (-e )?'?\.", block) is not None for block in blocks] == [True, True]
