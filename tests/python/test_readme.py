"""The examples in the documentation are run as they stand."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/guide.md")


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run(words: list[str], tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr


EXAMPLES = [pytest.param(code, id=f"{page}-{i}") for page in PAGES for i, code in enumerate(blocks(page, "python"))]
COMMANDS = [line for line in "".join(blocks("README.md", "sh")).splitlines() if line.startswith("dflash-rs ")]


def test_there_are_examples_to_run():
    assert len(EXAMPLES) >= 3 and len(COMMANDS) >= 4


@pytest.mark.pair
@pytest.mark.parametrize("code", EXAMPLES)
def test_a_python_example_runs(code, tmp_path):
    run([sys.executable, "-c", code], tmp_path)


@pytest.mark.pair
@pytest.mark.parametrize("command", COMMANDS)
def test_a_shell_example_runs(command, tmp_path):
    run([sys.executable, "-m", "dflash_rs", *shlex.split(command)[1:]], tmp_path)


def test_every_command_line_in_the_documentation_parses():
    from dflash_rs.cli import build_parser

    lines = []
    for page in (*PAGES, "docs/benchmarks.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        lines += re.findall(r"^(?:    |\s*echo .* \| )?(dflash-rs (?:generate|bench|doctor).*)$", text, re.MULTILINE)
    assert len(lines) >= 8
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        build_parser(words).parse_args(words)


def test_links_between_the_pages_lead_somewhere():
    for page in (*PAGES, "docs/benchmarks.md", "docs/training.md", "docs/architecture.md"):
        path = ROOT / page
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{page} links to {target}"
