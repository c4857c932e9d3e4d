"""The examples in the documentation are run as they stand."""

from __future__ import annotations

import argparse
import re
import shlex
from importlib import metadata
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

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


def test_every_command_of_the_page_about_training_parses():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^ {4,}(?:torchrun --nproc-per-node \d+ -m )?(dflash[-_]rs[ .].*)$", text, re.MULTILINE)
    # The one with an ellipsis shows how to start processes.
    lines = [line.replace("dflash_rs.train", "dflash-rs train") for line in lines if not line.endswith("...")]
    assert len(lines) >= 7 and sum(line.startswith("dflash-rs train drafter") for line in lines) >= 2
    for line in lines:
        words = shlex.split(re.sub(r"\$k", "0", line.removesuffix("&").strip()), comments=True)[1:]
        cli.build_parser().parse_args(words)


# Options of other programs that the pages name.
OTHERS = {"--json", "--model-path", "--no-deps", "--nproc-per-node", "--port", "--python", "--rounds", "--wheel"}
OTHERS |= {"--sglang", "--speculative-algorithm", "--speculative-draft-model-path"}


def test_every_option_that_the_documentation_names_is_one():
    known, parsers = set(), [cli.build_parser()]
    while parsers:
        for action in parsers.pop()._actions:
            known |= set(action.option_strings)
            parsers += action.choices.values() if isinstance(action, argparse._SubParsersAction) else []
    for page in (*PAGES, "docs/training.md", "docs/benchmarks.md"):
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", (ROOT / page).read_text(encoding="utf-8")))
        assert named - known <= OTHERS, page
    assert len(known) > 50


def test_what_a_stranger_types_first_is_what_the_demo_runs():
    """So the commands of the README's first block are run, too, whenever the demo is."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    demo = re.findall(
        r"^\t\$\(BIN\)/(dflash-rs .*)$", makefile.partition("\ndemo:")[2].partition("\n\n")[0], re.MULTILINE
    )
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Try it")[2].partition("## Use it")[0]
    assert len(demo) == 2 and re.findall(r"^    (dflash-rs .*)$", readme, re.MULTILINE) == demo
    assert readme.index("pip install 'dflash-rs[torch]'") < readme.index(demo[0]) < readme.index("make demo")


def test_extras_and_targets_in_the_documentation_exist():
    extras = set(metadata.distribution("dflash-rs").metadata.get_all("Provides-Extra"))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    text = "".join(
        (ROOT / page).read_text(encoding="utf-8") for page in (*PAGES, "docs/releasing.md", "docs/sglang.md")
    )
    named = set(re.findall(r"(?:dflash-rs|\.)\[([a-z]+)\]'", text))
    assert "torch" in named and named <= extras
    made = set(re.findall(r"(?:`|^    |&& )make ([a-z-]+)", text, re.MULTILINE))
    assert {"demo", "test", "dist", "wheel"} <= made <= targets


FORGE = "https://github.com/dflash-rs/dflash-rs/"
RAW = "https://raw.githubusercontent.com/dflash-rs/dflash-rs/"


def targets(text: str) -> list[str]:
    """Where the links and pictures of a page lead, as Markdown reads it: links by reference, too, nothing in code."""
    found = []
    for block in MarkdownIt("commonmark").enable("table").parse(text):
        for token in block.children or ():
            found += [str(token.attrs[name]) for name in ("href", "src") if name in token.attrs]
    return found


def anchors(text: str) -> set[str]:
    """The names of a page's headings, as the forge makes them."""
    tokens = MarkdownIt("commonmark").parse(text)
    titles = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_are_read_as_markdown_reads_them():
    text = "[a](b.md#c) ![p](d.png) [e] [f][e] `[g](h)`\n\n| t |\n|---|\n| [i](j) |\n\n[e]: k\n"
    assert targets(text) == ["b.md#c", "d.png", "k", "k", "j"]
    assert anchors("# What it *is*, and `how`\n\ntext\n\nNext one\n---\n") == {"what-it-is-and-how", "next-one"}


def leads_nowhere(target: str, page: Path) -> bool:
    """Whether a link of a page names a file or heading of this repository that is not there; others are not looked at."""
    if target.startswith((FORGE, RAW)):
        kind = re.match(rf"{FORGE}(blob|tree)/main/|{RAW}main/", target)
        if kind is None:
            return target != f"{FORGE}issues"
        path, _, anchor = target[kind.end() :].partition("#")
        file = ROOT / path
        right = file.is_dir() if kind[1] == "tree" else file.is_file()
    elif re.match(r"[a-z]+:", target):
        return False
    else:
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        right = file.exists()
    return not right or bool(anchor) and anchor not in anchors(file.read_text(encoding="utf-8"))


DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "cuda" / "README.md",
]


def test_a_link_that_leads_nowhere_is_noticed():
    page = ROOT / "docs" / "guide.md"
    right = (
        "#install",
        "sglang.md",
        "../README.md#try-it",
        f"{FORGE}blob/main/docs/guide.md#install",
        f"{FORGE}issues",
    )
    wrong = (
        "#instal",
        "sglan.md",
        "../README.md#try",
        f"{FORGE}blob/main/docs/guide.md#instal",
        f"{FORGE}wiki",
        f"{RAW}x",
    )
    assert not any(
        leads_nowhere(target, page) for target in (*right, "https://example.org/x#y", f"{RAW}main/README.md")
    )
    assert all(
        leads_nowhere(target, page) for target in (*wrong, f"{FORGE}tree/main/README.md", f"{FORGE}blob/main/docs")
    )


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    wrong = [target for target in targets(page.read_text(encoding="utf-8")) if leads_nowhere(target, page)]
    assert not wrong


def test_the_readmes_links_work_on_the_page_of_an_index_too():
    """Relative ones would be looked for there, and headings have no names."""
    found = targets((ROOT / "README.md").read_text(encoding="utf-8"))
    assert f"{RAW}main/docs/img/demo.png" in found
    assert len(found) > 8 and all(target.startswith("https://") for target in found)
