"""Lossless DFlash speculative decoding with a Rust core.

Importing this package imports neither torch nor a serving engine: names that need them are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dflash_rs.errors import CheckpointError, DflashError, InvalidArgument, OutOfPages, UnsupportedModel

if TYPE_CHECKING:
