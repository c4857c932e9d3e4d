"""What the package consists of: light import, metadata, names, size, and what `make` asks pip for."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata, resources
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_importing_the_package_loads_neither_torch_nor_a_serving_engine():
    code = (
        "import sys, dflash_rs\n"
        "heavy = {'torch', 'transformers', 'sglang', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there():
    import dflash_rs

    for name in dflash_rs.__all__:
        assert getattr(dflash_rs, name) is not None
        assert name in dir(dflash_rs)


def test_an_unknown_name_is_an_attribute_error():
    import dflash_rs

    with pytest.raises(AttributeError, match="nothing_like_this"):
        dflash_rs.nothing_like_this  # noqa: B018


def test_errors_are_one_family_and_bad_arguments_are_value_errors():
    from dflash_rs import CheckpointError, DflashError, InvalidArgument, OutOfPages

    assert issubclass(InvalidArgument, ValueError) and not issubclass(OutOfPages, ValueError)
    assert all(issubclass(kind, DflashError) for kind in (InvalidArgument, OutOfPages, CheckpointError))


def test_versions_agree_everywhere():
    project = script("requirements").load(ROOT / "Cargo.toml")
    version = project["package"]["version"]
    assert metadata.version("dflash-rs") == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_installed_metadata_names_the_command_the_extras_and_only_numpy():
    installed = metadata.distribution("dflash-rs")
    assert {"torch", "sglang", "bench", "dev"} <= set(installed.metadata.get_all("Provides-Extra"))
    core = [line for line in installed.requires if "extra ==" not in line]
    assert len(core) == 1 and core[0].startswith("numpy")
    commands = [point for point in installed.entry_points if point.group == "console_scripts"]
    assert [(point.name, point.value) for point in commands] == [("dflash-rs", "dflash_rs.cli:main")]
    assert any(str(path).endswith("LICENSE") for path in installed.files)
    assert any(str(path).endswith("py.typed") for path in installed.files)


@pytest.mark.pair
def test_the_bundled_pair_is_complete_and_small():
    from dflash_rs.doctor import ASSETS

    root = resources.files("dflash_rs") / "assets"
    sizes = [len((root / name).read_bytes()) for name in ASSETS]
    assert all(sizes) and sum(sizes) < 24e6


LISTING = """torch (2.15.0)
Available versions: 2.15.0, 2.14.1+cpu, 2.13.0+cpu, 2.13.0, 1.13.0
  INSTALLED: 2.13.0
"""


def test_a_cpu_build_of_the_tested_torch_is_preferred():
    requirements = script("requirements")
    versions = requirements.offered(LISTING)
    assert versions[0] == "2.15.0" and len(versions) == 5
    assert requirements.cpu_build(versions, "2.13.0") == "2.13.0+cpu"


def test_another_cpu_build_is_better_than_none():
    requirements = script("requirements")
    assert requirements.cpu_build(["2.10.0+cpu", "2.9.1+cpu", "2.8.0+cpu", "1.13.0+cpu"], "2.13.0") == "2.10.0+cpu"
    assert requirements.cpu_build(["2.8.0+cpu", "1.13.0+cpu", "2.13.0"], "2.13.0") is None
    assert requirements.cpu_build([], "2.13.0") is None


def test_requirements_follow_the_project_file_and_the_tested_versions():
    requirements = script("requirements")
    project = {
        "build-system": {"requires": ["maturin>=1"]},
        "project": {
            "dependencies": ["numpy>=1"],
            "optional-dependencies": {"torch": ["torch>=2.9,<3", "rich>=13"], "dev": ["rich>=13", "ruff>=0.1"]},
        },
    }
    pinned = {"torch": "2.13.0", "ruff": "0.5"}
    assert requirements.requirements(project, ["torch", "dev"], pinned, []) == [
        "numpy>=1",
        "torch==2.13.0",
        "rich>=13",
        "ruff==0.5",
    ]
    assert "torch==2.13.0+cpu" in requirements.requirements(project, ["torch"], pinned, ["2.13.0+cpu"])
    assert requirements.requirements(project, ["build"], pinned | {"maturin": "1.2"}, []) == [
        "numpy>=1",
        "maturin==1.2",
    ]


def planned(target: str, venv: Path) -> str:
    """The commands `make` would run for a target in a clone whose environment is `venv`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "--dry-run", target, f"VENV={venv}", f"SGLANG_VENV={venv}-sglang", "DFLASH_CUDA=0"],
        capture_output=True, text=True, cwd=ROOT, env=environment, check=True,
    )  # fmt: skip
    return done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_demo_installs_no_tools_of_the_tests_and_the_tests_do(tmp_path):
    demo, install, test, bench = (planned(t, tmp_path / "venv") for t in ("demo", "install", "test", "bench-demo"))
    need, tools = "requirements.py build torch gguf structured", "requirements.py torch gguf structured bench dev"
    assert need in demo and tools not in demo and need in install and tools not in install
    for more in (test, bench):
        # Once each, and the package before what looks at it.
        assert more.count(need) == more.count(tools) == more.count("maturin build") == 1
    lanes = next(line for line in test.splitlines() if "lanes.py" in line)
    assert all(
        name in lanes
        for name in (" lint ", " rust-test ", " stubs ", " python-test ", " test-processors", " sglang-test")
    )
    assert test.index(tools) < test.index("lanes.py") and test.index("maturin build") < test.index("lanes.py")
    # What is tested is what is published, linked by zig; a demo does without.
    assert (
        test.index("zig-requirements")
        < test.index("maturin build")
        < test.index("dist.py try dist")
        < test.index("lanes.py")
    )
    assert "zig-requirements" not in demo and "zig-requirements" not in install
    # After a demo nothing is compiled or fetched again but the tools.
    venv = tmp_path / "done"
    venv.mkdir()
    for stamp in (".stamp-venv", ".stamp-build", ".stamp-wheel", ".stamp-package"):
        (venv / stamp).touch()
    after = planned("python-test", venv)
    assert tools in after and need not in after and "maturin build" not in after
    assert "requirements.py" not in planned("demo", venv)


