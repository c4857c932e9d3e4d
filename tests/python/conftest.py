"""What every Python test shares."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Two test processes on a small machine must not fight over its cores; set before torch is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))
