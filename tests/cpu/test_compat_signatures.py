"""The shim takes what FlashInfer 0.7.2 takes: every parameter by its name, positional ones in their order.

tests/flashinfer_signatures.txt holds the names, one callable a line; what follows a * is taken by keyword only.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path

import pytest

NAMES = Path(__file__).parent.parent / "flashinfer_signatures.txt"
SIGNATURES = dict(line.split(": ", 1) for line in NAMES.read_text().splitlines())
# These collect keywords and pass them on, so that their signatures do not tell: to the plan, to the paged wrapper, to an error.
COLLECT = (".workspace_size", "attention.BatchAttentionWithAttentionSinkWrapper.")
# What 0.7 added to MLA for other back ends and cache layouts, and the shim does not take.
NOT_TAKEN = {
    "mla.BatchMLAPagedAttentionWrapper.plan": (
        "metadata cum_seq_lens_q block_tables seq_lens max_q_len query_layout kv_cache_layout lse_mode output_dtype "
        "output_scale scale_mode skip_softmax enable_pdl use_sinks"
    ),
    "mla.BatchMLAPagedAttentionWrapper.run": "query kv_cache skip_softmax_threshold_scale_factor bmm1_scale bmm2_scale",
}


def find(path: str) -> object:
    module, *names = path.split(".")
    found = import_module(f"jitgen.compat.flashinfer.{module}")
    for name in names:
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("path", SIGNATURES)
def test_parameters_have_flashinfers_names_and_order(path):
    parameters = [p for p in inspect.signature(find(path)).parameters.values() if p.name != "self"]
    wanted = SIGNATURES[path].split()
    collects = any(part in path for part in COLLECT) and any(p.kind is p.VAR_KEYWORD for p in parameters)
    missing = set(wanted) - {"*"} - {p.name for p in parameters}
    assert missing == set(NOT_TAKEN.get(path, "").split()) or collects, missing
    positional = wanted[: wanted.index("*")] if "*" in wanted else wanted
    ours = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [name for name in ours if name in positional] == [name for name in positional if name in ours]
