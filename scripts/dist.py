"""Checks the distributions in a folder as an index would, and installs them as a user would; `make dist` builds them before.

    python scripts/dist.py check dist             names, contents, metadata, README, sizes, the platform tag of every wheel
    python scripts/dist.py try dist               fresh environments of every Python found; the wheel, and one built from the sdist
    python scripts/dist.py try dist --kernels     besides, both have to contain CUDA kernels
    python scripts/dist.py tag v0.1.0             whether a release of this tag is what the tree says

Needs the `dev` extra. Exit code 1 after a line for everything that is not as it should be.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from email.parser import HeaderParser
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What the index takes per file, unless a project asks for more.
LARGEST = 100_000_000
OLDEST_PYTHON = (3, 10)
NEWEST_PYTHON = (3, 13)

# Everything in a wheel matches one of these, and each of these is there.
WHEEL_FILES = (
    "dflash_rs/*.py",
    "dflash_rs/py.typed",
    "dflash_rs/_core.pyi",
    "dflash_rs/_core.abi3.so",
    "dflash_rs/assets/MODEL_CARD.md",
    "dflash_rs/assets/prompts.json",
    "dflash_rs/assets/openings.jsonl",
    "dflash_rs/assets/bench_prompts.jsonl",
    "dflash_rs/assets/smollm2-draft/MODEL_CARD.md",
    "dflash_rs/assets/smollm2-draft/*.json",
    "dflash_rs/assets/smollm2-draft/model.safetensors",
    "dflash_rs/assets/draft/*.json",
    "dflash_rs/assets/draft/model.safetensors",
    "dflash_rs/assets/target/*.json",
    "dflash_rs/assets/target/model.safetensors",
    "*.dist-info/METADATA",
    "*.dist-info/WHEEL",
    "*.dist-info/RECORD",
    "*.dist-info/entry_points.txt",
    "*.dist-info/licenses/LICENSE",
    "*.dist-info/sboms/dflash-rs.cyclonedx.json",
)
# The same for a source distribution, below its one folder. `benches` and `tests/host_check` are named by the crate's manifest.
SDIST_FILES = (
    "PKG-INFO",
    "CHANGELOG.md",
    "LICENSE",
    "README.md",
    "Cargo.toml",
    "Cargo.lock",
    "build.rs",
    "pyproject.toml",
    "benches/*.rs",
    "cuda/*.cu",
    "cuda/*.cuh",
    "cuda/*.h",
    "cuda/host_check.cpp",
    "cuda/README.md",
    "cuda/registers.txt",
    "cuda/instructions.txt",
    "docs/*.md",
    "python/dflash_rs/*.py",
    "python/dflash_rs/py.typed",
    "python/dflash_rs/_core.pyi",
    "python/dflash_rs/assets/MODEL_CARD.md",
    "python/dflash_rs/assets/prompts.json",
    "python/dflash_rs/assets/openings.jsonl",
    "python/dflash_rs/assets/bench_prompts.jsonl",
    "python/dflash_rs/assets/smollm2-draft/MODEL_CARD.md",
    "python/dflash_rs/assets/smollm2-draft/*.json",
    "python/dflash_rs/assets/smollm2-draft/model.safetensors",
    "python/dflash_rs/assets/draft/*.json",
    "python/dflash_rs/assets/draft/model.safetensors",
    "python/dflash_rs/assets/target/*.json",
    "python/dflash_rs/assets/target/model.safetensors",
    "scripts/build_backend.py",
    "scripts/nvcc-requirements.txt",
    "src/*.rs",
    "tests/host_check/Cargo.toml",
    "tests/host_check/*.rs",
    "tests/host_check/geometry.cpp",
)


def content_problems(names: Iterable[str], expected: Iterable[str]) -> list[str]:
    """Names that nobody asked for, and patterns (`*` crosses folders) that nothing matches."""
    names, expected = sorted(names), list(expected)
    stray = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in expected)]
    lost = [pattern for pattern in expected if not any(fnmatchcase(name, pattern) for name in names)]
    return [f"{name}: should not be in it" for name in stray] + [f"{pattern}: should be in it" for pattern in lost]


def metadata_problems(text: str, version: str) -> list[str]:
    """What the index's page of a version is made from."""
    fields = HeaderParser().parsestr(text)
    found = []
    for field, expected in (("Name", "dflash-rs"), ("Version", version), ("License-Expression", "Apache-2.0")):
        if fields.get(field) != expected:
            found.append(f"{field}: got {fields.get(field)!r}, expected {expected!r}")
    for field in ("Summary", "Author", "Keywords", "Requires-Python", "License-File"):
        if not fields.get(field):
            found.append(f"{field}: got none")
    for field, least in (("Classifier", 8), ("Project-URL", 4), ("Provides-Extra", 4)):
        if len(fields.get_all(field, [])) < least:
            found.append(f"{field}: got {len(fields.get_all(field, []))}, expected {least} or more")
    return found + page_problems(fields.get_payload())


