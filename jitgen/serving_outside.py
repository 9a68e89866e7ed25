"""Serving calls inside of torch.compile with what a graph cannot carry: made between two graphs."""

from __future__ import annotations

import torch

from jitgen.serving import paged_attention, ragged_attention

REASON = (
    "inside torch.compile a serving call uses the variant of its plan and allocates its results: variant=, out=, lse= and "
    "captures by name break the graph. Give captures to plan.update, and make a plan for each variant"
)
# Dynamo would otherwise look into every function of them
paged_outside = torch.compiler.disable(paged_attention, reason=REASON)
ragged_outside = torch.compiler.disable(ragged_attention, reason=REASON)
