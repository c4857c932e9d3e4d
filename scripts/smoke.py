"""Whether the installed package works: run by the Python it is installed in, from a folder that is not a checkout.

    python smoke.py             what NumPy alone has to be enough for
    python smoke.py --torch     the bundled pair generates
    python smoke.py --kernels   besides, the build contains CUDA kernels

Ends with exit code 0 and one line, or with the first thing that is not as it should be.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from importlib import metadata, resources
from pathlib import Path


def expect(what: str, got: object, expected: object) -> None:
    """Ends the program unless both are equal."""
    if got != expected:
        sys.exit(f"{what}: got {got!r}, expected {expected!r}")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """The installed command, as a shell would find it."""
    command = Path(sysconfig.get_path("scripts")) / "dflash-rs"
    return subprocess.run([str(command), *words], capture_output=True, text=True, check=False)


def without_torch() -> None:
    """Importing, the core on arrays, and an error that says what is missing."""
    import numpy as np

    import dflash_rs
    from dflash_rs import _core, verify

    expect("an import", Path(dflash_rs.__file__).resolve().is_relative_to(Path(sys.prefix).resolve()), True)
    for name in dflash_rs.__all__:
        getattr(dflash_rs, name)
    expect("torch after an import of every public name", "torch" in sys.modules, False)
    accepted, bonus = verify.walk(np.array([[5, 7, 9]]), np.array([[5, 7, 8, 1]]))
    expect("verify.walk", (accepted.tolist(), bonus.tolist()), ([2], [8]))
    try:
        verify.walk(np.array([[0.5]]), np.array([[5, 7]]))
    except dflash_rs.InvalidArgument:
        pass
    else:
        sys.exit("verify.walk: got through with drafts that are float64, expected InvalidArgument")

    installed = metadata.distribution("dflash-rs")
    expect("versions", {dflash_rs.__version__, _core.__version__}, {installed.version})
    root = resources.files("dflash_rs")
    for name in ("py.typed", "_core.pyi", "assets/target/model.safetensors", "assets/draft/model.safetensors"):
        expect(name, (root / name).is_file(), True)
    expect("--version", run("--version").stdout.strip(), f"dflash-rs {installed.version}")
    module = subprocess.run(
        [sys.executable, "-m", "dflash_rs", "--version"], capture_output=True, text=True, check=False
    )
    expect("python -m dflash_rs --version", module.stdout.strip(), f"dflash-rs {installed.version}")


def refuses_without_torch() -> None:
    """The command names the extra that it needs, in one line."""
    from dflash_rs import extras

    done = run("generate", "import os")
    expect("exit code of generate without torch", done.returncode, 1)
    expect(
        "its lines",
        done.stderr.splitlines(),
        [f"dflash-rs: error: LLM needs torch and transformers (No module named 'torch'): {extras.install('torch')}"],
    )


def with_torch() -> None:
    """The bundled pair, by the command; `doctor` generates with it, with and without drafts."""
    done = run("doctor")
    expect("exit code of doctor", (done.returncode, done.stdout if done.returncode else ""), (0, ""))
    done = run("generate", "import os", "--json", "--max-tokens", "16")
    expect("exit code of generate", (done.returncode, done.stderr if done.returncode else ""), (0, ""))
    output = json.loads(done.stdout)
    expect("finish_reason", output["finish_reason"], "length")
    expect("tokens", len(output["token_ids"]), 16)


def main(options: set[str]) -> None:
    """Runs what the command line asks for."""
    if unknown := options - {"--torch", "--kernels"}:
        sys.exit(f"options: got {' '.join(sorted(unknown))}, expected --torch, --kernels")
    without_torch()
    from dflash_rs import _core

    built = _core.cuda_info()
    if "--kernels" in options:
        expect("the build contains CUDA kernels", bool(built["architectures"] and built["fatbin_bytes"]), True)
    if "--torch" in options:
        with_torch()
    else:
        refuses_without_torch()
    numpy = metadata.version("numpy")
    kernels = " ".join(built["architectures"]) or "none"
    print(f"Python {sys.version.split()[0]}, numpy {numpy}, kernels {kernels}: works")


if __name__ == "__main__":
    main(set(sys.argv[1:]))
