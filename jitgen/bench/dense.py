"""Suite dense: plain attention, causal and full, in the shapes of the published charts."""

from __future__ import annotations

from jitgen.bench.config import BenchConfig
from jitgen.bench.contest import Contest
from jitgen.bench.peers import contenders
from jitgen.bench.report import SuiteReport
from jitgen.bench.tables import make_report, throughput_tables
from jitgen.bench.workloads import Cell

# (head_dim, query heads, key heads). On the GPU the hidden size is 2048, but for the last; on the CPU it is 512.
CUDA_HEADS = ((64, 32, 32), (128, 16, 16), (256, 8, 8), (128, 32, 8))
CPU_HEADS = ((64, 8, 8), (128, 4, 4), (256, 2, 2), (128, 8, 2))
CUDA_TOKENS, CUDA_LENGTHS = 16384, (1024, 4096, 16384)
CPU_TOKENS, CPU_LENGTHS = 2048, (512, 2048)


def cells(config: BenchConfig) -> list[Cell]:
    """All cells; --quick keeps one length."""
    on_cuda = config.device == "cuda"
    tokens, lengths = (CUDA_TOKENS, CUDA_LENGTHS) if on_cuda else (CPU_TOKENS, CPU_LENGTHS)
    if config.quick:
        lengths = (4096,) if on_cuda else (512,)
    return [
        Cell(tokens // length, num_q_heads, num_kv_heads, length, head_dim, "bfloat16", variant)
        for head_dim, num_q_heads, num_kv_heads in (CUDA_HEADS if on_cuda else CPU_HEADS)
        for length in lengths
        for variant in ("full", "causal")
    ]


def labels(config: BenchConfig) -> list[str]:
    """What --filter is compared with."""
    return [cell.label for cell in cells(config)]


def run(config: BenchConfig) -> list[SuiteReport]:
    """Time the cells that the filters keep."""
    peers, notes = contenders(config)
    contest = Contest(config, peers)
    results = contest.run([cell for cell in cells(config) if config.keeps(cell.label)])
    notes += [f"{name}: not installed ({why})" for name, why in contest.absent.items()]
    tables = throughput_tables("dense", results, config.device)
    return [make_report("dense", config.device, tables, results, notes)]
