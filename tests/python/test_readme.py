"""The examples in the documentation are run as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dflash_rs import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/guide.md")


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


EXAMPLES = [pytest.param(code, id=f"{page}-{i}") for page in PAGES for i, code in enumerate(blocks(page, "python"))]
COMMANDS = [line for line in "".join(blocks("README.md", "sh")).splitlines() if line.startswith("dflash-rs ")]


def test_there_are_examples_to_run():
    assert len(EXAMPLES) >= 3 and len(COMMANDS) >= 4


@pytest.mark.pair
@pytest.mark.parametrize("code", EXAMPLES)
def test_a_python_example_runs(code):
    exec(compile(code, "example", "exec"), {"__name__": "example"})


@pytest.mark.pair
@pytest.mark.parametrize("command", COMMANDS)
def test_a_shell_example_runs(command):
    assert cli.main(shlex.split(command)[1:]) == 0


def test_every_command_line_in_the_documentation_parses():
    lines = []
    for page in (*PAGES, "docs/benchmarks.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        lines += re.findall(r"^(?:    |\s*echo .* \| )?(dflash-rs (?:generate|bench|doctor).*)$", text, re.MULTILINE)
    assert len(lines) >= 8
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        cli.build_parser().parse_args(words)


def test_links_between_the_pages_lead_somewhere():
    for page in (*PAGES, "docs/benchmarks.md", "docs/training.md", "docs/architecture.md"):
        path = ROOT / page
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{page} links to {target}"
