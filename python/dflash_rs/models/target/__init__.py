"""Targets: `protocol.Target` is what the engine needs, `adapter.TargetModel` a causal LM of transformers behind it."""

from .adapter import TargetModel
from .protocol import Target

__all__ = ["Target", "TargetModel"]
