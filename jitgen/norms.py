"""OnlineNorm: what a user subclasses to replace softmax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class OnlineNorm:
    """A replacement of softmax that is computed tile by tile along the keys.

    ``state`` names the float32 values a row carries along and what they start from; ``order`` says whether keys are visited
    in any order, forward or in reverse. A key the mask excludes has weight 0 whatever ``update`` computes for it.

    Errors:  VariantError, UnsupportedVariant when a Variant is made of it.
    Cost:    as softmax in dense attention. In plans, where softmax is cut along the keys of long requests, states of parts are
             not merged: only decode on a GPU is cut, and only for norms without state, row_cumsum and factor.
    """

    state: ClassVar[Mapping[str, float]] = {}
    order: ClassVar[str] = "any"

    def update(self, score: Any, state: Any) -> tuple[Any, Any, Any]:
        """Weights of a row of logits, the factor for what the row has accumulated, and the new state.

        ``score`` is one logit; jitgen.row_max, row_sum and row_cumsum reduce over the row's logits of this tile.
        """
        raise NotImplementedError(f"{type(self).__name__} has no update(score, state)")

    def finalize(self, o: Any, state: Any) -> Any:
        """The output row from the accumulated one; as it is, unless overridden."""
        return o

    def lse(self, state: Any) -> Any:
        """The logsumexp of a finished row. A norm that does not override this has none, and return_lse is refused."""
        raise NotImplementedError(f"{type(self).__name__} has no lse(state)")
