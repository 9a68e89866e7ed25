"""Attention of Hugging Face transformers models by jitgen: ``register()``, then ``attn_implementation="jitgen"``."""

from __future__ import annotations

from jitgen.compat.transformers._mask import ModelMask
from jitgen.compat.transformers._register import register

__all__ = ["ModelMask", "register"]
