"""OnlineNorm: what a user subclasses to replace softmax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class OnlineNorm:
    """A replacement of softmax that is computed tile by tile along the keys.

    ``state`` names the float32 values a row carries along and what they start from; ``order`` says whether keys are visited
    in any order, forward or in reverse. A key the mask excludes has weight 0 whatever ``update`` computes for it.

    Errors:  VariantError, UnsupportedVariant when a Variant is made of it.
    Cost:    as softmax in dense attention. Plans cut long requests along their keys, and join the parts by ``merge``. Of a norm
             without it requests stay whole, which leaves most of a device idle where they are few; but for decode on a GPU of
             norms without state, row_cumsum and factor.
    Source:  the online form of Milakov and Gimelshein 2018, with other weights than exponentials.
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

    def merge(self, a: Any, b: Any) -> tuple[Any, Any, Any]:
        """The state of two parts of a row's keys together, and what the accumulated output of each is multiplied by.

        Each part was begun with the start state, and a part may have seen no key. The output accumulated by both is
        ``scale_a * o_a + scale_b * o_b``. All keys of ``a`` are visited before those of ``b``, so with ``order = "reverse"``
        they are the later ones; with ``order = "any"`` and no row_cumsum, the two may be any keys. Parts are joined two by two,
        in any grouping: ``merge`` must be associative. A norm that does not override this is not cut along the keys.

        Shapes:  a and b are dicts like ``state``, of numbers; returns (such a dict, number, number).
        Errors:  VariantError when a Variant is made of a norm whose parts, joined, are not the whole. It is tried on rows of a
                 few logits, unless the norm reads captured tensors.
        Source:  for softmax: FlashDecoding's joining of parts by their maxima and denominators.
        """
        raise NotImplementedError(f"{type(self).__name__} has no merge(a, b)")
