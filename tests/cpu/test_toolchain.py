"""Finding compilers: links, wrappers, incomplete toolkits, old versions; and targets as part of a key."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jitgen import env, memo, target, toolchain
from jitgen.errors import EnvError, ToolchainMissing, UnsupportedDevice

pytestmark = pytest.mark.usefixtures("private_store")


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def toolkit(root: Path, *, header: bool = True) -> Path:
    """A directory that looks like a CUDA toolkit."""
    program(root / "bin" / "nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
    (root / "nvvm").mkdir()
    (root / "include").mkdir()
    if header:
        (root / "include" / "cuda_runtime.h").touch()
    return root


def only_path(monkeypatch: pytest.MonkeyPatch, *directories: Path) -> None:
    monkeypatch.setenv("PATH", os.pathsep.join(map(str, directories)))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)


def test_linked_nvcc_leads_to_its_real_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = toolkit(tmp_path / "cuda-13.0")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(root / "bin" / "nvcc")
    only_path(monkeypatch, tmp_path / "bin")
    assert toolchain.require_toolkit().root == root
    assert toolchain.require_toolkit().version == "13.0.88"


def test_wrapped_nvcc_is_asked_for_its_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = toolkit(tmp_path / "cuda-13.0")
    program(tmp_path / "bin" / "nvcc", f"echo '#$ TOP={root}/bin/..'")
    only_path(monkeypatch, tmp_path / "bin")
    assert toolchain.require_toolkit().root == root


def test_incomplete_toolkit_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda", header=False)))
    with pytest.raises(ToolchainMissing, match=r"no cuda_runtime\.h.*pip install jitgen\[nvcc\]"):
        toolchain.require_toolkit()


def test_named_toolkit_is_the_only_one_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    with pytest.raises(ToolchainMissing, match="nothing has no bin/nvcc"):
        toolchain.require_toolkit()


def test_old_compiler_is_refused_with_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITGEN_CXX", str(program(tmp_path / "g++", "echo 'g++ (GCC) 7.5.0'")))
    with pytest.raises(ToolchainMissing, match=r"g\+\+ \(GCC\) 7\.5\.0, at least version 10 is needed"):
        toolchain.require_cxx()


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("x86_64-conda-linux-gnu-g++ (conda-forge gcc 13.3.0-1) 13.3.0", "g++ (conda-forge gcc 13.3.0-1) 13.3.0"),
        ("Debian clang version 16.0.6 (1)", "clang 16.0.6 (1)"),
    ],
    ids=["gcc", "clang"],
)
def test_compiler_identity_has_no_path(line: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITGEN_CXX", str(program(tmp_path / "cxx", f"echo '{line}'")))
    assert toolchain.require_cxx().version == version


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("false (GNU coreutils) 9.1", r"cxx is false \(GNU coreutils\) 9\.1, neither g\+\+ nor clang\+\+\. Install one"),
        ("ccache version 4.8", r"cxx is ccache version 4\.8, neither g\+\+ nor clang\+\+\. Install one"),
        ("Cuda compiler driver", r"cxx is of unknown version, at least version 10 is needed"),
    ],
    ids=["coreutils", "ccache", "nvcc"],
)
def test_a_program_that_is_no_compiler_is_named_as_what_it_is(line, message, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("JITGEN_CXX", str(program(tmp_path / "cxx", f"echo '{line}'")))
    with pytest.raises(ToolchainMissing, match=message):
        toolchain.require_cxx()


@pytest.mark.parametrize("name", ["gcc", "cc", "clang", "x86_64-linux-gnu-gcc-12"])
def test_a_c_compiler_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # it compiles C++, but what it links lacks the C++ library and does not load
    monkeypatch.setenv("JITGEN_CXX", str(program(tmp_path / name, f"echo '{name} (GCC) 12.1.0'")))
    with pytest.raises(ToolchainMissing, match=r"is a C compiler.*Name g\+\+ or clang\+\+"):
        toolchain.require_cxx()


def test_upgraded_compiler_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = program(tmp_path / "g++", "echo 'g++ (GCC) 12.1.0'")
    monkeypatch.setenv("JITGEN_CXX", str(compiler))
    assert toolchain.require_cxx().major == 12
    program(compiler, "echo 'g++ (GCC) 13.1.0' # upgraded")
    toolchain._find_cxx.cache_clear()
    assert toolchain.require_cxx().major == 13


def test_version_is_asked_once_for_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tmp_path / "calls"
    monkeypatch.setenv("JITGEN_CXX", str(program(tmp_path / "g++", f"echo x >>{calls}; echo 'g++ (GCC) 12.1.0'")))
    for _ in range(3):
        toolchain._find_cxx.cache_clear()  # as a new process
        toolchain.require_cxx()
    assert calls.read_text() == "x\n"


def test_cpu_target_names_its_instructions_in_arch_and_flags() -> None:
    avx2 = target.cpu_target("avx2")
    assert avx2.isa == "avx2" and avx2.arch.endswith("+avx2+fma+f16c+bmi2")
    assert {"-mavx2", "-mfma"} <= set(avx2.flags) and "-march=native" not in avx2.flags
    assert target.cpu_target("avx512", ("avx512_bf16",)).isa == "avx512"
    assert "-mavx512bf16" in target.cpu_target("avx512", ("avx512_bf16",)).flags
    assert target.cpu_target("portable").isa == "portable"


def test_amx_is_a_level_that_takes_no_compiler_option() -> None:
    amx = target.cpu_target("amx")
    assert amx.isa == "amx" and amx.arch.endswith("+avx512_bf16+amx_tile+amx_bf16")
    assert amx.flags == target.cpu_target("avx512", ("avx512_bf16",)).flags
    assert target.target_of(amx.arch) == target.target_of("amx") == amx


def test_kernels_for_amx_run_nowhere_else() -> None:
    levels = {isa: [other.isa for other in target.lesser_targets(target.cpu_target(isa))] for isa in target.CPU_LEVELS}
    assert levels == {"amx": ["avx512", "avx512", "avx2", "portable"], "avx512": ["avx2", "portable"],
                      "avx2": ["portable"], "portable": []}  # fmt: skip
    best, *_ = target.lesser_targets(target.cpu_target("amx"))
    assert best == target.cpu_target("avx512", ("avx512_bf16",))


@pytest.mark.parametrize("isa", ["auto", "amx"])
def test_amx_that_the_system_withholds_is_not_used(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "cpu_features", lambda: frozenset(target.CPU_LEVELS["amx"]))
    monkeypatch.setattr(target, "may_use_tiles", lambda: False)
    monkeypatch.setenv("JITGEN_CPU_ISA", isa)
    if isa == "auto":
        assert target.detect_cpu() == target.cpu_target("avx512", ("avx512_bf16",))
    else:
        with pytest.raises(EnvError, match="JITGEN_CPU_ISA=amx, but this CPU has no amx_tile, amx_bf16 that this process may"):
            target.detect_cpu()


def test_instructions_the_cpu_lacks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "cpu_features", lambda: frozenset())
    monkeypatch.setenv("JITGEN_CPU_ISA", "avx2")
    with pytest.raises(EnvError, match="JITGEN_CPU_ISA=avx2, but this CPU has no avx2"):
        target.detect_cpu()
    monkeypatch.delenv("JITGEN_CPU_ISA")
    assert target.detect_cpu().isa == "portable"


@pytest.mark.parametrize(
    ("arch", "accelerated", "flag"),
    [
        ("8.0", True, "-gencode=arch=compute_80,code=sm_80"),
        ("9.0", False, "-gencode=arch=compute_90,code=sm_90"),
        ("9.0", True, "-gencode=arch=compute_90a,code=sm_90a"),
        ("12.0", False, "-gencode=arch=compute_120,code=sm_120"),
    ],
)
def test_cuda_arch_reaches_nvcc(arch: str, accelerated: bool, flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITGEN_CUDA_ARCH", arch)
    found = target.detect_cuda(accelerated=accelerated)
    assert flag in found.flags and found.kind == "cuda" and found.suffix == ".cu"
    assert found.compute_capability == tuple(map(int, arch.split(".")))


def test_no_device_and_no_override_is_an_error() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("has a device")
    with pytest.raises(UnsupportedDevice, match="Set JITGEN_CUDA_ARCH"):
        target.detect_cuda()


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("JITGEN_MODE", "maybe", env.is_frozen),
        ("JITGEN_PROGRESS", "yes", env.progress),
        ("JITGEN_LOG", "loud", env.log_level),
        ("JITGEN_LINE_MAP", "2", env.line_map),
        ("JITGEN_CPU_ISA", "sse9", env.cpu_isa),
        ("JITGEN_CUDA_ARCH", "sm_90", env.cuda_arch),
        ("JITGEN_CACHE_DIR", "relative/path", env.cache_dir),
    ],
)
def test_bad_value_of_a_variable_is_an_error(name: str, value: str, read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(EnvError, match=f"{name}='{value}' is .*Use "):
        read()


def test_zero_turns_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JITGEN_PROGRESS", "JITGEN_LOG", "JITGEN_LINE_MAP"):
        monkeypatch.setenv(name, "0")
    assert (env.progress(), env.log_level(), env.line_map()) == ("off", "off", False)


def test_a_compiler_that_is_installed_meanwhile_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_path(monkeypatch, tmp_path / "bin")
    monkeypatch.delenv("JITGEN_CXX", raising=False)
    assert toolchain.find_cxx() is None
    with pytest.raises(ToolchainMissing, match="no C\\+\\+ compiler on PATH"):
        toolchain.require_cxx()
    program(tmp_path / "bin" / "g++", "echo 'g++ (Test) 12.2.0'")
    found = toolchain.require_cxx()  # of the same process, as a notebook's
    assert found.major == 12
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert toolchain.find_toolkit() is None
    toolkit(tmp_path / "cuda")
    assert toolchain.require_toolkit().version == "13.0.88"


@pytest.mark.parametrize("read", [env.cache_dir, env.prebuilt_dirs], ids=["JITGEN_CACHE_DIR", "JITGEN_PREBUILT"])
def test_an_unknown_home_directory_is_named(read, monkeypatch: pytest.MonkeyPatch, request) -> None:
    monkeypatch.setenv(request.node.callspec.id, "~nobody-of-that-name/kernels")
    with pytest.raises(EnvError, match=f"{request.node.callspec.id}=.~nobody.*begins with a home directory that is not known"):
        read()


def test_a_home_that_is_no_full_path_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JITGEN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "somewhere")  # a store there would depend on where the program is started
    assert env.cache_dir() is None


def test_facts_about_a_path_that_is_no_utf8_are_remembered(tmp_path: Path) -> None:
    place = os.fsdecode(os.fsencode(tmp_path) + b"/J\xfcrgen")  # as an old disk names it, in Latin-1
    os.mkdir(place)
    answers = ["that", "this"]
    assert [memo.remembered("what", Path(place), answers.pop) for _ in range(2)] == ["this", "this"]


def test_an_answer_that_is_no_utf8_is_asked_for_again(tmp_path: Path) -> None:
    answers = ["/J\udcfcrgen/cuda", "/J\udcfcrgen/cuda"]
    assert [memo.remembered("root", tmp_path, answers.pop) for _ in range(2)] == ["/J\udcfcrgen/cuda"] * 2 and not answers
