"""Compiles the stand-in for CUDA's driver that runs the kernels' host-compiled logic."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def build(folder: Path) -> Path:
    """The library, named so that whoever opens libcuda.so.1 after it has been loaded gets it; skips without compilers."""
    c, cpp = shutil.which("cc"), shutil.which("c++")
    if c is None or cpp is None:
        pytest.skip("no C and C++ compiler")
    library, include = folder / "libcuda.so.1", ["-I", ROOT / "cuda"]
    fake = [c, "-c", "-O1", "-fPIC", "-DRUN_KERNELS", *include, "-o", folder / "fake.o"]
    subprocess.run([*fake, ROOT / "tests/python/fake_driver.c"], check=True)
    whole = [cpp, "-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
    whole += ["-Wl,-soname,libcuda.so.1", *include, "-o", library, folder / "fake.o", ROOT / "cuda/host_check.cpp"]
    subprocess.run([*whole, Path(__file__).parent / "driver.cpp"], check=True)
    return library
