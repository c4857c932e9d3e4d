"""The doctor's verdict and its words, without looking at this machine's models."""

from __future__ import annotations

import json
from types import SimpleNamespace

from dflash_rs import cli, doctor, extras
from dflash_rs.doctor import ABSENT, BROKEN, MISSING, OK, Check


def test_only_what_the_main_job_needs_decides(monkeypatch, capsys):
    fine = [Check("core", OK, "there", needed=True), Check("sglang", ABSENT, "not installed", "pip install x")]
    monkeypatch.setattr(doctor, "examine", lambda: fine)
    assert cli.main(["doctor"]) == 0
    assert "-> pip install x" in capsys.readouterr().out
    for status in (MISSING, BROKEN):
        monkeypatch.setattr(doctor, "examine", lambda s=status: [*fine, Check("torch", s, "no", needed=True)])
        assert cli.main(["doctor", "--json"]) == 1
        report = json.loads(capsys.readouterr().out)
        assert report["works"] is False and report["checks"][-1]["status"] == status


def test_a_check_that_dies_is_a_finding_and_the_rest_are_made(monkeypatch):
    def die():
        raise RuntimeError("no such driver")

    monkeypatch.setattr(doctor, "_gpu", die)
    monkeypatch.setattr(doctor, "_generation", lambda: Check("generation", OK, "24 tokens", needed=True))
    found = {check.name: check for check in doctor.examine()}
    assert found["gpu"].status == BROKEN and "no such driver" in found["gpu"].detail
    assert {"python", "cpu", "torch", "bundled pair", "llguidance", "gguf", "sglang", "reference loop"} <= set(found)


def test_a_missing_module_comes_with_the_command_that_gets_it():
    check = doctor._module("no_module_of_this_name", "torch", True)
    assert (check.status, check.fix) == (MISSING, extras.install("torch"))
    assert doctor._module("no_module_of_this_name", "bench", False).status == ABSENT


def test_what_only_some_things_need_is_told_with_what_it_is_for():
    check = doctor._extra("no_module_of_this_name", ("structured", "only needed for that"))
    assert (check.status, check.detail) == (ABSENT, "not installed; only needed for that")
    assert check.fix == extras.install("structured")
    assert set(doctor._EXTRAS) == {"llguidance", "gguf", "matplotlib"}


def test_without_sglang_its_part_says_how_to_get_it(capsys, monkeypatch):
    import dflash_rs.sglang.compat

    monkeypatch.setattr(dflash_rs.sglang.compat, "version", lambda: None)
    assert cli.main(["doctor", "--sglang"]) == 1
    out = capsys.readouterr().out
    assert "pip install sglang==" in out and "SGLang does not serve here yet." in out
    # What is not there is missing, and nothing is broken for that.
    assert out.startswith("missing") and "broken" not in out
    assert cli.main(["doctor", "--sglang", "--json"]) == 1
    assert [check["status"] for check in json.loads(capsys.readouterr().out)["checks"]] == [MISSING]


def test_what_is_missing_is_got_from_the_clone_where_there_is_one(monkeypatch, tmp_path):
    clone, other = tmp_path / "a clone", tmp_path / "other"
    (clone / "dist").mkdir(parents=True)
    other.mkdir()
    (clone / "pyproject.toml").write_text('[project]\nname = "dflash-rs"\n')
    (other / "pyproject.toml").write_text('[project]\nname = "another"\n')
    came: dict = {}
    package = SimpleNamespace(read_text=lambda name: json.dumps(came) if came and name == "direct_url.json" else None)
    monkeypatch.setattr(extras.metadata, "distribution", lambda name: package)
    monkeypatch.setattr(extras.sys, "prefix", str(other))
    monkeypatch.chdir(other)
    # From an index, and nothing of ours around.
    assert extras.install("bench") == "pip install 'dflash-rs[bench]'"
    assert extras.install(options="--force-reinstall") == "pip install --force-reinstall dflash-rs"
    # Called in a clone or below it, made in its environment, or installed from it or from a file in it.
    monkeypatch.chdir(clone)
    assert extras.install("bench") == "pip install '.[bench]'" and extras.install() == "pip install ."
    monkeypatch.chdir(clone / "dist")
    there = f"pip install '{clone}[bench]'"
    assert extras.install("bench") == there
    monkeypatch.chdir(other)
    for url in (clone.as_uri(), (clone / "dist" / "a.whl").as_uri()):
        came["url"] = url
        assert extras.install("bench") == there
    came.clear()
    monkeypatch.setattr(extras.sys, "prefix", str(clone / ".venv"))
    assert extras.install("bench") == there
    assert doctor._extra("no_module_of_this_name", ("bench", "x")).fix == there
