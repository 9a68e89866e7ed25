"""jitgen doctor: what works on this machine, and what to do about what does not."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from jitgen import __version__, env
from jitgen.cli_text import paint, terminal_width, wrapped
from jitgen.errors import JitgenError

OK, NOTE, MISSING, ERROR = "OK", "note", "missing", "error"
STYLES = {OK: "green", NOTE: "yellow", MISSING: "red", ERROR: "red"}
MACHINE, CPU, CUDA, STORE, ENVIRONMENT = "Machine", "CPU kernels", "CUDA kernels", "Store", "Environment"
SECTIONS = (MACHINE, ENVIRONMENT, STORE, CPU, CUDA)
STOPPED = "stopped"  # the name of the finding that a check could not go on
CUDA_VARIABLES = ("JITGEN_NVCC", "CUDA_HOME", "JITGEN_CUDA_ARCH")
NAME_WIDTH = 14
TEXT_COLUMN = 2 + len(MISSING) + 2 + NAME_WIDTH


@dataclass(frozen=True)
class Finding:
    """One line of the report; the remedy is empty where there is nothing to do."""

    section: str
    name: str
    status: str  # OK, note, missing or error
    text: str
    remedy: str = ""

    @property
    def is_bad(self) -> bool:
        return self.status in (MISSING, ERROR)

    @property
    def stops_cpu(self) -> bool:
        """Whether no CPU kernel can be compiled because of this."""
        return self.is_bad and self.section != CUDA and self.name not in CUDA_VARIABLES

    @property
    def stops_cuda(self) -> bool:
        """Whether this, beyond what CPU kernels need, stops CUDA kernels."""
        return self.is_bad and (self.section == CUDA or self.name in CUDA_VARIABLES)


def run(as_json: bool = False) -> int:
    """Print the report and return the exit code: 0 when CPU kernels work.

    Cost:    seconds: it imports torch, and compiles and runs a small library for each kind of target.
    """
    findings = []
    for finding in examine():
        if not as_json:
            if not findings or findings[-1].section != finding.section:
                print("\n" * bool(findings) + paint(finding.section, "bold"))
            print(as_text(finding), flush=True)
        findings.append(finding)
    if as_json:
        report = {"version": __version__, **verdict(findings), "findings": [asdict(f) for f in findings]}
        print(json.dumps(report, indent=1))
    else:
        print("\n" + closing_line(findings))
    return 0 if verdict(findings)["cpu"] else 1


def verdict(findings: list[Finding]) -> dict[str, bool]:
    """Whether kernels of each kind can be compiled and run here."""
    cuda_runs = any(f.section == CUDA and f.name == "first kernel" and f.status == OK for f in findings)
    return {"cpu": not any(f.stops_cpu for f in findings), "cuda": cuda_runs}


def closing_line(findings: list[Finding]) -> str:
    """One sentence for each kind of target."""
    ready = verdict(findings)
    cpu = "CPU kernels work." if ready["cpu"] else f"CPU kernels do not work: see {named(findings, is_cpu=True)}."
    if ready["cuda"]:
        return f"{cpu} CUDA kernels work."
    troubles = named(findings, is_cpu=False)
    return f"{cpu} CUDA kernels do not run here{': see ' + troubles if troubles else ''}."


def named(findings: list[Finding], *, is_cpu: bool) -> str:
    """What stands in the way; that a check stopped is mentioned only where nothing says why."""
    bad = [f for f in findings if (f.stops_cpu if is_cpu else f.stops_cuda)]
    causes = [f.name for f in bad if f.name != STOPPED] or [f"{STOPPED} in {f.section}" for f in bad]
    return ", ".join(dict.fromkeys(causes))


# ---- printing -------------------------------------------------------------------------------------------------------


def as_text(finding: Finding) -> str:
    """The finding as aligned lines, its remedy below it."""
    columns = terminal_width()
    status = paint(f"{finding.status:<{len(MISSING)}}", STYLES[finding.status])
    indent = " " * TEXT_COLUMN
    lines = wrapped(finding.text, columns - TEXT_COLUMN)
    name = f"{finding.name:<{NAME_WIDTH}}"
    if len(finding.name) >= NAME_WIDTH:  # an environment variable: its text goes below
        name, lines = finding.name, ["", *lines]
    remedy = wrapped(finding.remedy, columns - TEXT_COLUMN - 3) if finding.remedy else []
    below = [*lines[1:], *(("-> " if i == 0 else "   ") + line for i, line in enumerate(remedy))]
    return "\n".join([f"  {status}  {name}{lines[0]}".rstrip(), *(indent + line for line in below)])


# ---- the examination ------------------------------------------------------------------------------------------------


def examine() -> Iterator[Finding]:
    """All findings, cheap ones first."""
    from jitgen import doctor_cuda, doctor_store

    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        MACHINE: check_machine,
        ENVIRONMENT: check_environment,
        STORE: doctor_store.check_store,
        CPU: check_cpu,
        CUDA: doctor_cuda.check_cuda,
    }
    for section in SECTIONS:
        yield from guarded(section, checks[section])


def guarded(section: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Findings of a check; an error of jitgen that it runs into is a finding too."""
    try:
        yield from check()
    except JitgenError as error:
        yield Finding(section, STOPPED, ERROR, str(error))