def page_problems(markdown: str) -> list[str]:
    """Links and pictures that would lead nowhere from the index's page, as that page is rendered."""
    from readme_renderer.markdown import render

    page = render(markdown, variant="GFM")
    if page is None:
        return ["README.md: does not render"]
    targets = re.findall(r'\b(?:href|src)="([^"]*)"', page)
    found = [f"README.md: {target} is not absolute" for target in targets if not target.startswith(("https://", "#"))]
    if "<img" not in page:
        found.append("README.md: its picture does not show")
    return found


def platform_tags(name: str) -> list[str]:
    """The platforms of a wheel's name."""
    return name.removesuffix(".whl").split("-")[-1].split(".")


def tag_problems(name: str, audited: str) -> list[str]:
    """Whether the index takes a wheel of this name and the wheel keeps what it promises; `audited` is what auditwheel says."""
    shape = r"manylinux_(\d+)_(\d+)_(\w+)"
    tags = [re.fullmatch(shape, tag) for tag in platform_tags(name)]
    if not all(tags):
        return [
            f"platform: got {'.'.join(platform_tags(name))}, expected manylinux tags: an index takes no others from Linux"
        ]
    found = re.search(rf'platform tag:\s*"({shape})"', audited)
    if found is None:
        return [f"auditwheel finds no platform tag: {audited.strip()}"]
    needed, machine = (int(found[2]), int(found[3])), found[4]
    if any(needed > (int(tag[1]), int(tag[2])) or machine != tag[3] for tag in tags):
        return [f"platform: got {found[1]} by what it links to, expected what its name says"]
    return []


