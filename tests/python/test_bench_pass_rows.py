"""The benchmark of passes by rows, run with the bundled target: what it writes, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dflash_rs import _core

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "pass_rows.py"


def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, env=os.environ | environment, check=False
    )


@pytest.mark.pair
def test_every_set_precision_and_number_of_rows_has_a_row_with_machine_and_commit(tmp_path):
    out = tmp_path / "rows.json"
    isa = _core.cpu_isas()[-1]
    words = ["--isa", isa, "--rounds", "2", "--passes", "1", "--rows", "1,3", "--context", "5", "--threads", "1"]
    done = run(*words, "--json", str(out), DFLASH_RS_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    data = json.loads(out.read_text())
    assert [(row["isa"], row["precision"], row["rows"]) for row in data["rows"]] == [
        (isa, precision, rows) for precision in ("highest", "medium") for rows in (1, 3)
    ]
    for row in data["rows"]:
        low, high = row["ms_quartiles"]
        assert 0 < row["ms_fastest"] <= low <= row["ms"] <= high
        assert (row["over_one"] == 1) if row["rows"] == 1 else row["over_one"] > 0
    assert {"cpu", "machine", "git_commit", "date", "model", "threads", "load_average"} <= set(data["header"])
    assert data["header"]["model"] == "target" and data["skipped"] == []
    assert len(done.stdout.splitlines()) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--isa", "neon"], "--isa: got 'neon', expected "),
        (["--precision", "low"], "--precision: got 'low', expected highest or medium"),
        (["--rows", "1,x"], "--rows: got '1,x'"),
        (["--rounds", "0"], "--rounds: got 0, expected at least 1"),
        (["--context", "-1"], "--context: got -1, expected at least 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(words, said):
    done = run(*words)
    assert done.returncode == 2 and said in done.stderr
