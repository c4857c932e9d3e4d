"""The command for GPU machines, on a machine without one."""

from __future__ import annotations

import importlib.util
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


@pytest.fixture
def kernels(monkeypatch):
    """The script that measures, with a clock of its own."""
    monkeypatch.syspath_prepend(str(SUITE))
    import kernels

    monkeypatch.setattr(kernels, "eager_us", lambda call: 9.0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return kernels


def test_without_sglang_nothing_is_compared(kernels, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sglang" else find_spec(name))
    assert kernels.peers.sglang() == (None, "not found, not compared")


def test_only_a_peer_that_agrees_is_timed(kernels, monkeypatch):
    def median_us(call):
        if call == "not captured":
            raise RuntimeError("capture:\n  refused")
        return 4.0

    def breaks():
        raise ValueError("no such tile")

    peers = kernels.peers
    found = [
        peers.Found("a", peers.Peer("captured", lambda: None)),
        peers.Found("b", peers.Peer("not captured", lambda: None)),
        peers.Found("c", peers.Peer("captured", lambda: "output 0: 1 of 2 entries differ")),
        peers.Found("d", peers.Peer("captured", breaks)),
        peers.Found("e", None, "ImportError: libcudart"),
    ]
    monkeypatch.setattr(peers, "peers", lambda case: found)
    monkeypatch.setattr(kernels, "median_us", median_us)
    assert kernels.peer_times(None) == [
        {"kernel": "a", "us": 4.0, "timed": "graph"},
        {"kernel": "b", "us": 9.0, "timed": "eager", "not_captured": "RuntimeError: capture: refused"},
        {"kernel": "c", "differs": "output 0: 1 of 2 entries differ"},
        {"kernel": "d", "failed": "ValueError: no such tile"},
        {"kernel": "e", "failed": "ImportError: libcudart"},
    ]


@pytest.fixture
def suite():
    """The command, not run."""
    spec = importlib.util.spec_from_file_location("gpu_suite_main", SUITE / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_run_that_ends_early_has_failed_and_keeps_its_rows(suite, monkeypatch, tmp_path):
    given = {}

    def run(command, environment, timeout):
        given.update(environment)
        Path(command[-1]).write_text(json.dumps({"rows": [{}], "copy_gb_s": 1.0}))
        return 1, ""

    monkeypatch.setattr(suite, "run", run)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = suite.part_kernels({"PYTHONPATH": "package"}, tmp_path)
    assert (found["status"], found["detail"]) == ("FAILED", "code 1, 1 rows") and found["results"]["rows"] == [{}]
    # SGLang is found there, the package under test is not.
    assert given == {"PYTHONPATH": "package", "GPU_SUITE_PEERS_PATH": str(tmp_path)}


def test_the_table_names_what_was_compared_and_what_was_not(suite):
    others = [
        {"kernel": "a", "us": 4.0, "timed": "eager"},
        {"kernel": "b", "differs": "x"},
        {"kernel": "c", "failed": "y"},
    ]
    rows = [
        {"kernel": "accept", "shape": "R=1", "us": 2.0, "sglang": others, "sglang_us": 4.0},
        {"kernel": "tree_build", "shape": "R=2", "us": 3.0},
    ]
    lines = suite.kernel_rows({"rows": rows, "sglang": {"version": None, "detail": "not found, not compared"}})
    assert lines[0].split()[-2:] == ["sglang", "us"]
    assert lines[1].split("  ")[-3:] == ["a 4.0 (eager)", "b differs (x)", "c failed (y)"] and " 4.0  a" in lines[1]
    assert lines[2].rstrip().endswith("-") and "SGLang" not in lines[2]
    assert lines[3:] == ["SGLang: not found, not compared"]
