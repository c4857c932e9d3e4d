"""docs/architecture.md and CONTRIBUTING.md against the folders: what they name is there, and what is there is named."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "dflash_rs"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
NAMED = re.compile(r"(?<![\w*/.])[\w*]+(?:/|\.(?:rs|py|cuh)\b)")


def picture() -> list[tuple[Path, list[str], list[str]]]:
    """The picture's lines: the folder each is about, the entries that it begins with, and the files named beside them."""
    block = PAGE.partition("## Where things are")[2].partition("```text\n")[2].partition("```")[0]
    lines, above = [], {-1: ROOT}
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        entries, text = line[:24].split(), line[24:]
        folder = above[max(at for at in above if at < depth)]
        above = {at: path for at, path in above.items() if at < depth}
        above[depth] = folder / entries[0]
        lines.append((folder, entries, NAMED.findall(text)))
    return lines


def test_the_picture_names_nothing_that_is_not_there():
    lines = picture()
    assert len(lines) > 20
    for folder, entries, others in lines:
        for name in entries:
            assert (folder / name).exists(), f"{name} is not in {folder.relative_to(ROOT)}"
        for name in others:
            places = [folder, *(folder / entry for entry in entries if entry.endswith("/"))]
            assert any(list(place.glob(name.rstrip("/"))) for place in places), f"{name}, beside {entries}"


@pytest.mark.parametrize("top", ["src", "python/dflash_rs"])
def test_the_picture_names_every_file_and_room(top):
    root = ROOT / top
    named = set()
    for folder, entries, others in picture():
        if folder == root:
            named |= {name.partition("/")[0] for name in (*entries, *others)}
    there = {
        path.name
        for path in root.iterdir()
        if path.suffix in (".rs", ".py") or (path.is_dir() and any(path.glob("*.[rp][sy]")))
    }
    assert there - named == {"__init__.py", "__main__.py"} & there


# Rooms of the core: whom each may use.
CORE = {
    "types": set(),
    "error": set(),
    "rng": set(),
    "kv": {"types", "error", "rng"},
    "draft": {"types", "error", "rng"},
    "stats": {"types", "error", "rng"},
    "verify": {"types", "error", "rng", "draft"},
    "plan": {"types", "error", "rng", "draft"},
    "schedule": {"types", "error", "rng", "kv", "draft", "stats", "verify"},
    "device": {"types", "error", "rng", "verify"},
    "step": {"types", "error", "rng", "kv", "draft", "stats", "verify", "plan", "schedule", "device"},
}


def test_rooms_of_the_core_use_only_those_below_them():
    seen = set()
    for file in sorted((ROOT / "src").rglob("*.rs")):
        room = file.relative_to(ROOT / "src").parts[0].removesuffix(".rs")
        if room in ("lib", "py") or "tests" in file.stem or "tests" in file.parts:
            continue
        code = file.read_text(encoding="utf-8").partition("#[cfg(test)]\nmod tests {")[0]
        code = re.sub(r"^\s*//.*$", "", code, flags=re.MULTILINE)
        assert "crate::{" not in code, f"{file}: one `use` per room"
        used = set(re.findall(r"\bcrate::(\w+)", code)) - {room}
        assert used <= CORE[room], f"{file.relative_to(ROOT)}: uses {used - CORE[room]}"
        seen.add(room)
    assert seen == set(CORE)


def imported(file: Path) -> set[str]:
    """The modules of this package that a file imports, wherever it does, such as "models.drafter"."""
    own = ("dflash_rs", *file.relative_to(PACKAGE).with_suffix("").parts)
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = own[: len(own) - node.level] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("dflash_rs.") for name in found if name.startswith("dflash_rs.")}


def test_models_know_no_engine_and_nobody_knows_sglang_but_its_entry_points():
    assert "models.checkpoint" in imported(PACKAGE / "engine" / "build.py")
    for file in sorted(PACKAGE.rglob("*.py")):
        room, used = file.relative_to(PACKAGE).parts[0], {name.partition(".")[0] for name in imported(file)}
        if room == "models":
            assert not used & {"engine", "llm"}, file
        if room not in ("sglang", "doctor.py"):
            assert "sglang" not in used, file


def test_an_engine_knows_drafters_through_their_seams_only():
    for file in sorted((PACKAGE / "engine").rglob("*.py")):
        used = {name for name in imported(file) if name.startswith("models.")}
        if file.name != "build.py":
            assert not [n for n in used if re.match(r"models\.(dflash|dflash2|mtp|lookup|loader)\b", n)], file


def quoted(text: str) -> list[str]:
    """What stands in backticks and reads as a path of this repository."""
    words = re.findall(r"`([^`\n]+)`", text)
    shape = re.compile(
        r"[\w.*-]+(/[\w.*-]+)*(/|\.(rs|py|pyi|cu|cuh|h|cpp|md|toml|txt|sh|yaml|json))|(src|python|cuda|tests|docs)(/[\w-]+)+"
    )
    return [word for word in words if shape.fullmatch(word)]


def is_there(name: str) -> bool:
    """Whether a path is there, from the root or, where the text has named the folder before, anywhere in the code."""
    if re.search(r"NAME|COMMAND|X_Y_Z", name):
        name = re.sub(r"NAME|COMMAND|vX_Y_Z", "*", name)
    if list(ROOT.glob(name.rstrip("/"))):
        return True
    return any(list((ROOT / top).rglob(name.rstrip("/"))) for top in ("src", "python", "cuda", "tests"))


def test_what_the_recipes_of_contributing_name_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = quoted(text)
    assert len(names) > 80 and not is_there("src/nothing.rs")
    assert [name for name in names if not is_there(name)] == []
    assert text.count("\n### ") >= 10
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"make ([a-z]+(?:-[a-z]+)*)", text)) - {"a"} <= targets
    for test in re.findall(r"cargo test --test (\w+)", text):
        assert (ROOT / "tests" / f"{test}.rs").is_file()


# Names of the code that recipes send a reader to, with the file.
POINTED_AT = {
    "SamplingRow": "cuda/params.h",
    "From<&Sampling>": "src/device/cuda/params.rs",
    "__post_init__": "python/dflash_rs/sampling.py",
    "Seams": "python/dflash_rs/sglang/compat/seams.py",
    "SERVED": "python/dflash_rs/sglang/compat/__init__.py",
    "build_parser": "python/dflash_rs/cli/__init__.py",
    "class Drafter": "python/dflash_rs/models/drafter.py",
}


@pytest.mark.parametrize("name", POINTED_AT)
def test_what_the_recipes_point_at_is_in_its_file(name):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert name.removeprefix("class ") in text
    assert name in (ROOT / POINTED_AT[name]).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("top", "suffixes", "most"),
    [
        ("src", {".rs"}, 600),
        ("cuda", {".cu", ".cuh", ".h", ".cpp"}, 600),
        ("python", {".py"}, 600),
        ("scripts", {".py"}, 600),
        ("tests", {".rs", ".py", ".cpp"}, 1000),
    ],
)
def test_a_long_file_says_at_its_head_why(top, suffixes, most):
    files = [path for path in sorted((ROOT / top).rglob("*")) if path.suffix in suffixes]
    assert len(files) > 5
    for file in files:
        lines = file.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= most or "In one file because" in "\n".join(lines[:30]), (
            f"{file.relative_to(ROOT)}: {len(lines)} lines"
        )
