"""The build backend: maturin, and a CUDA compiler among the build requirements unless one is there or none is wanted.

DFLASH_CUDA=0   no kernels, nothing to download for them
otherwise       the compiler that build.rs would find outside an isolated build, else the pinned Python packages

Without Rust maturin would download a toolchain of several hundred megabytes into the user's cache and go on. Here that takes
MATURIN_NO_INSTALL_RUST set to nothing; else the build says what it needs, and ends. So does every build that fails: its last lines
are what this machine lacks.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import maturin
from maturin import get_requires_for_build_sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

_REQUIREMENTS = Path(__file__).with_name("nvcc-requirements.txt")
os.environ.setdefault("MATURIN_NO_INSTALL_RUST", "1")

# As in build.rs.
_OLDEST_NVCC = (12, 8)
# As in Cargo.toml, whose reader (cargo) is what may be missing.
_OLDEST_RUST = (1, 90)


def nvcc_requirements() -> list[str]:
    """The compiler's packages, pinned."""
    lines = _REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def packaged_nvcc() -> str | None:
    """The compiler of the Python package in this environment; torch brings a folder of the same name without it."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        nvcc = Path(folder) / "cu13" / "bin" / "nvcc"
        if nvcc.is_file():
            return str(nvcc)
    return None


def _new_enough(nvcc: str) -> bool:
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return False
    found = re.search(r"\bV(\d+)\.(\d+)", text)
    return found is not None and (int(found[1]), int(found[2])) >= _OLDEST_NVCC


def _needed() -> list[str]:
    """Requirements beyond maturin's own. The isolated build sees no package of the outside, only variables and PATH."""
    # Python wheels of the compiler exist for Linux alone.
    if os.environ.get("DFLASH_CUDA") == "0" or os.environ.get("DFLASH_NVCC") or not sys.platform.startswith("linux"):
        return []
    home = os.environ.get("CUDA_HOME")
    there = [
        shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None,
        shutil.which("nvcc"),
        packaged_nvcc(),
    ]
    return [] if any(nvcc and _new_enough(nvcc) for nvcc in there) else nvcc_requirements()


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    """Maturin's, and the CUDA compiler's."""
    return [*maturin.get_requires_for_build_wheel(config_settings), *_needed()]


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    """As for a wheel."""
    return [*maturin.get_requires_for_build_editable(config_settings), *_needed()]


def _says(*words: str) -> str | None:
    """What a program prints; nothing if it is not there or fails."""
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def lacking() -> list[str]:
    """What a build needs and this machine seems not to have, with the way to get it."""
    found, oldest = [], ".".join(map(str, _OLDEST_RUST))
    get_rust = "with rustup (https://rustup.rs) or the system's packages"
    if shutil.which("cargo") is None:
        # Where maturin may install it, it has.
        if os.environ.get("MATURIN_NO_INSTALL_RUST"):
            found.append(f"Rust: cargo is not on PATH; install Rust {oldest} or newer {get_rust}")
    else:
        version = _says("rustc", "--version")
        number = re.search(r"^rustc (\d+)\.(\d+)", version or "")
        if number is None:
            found.append("Rust: `rustc --version` fails; with rustup, `rustup default stable` chooses a toolchain")
        elif (int(number[1]), int(number[2])) < _OLDEST_RUST:
            found.append(f"Rust: got {version.strip()}, expected {oldest} or newer, {get_rust}")
    # Rust links with `cc` on these systems, unless told otherwise.
    if sys.platform.startswith(("linux", "darwin")) and shutil.which("cc") is None:
        found.append("linker: cc is not on PATH; install a C compiler, such as the system's package gcc")
    return found


@contextmanager
def _explained() -> Iterator[None]:
    """Lets a failure end with what is lacking."""
    try:
        yield
    except (Exception, SystemExit):
        for line in lacking():
            print(f"dflash-rs cannot be built here: {line}", file=sys.stderr, flush=True)
        raise


def _name_the_compiler() -> None:
    # build.rs would have to guess which Python this is.
    if os.environ.get("DFLASH_CUDA") != "0" and not os.environ.get("DFLASH_NVCC") and (nvcc := packaged_nvcc()):
        os.environ["DFLASH_NVCC"] = nvcc


@_explained()
def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None) -> str:
    """Maturin's, which asks cargo for the version."""
    return maturin.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel


@_explained()
def build_sdist(sdist_directory, config_settings=None) -> str:
    """Maturin's, which asks cargo for the files."""
    return maturin.build_sdist(sdist_directory, config_settings)


@_explained()
def build_wheel(wheel_directory, config_settings=None, metadata_directory=None) -> str:
    """A wheel, with kernels where there is a compiler."""
    _name_the_compiler()
    return maturin.build_wheel(wheel_directory, config_settings, metadata_directory)


@_explained()
def build_editable(wheel_directory, config_settings=None, metadata_directory=None) -> str:
    """An editable wheel, with kernels where there is a compiler."""
    _name_the_compiler()
    return maturin.build_editable(wheel_directory, config_settings, metadata_directory)
