"""What an installation leaves behind: the package jitgen, complete, and no other name; what its extras bring."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

from jitgen import toolchain

ROOT = Path(__file__).parent.parent
FOLDERS = ("jitgen", "cache", "kernel_templates", "tests", "examples")
FILES = ("pyproject.toml", "README.md", "LICENSE")
INSTALLED_AS = {"jitgen": "jitgen", "cache": "jitgen/cache", "kernel_templates": "jitgen/kernel_templates"}
SUFFIXES = {"jitgen": (".py", ".typed"), "cache": (".py",), "kernel_templates": (".py", ".jinja", ".h", ".cuh")}

# not find_spec: setuptools takes that for pip starting, and turns off its distutils for the rest of the process
has_pip = any(metadata.distributions(name="pip"))
needs_pip = pytest.mark.skipif(not has_pip, reason="no pip in this environment")


class Installation(NamedTuple):
    """An environment that jitgen was installed into, and what that added to its site-packages."""

    python: Path
    source: Path
    added: set[str]

    def run(self, code: str, cwd: Path) -> str:
        return checked([str(self.python), "-W", "ignore", "-c", code], cwd)


def checked(command: list[str], cwd: Path | None = None) -> str:
    """Output of a command that must succeed."""
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=cwd, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


def pip(*arguments: object) -> None:
    checked([sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)])


def checkout_copy(place: Path) -> Path:
    """A copy of the checkout, since a build writes into it; with a stray binary where it could be taken for data."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, place / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(ROOT / file, place)
    (place / "cache" / "stray.so").touch()
    return place


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    source = checkout_copy(directory / "source")
    pip("wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", directory, source)
    (built,) = directory.glob("*.whl")
    return built


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installation(request, tmp_path_factory) -> Installation:
    """jitgen in a new environment that finds everything else in this one."""
    directory = tmp_path_factory.mktemp(request.param)
    venv.create(directory / "venv", with_pip=False)
    python = directory / "venv/bin/python"
    site = Path(checked([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    # a path in a .pth file does not bring the .pth files there into force, such as an editable jitgen's
    (site / "others.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    before = set(os.listdir(site))
    options = ("--python", python, "install", "--no-build-isolation", "--no-deps", "--no-index", "--ignore-installed")
    if request.param == "wheel":
        source = request.getfixturevalue("wheel")
        pip(*options, source)
    else:
        source = checkout_copy(directory / "source")
        pip(*options, "--editable", source)
    return Installation(python, source, set(os.listdir(site)) - before)


@needs_pip
def test_installation_adds_jitgen_and_nothing_else(installation):
    ours = r"jitgen|jitgen-[\d.]+\.dist-info|__editable__\.jitgen-[\d.]+\.pth|__editable___jitgen_\w+\.py|__pycache__"
    assert {name for name in installation.added if not re.fullmatch(ours, name)} == set()


@needs_pip
@pytest.mark.parametrize("folder", ["cache", "kernel_templates", "tests", "examples", "bench"])
def test_folder_of_the_checkout_is_no_top_level_module(folder, installation, tmp_path):
    assert installation.run(f"import importlib.util; print(importlib.util.find_spec({folder!r}))", tmp_path) == "None\n"


@needs_pip
def test_installed_jitgen_renders_a_kernel_away_from_the_checkout(installation, tmp_path):
    code = """if True:
        import jitgen, jitgen.bench, jitgen.cache, jitgen.kernel_templates
        from jitgen.families import cpu_tiles
        from jitgen.render import render_kernel
        from jitgen.spec import KernelSpec
        from jitgen.target import cpu_target
        program = jitgen.Variant(mask_mod=lambda b, h, q, kv: kv <= q).trace().program
        spec = KernelSpec("cpu", program, "float32", 64, 64, cpu_tiles(64, 64), cpu_target("portable"))
        assert "jitgen_launch" in render_kernel(spec).text
        print(jitgen.__file__)
    """
    place = installation.python.parent.parent if installation.source.suffix == ".whl" else installation.source
    assert Path(installation.run(code, tmp_path).strip()).resolve().is_relative_to(place.resolve())


@needs_pip
def test_installation_brings_the_command(installation, tmp_path):
    assert checked([str(installation.python.with_name("jitgen")), "--version"], tmp_path).startswith("jitgen ")


@pytest.mark.parametrize("program", ["import jitgen\ntry: from jitgen import cache\nexcept ImportError as e: print(e)", "demo"])
def test_checkout_that_is_not_installed_says_so(program, tmp_path):
    """As where jitgen is installed, and Python is started in the folder it was installed from."""
    shutil.copytree(ROOT / "jitgen", tmp_path / "jitgen", ignore=shutil.ignore_patterns("__pycache__"))
    # without .pth files, of which an editable installation consists
    path = os.pathsep.join([str(tmp_path), *(p for p in sys.path if p.endswith("site-packages"))])
    call = ["-m", "jitgen", program] if program == "demo" else ["-c", program]
    done = subprocess.run(
        [sys.executable, "-S", *call], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    said = f"the checkout {tmp_path}, which is not installed in place. Run 'pip install -e .'"
    assert said in done.stdout + done.stderr, done.stderr



@needs_pip
def test_wheel_holds_every_module_template_and_header(wheel):
    wanted = {
        f"{name}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, name in INSTALLED_AS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SUFFIXES[folder]
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == wanted


def pypi_nvcc() -> Path | None:
    """The nvcc that the extra of that name installed, if it did."""
    return next((root / "bin/nvcc" for root in toolchain.pypi_roots() if (root / "bin/nvcc").is_file()), None)


@pytest.mark.skipif(pypi_nvcc() is None, reason="no toolkit from PyPI: pip install -e '.[nvcc]'")
@pytest.mark.skipif(toolchain.find_cxx() is None, reason="no C++ compiler on this machine")
def test_toolkit_from_pypi_compiles_a_module(tmp_path, monkeypatch):
    from jitgen import Variant, build
    from jitgen.families import cuda_spec
    from jitgen.render import render_kernel
    from jitgen.target import cuda_target

    monkeypatch.setenv("JITGEN_NVCC", str(pypi_nvcc()))
    spec = cuda_spec(Variant().trace().program, "float16", (64, 64), "sm80", cuda_target("8.0"))
    source = render_kernel(spec)
    module = build.build(
        source.text, name="from_pypi", target=spec.target, includes=source.includes, label=spec.label, directory=tmp_path
    )
    assert toolchain.require_toolkit().nvcc == pypi_nvcc()
    assert module.is_file()
