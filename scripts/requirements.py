"""Prints what `pip install` needs for the extras named on the command line, one requirement per line; `build` is what builds it.

pip cannot install a package's extras without building the package, and building is what these are needed for.

torch is special. Where the configured index offers CPU builds (versions ending in `+cpu`), the newest one in range is
asked for by name: it is a tenth of the size of the default build with its CUDA libraries. Elsewhere the plain
requirement stands and pip takes what it finds. No index is named here: pip's own configuration decides where to look.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def load(path: Path) -> dict:
    """A TOML file; Python 3.10 has no reader of its own, but its pip does."""
    try:
        import tomllib
    except ModuleNotFoundError:
        from pip._vendor import tomli as tomllib
    return tomllib.loads(path.read_text(encoding="utf-8"))


def offered(listing: str) -> list[str]:
    """The versions in the output of `pip index versions`."""
    found = re.search(r"^Available versions: (.*)$", listing, re.MULTILINE)
    return [version.strip() for version in found.group(1).split(",")] if found else []


def cpu_build(versions: list[str], pinned: str) -> str | None:
    """The CPU build to ask for: of the pinned version if there is one, else the newest of the same major version."""
    builds = [version for version in versions if version.endswith("+cpu")]
    if f"{pinned}+cpu" in builds:
        return f"{pinned}+cpu"

    def key(version: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", version.partition("+")[0])]

    builds = [version for version in builds if key(version)[:1] == key(pinned)[:1] and key(version) >= [2, 9]]
    return max(builds, key=key, default=None)


def pins(path: Path) -> dict[str, str]:
    """The versions that this commit was tested with."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return dict(line.split("==") for line in lines if line)


def requirements(project: dict, extras: list[str], pinned: dict[str, str], torch_versions: list[str]) -> list[str]:
    """Core dependencies and those of `extras`, the tested version where one is recorded. `build` stands for the build system."""
    wanted = list(project["project"]["dependencies"])
    for extra in extras:
        wanted += (
            project["build-system"]["requires"]
            if extra == "build"
            else project["project"]["optional-dependencies"][extra]
        )
    lines = []
    for requirement in wanted:
        name, extra = re.match(r"([A-Za-z0-9_.-]+)(\[[^]]*\])?", requirement).groups(default="")
        if name == "torch" and (cpu := cpu_build(torch_versions, pinned["torch"])):
            requirement = f"torch=={cpu}"
        elif name in pinned:
            requirement = f"{name}{extra}=={pinned[name]}"
        if requirement not in lines:
            lines.append(requirement)
    return lines


def main() -> None:
    """Prints the requirements of the extras in sys.argv."""
    extras = sys.argv[1:]
    versions: list[str] = []
    if "torch" in extras:
        listing = subprocess.run(
            [sys.executable, "-m", "pip", "index", "versions", "torch"], capture_output=True, text=True, check=False
        )
        versions = offered(listing.stdout)
    project = load(ROOT / "pyproject.toml")
    print("\n".join(requirements(project, extras, pins(ROOT / "scripts" / "tested-versions.txt"), versions)))


if __name__ == "__main__":
    main()
