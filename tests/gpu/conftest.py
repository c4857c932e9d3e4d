"""Kernel tests on a GPU. Without one, or without kernels in the build, they are skipped, never passed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


def why_not() -> str | None:
    """Why the kernels cannot run here."""
    from dflash_rs import _core, cuda

    if not torch.cuda.is_available():
        return "no CUDA GPU that torch can use"
    if not _core.cuda_info()["fatbin_bytes"]:
        return "this build contains no CUDA kernels"
    if not cuda.available():
        return f"no kernels for this GPU: {_core.cuda_info()}"
    return None


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    """The device, or a skip that says why there is none."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Fresh numbers every time; the seed is printed with a failure."""
    seed = int(np.random.SeedSequence().entropy % 2**32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return np.random.default_rng(seed)
