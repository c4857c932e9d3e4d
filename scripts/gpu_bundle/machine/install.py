"""Makes an environment out of the wheels beside this file, on a machine that fetches nothing: python install.py ENVIRONMENT

The Python that runs this has to have torch. Its packages are seen in the new environment; what is there in another version than wanted stays as it
is and is installed beside, in front. ENVIRONMENT/bin/python runs everything else. Removes an environment that is there already.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent


def seen_here() -> list[str]:
    """Folders of packages of this Python. One that is an environment itself shares them with no other by itself."""
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    return list(dict.fromkeys(path for path in paths if Path(path).is_dir()))


def make(environment: Path, wheels: Path, wanted: list[str], python: str | None = None) -> Path:
    """The Python of the new environment, in which `wanted` is installed from `wheels` alone. Ends the program with pip's words if that fails."""
    if python is not None and python != ".".join(map(str, sys.version_info[:2])):
        sys.exit(f"Python: got {sys.version.split()[0]}, expected {python}: the wheels are for that one")
    if importlib.util.find_spec("torch") is None:
        sys.exit(
            f"torch: got none with {sys.executable}, expected the machine's Python that has it; the bundle carries none"
        )
    pip = sorted(wheels.glob("pip-*.whl"))
    if not pip:
        sys.exit(f"pip: got none in {wheels}, expected its wheel beside the others: unpack the archive `base`")
    if environment.exists():
        shutil.rmtree(environment)
    venv.EnvBuilder(system_site_packages=True, symlinks=True, with_pip=False).create(environment)
    inside = environment / "bin" / "python"
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_", "VIRTUAL_ENV"))
    }
    purelib = subprocess.run(
        [inside, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], env=clean, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    added = "".join(f"import site; site.addsitedir({path!r})\n" for path in seen_here())
    (Path(purelib) / "zz_machine.pth").write_text(added, encoding="utf-8")
    command = [
        inside,
        pip[-1] / "pip",
        "--isolated",
        "--disable-pip-version-check",
        "--quiet",
        "install",
        "--no-cache-dir",
    ]
    done = subprocess.run([*command, "--no-index", "--find-links", wheels, *wanted], env=clean, check=False)
    if done.returncode:
        sys.exit(f"pip could not install {' '.join(wanted)} from {wheels} alone")
    return inside


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment", type=Path, metavar="ENVIRONMENT", help="folder to make")
    args = parser.parse_args()
    python = (HERE / "python.txt").read_text(encoding="utf-8").strip()
    wanted = (HERE / "wanted.txt").read_text(encoding="utf-8").split("\n")
    inside = make(args.environment, HERE / "wheels", [line for line in wanted if line], python)
    code = (
        "import torch, transformers, dflash_rs; print(f'dflash-rs {dflash_rs.__version__}, torch {torch.__version__}, "
        "transformers {transformers.__version__}, GPU: {torch.cuda.is_available()}')"
    )
    return subprocess.run([inside, "-c", code], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
