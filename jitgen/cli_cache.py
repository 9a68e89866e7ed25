"""Look after compiled kernels.

  ls               what the user store holds, newest first
  info [ENTRY]     where the stores are and how large; or all about one kernel
  explain A B      why two kernels are two: what differs in their keys and sources
  verify           compare every file with its manifest
  gc               remove what crashes, failures and damage left, and with --older-than old kernels
  clear            remove every kernel
  stats            how often kernels were built and loaded, and the compile time that this saved

A kernel is given by its name, the beginning of its name or digest, or its path. Removing one costs compiling it again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from jitgen import env, paths
from jitgen.cache import admin
from jitgen.cli_text import age_text, counted, duration_text, field, paint, short_arch, size_text, table
from jitgen.errors import CacheError

DAY = 24 * 3600  # seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--dir", metavar="DIR", type=Path, help="another store; default: the user store")
    shared.add_argument("--json", action="store_true", help="print JSON")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    adders = {name: actions.add_parser(name, parents=[shared], help=help) for name, (help, _) in ACTIONS.items()}
    adders["info"].add_argument("entry", metavar="ENTRY", nargs="?", help="a kernel")
    adders["explain"].add_argument("first", metavar="A", help="a kernel")
    adders["explain"].add_argument("second", metavar="B", help="another")
    adders["gc"].add_argument("--older-than", metavar="DAYS", type=days, help="also kernels built longer ago than that")
    adders["clear"].add_argument("--yes", action="store_true", help="do not ask")


def run(args: argparse.Namespace) -> int:
    root = args.dir or paths.cache_dir()
    if root is None:
        raise CacheError("there is no home directory, so no user store. Set JITGEN_CACHE_DIR, or give --dir.")
    return ACTIONS[args.action][1](root, args)


def days(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of days")
    return number


def print_json(value: object) -> None:
    print(json.dumps(value, indent=1))


def run_ls(root: Path, args: argparse.Namespace) -> int:
    """All kernels of a store."""
    entries = admin.list_entries(root)
    if args.json:
        print_json([info._asdict() for info in entries])
        return 0
    if not entries:
        print(f"{root} holds no kernels")
        return 0
    rows = [("kernel", "what", "for", "size", "age")]
    rows += [(e.name, e.label, short_arch(e.arch), size_text(e.size), age_text(e.age)) for e in entries]
    print("\n".join(table(rows, right=(3, 4))))
    print(f"\n{counted(len(entries), 'kernel')}, {size_text(sum(e.size for e in entries))} in {root}")
    return 0


def run_info(root: Path, args: argparse.Namespace) -> int:
    if args.entry is not None:
        return info_of_entry(root, args)
    places = [("user store" if args.dir is None else "store", root)]
    if args.dir is None:
        from jitgen.cache.installed import installed_layers

        installed = [("installed layer", layer) for layer in installed_layers()]
        places = [*(("prebuilt layer", layer) for layer in env.prebuilt_dirs()), *installed, *places]
    found = [{"kind": kind, **admin.summary(place)} for kind, place in places]
    mode = "frozen" if env.is_frozen() else "auto"
    if args.json:
        print_json({"mode": mode, "stores": found})
        return 0
    for number, store in enumerate(found, start=1):
        order = f"{number}. " if len(found) > 1 else ""
        print(paint(f"{order}{store['kind']}", "bold") + f"  {store['root']}")
        kernels = f"{counted(store['kernels'], 'kernel')}, {size_text(store['bytes'])}"
        print(field("holds", kernels if store["exists"] else "nothing: it does not exist yet", name_width=12))
        leftovers = [f"{n} {name}" for name, n in store["leftovers"].items() if n]
        if leftovers:
            print(field("left over", ", ".join(leftovers) + "; 'jitgen cache gc' removes them", name_width=12))
    print(f"\nmode {mode}: a kernel that no store holds is {'an error' if mode == 'frozen' else 'compiled'}")
    return 0


def info_of_entry(root: Path, args: argparse.Namespace) -> int:
    """All about one kernel."""
    facts = admin.describe(root, args.entry)
    if args.json:
        print_json(facts)
        return 0
    print(paint(facts["name"], "bold"))
    target = facts["target"]
    for name in ("label", "path"):
        print(field(name, str(facts[name]), name_width=12))
    print(field("age", age_text(facts["age"]), name_width=12))
    for name in ("arch", "compiler", "flags", "link_flags"):
        value = target.get(name) or "none"
        print(field(name.replace("_", " "), " ".join(value) if isinstance(value, list) else str(value), name_width=12))
    rows = [("file", "size"), *((file, size_text(size)) for file, size in facts["files"].items())]
    print("\n" + "\n".join(table(rows, right=(1,))))
    return 0


def run_explain(root: Path, args: argparse.Namespace) -> int:
    lines = admin.compare(root, args.first, args.second)
    if args.json:
        print_json(lines)
        return 0
    styles = {"+": "green", "-": "red", "@": "cyan"}
    for line in lines or ["the keys and sources are equal: one kernel"]:
        print(paint(line, styles[line[0]]) if line[:1] in styles else line)
    return 0


def run_verify(root: Path, args: argparse.Namespace) -> int:
    """Exit code 1 when a kernel is damaged."""
    problems = {name: problem for name, problem in admin.verify_entries(root) if problem or args.json}
    damaged = {name: problem for name, problem in problems.items() if problem}
    if args.json:
        print_json(problems)
        return 1 if damaged else 0
    for name, problem in damaged.items():
        print(f"{paint('damaged', 'red')}  {name}: {problem}")
    total = len(admin.list_entries(root))
    if damaged:
        print(f"\n{len(damaged)} of {counted(total, 'kernel')} damaged: they are built again when they are needed")
        return 1
    print(f"{counted(total, 'kernel')} in {root}, all as they were built")
    return 0


def run_gc(root: Path, args: argparse.Namespace) -> int:
    older_than = None if args.older_than is None else args.older_than * DAY
    before = admin.tree_size(root)
    removed = admin.collect_garbage(root, older_than=older_than)
    freed = before - admin.tree_size(root)
    if args.json:
        print_json({"removed": [str(path) for path in removed], "bytes": freed})
        return 0
    for path in removed:
        print(f"removed {path.relative_to(root)}")
    print(f"{counted(len(removed), 'item')} removed, {size_text(freed)} freed" if removed else "nothing to remove")
    return 0


def run_clear(root: Path, args: argparse.Namespace) -> int:
    """Exit code 2 when it may not remove: nobody was there to say yes."""
    held = len(admin.list_entries(root))
    if not args.yes and held:
        question = f"Remove {counted(held, 'kernel')} from {root}?"
        if not sys.stdin.isatty():
            print(f"jitgen cache clear: {question} Say so with --yes.", file=sys.stderr)
            return 2
        if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
            return 1
    removed = admin.clear(root)
    print_json({"removed": removed}) if args.json else print(f"removed {counted(removed, 'kernel')} from {root}")
    return 0


def run_stats(root: Path, args: argparse.Namespace) -> int:
    """Counts by kernel, and their sums."""
    from jitgen.cache.installed import installed_layers

    kernels = admin.stats(root, () if args.dir else (*env.prebuilt_dirs(), *installed_layers()))
    total = {
        "kernels": len(kernels),
        "bytes": sum(kernel.size for kernel in kernels),
        "hits": sum(kernel.loads for kernel in kernels),
        "misses": sum(kernel.builds for kernel in kernels),
        "build_seconds": round(sum(kernel.build_seconds for kernel in kernels), 2),
        "saved_seconds": round(sum(kernel.saved_seconds for kernel in kernels), 2),
    }
    if args.json:
        print_json({**total, "by_kernel": [kernel._asdict() for kernel in kernels]})
        return 0
    if kernels:
        rows = [("kernel", "what", "size", "loads", "saved", "builds", "cost")]
        for k in kernels:
            numbers = (str(k.loads), duration_text(k.saved_seconds), str(k.builds), duration_text(k.build_seconds))
            rows.append((k.name, k.label, size_text(k.size), *numbers))
        print("\n".join(table(rows, right=(2, 3, 4, 5, 6))) + "\n")
    print(f"{counted(total['kernels'], 'kernel')}, {size_text(total['bytes'])} in {root}")
    print(f"{counted(total['misses'], 'build')} took {duration_text(total['build_seconds'])}; "
          f"{counted(total['hits'], 'load')} by processes saved {duration_text(total['saved_seconds'])}")  # fmt: skip
    return 0


ACTIONS: dict[str, tuple[str, Callable[[Path, argparse.Namespace], int]]] = {
    "ls": ("list kernels", run_ls),
    "info": ("stores, or one kernel", run_info),
    "explain": ("how two kernels differ", run_explain),
    "verify": ("check all files", run_verify),
    "gc": ("remove leftovers", run_gc),
    "clear": ("remove all kernels", run_clear),
    "stats": ("what kernels cost and saved", run_stats),
}
