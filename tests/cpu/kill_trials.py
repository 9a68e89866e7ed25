"""Kill a process at a random moment while it builds and publishes, again and again: python kill_trials.py 1000.

After each trial every entry in the store must be whole, and the kernel that was interrupted must be had at once.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

from fake_builder import FakeBuilder, FakeSource, request

from jitgen import cache
from jitgen.cache import admin, lookup


def source_of(number: int) -> FakeSource:
    return FakeSource(f"int kernel_{number};\n", includes={"a.h": "x" * 2000})


def build_forever(first: int) -> None:
    """What the victim does: kernels that nobody has built, one after the other."""
    for number in range(first, first + 1000):
        cache.get_module(request(source_of(number), spec=f"spec {number}"), FakeBuilder())


def start_victim(first: int) -> int:
    """Process number of a victim."""
    victim = os.fork()
    if victim == 0:
        try:
            build_forever(first)
        finally:
            os._exit(0)
    return victim


def stop(victim: int) -> None:
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)


def time_to_publish(store: Path) -> float:
    """Seconds from a victim's start to its first entry, on this machine and under its load."""
    begun, victim = time.monotonic(), start_victim(10**9)
    while not cache.Store(store).names() and time.monotonic() < begun + 60:
        time.sleep(0.001)
    stop(victim)
    admin.clear(store)
    return time.monotonic() - begun


def run(count: int, store: Path, seed: int) -> dict[str, int]:
    """Trials, and what they came upon: lost or wrong entries, and how many were published or left in the middle."""
    rng = random.Random(seed)
    longest = max(0.02, 2 * time_to_publish(store))
    found = {"trials": count, "published": 0, "interrupted": 0, "wrong": 0, "lost": 0}
    for trial in range(count):
        first = trial * 1000
        before = set(cache.Store(store).names())
        victim = start_victim(first)
        time.sleep(rng.uniform(0, longest))
        stop(victim)
        lookup.forget()
        names = cache.Store(store).names()
        found["lost"] += len(before - set(names))
        found["published"] += len(set(names) - before)
        found["wrong"] += sum(bool(problem) for _, problem in admin.verify_entries(store))
        found["interrupted"] += len(list((store / "tmp").iterdir())) if (store / "tmp").is_dir() else 0
        for number in range(first, first + 2 + len(set(names) - before)):
            module = cache.get_module(request(source_of(number), spec=f"spec {number}"), FakeBuilder())
            found["wrong"] += module.read_bytes() != b"\x7fELF" + source_of(number).text.encode() * 100
        admin.collect_garbage(store)
        if len(names) > 300:  # so that looking at all of them stays quick
            admin.clear(store)
    return found


def main() -> int:
    store = Path(tempfile.mkdtemp(prefix="kill-trials-")) / "store"
    os.environ["JITGEN_CACHE_DIR"] = str(store)
    warnings.simplefilter("error")
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    found = run(int(sys.argv[1]), store, seed)
    print(found)
    shutil.rmtree(store.parent)
    return 1 if found["wrong"] or found["lost"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
