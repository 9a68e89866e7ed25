"""What suite deploy measures inside a fresh process: ``python -m jitgen.bench.deploy_probe TASK JSON`` prints JSON."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import sys
import time
from typing import Any

import torch

from jitgen.bench.method import synchronize


def frozen_start(device: str, head_dims: list[int], dtypes: list[str]) -> dict[str, Any]:
    """Milliseconds from importing jitgen to the finished outputs of all kernels, torch and the tensors being there."""
    from jitgen.bench import deploy_variants

    deploy_variants.slopes = deploy_variants.slopes.to(device)
    inputs = {
        (dtype, dim): [torch.randn(1, 2, 64, dim, device=device, dtype=getattr(torch, dtype)) for _ in range(3)]
        for dtype in dtypes
        for dim in head_dims
    }
    synchronize(device)
    begun = time.perf_counter()
    import jitgen

    marks = [time.perf_counter()]
    for hooks in deploy_variants.CALLS.values():
        for tensors in inputs.values():
            jitgen.attention(*tensors, **hooks)
            marks.append(time.perf_counter())
    synchronize(device)
    total = time.perf_counter() - begun
    from jitgen.runtime import loaded_kernels

    each = sorted(after - before for before, after in itertools.pairwise(marks[1:]))
    return {"kernels": len(loaded_kernels()), "ms": 1e3 * total, "later_ms": 1e3 * each[len(each) // 2]}


def race(arch: str, num_processes: int, head_dim: int) -> dict[str, Any]:
    """Processes that ask for one kernel at the same moment: seconds of the build, and until the last has its module.

    They are forked from this one, which has imported torch and the builder but started no thread.
    """
    for module in ("torch.utils.cpp_extension", "jitgen.cache.publish", "jitgen.render", "jitgen.loader", "filelock"):
        importlib.import_module(module)
    from jitgen import runtime
    from jitgen.bench.deploy_variants import causal
    from jitgen.events import Event, on_event
    from jitgen.prebuild_units import spec_of
    from jitgen.variant import Variant

    spec = spec_of(Variant(mask_mod=causal).trace().program, "bfloat16", (head_dim, head_dim), arch)
    start, results = os.pipe(), os.pipe()
    children = []
    for _ in range(num_processes):
        child = os.fork()
        if child == 0:
            events: list[Event] = []
            on_event(events.append)
            os.close(start[1])
            os.read(start[0], 1)  # until the parent closes its end
            begun = time.perf_counter()
            runtime.module_path(spec)
            built = [event.seconds for event in events if event.kind == "build"]
            answer = {"seconds": time.perf_counter() - begun, "built": built}
            os.write(results[1], (json.dumps(answer) + "\n").encode())
            os._exit(0)
        children.append(child)
    time.sleep(0.5)
    os.close(start[1])
    for child in children:
        os.waitpid(child, 0)
    os.close(results[1])
    with os.fdopen(results[0]) as stream:
        answers = [json.loads(line) for line in stream]
    builds = [seconds for answer in answers for seconds in answer["built"]]
    last = max(answer["seconds"] for answer in answers)
    return {"processes": len(answers), "builds": len(builds), "last_s": last}


TASKS = {"frozen_start": frozen_start, "race": race}


def main(argv: list[str]) -> int:
    """Run one task with the arguments given as JSON."""
    task, arguments = argv
    print(json.dumps(TASKS[task](**json.loads(arguments))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
