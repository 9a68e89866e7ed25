"""The command line as a shell sees it: help without torch, exit codes, one message per error."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from jitgen import __main__ as cli
from jitgen import __version__
from jitgen.errors import VariantError

WITHOUT_TORCH = """
import sys
from jitgen.__main__ import main
code = main(sys.argv[1:])
assert "torch" not in sys.modules, "torch was imported"
sys.exit(code)
"""


def run_without_torch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_terminal_without_a_character_shows_another(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(cli, "dispatch", lambda arguments: print("\u2713 right") or cli.OK)
    assert cli.main(["demo"]) == cli.OK
    assert stream.buffer.getvalue() == b"? right\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["cache", "ls"],
        ["cache", "gc", "--help"],
        *([name, "--help"] for name in cli.COMMANDS),
    ],
    ids=" ".join,
)
def test_command_answers_without_importing_torch(arguments):
    done = run_without_torch(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


def test_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "jitgen", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"jitgen {__version__}\n"


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shwo"], "'shwo' is not a command. Did you mean show?"),
        (["--verison"], "'--verison' is not an option. Commands: demo, show, doctor, prebuild, bundle, cache, bench."),
        (["show"], "TARGET is missing"),
        (["show", "causal"], "'causal' is not module:name or path.py:name"),
        (["show", "a:b", "--head-dim", "100"], "100 is not a multiple of 8 up to 512"),
        (["show", "a:b", "--arch", "sm90"], "'sm90' is not an architecture"),
        (["show", "a:b", "--q-len", "0"], "'0' is not a positive number"),
        (["show", "a:b", "--mask", "x.jpg"], "expected a name that ends in .png"),
        (["doctor", "--jsno"], "unrecognized arguments: --jsno"),
        (["cache"], "required: ACTION"),
        (["prebuild"], "required: MANIFEST"),
        (["prebuild", "m.toml"], "--out DIR is missing"),
        (["prebuild", "m.toml", "--out", "d", "--shard", "3/2"], "'3/2' is not I/N"),
        (["bundle", "pack", "d"], "required: -o/--out"),
        (["cache", "gc", "--older-than", "never"], "'never' is not a number of days"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_code_2_and_says_what_is_wrong(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_no_command_prints_the_help_and_is_wrong_usage(capsys):
    assert cli.main([]) == 2
    assert "usage: jitgen <command>" in capsys.readouterr().err


def test_error_of_jitgen_is_one_message_and_code_1(monkeypatch, capsys):
    def run(args):
        raise VariantError("window is -3, expected a positive number.")

    monkeypatch.setattr("jitgen.cli_doctor.run", run)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == "jitgen doctor: window is -3, expected a positive number.\n"


@pytest.mark.parametrize(
    "arguments", [["show", "x:y"], ["demo"], ["prebuild", "x.toml", "--out", "y"], ["bench", "cpu"]], ids=" ".join
)
def test_a_missing_torch_is_one_message(arguments):
    without = "import sys; sys.modules['torch'] = None; from jitgen.__main__ import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", without, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"jitgen {arguments[0]}: torch is not installed in this Python, {sys.executable}. " in done.stderr


def test_bug_is_not_hidden(monkeypatch):
    def run(args):
        raise ZeroDivisionError

    monkeypatch.setattr("jitgen.cli_doctor.run", run)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_interrupt_ends_quietly(monkeypatch, capsys):
    def run(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("jitgen.cli_doctor.run", run)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == ""


def test_closed_pipe_ends_quietly():
    command = f"{sys.executable} -m jitgen --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""


def test_a_full_disk_is_said_in_a_line():
    command = f"{sys.executable} -m jitgen --help > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, "jitgen: the output cannot be written: No space left on device.\n")


@pytest.mark.parametrize("stream", [1, 2])
def test_a_closed_stream_is_no_error(stream, private_store):
    command = f"{sys.executable} -m jitgen cache stats {stream}>&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_bench_is_given_its_arguments(monkeypatch):
    seen = []
    fake = type(sys)("jitgen.bench.cli")
    fake.main = lambda argv: seen.append(argv) or 3
    monkeypatch.setitem(sys.modules, "jitgen.bench.cli", fake)
    assert cli.main(["bench", "cpu", "--json"]) == 3
    assert seen == [["cpu", "--json"]]
