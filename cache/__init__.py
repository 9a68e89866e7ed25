"""Where compiled kernels are kept: keys, entries, stores, building once.

Needs nothing of the generator but a digest: sources come in as text, targets as plain values, the builder as a
callable.
"""

from jitgen.cache.generator import generator_digest
from jitgen.cache.key import digest, explain
from jitgen.cache.lookup import Request, find_module, get_module
from jitgen.cache.store import Store

__all__ = [
    "Request",
    "Store",
    "digest",
    "explain",
    "find_module",
    "generator_digest",
    "get_module",
]
