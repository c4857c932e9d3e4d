"""Targets: `adapter.TargetModel` is a causal LM behind pages, however it is made inside."""

from .adapter import TargetModel

__all__ = ["TargetModel"]
