"""jitgen doctor on machines that lack something: each absence is named, with what to do, and never stops the report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from jitgen import doctor, doctor_cuda, doctor_probe, doctor_store, env, toolchain
from jitgen.__main__ import main
from jitgen.doctor import CUDA, ERROR, MISSING, NOTE, OK, Finding
from jitgen.errors import CompileError

pytestmark = pytest.mark.usefixtures("private_store")
needs_compiler = pytest.mark.skipif(toolchain.find_cxx() is None, reason="no C++ compiler on this machine")


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def by_name(findings) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@pytest.fixture
def without_cuda(monkeypatch):
    """A machine that has nothing of CUDA, so that a whole report is quick."""
    monkeypatch.setattr(doctor_cuda, "check_cuda", lambda: iter(()))
    monkeypatch.setenv("COLUMNS", "100")  # workers of pytest-xdist say 80


# ---- the whole report -----------------------------------------------------------------------------------------------


@needs_compiler
def test_machine_with_a_compiler_passes(without_cuda, capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "first kernel  compiled, loaded and run with OpenMP" in text
    assert text.endswith("CPU kernels work. CUDA kernels do not run here.\n")


def test_report_in_json_holds_the_verdict_and_all_findings(without_cuda, monkeypatch, capsys):
    monkeypatch.setenv("JITGEN_CXX", "/nonexistent/g++")
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["cpu"], report["cuda"]) == (False, False)
    compiler = next(f for f in report["findings"] if f["name"] == "C++ compiler")
    assert compiler["status"] == "missing" and "/nonexistent/g++" in compiler["text"]


def test_missing_compiler_is_named_in_the_last_line(without_cuda, monkeypatch, capsys):
    monkeypatch.setenv("JITGEN_CXX", "/nonexistent/g++")
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "JITGEN_CXX=/nonexistent/g++ is not a program on this machine" in text
    assert "first kernel" not in text
    assert text.endswith("CPU kernels do not work: see C++ compiler. CUDA kernels do not run here.\n")


def test_error_in_one_section_does_not_stop_the_others(without_cuda, monkeypatch, capsys):
    monkeypatch.setenv("JITGEN_MODE", "maybe")
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "JITGEN_MODE='maybe' is not allowed" in text and "\nCPU kernels\n" in text
    assert "CPU kernels do not work: see JITGEN_MODE." in text


def test_frozen_machine_needs_no_compiler(without_cuda, monkeypatch, capsys):
    monkeypatch.setenv("JITGEN_MODE", "frozen")
    monkeypatch.setenv("JITGEN_CXX", "/nonexistent/g++")
    assert main(["doctor"]) == 0
    assert "not tried: JITGEN_MODE=frozen" in capsys.readouterr().out


# ---- environment ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "status", "text"),
    [
        ("JITGEN_PROGRESS", "purple", ERROR, "Use auto, on or off"),
        ("CUDA_HOME", "cuda", ERROR, "is a relative path"),
        ("JITGEN_CASHE_DIR", "/tmp", NOTE, "jitgen reads no such variable"),
        ("JITGEN_LINE_MAP", "0", OK, "0"),
    ],
)
def test_variable_is_judged(name, value, status, text, monkeypatch):
    monkeypatch.setenv(name, value)
    found = by_name(doctor.check_environment())[name]
    assert found.status == status and text in found.text


def test_every_documented_variable_is_known():
    known = {variable.name for variable in env.VARIABLES}
    assert set(doctor.variable_readers()) == known


def test_misspelt_variable_gets_the_right_name(monkeypatch):
    monkeypatch.setenv("JITGEN_CASHE_DIR", "/tmp")
    assert by_name(doctor.check_environment())["JITGEN_CASHE_DIR"].remedy == "Did you mean JITGEN_CACHE_DIR?"


def test_wrong_cuda_variable_leaves_the_cpu_working():
    wrong = Finding(doctor.ENVIRONMENT, "CUDA_HOME", ERROR, "is a relative path")
    assert doctor.verdict([wrong])["cpu"]
    assert doctor.closing_line([wrong]) == "CPU kernels work. CUDA kernels do not run here: see CUDA_HOME."


# ---- programs -------------------------------------------------------------------------------------------------------


def test_empty_path_lacks_a_compiler_and_says_how_to_install_one(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = doctor_probe.check_cxx()
    assert found.status == MISSING and found.text == "no C++ compiler on PATH"
    assert found.remedy


@pytest.mark.parametrize(
    ("release", "sudo", "command"),
    [
        ({"ID": "debian"}, False, "Run: apt install g++;"),
        ({"ID": "linuxmint", "ID_LIKE": "ubuntu debian"}, True, "Run: sudo apt install g++;"),
        ({"ID": "rocky", "ID_LIKE": "rhel centos fedora"}, True, "Run: sudo dnf install gcc-c++;"),
        ({"ID": "opensuse-leap"}, False, "Run: zypper install gcc-c++;"),
        ({}, False, toolchain.CXX_REMEDY),
    ],
)
def test_compiler_is_installed_as_the_distribution_does_it(release, sudo, command, monkeypatch):
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    assert doctor_probe.cxx_remedy(release, sudo).startswith(command)


def test_too_old_compiler_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("JITGEN_CXX", str(program(tmp_path / "g++", "echo 'g++ (GCC) 8.5.0'")))
    found = doctor_probe.check_cxx()
    assert found.status == MISSING and "at least version 10" in found.text


def test_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    text = 'case "$1" in --version) echo "g++ (GCC) 13.2.0"; exit;; esac\necho "x.cpp:1: error: no disk" >&2; exit 1'
    monkeypatch.setenv("JITGEN_CXX", str(program(tmp_path / "g++", text)))
    found = doctor_probe.check_probe(doctor.CPU, doctor.PROBE)
    assert found.status == ERROR and "error: no disk" in found.text
    assert found.remedy == "Reinstall the compiler, or name another one in JITGEN_CXX or JITGEN_NVCC."


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("fatal error: omp.h: No such file or directory", "OpenMP is missing"),
        ("/usr/bin/ld: cannot find -lgomp", "OpenMP is missing"),
        ("#error -- unsupported GNU version! gcc versions later than 14 are not supported!", "nvcc does not know"),
        ("error: compilation terminated", "Reinstall the compiler"),
    ],
)
def test_compilers_complaint_gets_its_remedy(line, remedy):
    assert doctor_probe.probe_remedy(CompileError("a test", lines=(line,))).startswith(remedy)


def test_missing_torch_is_a_finding(monkeypatch):
    monkeypatch.setattr(doctor, "has_package", lambda name: name != "torch")
    assert doctor_probe.check_torch().status == MISSING


def test_missing_ninja_is_a_finding(monkeypatch):
    monkeypatch.setattr(toolchain, "find_ninja", lambda: None)
    assert doctor_probe.check_ninja().remedy == "Run: pip install ninja"


@needs_compiler
def test_probe_leaves_nothing_in_the_store(private_store):
    assert doctor_probe.check_probe(doctor.CPU, doctor.PROBE).status == OK
    assert list((private_store / "tmp").iterdir()) == []


# ---- store ----------------------------------------------------------------------------------------------------------


def test_store_that_others_can_write_is_an_error(private_store):
    private_store.mkdir()
    private_store.chmod(0o777)
    found = by_name(doctor_store.check_store())["user store"]
    assert found.status == ERROR and f"chmod go-w '{private_store}'" in found.text


def test_store_that_cannot_be_made_is_noticed(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(tmp_path / "file" / "store"))
    found = by_name(doctor_store.check_store())["user store"]
    assert found.status == NOTE and "cannot be written (" in found.text


def test_absent_layer_is_noticed(monkeypatch, tmp_path):
    monkeypatch.setenv("JITGEN_PREBUILT", str(tmp_path / "nothing"))
    found = by_name(doctor_store.check_store())["prebuilt"]
    assert found.status == NOTE and found.text == f"{tmp_path / 'nothing'} is not a directory"


def test_no_home_directory_is_noticed(monkeypatch):
    monkeypatch.setattr("jitgen.env.cache_dir", lambda: None)
    assert by_name(doctor_store.check_store())["user store"].status == NOTE


# ---- text -----------------------------------------------------------------------------------------------------------


def test_working_cuda_is_said_in_the_last_line():
    proof = Finding(CUDA, "first kernel", OK, "compiled, loaded and run for 9.0 in 2.0 s")
    assert doctor.closing_line([proof]) == "CPU kernels work. CUDA kernels work."


def test_remedy_stands_below_its_finding_and_is_aligned(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    lines = doctor.as_text(Finding(CUDA, "toolkit", MISSING, "word " * 40, "Run: " + "word " * 40)).split("\n")
    column = lines[0].index("word")
    assert lines[0].startswith("  missing  toolkit")
    assert all(line.startswith(" " * column) for line in lines[1:])
    assert sum(line.startswith(" " * column + "-> Run:") for line in lines) == 1
