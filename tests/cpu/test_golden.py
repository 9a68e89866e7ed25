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
from pathlib import Path

import pytest
from golden_cases import CASES, case_program, case_source, case_spec
from jinja2 import meta
from template_checks import (
    assert_both_ways,
    assert_tidy,
    names_set_in,
    parsed,
    parts_of,
    record_branches,
    template_names,
)

from jitgen import build, errors, mask_tiles, paths, render, toolchain
from jitgen.emit import emit_variant
from jitgen.emit_section import section_context
from jitgen.mask_tiles import mask_tiles_context

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden"
TEMPLATES = template_names("attention")
VARIANT = "attention/variant.h.jinja"
INCLUDED_BY = {
    part: {Path(name).name for name in TEMPLATES if part in meta.find_referenced_templates(parsed(name))}
    for part in {part for name in TEMPLATES for part in parts_of(name) - {name}}
}


def golden_path(name: str) -> Path:
    return GOLDEN / f"{name}{case_source(name).suffix}"


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
    assert_golden(name, case_source(name).text)


def test_golden_directory_holds_no_stale_file():
    assert {p.name for p in GOLDEN.iterdir() if p.is_file()} == {golden_path(name).name for name in CASES}


# ---- templates -------------------------------------------------------------------------------------------------------


def context_of(template: str, name: str) -> dict[str, object]:
    """What the case ``name`` passes to ``template``."""
    family, program = CASES[name].family, case_program(name)
    if template == mask_tiles.TEMPLATE:
        return vars(mask_tiles_context(program))
    backend = "cpu" if family in ("cpu", "merge_cpu", mask_tiles.FAMILY) else "cuda"
    section = emit_variant(program, backend=backend, raw_scores=family in render.RAW_SCORE_FAMILIES)
    if template == VARIANT:
        return section_context(section, CASES[name].layout)
    return vars(render.kernel_context(case_spec(name), section, ""))


def cases_of(template: str) -> list[str]:
    """Cases whose rendering uses ``template``."""
    return [name for name in CASES if template == VARIANT or template in parts_of(main_template(name))]


def main_template(name: str) -> str:
    """Template that the case is rendered from."""
    return mask_tiles.TEMPLATE if CASES[name].family == mask_tiles.FAMILY else render.template_of(case_spec(name))


@pytest.mark.parametrize("template", TEMPLATES)
def test_template_names_only_what_its_context_has(template):
    """A part has the context of what includes it, and the names that are set there."""
    assert cases_of(template), f"no golden case renders {template}"
    for name in cases_of(template):
        main = main_template(name)
        known = set(context_of(template, name)) | (names_set_in(main) if template != main else set())
        assert meta.find_undeclared_variables(parsed(template)) <= known, name


@pytest.mark.parametrize("part", sorted(INCLUDED_BY))
def test_part_says_in_its_first_comment_what_includes_it(part):
    said = (paths.template_dir() / part).read_text().partition("#}")[0]
    assert {name for name in INCLUDED_BY[part] if not re.search(rf"\b{re.escape(name)}", said)} == set()


@pytest.fixture(scope="module")
def branches():
    return record_branches(lambda: [case_source(name) for name in CASES])


@pytest.mark.parametrize("template", TEMPLATES)
def test_golden_cases_take_every_branch_both_ways(template, branches):
    assert_both_ways(template, branches)


# ---- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_generated_source_is_tidy(name):
    assert_tidy(case_source(name).text)


def digests() -> dict[str, str]:
    return {name: hashlib.sha256(case_source(name).mapped_text.encode()).hexdigest() for name in CASES}


def test_generated_source_is_the_same_in_another_process():
    script = "import test_golden; [print(n, d) for n, d in test_golden.digests().items()]"
    other_seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environ = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONHASHSEED": other_seed}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=True)
    assert dict(line.split() for line in done.stdout.splitlines()) == digests()


# ---- line map --------------------------------------------------------------------------------------------------------


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
@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("attention/cpu.cpp.jinja", "static_assert"),
        ("attention/cpu_hooks.cpp.jinja", "static void prepare_rows"),  # in a part
        ("attention/cpu.cpp.jinja", "static void load_queries"),  # after it
    ],
)
def test_error_in_a_template_is_reported_at_its_line(name, before, templates_copy, tmp_path):
    template = templates_copy / name
    lines = template.read_text().split("\n")
    at = next(i for i, line in enumerate(lines) if line.startswith(before))
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
    assert f"{name}:{at + 1}:" in str(caught.value)
    assert "planted" in str(caught.value)
