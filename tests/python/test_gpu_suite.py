"""The command for GPU machines, on a machine without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SUITE = Path(__file__).resolve().parents[2] / "scripts" / "gpu_suite"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_runs_and_nothing_passes(tmp_path):
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, SUITE, "--json", report], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    parts = json.loads(report.read_text())["parts"]
    assert set(parts) == {"tests", "sanitizer", "kernels", "engine", "trees"}
    assert all(part["status"] == "not run" and "no GPU" in part["detail"] for part in parts.values())
    assert done.stdout.count("not run") == len(parts)


def test_an_unknown_part_is_refused():
    done = subprocess.run([sys.executable, SUITE, "kernel"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "unknown part 'kernel'" in done.stderr