def test_extras_of_a_requirement_survive_its_pin():
    requirements = script("requirements")
    project = {"project": {"dependencies": [], "optional-dependencies": {"dev": ["a_b[md,x]>=1", "c[y]>=1"]}}}
    assert requirements.requirements(project, ["dev"], {"torch": "1", "a_b": "2.0"}, []) == [
        "a_b[md,x]==2.0",
        "c[y]>=1",
    ]


def test_every_tested_version_is_inside_the_range_that_users_get():
    from packaging.requirements import Requirement

    requirements = script("requirements")
    project = requirements.load(ROOT / "pyproject.toml")["project"]
    ranges = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    pinned = requirements.pins(ROOT / "scripts" / "tested-versions.txt")
    checked = 0
    for requirement in map(Requirement, ranges):
        if requirement.name in pinned:
            assert requirement.specifier.contains(pinned[requirement.name]), requirement
            checked += 1
    assert checked >= len(pinned)


def test_microbenchmark_results_are_boiled_down_to_microseconds(tmp_path):
    collect = script("collect_results")
    new = tmp_path / "plan" / "256" / "new"
    new.mkdir(parents=True)
    estimates = {kind: {"point_estimate": 1500.0} for kind in ("median", "mean")}
    (new / "estimates.json").write_text(json.dumps(estimates))
    assert collect.from_criterion(tmp_path) == {"plan/256": {"median_us": 1.5, "mean_us": 1.5}}
    path = tmp_path / "crossing.json"
    path.write_text(json.dumps({"benchmarks": [{"name": "a", "stats": {"median": 2e-6, "mean": 3e-6, "data": [1]}}]}))
    assert collect.from_pytest(path) == {"a": {"median_us": 2.0, "mean_us": 3.0}}


# --- what `make dist` refuses ------------------------------------------------------------------------------------------


def test_a_stray_file_and_a_lost_one_are_named():
    dist = script("dist")
    names = [
        "dflash_rs/__init__.py",
        "dflash_rs/models/dflash/model.py",
        "dflash_rs/__pycache__/cli.pyc",
        "dflash_rs/notes.txt",
    ]
    assert dist.content_problems(names, ["dflash_rs/*.py", "dflash_rs/py.typed"]) == [
        "dflash_rs/__pycache__/cli.pyc: should not be in it",
        "dflash_rs/notes.txt: should not be in it",
        "dflash_rs/py.typed: should be in it",
    ]


@pytest.mark.parametrize(
    ("name", "audited", "expected"),
    [
        ("manylinux_2_28_x86_64", "manylinux_2_28_x86_64", None),
        ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", None),
        ("manylinux_2_28_x86_64", "manylinux_2_34_x86_64", "got manylinux_2_34_x86_64"),
        ("manylinux_2_28_aarch64", "manylinux_2_28_x86_64", "got manylinux_2_28_x86_64"),
        ("manylinux_2_28_x86_64", "linux_x86_64", "finds no platform tag"),
        ("linux_x86_64", "manylinux_2_17_x86_64", "got linux_x86_64, expected manylinux"),
        ("manylinux_2_28_x86_64.linux_x86_64", "manylinux_2_17_x86_64", "expected manylinux"),
    ],
)
def test_a_wheel_keeps_what_its_platform_tag_promises(name, audited, expected):
    said = f'a.whl is consistent\nwith the following platform tag:\n"{audited}".\n'
    found = script("dist").tag_problems(f"dflash_rs-0.1.0-cp310-abi3-{name}.whl", said)
    assert len(found) == bool(expected) and all(expected in line for line in found)


def test_the_page_of_an_index_has_nothing_to_follow_a_relative_link_from():
    dist = script("dist")
    good = "# A\n\n[b](https://example.org/b) ![c](https://example.org/c.png)\n"
    assert dist.page_problems(good) == []
    assert dist.page_problems(good + "[d](docs/d.md)\n") == ["README.md: docs/d.md is not absolute"]
    assert dist.page_problems("# A\n\n[b](https://example.org/b)\n") == ["README.md: its picture does not show"]