def tool(*words: str) -> subprocess.CompletedProcess[str]:
    """A module of this environment as a program; both its outputs in one."""
    return subprocess.run(
        [sys.executable, "-m", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


def distributions(folder: Path) -> tuple[list[Path], Path]:
    """The wheels of a folder and its one source distribution."""
    wheels, sources = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    if not wheels or len(sources) != 1:
        sys.exit(f"{folder}: got {len(wheels)} wheels and {len(sources)} source distributions, expected some and one")
    return wheels, sources[0]


def project_version() -> str:
    """The version of the crate, which is the package's."""
    text = (ROOT / "Cargo.toml").read_text(encoding="utf-8")
    return re.search(r'^version = "(.+)"$', text, re.MULTILINE)[1]


def release_problems(tag: str, version: str, changelog: str) -> list[str]:
    """Whether tag, crate and changelog name one version, and the changelog its day."""
    found = [] if tag == f"v{version}" else [f"tag: got {tag}, expected v{version}, the version in Cargo.toml"]
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        found.append(f"CHANGELOG.md: got no heading of {version} with a day, expected: ## [{version}] - YYYY-MM-DD")
    return found


def wheel_problems(wheel: Path, version: str) -> list[str]:
    """Everything about one wheel but whether it works."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        found = content_problems(names, WHEEL_FILES)
        text = archive.read(f"dflash_rs-{version}.dist-info/METADATA").decode()
    if not wheel.name.startswith(f"dflash_rs-{version}-cp310-abi3-"):
        found.append(f"name: got {wheel.name}, expected dflash_rs-{version}-cp310-abi3-*")
    return [
        *found,
        *metadata_problems(text, version),
        *tag_problems(wheel.name, tool("auditwheel", "show", str(wheel)).stdout),
    ]


def sdist_problems(sdist: Path, version: str) -> list[str]:
    """The same for a source distribution."""
    top = f"dflash_rs-{version}"
    if sdist.name != f"{top}.tar.gz":
        return [f"name: got {sdist.name}, expected {top}.tar.gz"]
    with tarfile.open(sdist) as archive:
        members = [member for member in archive.getmembers() if not member.isdir()]
        odd = [f"{member.name}: not a plain file" for member in members if not member.isfile()]
        outside = [f"{member.name}: not below {top}" for member in members if not member.name.startswith(f"{top}/")]
        text = archive.extractfile(f"{top}/PKG-INFO").read().decode()
    names = [member.name.removeprefix(f"{top}/") for member in members]
    return odd + outside + content_problems(names, SDIST_FILES) + metadata_problems(text, version)


def check(folder: Path) -> list[str]:
    """Everything that is wrong in the folder, one line each."""
    version = project_version()
    wheels, sdist = distributions(folder)
    found = [(wheel, problem) for wheel in wheels for problem in wheel_problems(wheel, version)]
    found += [(sdist, problem) for problem in sdist_problems(sdist, version)]
    for path in (*wheels, sdist):
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
        if path.stat().st_size > LARGEST:
            found.append((path, f"size: got {path.stat().st_size}, expected at most {LARGEST} bytes"))
        twine = tool("twine", "--no-color", "check", "--strict", str(path))
        if twine.returncode:
            found.append((path, f"twine check: {twine.stdout.strip()}"))
    return [f"{path.name}: {problem}" for path, problem in found]


def interpreters() -> dict[tuple[int, int], str]:
    """The Pythons of this machine that start, can make environments and are not too old: by version, the first of each."""
    minors = range(OLDEST_PYTHON[1], NEWEST_PYTHON[1] + 6)
    candidates = [sys.executable, *(shutil.which(f"python3.{minor}") or "" for minor in minors)]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    candidates += sorted(str(path) for path in pyenv.glob("3.*/bin/python3"))
    found: dict[tuple[int, int], str] = {}
    for candidate in filter(None, candidates):
        # A shim may stand for a Python that is not there, a system's Python may come without what makes environments, and one
        # without the lock takes other wheels.
        code = (
            "import ensurepip, sys, venv; locked = getattr(sys, '_is_gil_enabled', lambda: True)(); "
            "print(*sys.version_info[:2], sys.implementation.name, locked)"
        )
        try:
            done = subprocess.run([candidate, "-c", code], capture_output=True, text=True, check=False)
        except OSError:
            continue
        words = done.stdout.split()
        if (
            done.returncode == 0
            and words[2:] == ["cpython", "True"]
            and (int(words[0]), int(words[1])) >= OLDEST_PYTHON
        ):
            found.setdefault((int(words[0]), int(words[1])), candidate)
    return dict(sorted(found.items()))


def must(words: list[str], **options) -> str:
    """The output of a command that has to succeed."""
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout.rstrip()}")
    return done.stdout


def clean_environment() -> dict[str, str]:
    """This process's, without what would let an environment see more than what is in it."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
    return {name: value for name, value in os.environ.items() if name not in hidden}


def unpacked(sdist: Path) -> Path:
    """The folder of the source distribution, unpacked outside the checkout, as if its files had been written now.

    Always at the same place for one checkout: cargo keeps what it compiles by path, and would keep it for every place anew. The
    files' own dates are all the same, so cargo would take changed ones for unchanged.
    """
    owner = hashlib.sha256(str(ROOT).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"dflash-rs-sdist-{owner}"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(mode=0o700)
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            member.mtime = time.time()
            archive.extract(member, folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder / sdist.name.removesuffix(".tar.gz")


def wheel_of(sdist: Path, folder: Path, target: Path) -> Path:
    """The wheel that the source distribution builds here.

    Unoptimised, and with this environment's maturin and nvcc and this checkout's folder of what is compiled already: what the
    source distribution has to show is that it is complete.
    """
    environment = clean_environment()
    environment |= {"CARGO_TARGET_DIR": str(target), "MATURIN_PEP517_ARGS": "--profile dev"}
    # The same compiler as the checkout's, which the source distribution does not ask for.
    channel = re.search(r'^channel = "(.+)"$', (ROOT / "rust-toolchain.toml").read_text(encoding="utf-8"), re.MULTILINE)
    environment["RUSTUP_TOOLCHAIN"] = channel[1]
    environment["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), environment["PATH"]])
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--quiet",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
    ]
    source = unpacked(sdist)
    try:
        must([*pip, "--wheel-dir", str(folder), str(source)], env=environment, cwd=folder)
    finally:
        shutil.rmtree(source.parent)
    (wheel,) = folder.glob("*.whl")
    return wheel


def difference(ours: Path, built: Path) -> list[str]:
    """What the wheel built from the source distribution has otherwise than the one built from the checkout."""

    def files(path: Path) -> dict[str, bytes | None]:
        compiled = ("*.so", "*/WHEEL", "*/RECORD", "*/sboms/*")
        with zipfile.ZipFile(path) as archive:
            return {
                name: None if any(fnmatchcase(name, pattern) for pattern in compiled) else archive.read(name)
                for name in archive.namelist()
            }

    one, other = files(ours), files(built)
    return sorted(
        f"{name}: not the same" for name in one.keys() | other.keys() if one.get(name, b"") != other.get(name, b"")
    )


def fitting(wheels: list[Path]) -> Path:
    """The wheel for this machine."""
    from packaging.tags import sys_tags
    from packaging.utils import parse_wheel_filename

    tags = set(sys_tags())
    for wheel in wheels:
        if parse_wheel_filename(wheel.name)[3] & tags:
            return wheel
    sys.exit(f"wheels: got {', '.join(wheel.name for wheel in wheels)}, expected one that this Python takes")


def oldest_numpy() -> str:
    """The oldest NumPy that pyproject.toml admits."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^dependencies = \["numpy>=([\d.]+),', text, re.MULTILINE)[1]


def attempt(python: str, wheel: Path, folder: Path, options: list[str], numpy: str = "", torch_from: str = "") -> str:
    """Installs a wheel into a fresh environment and runs scripts/smoke.py there; what it said.

    `numpy` is a version to ask for; `torch_from` a folder of packages that the environment sees besides, in place of installing
    what the wheel depends on.
    """
    environment = clean_environment()
    must([python, "-m", "venv", str(folder / "env")], env=environment)
    inside = str(folder / "env" / "bin" / "python")
    pip = [inside, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--only-binary", ":all:"]
    if torch_from:
        must([*pip, "--no-deps", str(wheel)], env=environment)
        packages = must(
            [inside, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], env=environment
        ).strip()
        (Path(packages) / "zz_shared.pth").write_text(torch_from + "\n", encoding="utf-8")
    else:
        must([*pip, str(wheel), *([f"numpy=={numpy}"] if numpy else [])], env=environment)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    return must([inside, "-I", str(ROOT / "scripts" / "smoke.py"), *options], env=environment, cwd=elsewhere).strip()


def attempts(folder: Path, kernels: bool, target: Path) -> list[str]:
    """Installs and tries everything; one line for whatever failed."""
    wheels, sdist = distributions(folder)
    wheel = fitting(wheels)
    pythons = interpreters()
    minors = range(OLDEST_PYTHON[1], NEWEST_PYTHON[1] + 1)
    if missing := [f"3.{minor}" for minor in minors if (3, minor) not in pythons]:
        print(f"not tried, because this machine has none: Python {', '.join(missing)}")
    options = ["--kernels"] if kernels else []
    failed: list[str] = []

    def one(name: str, **arguments) -> None:
        start = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory(prefix="dflash-rs-") as temporary:
                said = attempt(folder=Path(temporary), **arguments)
        except RuntimeError as error:
            failed.append(f"{name}: {error}")
            return
        print(f"{name}: {said} ({time.perf_counter() - start:.0f} s)", flush=True)

    with tempfile.TemporaryDirectory(prefix="dflash-rs-") as temporary, ThreadPoolExecutor(2) as pool:
        jobs = []
        for version, python in pythons.items():
            # The oldest NumPy has no wheel for the newest Pythons.
            numpy = oldest_numpy() if version == OLDEST_PYTHON else ""
            arguments = {"python": python, "wheel": wheel, "options": options, "numpy": numpy}
            jobs.append(pool.submit(one, "wheel", **arguments))
        shared = {"torch_from": sysconfig.get_path("purelib"), "options": [*options, "--torch"]}
        jobs.append(pool.submit(one, "wheel with torch", python=sys.executable, wheel=wheel, **shared))
        start = time.perf_counter()
        try:
            built = wheel_of(sdist, Path(temporary), target)
        except RuntimeError as error:
            failed.append(f"sdist: {error}")
        else:
            print(f"sdist: builds a wheel ({time.perf_counter() - start:.0f} s)", flush=True)
            failed += [f"sdist: its wheel's {line}" for line in difference(wheel, built)]
            jobs.append(pool.submit(one, "sdist", python=sys.executable, wheel=built, options=options))
        for job in jobs:
            job.result()
    return failed


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["check", "try", "tag"])
    parser.add_argument("subject", help="the folder of the distributions, or the tag")
    parser.add_argument("--kernels", action="store_true", help="the distributions have to contain CUDA kernels")
    parser.add_argument("--target", type=Path, default=ROOT / "target", help="cargo's folder (default: the checkout's)")
    arguments = parser.parse_args()
    if arguments.what == "tag":
        changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
        failed = release_problems(arguments.subject, project_version(), changelog)
    elif arguments.what == "check":
        failed = check(Path(arguments.subject).resolve())
    else:
        failed = attempts(Path(arguments.subject).resolve(), arguments.kernels, arguments.target.resolve())
    for line in failed:
        print(line, file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
