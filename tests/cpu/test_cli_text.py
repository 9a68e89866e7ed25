"""What the command line prints: colours only where they show, numbers as a human reads them, nothing broken apart."""

from __future__ import annotations

import sys
import threading
from contextlib import ExitStack

import pytest

from jitgen import cli_text, progress
from jitgen.target import CPU_LEVELS


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (39_400, "39 kB"),
        (999_400, "999 kB"),
        (999_600, "1.0 MB"),
        (2.5e6, "2.5 MB"),
        (7e12, "7000 GB"),
    ],
)
def test_size_is_read_by_a_human(size, text):
    assert cli_text.size_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.2e-6, "3.2 us"), (4e-5, "40 us"), (0.0042, "4.2 ms"), (0.5, "500 ms"), (1.84, "1.8 s"), (90, "90 s"),
     (600, "10 min"), (36_000, "10 h"), (864_000, "10 days")],
)  # fmt: skip
def test_duration_is_read_by_a_human(seconds, text):
    assert cli_text.duration_text(seconds) == text


@pytest.mark.parametrize(("isa", "shown"), [("amx", "amx"), ("avx512", "avx512"), ("avx2", "avx2")])
def test_instruction_sets_are_shown_by_the_level_that_they_make(isa, shown):
    assert cli_text.short_arch("+".join(("x86_64", *CPU_LEVELS[isa]))) == f"x86_64 {shown}"
    assert cli_text.short_arch("9.0a") == "9.0a"


def test_age_of_what_a_wrong_clock_built():
    assert cli_text.age_text(0.5) == "500 ms"
    assert cli_text.age_text(-1e8) == "in the future"


def test_no_colour_where_output_is_not_a_terminal(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert cli_text.paint("kernel", "bold") == "kernel"


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_colour_where_the_user_wants_none(variable, value, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert cli_text.paint("kernel", "bold") == "\x1b[1mkernel\x1b[0m"
    monkeypatch.setenv(variable, value)
    assert cli_text.paint("kernel", "bold") == "kernel"


def test_long_path_is_never_broken():
    path = "/a/very-long/path-with-hyphens/" + 20 * "directory-"
    assert path in cli_text.wrapped(f"the kernel is in {path} now", 40)


def test_table_aligns_columns_and_sends_numbers_right():
    lines = cli_text.table([("name", "size"), ("a", "5 B"), ("longer", "100 B")], right=(1,))
    assert lines == ["name     size", "a         5 B", "longer  100 B"]


def test_wrapped_field_continues_below_its_text():
    lines = cli_text.field("flags", "word " * 60, name_width=10).split("\n")
    assert lines[0].startswith("  flags     word")
    assert all(line.startswith(" " * 12 + "word") for line in lines[1:])


def test_progress_line_fits_the_terminal_so_that_it_can_be_erased(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SHOW_AFTER", 0.0)
    monkeypatch.setenv("JITGEN_PROGRESS", "on")
    monkeypatch.setenv("COLUMNS", "40")
    drawn = threading.Event()
    write = sys.stderr.write
    monkeypatch.setattr(sys.stderr, "write", lambda text: (write(text), drawn.set()))
    with progress.progress_line("compiling " + "x" * 200):
        assert drawn.wait(10)
    lines = capsys.readouterr().err.replace("\x1b[2K", "").split("\r")
    assert any(line.startswith("jitgen: compiling x") for line in lines)
    assert all(len(line) < 40 for line in lines)


def test_of_lines_shown_at_the_same_time_one_is_drawn(monkeypatch):
    monkeypatch.setattr(progress, "SHOW_AFTER", 0.0)
    monkeypatch.setattr(progress, "REDRAW_EVERY", 0.01)
    monkeypatch.setenv("JITGEN_PROGRESS", "on")
    seen = {"first": 0, "second": 0}
    changed = threading.Condition()

    def write(text):
        with changed:
            for name in seen:
                seen[name] += name in text
            changed.notify()

    def until(happened):
        with changed:
            assert changed.wait_for(happened, 10)

    monkeypatch.setattr(sys.stderr, "write", write)
    with ExitStack() as second:
        with progress.progress_line("compiling the first"):
            until(lambda: seen["first"] > 0)
            second.enter_context(progress.progress_line("compiling the second"))
            before = seen["first"]
            until(lambda: seen["first"] > before + 5)
            assert seen["second"] == 0
        until(lambda: seen["second"] > 0)
