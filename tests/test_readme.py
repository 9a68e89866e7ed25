"""The README tells the truth: its Python runs, its table of environment variables is that of env.py.

JITGEN_ACCEPT=1 rewrites the table.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from jitgen import env

README = Path(__file__).parent.parent / "README.md"
TABLE = re.compile(r"(?<=<!-- begin: environment variables )(.*? -->\n)(.*?)(?=<!-- end: environment variables -->)", re.DOTALL)
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def environment_table() -> str:
    rows = [f"| `{v.name}` | {v.values} | {v.default} | {v.meaning} |" for v in env.VARIABLES]
    return "\n".join(["| variable | values | default | meaning |", "|---|---|---|---|", *rows]) + "\n"


def test_table_of_environment_variables_equals_env_py():
    text = README.read_text()
    if os.environ.get("JITGEN_ACCEPT") == "1":
        text = TABLE.sub(lambda found: found.group(1) + environment_table(), text)
        README.write_text(text)
    assert TABLE.search(text).group(2) == environment_table()


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_python_of_readme_runs(number):
    names: dict[str, object] = {}
    exec(compile(SNIPPETS[number], f"{README.name}[{number}]", "exec"), names)
    assert names["out"].isfinite().all()


def test_readme_has_an_example_of_at_most_twelve_lines():
    assert SNIPPETS
    assert sum(1 for line in SNIPPETS[0].splitlines() if line.strip()) <= 12


def test_every_example_is_named_in_the_readme():
    examples = {path.name for path in (README.parent / "examples").glob("[0-9]*.py")}
    assert examples == set(re.findall(r"^\| `(\d\d_\w+\.py)` \|", README.read_text(), re.MULTILINE))
