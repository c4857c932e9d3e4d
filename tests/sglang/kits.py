"""SGLang's test kits, importable where Hugging Face's ``datasets`` is not installed: their helpers import it to download data sets,
which the tests here never do."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def _no_data_sets(*args: object, **kwargs: object) -> None:
    raise RuntimeError(f"load_dataset: got {args}, expected no download: `datasets` is not installed")


def _import() -> None:
    stand_in = find_spec("datasets") is None
    if stand_in:
        module = ModuleType("datasets")
        module.__spec__ = ModuleSpec("datasets", None)
        module.load_dataset = _no_data_sets
        sys.modules["datasets"] = module
    try:
        import sglang.benchmark.datasets
        import sglang.test.test_utils  # noqa: F401
    finally:
        if stand_in:
            del sys.modules["datasets"]


_import()

from sglang.test.kits import (  # noqa: E402
    abort_timeout_kit,
    basic_api_contract_kit,
    basic_decode_correctness_kit,
    cache_hit_kit,
    ebnf_constrained_kit,
    json_constrained_kit,
    matched_stop_kit,
    pause_generation_kit,
    radix_cache_server_kit,
    regex_constrained_kit,
    spec_server_kits,
)

__all__ = [
    "abort_timeout_kit",
    "basic_api_contract_kit",
    "basic_decode_correctness_kit",
    "cache_hit_kit",
    "ebnf_constrained_kit",
    "json_constrained_kit",
    "matched_stop_kit",
    "pause_generation_kit",
    "radix_cache_server_kit",
    "regex_constrained_kit",
    "spec_server_kits",
]
