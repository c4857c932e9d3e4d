"""What a build asks for: the CUDA compiler's packages unless one is there or none is wanted; and what the register table says."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    sys.path.insert(0, str(ROOT / "scripts"))  # they import each other
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return module


@pytest.fixture
def backend(monkeypatch):
    pytest.importorskip("maturin")
    module = script("build_backend")
    for name in ("DFLASH_CUDA", "DFLASH_NVCC", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MATURIN_NO_INSTALL_RUST", "1")
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(module, "packaged_nvcc", lambda: None)
    monkeypatch.setattr(module.maturin, "get_requires_for_build_wheel", lambda settings=None: ["maturins-own"])
    monkeypatch.setattr(module.sys, "platform", "linux")
    return module


def fake_nvcc(folder: Path, version: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
    nvcc.chmod(0o755)
    return nvcc


def test_a_build_without_a_compiler_asks_for_all_five_packages_pinned(backend):
    own, *packages = backend.get_requires_for_build_wheel()
    assert own == "maturins-own" and len(packages) == 5
    assert all(package.startswith("nvidia-") and "==13.0." in package for package in packages)


def test_no_compiler_is_asked_for_when_none_is_wanted_or_one_is_named(backend, monkeypatch):
    monkeypatch.setenv("DFLASH_CUDA", "0")
    assert backend.get_requires_for_build_wheel() == ["maturins-own"]
    monkeypatch.setenv("DFLASH_CUDA", "1")
    monkeypatch.setenv("DFLASH_NVCC", "/opt/nvcc")
    assert backend.get_requires_for_build_wheel() == ["maturins-own"]


@pytest.mark.parametrize(("version", "asked"), [("12.4", 5), ("12.8", 0), ("13.1", 0)])
def test_an_installed_compiler_serves_if_it_knows_the_newest_architectures(
    backend, monkeypatch, tmp_path, version, asked
):
    fake_nvcc(tmp_path / "bin", version)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert len(backend.get_requires_for_build_wheel()) == 1 + asked
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/bin")
    assert len(backend.get_requires_for_build_wheel()) == 1 + asked


def program(folder: Path, name: str, says: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{says}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("rustc", "expected"),
    [
        ("echo 'rustc 1.90.0 (1159e78c4 2025-09-14)'", None),
        ("echo 'rustc 2.0.0'", None),
        (
            "echo 'rustc 1.85.0 (4d91de4e4 2025-02-17)'",
            "Rust: got rustc 1.85.0 (4d91de4e4 2025-02-17), expected 1.90 or newer",
        ),
        ("echo 'error: no default toolchain' >&2; exit 1", "Rust: `rustc --version` fails"),
    ],
)
def test_what_a_build_lacks_is_said_with_the_way_to_get_it(backend, monkeypatch, tmp_path, rustc, expected):
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/nonexistent")
    program(tmp_path, "cargo", "exit 0")
    program(tmp_path, "cc", "exit 0")
    program(tmp_path, "rustc", rustc)
    found = backend.lacking()
    assert len(found) == bool(expected) and all(line.startswith(expected) for line in found)


def test_a_build_without_rust_and_linker_ends_with_both(backend, monkeypatch, capsys):
    def fails(*arguments):
        raise SystemExit(1)

    for build in ("build_wheel", "build_editable", "build_sdist", "prepare_metadata_for_build_wheel"):
        monkeypatch.setattr(backend.maturin, build, fails)
        with pytest.raises(SystemExit):
            getattr(backend, build)("folder")
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2 and all(line.startswith("dflash-rs cannot be built here: ") for line in lines)
        assert "cargo is not on PATH; install Rust 1.90 or newer" in lines[0] and "cc is not on PATH" in lines[1]


def test_no_toolchain_is_downloaded_unless_asked_for(backend, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("DFLASH_CUDA", "0")
    # As a build starts: the variable is not set, or set to nothing by who wants the download.
    monkeypatch.delenv("MATURIN_NO_INSTALL_RUST", raising=False)
    fresh = script("build_backend")
    assert fresh.get_requires_for_build_wheel() == fresh.get_requires_for_build_sdist() == []
    assert any("cargo is not on PATH" in line for line in fresh.lacking())
    monkeypatch.setenv("MATURIN_NO_INSTALL_RUST", "")
    fresh = script("build_backend")
    assert fresh.get_requires_for_build_wheel() == ["puccinialin"]
    assert not any("cargo" in line for line in fresh.lacking())


def test_the_oldest_rust_is_that_of_the_manifest(backend):
    manifest = (ROOT / "Cargo.toml").read_text(encoding="utf-8")
    assert 'rust-version = "{}.{}"'.format(*backend._OLDEST_RUST) in manifest


LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'accept' for 'sm_80'
ptxas info    : Function properties for accept
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 29 registers, used 1 barriers, 48 bytes smem, 536 bytes cmem[0]
ptxas info    : Compiling entry function 'accept' for 'sm_90a'
ptxas info    : Function properties for accept
    64 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 64 bytes cumulative stack size
"""


def test_the_compilers_log_becomes_a_table_that_reads_back():
    table = script("kernel_table")
    found = table.parse_log(LOG)
    assert found == {("accept", "sm_80"): table.Usage(29, 0, 48), ("accept", "sm_90a"): table.Usage(32, 40, 0)}
    assert table.parse_table(table.to_text(found, "13.0.88")) == found


def test_only_more_is_worse():
    table = script("kernel_table")
    old = {("a", "sm_80"): table.Usage(40, 0, 0), ("b", "sm_80"): table.Usage(40, 8, 0)}
    fewer = {("a", "sm_80"): table.Usage(38, 0, 0), ("b", "sm_80"): table.Usage(40, 0, 0)}
    worse, better = table.differences(old, fewer)
    assert not worse and len(better) == 2
    worse, better = table.differences(fewer, old)
    assert len(worse) == 2 and not better
    worse, _ = table.differences({("gone", "sm_80"): table.Usage(1, 0, 0)}, {("new", "sm_80"): table.Usage(1, 0, 0)})
    assert worse == ["gone sm_80: in the table, not compiled", "new sm_80: compiled, not in the table"]
