"""Lossless DFlash speculative decoding with a Rust core.

Importing this package imports neither torch nor a serving engine: names that need them are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dflash_rs.errors import (
    CheckpointError,
    DflashError,
    InvalidArgument,
    MissingPackage,
    OutOfPages,
    UnsupportedModel,
)

if TYPE_CHECKING:
    from dflash_rs import serving, verify
    from dflash_rs._core import DraftTree, PagePool, Planner, WidthPlanner
    from dflash_rs.config import StepCosts
    from dflash_rs.llm import LLM, Output, Stream, StreamEvent
    from dflash_rs.sampling import SamplingParams
    from dflash_rs.structured import StructuredOutputsParams

_LATER = {
    "DraftTree": "dflash_rs._core",
    "LLM": "dflash_rs.llm",
    "Output": "dflash_rs.llm",
    "Stream": "dflash_rs.llm",
    "StreamEvent": "dflash_rs.llm",
    "PagePool": "dflash_rs._core",
    "Planner": "dflash_rs._core",
    "StepCosts": "dflash_rs.config",
    "StructuredOutputsParams": "dflash_rs.structured",
    "SamplingParams": "dflash_rs.sampling",
    "WidthPlanner": "dflash_rs._core",
}

__all__ = [
    "CheckpointError",
    "DflashError",
    "DraftTree",
    "InvalidArgument",
    "LLM",
    "MissingPackage",
    "OutOfPages",
    "Output",
    "PagePool",
    "Planner",
    "SamplingParams",
    "StepCosts",
    "Stream",
    "StreamEvent",
    "StructuredOutputsParams",
    "UnsupportedModel",
    "WidthPlanner",
    "__version__",
    "serving",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in ("serving", "verify"):
        return import_module(f"dflash_rs.{name}")
    module = _LATER.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("dflash-rs")
    except metadata.PackageNotFoundError:
        # A source tree on PYTHONPATH: there is no installed version to tell.
        return "0+uninstalled"
