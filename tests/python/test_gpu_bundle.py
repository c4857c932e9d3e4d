"""The folder for GPU machines: parts that come back whole or are named, wheels that are enough, trainings in pieces."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

BUNDLE = Path(__file__).resolve().parents[2] / "scripts" / "gpu_bundle"
LIMIT = 10_000


@pytest.fixture
def modules(monkeypatch):
    """Imports a script of the bundle by its name."""
    import importlib

    monkeypatch.syspath_prepend(str(BUNDLE / "machine"))
    monkeypatch.syspath_prepend(str(BUNDLE))
    names = ("parts", "wheels", "install", "train")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def packed(modules, tmp_path):
    """A folder of two archives, one of which has several parts, and what was packed."""
    parts = modules("parts")
    source = tmp_path / "source"
    (source / "inside" / "__pycache__").mkdir(parents=True)
    (source / "large.bin").write_bytes(os.urandom(3 * LIMIT))
    (source / "inside" / "run.sh").write_text("true\n")
    (source / "inside" / "run.sh").chmod(0o755)
    (source / "inside" / "__pycache__" / "run.pyc").write_bytes(b"x")
    folder = tmp_path / "folder"
    parts.split([(source, ".")], folder, "base", LIMIT)
    parts.split([(source / "inside", "model")], folder, "training", 1 << 20)
    return parts, source, folder


def test_parts_keep_their_bound_and_come_back_whole(packed, tmp_path):
    parts, source, folder = packed
    sizes = [path.stat().st_size for path in sorted(folder.glob("base.tar.*"))]
    assert len(sizes) > 3 and set(sizes[:-1]) == {LIMIT} and 0 < sizes[-1] <= LIMIT
    assert parts.join(folder, tmp_path / "out") == (["base", "training"], [])
    out = tmp_path / "out"
    assert (out / "large.bin").read_bytes() == (source / "large.bin").read_bytes()
    assert (out / "inside" / "run.sh").stat().st_mode & stat.S_IXUSR and (out / "model" / "run.sh").is_file()
    assert not list(out.rglob("*.pyc"))


def test_a_missing_part_is_named_and_nothing_is_unpacked(packed, tmp_path):
    parts, _, folder = packed
    (folder / "base.tar.2").unlink()
    (folder / "base.tar.3").unlink()
    with pytest.raises(parts.PartsError) as caught:
        parts.join(folder, tmp_path / "out")
    assert str(caught.value).splitlines() == [f"base.tar.{n}: missing ({LIMIT} bytes)" for n in (2, 3)]
    assert not (tmp_path / "out").exists()
    # The other archive does not suffer from it.
    assert parts.join(folder, tmp_path / "out", ["training"]) == (["training"], ["base"])


def test_a_part_that_is_another_than_it_was_is_named(packed, tmp_path):
    parts, _, folder = packed
    data = bytearray((folder / "base.tar.2").read_bytes())
    data[LIMIT // 2] ^= 1
    (folder / "base.tar.2").write_bytes(data)
    (folder / "base.tar.1").write_bytes(data[:-1])
    with pytest.raises(parts.PartsError) as caught:
        parts.join(folder, tmp_path / "out")
    first, second = str(caught.value).splitlines()
    assert first == f"base.tar.1: got {LIMIT - 1} bytes, expected {LIMIT}" and second.startswith(
        "base.tar.2: damaged: got sha256 "
    )
    assert not (tmp_path / "out").exists()


def test_what_was_left_at_home_is_said_and_is_a_mistake_only_when_asked_for(packed, tmp_path):
    _, _, folder = packed
    (folder / "training.tar.1").unlink()
    command = [sys.executable, BUNDLE / "parts.py", "join", folder, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("base; not here: training")
    for name, words in (
        ("training", "training.tar.1: missing"),
        ("model", "model: no such archive, expected base, training"),
    ):
        done = subprocess.run([*command, "--only", name], capture_output=True, text=True, check=False)
        assert done.returncode == 1 and done.stderr.startswith(words)


def test_a_folder_without_any_part_or_without_its_list_is_refused(packed, tmp_path):
    parts, _, folder = packed
    for path in folder.glob("*.tar.*"):
        path.unlink()
    with pytest.raises(parts.PartsError, match=r"base.tar.1: missing(.|\n)*training.tar.1: missing"):
        parts.join(folder, tmp_path / "out")
    with pytest.raises(parts.PartsError, match="parts.json: missing"):
        parts.join(tmp_path, tmp_path / "out")


def test_an_archive_that_is_written_again_leaves_no_old_parts(packed):
    parts, source, folder = packed
    parts.split([(source / "inside", ".")], folder, "base", 1 << 20)
    assert [path.name for path in folder.glob("base.tar.*")] == ["base.tar.1"]
    assert set(parts.listed(folder)) == {"base", "training"}


def wheel(folder: Path, name: str, version: str, *requires: str) -> Path:
    path = folder / f"{name}-{version}-py3-none-any.whl"
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n")
    return path


def test_what_the_wheels_lack_on_the_other_machine_is_named(modules, tmp_path):
    missing = modules("wheels").missing
    wheels = [
        wheel(
            tmp_path,
            "ours",
            "1.0",
            "helper>=2",
            "torch>=2; extra == 'torch'",
            "rich; extra == 'torch'",
            "never; extra == 'x'",
        ),
        wheel(tmp_path, "helper", "2.1", "newer; python_version >= '3.12'", "windows; sys_platform == 'win32'"),
        wheel(tmp_path, "rich", "1.0"),
    ]
    assert missing(wheels, ["ours[torch]"], "3.11", ["torch"]) == []
    assert missing(wheels, ["ours[torch]"], "3.12", ["torch"]) == ["newer wanted by helper, got none"]
    assert missing(wheels, ["ours[torch]"], "3.11", []) == ["torch>=2 wanted by ours, got none"]
    old = [wheels[0], wheel(tmp_path, "helper", "1.9"), wheels[2]]
    assert missing(old, ["ours"], "3.12", []) == ["helper>=2 wanted by ours, got 1.9"]


def test_an_installation_that_cannot_work_says_what_it_lacks(modules, tmp_path, monkeypatch):
    install = modules("install")
    with pytest.raises(SystemExit, match=r"Python: got 3\.\d+\.\d+, expected 3.1: the wheels"):
        install.make(tmp_path / "env", tmp_path, [], "3.1")
    with pytest.raises(SystemExit, match="pip: got none in"):
        install.make(tmp_path / "env", tmp_path, [])
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="torch: got none with"):
        install.make(tmp_path / "env", tmp_path, [])
    assert not (tmp_path / "env").exists()


@pytest.fixture
def training(modules, monkeypatch, tmp_path):
    """train.py with commands that are stood in for, and one piece of it: (exit code, state, names that were carried away)."""
    train, parts = modules("train"), modules("parts")
    commands = []

    def run(self, *words):
        commands.append(words)
        out = Path(self.work / str(words[words.index("--out") + 1]) if "--out" in words else self.work / "models")
        out.mkdir(exist_ok=True)
        self.say("said")
        if words[1] == "responses":
            number = train.shards(self.work)
            (out / f"shard-{number:05}.npz").write_bytes(b"text")
            return "stopped, 1 shards are missing: start again" if number == 0 else "all"
        if words[1] == "drafter":
            report = {"report": {"steps": 1 + train.trained(out)[0]}, "settings": {"steps": 2}}
            (out / "training.json").write_text(json.dumps(report))
            for name in ("model.safetensors", "checkpoint.pt"):
                (out / name).write_bytes(b"weights")
            (self.work / "features").mkdir(exist_ok=True)
            (self.work / "features" / "all.bin").write_bytes(b"large")
        return ""

    monkeypatch.setattr(train.Piece, "run", run)

    def piece(*options, work="work"):
        out = tmp_path / "out"
        words = [
            "train.py",
            "--work",
            str(tmp_path / work),
            "--out",
            str(out),
            "--package",
            str(tmp_path / "model.whl"),
        ]
        monkeypatch.setattr(sys, "argv", [*words, "--store-features", *options])
        code = train.main()
        parts.join(out, tmp_path / f"carried-{len(commands)}")
        carried = tmp_path / f"carried-{len(commands)}"
        names = {str(path.relative_to(carried)) for path in carried.rglob("*") if path.is_file()}
        return code, json.loads((out / "state.json").read_text()), names, carried

    piece.commands, piece.train = commands, train
    return piece


def test_a_training_goes_on_piece_by_piece_and_carries_away_what_is_small(training):
    kinds = lambda: [words[1] for words in training.commands]  # noqa: E731
    code, state, names, _ = training()
    assert (code, state["finished"], state["shards"], state["steps"]) == (0, False, 1, 0)
    assert kinds() == ["get", "responses"] and names == {"responses/shard-00000.npz", "log.txt"}
    code, state, names, _ = training()
    assert (code, state["finished"], state["shards"], state["steps"]) == (0, False, 2, 1)
    assert kinds()[2:] == ["responses", "drafter"]
    drafter = {"drafter/model.safetensors", "drafter/training.json"}
    texts = {"responses/shard-00000.npz", "responses/shard-00001.npz", "responses.done", "log.txt"}
    assert names == drafter | texts
    code, state, names, carried = training("--with-checkpoint")
    assert (code, state["finished"], state["steps"], state["steps_wanted"]) == (0, True, 2, 2)
    assert kinds()[4:] == ["drafter"] and names == drafter | texts | {"drafter/checkpoint.pt"}
    minutes = [float(words[words.index("--minutes") + 1]) for words in training.commands if "--minutes" in words]
    assert all(0 < each < 9 for each in minutes)
    # On a fresh machine: neither texts nor steps are made again.
    code, state, names, _ = training("--from", str(carried), work="fresh")
    assert (code, state["shards"], kinds()[5:]) == (0, 2, ["get", "drafter"])


def test_what_there_is_comes_out_of_a_piece_that_fails_or_is_late(training, monkeypatch):
    training()
    run = training.train.Piece.run
    for error, code in ((training.train.Failed("exit code 1:\nno memory"), 1), (training.train.Late("interrupted"), 2)):

        def fails(self, *words, error=error):
            raise error

        monkeypatch.setattr(training.train.Piece, "run", fails)
        found, state, names, carried = training()
        assert (found, state["finished"], state["shards"]) == (code, False, 1)
        assert "responses/shard-00000.npz" in names and str(error) in (carried / "log.txt").read_text()
    monkeypatch.setattr(training.train.Piece, "run", run)
    assert training()[1]["shards"] == 2


def test_a_command_that_runs_past_its_time_is_ended(modules, monkeypatch, tmp_path):
    train = modules("train")
    endless = tmp_path / "python"
    endless.write_text("#!/bin/sh\nwhile :; do sleep 1; done\n")
    endless.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(endless))
    monkeypatch.setattr(train, "SPARE_SECONDS", 0)
    with pytest.raises(train.Late, match="interrupted: train drafter"):
        train.Piece(tmp_path / "work", 0).run("train", "drafter")


def test_a_command_that_fails_is_quoted(modules, tmp_path):
    train = modules("train")
    with pytest.raises(train.Failed, match=r"dflash-rs train drafter ended with exit code 2:\n(.|\n)*--target"):
        train.Piece(tmp_path, 1).run("train", "drafter")


def test_a_folder_with_something_else_in_it_is_not_written_over(tmp_path):
    (tmp_path / "mine").write_text("keep")
    (tmp_path / "x.whl").touch()
    command = [sys.executable, BUNDLE, tmp_path, "--wheel", tmp_path / "x.whl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "holds something else" in done.stderr and (tmp_path / "mine").exists()