def test_metadata_without_what_the_page_shows_is_refused():
    dist = script("dist")
    installed = metadata.distribution("dflash-rs")
    text = installed.read_text("METADATA")
    assert dist.metadata_problems(text, installed.version) == []
    bare = "\n".join(line for line in text.splitlines() if not line.startswith(("Author:", "Project-URL:")))
    assert dist.metadata_problems(bare, "9") == [
        f"Version: got {installed.version!r}, expected '9'",
        "Author: got none",
        "Project-URL: got 0, expected 4 or more",
    ]


def test_what_the_source_distribution_compiles_otherwise_is_no_difference_and_all_else_is(tmp_path):
    dist = script("dist")

    def wheel(name: str, **files: str) -> Path:
        path = tmp_path / name
        with zipfile.ZipFile(path, "w") as archive:
            for file, text in files.items():
                archive.writestr(file, text)
        return path

    one = wheel("one.whl", **{"a.py": "1", "b.py": "1", "core.so": "1", "x/WHEEL": "1", "x/METADATA": "1"})
    assert (
        dist.difference(
            one, wheel("two.whl", **{"a.py": "1", "b.py": "1", "core.so": "2", "x/WHEEL": "2", "x/METADATA": "1"})
        )
        == []
    )
    assert dist.difference(
        one, wheel("three.whl", **{"a.py": "2", "c.py": "1", "x/WHEEL": "1", "x/METADATA": "1"})
    ) == [
        "a.py: not the same",
        "b.py: not the same",
        "c.py: not the same",
        "core.so: not the same",
    ]


def test_a_python_that_does_not_start_is_not_tried(tmp_path, monkeypatch):
    dist = script("dist")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    for name, says in (
        ("python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127"),
        ("python3.13", "echo 3 13 cpython True"),
        ("python3.14", "echo 3 14 cpython False"),
        ("python3.11", "echo 3 9 cpython True"),
    ):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{says}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setattr(dist.sys, "executable", str(tmp_path / "nothing"))
    assert dist.interpreters() == {(3, 13): str(tmp_path / "bin" / "python3.13")}


def test_what_fails_in_one_environment_is_named_and_the_others_are_tried(tmp_path, monkeypatch, capsys):
    dist = script("dist")
    wheel = tmp_path / "dflash_rs-1-cp310-abi3-any.whl"
    monkeypatch.setattr(dist, "distributions", lambda folder: ([wheel], tmp_path / "dflash_rs-1.tar.gz"))
    monkeypatch.setattr(dist, "fitting", lambda wheels: wheels[0])
    monkeypatch.setattr(dist, "interpreters", lambda: {(3, 10): "python3.10", (3, 12): "python3.12"})
    monkeypatch.setattr(dist, "wheel_of", lambda *_: wheel)
    monkeypatch.setattr(dist, "difference", lambda ours, built: ["a.py: not the same"])
    asked = []

    def attempt(python, options, numpy="", torch_from="", **_):
        asked.append((python, tuple(options), numpy))
        return dist.must(
            [sys.executable, "-c", "import sys; sys.exit('broken' if sys.argv[1] == 'python3.12' else 0)", python]
        )

    monkeypatch.setattr(dist, "attempt", attempt)
    failed = dist.attempts(tmp_path, kernels=True, target=tmp_path)
    assert len(failed) == 2 and "sdist: its wheel's a.py: not the same" in failed
    assert any(line.startswith("wheel: ") and line.endswith("ended with 1:\nbroken") for line in failed)
    assert ("python3.10", ("--kernels",), dist.oldest_numpy()) in asked and ("python3.12", ("--kernels",), "") in asked
    assert (sys.executable, ("--kernels", "--torch"), "") in asked and len(asked) == 4
    assert "this machine has none: Python 3.11, 3.13" in capsys.readouterr().out


def test_a_tag_names_the_version_and_the_changelog_its_day():
    dist = script("dist")
    changelog = "# Changelog\n\n## [0.2.0] - 2026-11-30\n\n## [0.1.0] - unreleased\n"
    assert dist.release_problems("v0.2.0", "0.2.0", changelog) == []
    assert [line.partition(":")[0] for line in dist.release_problems("0.2.0", "0.2.0", changelog)] == ["tag"]
    assert [line.partition(":")[0] for line in dist.release_problems("v0.1.0", "0.1.0", changelog)] == ["CHANGELOG.md"]


def test_the_workflow_builds_both_architectures_and_publishes_without_a_token():
    """Its parts hang together: the names of jobs, folders and commands."""
    import yaml

    flows = {
        path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in (ROOT / ".github/workflows").glob("*.yml")
    }
    assert set(flows) == {"ci", "release"}
    build, publish = flows["release"]["jobs"]["build"], flows["release"]["jobs"]["publish"]
    assert {row["arch"] for row in build["strategy"]["matrix"]["include"]} == {"x86_64", "aarch64"}
    commands = [step.get("run", "") for step in build["steps"]]
    assert "make dist" in commands and any("dist.py tag" in command for command in commands)
    assert publish["needs"] == "build" and publish["permissions"] == {"id-token": "write"}
    assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
    assert any("make test" in step.get("run", "") for step in flows["ci"]["jobs"]["test"]["steps"])
