"""The tests of tests/gpu on the emulated GPU: they must not be tried for the first time when there is one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

GPU_TESTS = Path(__file__).resolve().parents[1] / "gpu"
# What only hardware answers.
NEEDS_HARDWARE = {"test_the_code_that_runs_is_the_code_for_this_gpu", "test_a_step_can_be_captured_and_replayed"}
sys.path.insert(0, str(GPU_TESTS))


def _load(name: str):
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", GPU_TESTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


for _name in ("test_kernels", "test_delta", "test_engine"):
    _module = _load(_name)
    if hasattr(_module, "MAX_TOKENS"):
        _module.MAX_TOKENS = 10
    globals().update(
        {
            name: value
            for name, value in vars(_module).items()
            if (name.startswith("test_") and name not in NEEDS_HARDWARE) or name == "llm"
        }
    )


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(np.random.SeedSequence().entropy % 2**32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)