def check_machine() -> Iterator[Finding]:
    """Versions, and whether this is an operating system that jitgen knows."""
    yield Finding(MACHINE, "jitgen", OK, f"{__version__} ({Path(__file__).resolve().parent})")
    yield Finding(MACHINE, "python", OK, f"{platform.python_version()} ({sys.executable})")
    system = f"{release().get('PRETTY_NAME', platform.system())}, {platform.machine()}"
    if sys.platform == "linux":
        yield Finding(MACHINE, "system", OK, system)
    else:
        yield Finding(MACHINE, "system", ERROR, f"{system}: jitgen runs on Linux only", "Use a container with Linux.")


def check_environment() -> Iterator[Finding]:
    """Every variable that is set: whether its value is allowed, and whether jitgen reads it at all."""
    readers = variable_readers()
    found = [name for name in sorted(os.environ) if name in readers or name.startswith("JITGEN_")]
    for name in found:
        value = os.environ[name]
        if name not in readers:
            yield Finding(ENVIRONMENT, name, NOTE, f"{value!r}: jitgen reads no such variable", similar(name, readers))
            continue
        try:
            readers[name]()
        except JitgenError as error:
            yield Finding(ENVIRONMENT, name, ERROR, str(error), f"Correct it, or: unset {name}")
        else:
            yield Finding(ENVIRONMENT, name, OK, value or "(empty: as if unset)")
    if not found:
        yield Finding(ENVIRONMENT, "variables", OK, "none set, all at their defaults")


def variable_readers() -> dict[str, Callable[[], object]]:
    """The function that parses each variable."""
    return {
        "JITGEN_CACHE_DIR": env.cache_dir,
        "JITGEN_MODE": env.is_frozen,
        "JITGEN_PREBUILT": env.prebuilt_dirs,
        "JITGEN_RECORD": env.record,
        "JITGEN_REMOTE": env.remote,
        "JITGEN_REMOTE_UPLOAD": env.remote_upload,
        "JITGEN_REMOTE_TIMEOUT": env.remote_timeout,
        "JITGEN_PROGRESS": env.progress,
        "JITGEN_LOG": env.log_level,
        "JITGEN_LINE_MAP": env.line_map,
        "JITGEN_CXX": env.cxx,
        "JITGEN_NVCC": env.nvcc,
        "CUDA_HOME": env.cuda_home,
        "JITGEN_CUDA_ARCH": env.cuda_arch,
        "JITGEN_CPU_ISA": env.cpu_isa,
    }


def similar(name: str, known: object) -> str:
    """What a misspelt variable was probably meant to be."""
    import difflib

    close = difflib.get_close_matches(name, list(known), 1)  # type: ignore[call-overload]
    return f"Did you mean {close[0]}?" if close else ""


# ---- CPU ------------------------------------------------------------------------------------------------------------

PROBE = """
#include <omp.h>
extern "C" int jitgen_probe() {
  int sum = 0;
#pragma omp parallel for reduction(+ : sum) num_threads(2)
  for (int i = 0; i < 1000; ++i) sum += i;
  return sum == 499500 && omp_get_max_threads() > 0 ? 42 : 0;
}
"""


def check_cpu() -> Iterator[Finding]:
    """All that compiling a CPU kernel needs, then the proof."""
    from jitgen import doctor_probe as probe

    needed = [probe.check_torch(), probe.check_setuptools(), probe.check_ninja(), probe.check_cxx(), probe.check_isa()]
    yield from needed
    if any(f.is_bad for f in needed):
        return
    if env.is_frozen():
        yield Finding(CPU, "first kernel", NOTE, "not tried: JITGEN_MODE=frozen, nothing is compiled")
        return
    yield probe.check_probe(CPU, PROBE)


def has_package(name: str) -> bool:
    """Whether a Python package can be imported, without importing it."""
    return importlib.util.find_spec(name) is not None


def release() -> dict[str, str]:
    """Fields of /etc/os-release; empty where there is none."""
    try:
        return platform.freedesktop_os_release()
    except OSError:
        return {}
