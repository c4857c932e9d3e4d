"""Wheels for a Python that is not this one, and whether they are enough there."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterable
from email.parser import HeaderParser
from pathlib import Path

# pip takes each by its own name only.
_GLIBC = (5, 12, 17, *range(24, 40))
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in _GLIBC]
PLATFORMS += ["manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64", "any"]


def download(requirements: Iterable[str], python: str, folder: Path) -> None:
    """Fetches wheels of the requirements and of what they require, for CPython `python` ("3.12") on Linux with x86-64, into a folder."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--dest", str(folder)]
    command += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", python]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    done = subprocess.run([*command, *requirements], check=False)
    if done.returncode:
        sys.exit(f"pip could not fetch wheels for Python {python}: {' '.join(requirements)}")


def missing(wheels: Iterable[Path], wanted: Iterable[str], python: str, there: Iterable[str]) -> list[str]:
    """What `wanted` and what it requires still lack, as "NAME wanted by NAME", once `wheels` are installed on a machine that has `there`.

    pip looks at what a requirement says of versions and systems as if it were installing here; this looks at it as Python `python` on Linux
    would."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name, parse_wheel_filename

    environment = {
        "python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux", "platform_system": "Linux",
        "platform_machine": "x86_64", "implementation_name": "cpython", "platform_python_implementation": "CPython", "os_name": "posix",
    }  # fmt: skip
    have = {name: (version, path) for path in wheels for name, version, *_ in [parse_wheel_filename(path.name)]}
    satisfied = {canonicalize_name(name) for name in there}
    found, seen = [], set()
    waiting = [(Requirement(line), "the bundle") for line in wanted]
    while waiting:
        requirement, asker = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in satisfied or (name, frozenset(requirement.extras)) in seen:
            continue
        version, path = have.get(name, (None, None))
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name}{requirement.specifier} wanted by {asker}, got {version or 'none'}")
            continue
        seen.add((name, frozenset(requirement.extras)))
        for line in _requirements(path):
            inner = Requirement(line)
            extras = requirement.extras or {""}
            if inner.marker is None or any(inner.marker.evaluate(environment | {"extra": extra}) for extra in extras):
                waiting.append((inner, name))
    return sorted(found)


def _requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (
            name for name in archive.namelist() if name.endswith(".dist-info/METADATA") and name.count("/") == 1
        )
        return HeaderParser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist", [])
