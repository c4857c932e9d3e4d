"""What every Python test shares."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Two test processes on a small machine must not fight over its cores; set before torch is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def seeded_torch():
    """What a test draws from torch's own generator is the same in every run, whatever ran before it."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)
