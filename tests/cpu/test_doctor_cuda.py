"""jitgen doctor about CUDA: what is a problem with a GPU is a note without one, and every problem has its remedy."""

from __future__ import annotations

import pytest

from jitgen import doctor_cuda, toolchain
from jitgen.doctor import ERROR, MISSING, NOTE, OK, Finding
from jitgen.doctor_cuda import Gpu

pytestmark = pytest.mark.usefixtures("private_store")
H100 = Gpu("NVIDIA H100 80GB HBM3", "580.65.06", (9, 0))
T4 = Gpu("Tesla T4", "580.65.06", (7, 5))


def by_name(findings) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@pytest.fixture
def gpu(monkeypatch):
    """A machine with an H100 and its driver, whatever this one is."""
    monkeypatch.setattr(doctor_cuda, "find_gpus", lambda: [H100])
    monkeypatch.setattr(doctor_cuda, "driver_version", lambda: (13, 0))


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(doctor_cuda, "find_gpus", list)
    monkeypatch.setattr(doctor_cuda, "driver_version", lambda: None)


@pytest.fixture
def no_toolkit(monkeypatch):
    monkeypatch.setattr(toolchain, "_toolkit_and_lacks", lambda: (None, ("/opt/cuda has no bin/nvcc",)))
    for name in ("JITGEN_NVCC", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def two_listed(monkeypatch, tmp_path):
    """nvidia-smi lists two GPUs."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 580.65.06, 9.0'\necho 'Tesla T4, 580.65.06, 7.5'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def test_gpus_are_read_from_nvidia_smi_where_torch_sees_none(two_listed, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor_cuda.find_gpus() == [H100, T4]


def test_gpus_have_the_numbers_that_torch_gives_them(two_listed, monkeypatch):
    torch = pytest.importorskip("torch")
    seen = [("Tesla T4", (7, 5)), ("NVIDIA H100 80GB HBM3", (9, 0))]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(seen))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: seen[i][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: seen[i][1])
    assert doctor_cuda.find_gpus() == [T4, H100]


def test_hidden_gpus_are_named_as_the_cause(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert "CUDA_VISIBLE_DEVICES is '7'" in doctor_cuda.check_torch_build(needed=True).remedy


def test_message_of_nvidia_smi_is_no_gpu():
    text = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver, make sure it is running."
    assert doctor_cuda.parse_gpus(text) == []


@pytest.mark.parametrize(
    ("capability", "status", "text"),
    [((9, 0), OK, "sm90"), ((10, 0), OK, "sm80"), ((8, 9), OK, "sm80"), ((7, 5), ERROR, "8.0")],
)
def test_gpu_is_judged_by_its_capability(capability, status, text):
    found = doctor_cuda.check_gpu(0, Gpu("a GPU", "580", capability))
    assert found.status == status and text in found.text


def test_nothing_of_cuda_is_no_problem_without_a_gpu(no_gpu, no_toolkit):
    findings = list(doctor_cuda.check_cuda())
    assert {f.name for f in findings} == {"driver", "torch", "toolkit"}
    assert not any(f.is_bad for f in findings)


def test_missing_toolkit_is_a_problem_with_a_gpu(gpu, no_toolkit):
    found = by_name(doctor_cuda.check_cuda())["toolkit"]
    assert found.status == MISSING and "/opt/cuda has no bin/nvcc" in found.text and "jitgen[nvcc]" in found.remedy


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("JITGEN_NVCC", "/nonexistent/nvcc", "JITGEN_NVCC=/nonexistent/nvcc is not a program"),
        ("CUDA_HOME", "/nonexistent", "/nonexistent has no bin/nvcc"),
    ],
)
def test_toolkit_that_was_named_and_is_absent_is_an_error(variable, value, text, monkeypatch):
    for name in ("JITGEN_NVCC", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    found = doctor_cuda.check_toolkit(needed=False)
    assert found.status == ERROR and text in found.text and variable in found.remedy


@pytest.mark.parametrize(
    ("toolkit", "driver", "num_findings"),
    [
        ("13.0.88", (13, 0), 0),
        ("13.1.2", (13, 0), 0),
        ("12.9.1", (13, 0), 0),
        ("13.0.8", (12, 4), 1),
        ("13.0", None, 0),
    ],
)
def test_toolkit_newer_than_the_driver_is_an_error(toolkit, driver, num_findings):
    found = list(doctor_cuda.check_versions(toolkit, driver))
    assert len(found) == num_findings and all(f.status == ERROR and "Update the driver" in f.remedy for f in found)


def test_torch_without_cuda_is_a_problem_with_a_gpu(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor_cuda.check_torch_build(needed=True).status == MISSING
    assert doctor_cuda.check_torch_build(needed=False).status == NOTE


def test_torch_that_finds_no_gpu_is_an_error_where_there_is_one(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor_cuda.check_torch_build(needed=True).status == ERROR


def test_driver_without_its_library_is_an_error_with_a_gpu():
    found = doctor_cuda.check_driver([H100], None)
    assert found.status == ERROR and "--gpus all" in found.remedy


@pytest.mark.parametrize(
    ("gpus", "arch"),
    [([], "8.0"), ([H100], "9.0"), ([Gpu("Tesla T4", "580", (7, 5)), Gpu("A10", "580", (8, 6))], "8.6")],
)
def test_proof_is_compiled_for_the_gpu_that_is_there(gpus, arch, monkeypatch):
    monkeypatch.delenv("JITGEN_CUDA_ARCH", raising=False)
    assert doctor_cuda.probe_arch(gpus) == arch


@pytest.mark.skipif(toolchain.find_toolkit() is None or toolchain.find_cxx() is None, reason="no CUDA toolkit here")
def test_proof_compiles_without_a_gpu(no_gpu, monkeypatch):
    monkeypatch.setattr(doctor_cuda, "check_torch_build", lambda needed: Finding("", "torch", NOTE, "built without CUDA"))
    found = by_name(doctor_cuda.check_cuda())["compiling"]
    assert found.status == OK and "nothing here to run it on" in found.text
