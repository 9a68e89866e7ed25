"""The command line: ``jitgen <command>`` or ``python -m jitgen <command>``.

A command is a module ``cli_<name>`` with ``add_arguments(parser)`` and ``run(args) -> exit code``, imported when it is
called for. Its help is printed without importing torch.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from jitgen import __version__
from jitgen.errors import JitgenError

OK, FAILED, USAGE = 0, 1, 2  # exit codes
NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # what a full disk says of a redirected output
INTERRUPTED = 130  # what a shell reports for Ctrl-C

NEEDED = ("torch", "jinja2", "filelock")  # dependencies, which a copied folder does not bring

COMMANDS = {
    "demo": "compile a variant, compare it with the oracle, show times and where the kernel is kept",
    "show": "what becomes of a variant: expressions, captures, tile classes, kernel, key, source",
    "doctor": "what works on this machine, and what to do about what does not",
    "prebuild": "compile what manifests ask for, without a GPU, into a directory to ship",
    "bundle": "pack, check and unpack such a directory as one file",
    "cache": "list, check, compare and remove compiled kernels",
    "bench": "measure this machine",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 it worked, 1 it failed, 2 it was called wrongly."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started us: what is opened next must not take its place
            setattr(sys, name, open(os.devnull, "w"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows another: no reason to fail
    try:
        code = dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of a pipe had enough
        give_up_output()
        return OK
    except OSError as error:
        if error.filename is not None or error.errno not in NOT_WRITTEN:
            raise
        give_up_output()
        print(f"jitgen: the output cannot be written: {error.strerror}.", file=sys.stderr)
        return FAILED


def give_up_output() -> None:
    """Write nothing more to standard output, at exit either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def dispatch(arguments: list[str]) -> int:
    """Answer what concerns no command, or run the command."""
    if not arguments:
        print(help_text(), file=sys.stderr)
        return USAGE
    command = arguments[0]
    if command in ("-h", "--help", "help"):
        print(help_text())
        return OK
    if command in ("-V", "--version"):
        print(f"jitgen {__version__}")
        return OK
    if importlib.util.find_spec("jitgen.cache") is None:
        try:
            import_module("jitgen").cache  # noqa: B018 - says what is wrong
        except ImportError as error:
            print(f"jitgen: {error}", file=sys.stderr)
            return FAILED
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"Did you mean {close[0]}?" if close else f"Commands: {', '.join(COMMANDS)}."
        kind = "an option" if command.startswith("-") else "a command"
        print(f"jitgen: {command!r} is not {kind}. {hint}", file=sys.stderr)
        return USAGE
    return run_command(command, arguments[1:])


def run_command(command: str, arguments: list[str]) -> int:
    """Run one command; errors of jitgen become one message on stderr."""
    try:
        if command == "bench":  # has a parser of its own
            from jitgen.bench.cli import main as bench

            return bench(arguments)
        module = import_module(f"jitgen.cli_{command}")
        parser = argparse.ArgumentParser(
            prog=f"jitgen {command}",
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(parser)
        return module.run(parser.parse_args(arguments))
    except SystemExit as stop:  # argparse has printed its message
        return stop.code if isinstance(stop.code, int) else FAILED
    except JitgenError as error:
        sys.stdout.flush()
        print(f"jitgen {command}: {error}", file=sys.stderr)
        return FAILED
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        what = f"{error.name} is not installed in this Python, {sys.executable}"
        print(f"jitgen {command}: {what}. Install it; 'jitgen doctor' says what else is missing.", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def help_text() -> str:
    """The overview of all commands."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: jitgen <command> [options]",
            "",
            "Attention variants written in Python, compiled just in time into kernels.",
            "",
            "commands:",
            *lines,
            "",
            "options:",
            f"  {'--version':<{width + 3}}print the version",
            f"  {'-h, --help':<{width + 3}}this text; 'jitgen <command> --help' for a command's own",
            "",
            "Environment variables, such as JITGEN_CACHE_DIR, are listed in the README.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
