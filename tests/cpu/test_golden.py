"""Generated source: reviewed as code, the same everywhere, tidy, and mapped to its template's lines.

JITGEN_ACCEPT=1 rewrites the files in tests/golden; read the diff before committing it.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from golden_cases import CASES, case_spec
from jinja2 import meta, nodes

from jitgen import build, errors, paths, render, toolchain
from jitgen.emit import emit_variant, section_context

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden"
TEMPLATES = sorted(p.relative_to(paths.template_dir()).as_posix() for p in paths.template_dir().rglob("*.jinja"))
BACKENDS = {"cpu": "cpu", "sm80": "cuda"}


def golden_path(name: str) -> Path:
    return GOLDEN / f"{name}.{'cpp' if CASES[name][1] == 'cpu' else 'cu'}"


def assert_golden(name: str, text: str) -> None:
    """Compare with the file, or rewrite it when JITGEN_ACCEPT=1."""
    path = golden_path(name)
    if os.environ.get("JITGEN_ACCEPT") == "1":
        path.write_text(text)
    want = path.read_text() if path.is_file() else ""
    diff = "".join(difflib.unified_diff(want.splitlines(True), text.splitlines(True), path.name, "rendered"))
    assert not diff, f"{name}: generated source changed; if intended, JITGEN_ACCEPT=1 and review the diff\n{diff}"


@pytest.mark.parametrize("name", CASES)
def test_generated_source_equals_golden_file(name):
    assert_golden(name, render.render_kernel(case_spec(name)).text)


def test_golden_directory_holds_no_stale_file():
    assert {p.name for p in GOLDEN.iterdir()} == {golden_path(name).name for name in CASES}


# ---- templates ------------------------------------------------------------------------------------------------------------


def parsed(template: str) -> nodes.Template:
    return render.environment().parse((paths.template_dir() / template).read_text())


def context_of(template: str, name: str) -> dict[str, object]:
    """What the case ``name`` passes to ``template``."""
    spec = case_spec(name)
    section = emit_variant(spec.program, backend=BACKENDS[spec.family])
    if template == "attention/variant.h.jinja":
        return dict(section_context(section))
    context = render.kernel_context(spec, section, "")
    return {f.name: getattr(context, f.name) for f in fields(context)}


def cases_of(template: str) -> list[str]:
    """Cases whose rendering uses ``template``."""
    users = {family for family, used in render.TEMPLATE_OF_FAMILY.items() if used == template}
    return [name for name in CASES if template == "attention/variant.h.jinja" or CASES[name][1] in users]


@pytest.mark.parametrize("template", TEMPLATES)
def test_template_names_only_what_its_context_has(template):
    cases = cases_of(template)
    assert cases, f"no golden case renders {template}"
    assert meta.find_undeclared_variables(parsed(template)) <= set(context_of(template, cases[0]))


@pytest.mark.parametrize("template", TEMPLATES)
def test_golden_cases_take_every_branch_both_ways(template):
    environment, untaken = render.environment(), []
    contexts = [context_of(template, name) for name in cases_of(template)]
    source = (paths.template_dir() / template).read_text()
    outer = {n for n in meta.find_undeclared_variables(parsed(template))}
    for condition in sorted(set(re.findall(r"\{%-? *(?:if|elif) +(.+?) *-?%\}", source))):
        names = set(re.findall(r"[a-z_]\w*", condition)) - {"and", "or", "not", "is", "in", "defined", "none"}
        if not names <= outer:
            continue  # about a loop's own variable
        taken = {bool(environment.compile_expression(condition)(**context)) for context in contexts}
        if taken != {True, False}:
            untaken.append(condition)
    assert not untaken, f"{template}: always the same way: {untaken}"


# ---- text -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_generated_source_is_tidy(name):
    text = render.render_kernel(case_spec(name)).text
    code = re.sub(r"//[^\n]*", "", text)
    assert "\t" not in text
    assert not re.findall(r"[ \t]+$", text, re.MULTILINE)
    assert "\n\n\n" not in text
    assert not re.findall(r"\b(?:None|True|False|Undefined|nan|inf)\b", code)
    assert "{{" not in code.replace("{{}}", "") and "{%" not in text and "\ue000" not in text
    for opening, closing in ("{}", "()", "[]"):
        assert code.count(opening) == code.count(closing)
    assert text.endswith("}\n") or text.endswith(";\n")


def digests() -> dict[str, str]:
    return {name: hashlib.sha256(render.render_kernel(case_spec(name)).mapped_text.encode()).hexdigest() for name in CASES}


def test_generated_source_is_the_same_in_another_process():
    script = "import test_golden; [print(n, d) for n, d in test_golden.digests().items()]"
    environ = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=True)
    assert dict(line.split() for line in done.stdout.splitlines()) == digests()


# ---- line map -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def templates_copy(tmp_path, monkeypatch):
    """A copy of the templates that render.py uses instead of the real ones."""
    copy = shutil.copytree(paths.template_dir(), tmp_path / "kernel_templates")
    monkeypatch.setattr(render, "template_dir", lambda: copy)
    render.environment.cache_clear()
    render._header_text.cache_clear()
    yield copy
    monkeypatch.undo()
    render.environment.cache_clear()
    render._header_text.cache_clear()


@pytest.mark.skipif(toolchain.find_cxx() is None, reason="no C++ compiler on this machine")
def test_error_in_a_template_is_reported_at_its_line(templates_copy, tmp_path):
    template = templates_copy / "attention/cpu.cpp.jinja"
    lines = template.read_text().split("\n")
    at = next(i for i, line in enumerate(lines) if line.startswith("static_assert"))
    lines.insert(at, 'static_assert(false, "planted");')
    template.write_text("\n".join(lines))
    spec = case_spec("plain__cpu__float32")
    source = render.render_kernel(spec)
    with pytest.raises(errors.CompileError) as caught:
        build.build(
            source.mapped_text,
            name="planted_error",
            target=spec.target,
            includes=source.includes,
            label=spec.label,
            directory=tmp_path / "build",
        )
    assert f"attention/cpu.cpp.jinja:{at + 1}:" in str(caught.value)
    assert "planted" in str(caught.value)
