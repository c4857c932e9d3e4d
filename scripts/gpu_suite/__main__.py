"""Everything that needs a GPU, with one command, on a machine that fetches nothing: python scripts/gpu_suite --wheel WHEEL

    tests      tests/gpu: every kernel against float64, outputs poisoned, fresh random inputs
    sanitizer  the same calls on small shapes under compute-sanitizer (memcheck, racecheck, synccheck)
    kernels    time of every kernel, as a share of measured copy bandwidth, beside torch and SGLang on the same inputs
    engine     dflash-rs bench --suite demo on the GPU
    trees      the same with draft trees

Needs Python with torch for CUDA, numpy, and pytest for `tests`; no Rust and no nvcc. The wheel is built elsewhere (make
install leaves it in dist/) and unpacked into a temporary folder; nothing is installed. Without --wheel the installed package is used.
SGLang 0.5.17 or 0.5.23 takes part in `kernels` where it is installed or unpacked in a folder on PYTHONPATH.

Exit code 0: everything that was asked for ran and passed; 1: something failed; 2: no GPU, or a part that cannot run here. A part that
did not run is reported as such, never as passed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PASSED, FAILED, NOT_RUN = "passed", "FAILED", "not run"


def run(command: list[str], environment: dict[str, str], timeout: float) -> tuple[int, str]:
    """Exit code and output, which is shown as it comes."""
    print("+", " ".join(map(str, command)), flush=True)
    done = subprocess.Popen(
        list(map(str, command)), env=environment, cwd=tempfile.gettempdir(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline, lines = time.monotonic() + timeout, []
    for line in done.stdout:
        print(line, end="", flush=True)
        lines.append(line)
        if time.monotonic() > deadline:
            done.kill()
            lines.append(f"killed after {timeout:.0f} s\n")
            break
    return done.wait(), "".join(lines)


def machine(environment: dict[str, str]) -> dict:
    """What there is, found by another process so that this one holds no context."""
    code = (
        "import json, torch, dflash_rs\n"
        "from dflash_rs import _core\n"
        "info = {'dflash_rs': dflash_rs.__version__, 'torch': torch.__version__, 'cuda': _core.cuda_info()}\n"
        "info['gpu'] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None\n"
        "print(json.dumps(info))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"dflash_rs and torch cannot be imported:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def part_tests(environment: dict[str, str], folder: Path) -> dict:
    """Passes when tests ran, none failed and none was skipped."""
    report = folder / "tests.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        ROOT / "tests" / "gpu",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
    ]
    code, _ = run([*command, "-c", os.devnull, "--rootdir", ROOT, "--import-mode=importlib"], environment, 1200)
    if not report.is_file():
        return {"status": NOT_RUN, "detail": f"pytest ended with code {code}"}
    suite = next(xml.etree.ElementTree.parse(report).iter("testsuite"))
    total, skipped = int(suite.get("tests")), int(suite.get("skipped"))
    bad = int(suite.get("failures")) + int(suite.get("errors"))
    good = code == 0 and bad == 0 and skipped == 0 and total > 0
    detail = f"{total - skipped - bad} passed, {bad} failed, {skipped} skipped"
    return {"status": PASSED if good else FAILED, "detail": detail}


def sanitizer_path() -> str | None:
    """compute-sanitizer on PATH, in CUDA_HOME, or where CUDA is usually installed."""
    found = shutil.which("compute-sanitizer")
    for home in filter(None, (os.environ.get("CUDA_HOME"), "/usr/local/cuda")):
        found = found or shutil.which("compute-sanitizer", path=str(Path(home) / "bin"))
    return found


def part_sanitizer(environment: dict[str, str], folder: Path) -> dict:
    """Three tools over small.py."""
    tool = sanitizer_path()
    if tool is None:
        return {"status": NOT_RUN, "detail": "no compute-sanitizer on PATH, in CUDA_HOME or in /usr/local/cuda"}
    results = {}
    for check in ("memcheck", "racecheck", "synccheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9"]
        code, text = run([*command, sys.executable, HERE / "small.py"], environment, 900)
        results[check] = "clean" if code == 0 and "small shapes done" in text else f"code {code}"
    clean = all(result == "clean" for result in results.values())
    return {"status": PASSED if clean else FAILED, "detail": ", ".join(f"{k} {v}" for k, v in results.items())}


def part_kernels(environment: dict[str, str], folder: Path) -> dict:
    """The table of kernels.py."""
    report = folder / "kernels.json"
    # For SGLang alone, which is looked for after everything else has been imported.
    paths = [str(Path(path).resolve()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = environment | {"GPU_SUITE_PEERS_PATH": os.pathsep.join(paths)}
    code, _ = run([sys.executable, HERE / "kernels.py", report], environment, 900)
    if not report.is_file():
        return {"status": FAILED, "detail": f"code {code}"}
    results = json.loads(report.read_text(encoding="utf-8"))
    detail = f"code {code}, {len(results['rows'])} rows" if code else f"copy {results['copy_gb_s']:.0f} GB/s"
    return {"status": FAILED if code else PASSED, "detail": detail, "results": results}


def part_engine(environment: dict[str, str], folder: Path) -> dict:
    """The bundled pair on the GPU."""
    return bench(environment, folder / "engine.json", "1,2,4,8,16,32,64")


def part_trees(environment: dict[str, str], folder: Path) -> dict:
    """The bundled pair on the GPU, drafting trees."""
    return bench(environment, folder / "trees.json", "1,4,16,64", "--tree-nodes", "63")


def bench(environment: dict[str, str], report: Path, concurrency: str, *options: str) -> dict:
    """Plain against DFlash at each concurrency."""
    command = [sys.executable, "-m", "dflash_rs", "bench", "--suite", "demo", "--device", "cuda", "--json", report]
    command += ["--concurrency", concurrency, "--max-tokens", "96", "--repeat", "2", "--profile", *options]
    code, _ = run(command, environment, 900)
    if not report.is_file():
        return {"status": FAILED, "detail": f"code {code}"}
    results = json.loads(report.read_text(encoding="utf-8"))
    return {"status": PASSED if code == 0 else FAILED, "detail": f"code {code}", "results": results}


PARTS = {
    "tests": part_tests,
    "sanitizer": part_sanitizer,
    "kernels": part_kernels,
    "engine": part_engine,
    "trees": part_trees,
}


def kernel_rows(results: dict) -> list[str]:
    """One line per kernel, and one on SGLang."""
    lines = [f"{'kernel':<28} {'shape':<34} {'us':>9} {'% copy':>7} {'torch us':>9} {'sglang us':>9}"]
    for row in results["rows"]:
        share = f"{100 * row['bandwidth_share']:.0f}" if row.get("bandwidth_share") else "-"
        peer = f"{row['torch_us']:.1f}" if row.get("torch_us") else "-"
        other = f"{row['sglang_us']:.1f}" if row.get("sglang_us") else "-"
        line = f"{row['kernel']:<28} {row['shape']:<34} {row['us']:>9.1f} {share:>7} {peer:>9} {other:>9}"
        lines.append("  ".join((line, *map(sglang_note, row.get("sglang", ())))))
    return [*lines, f"SGLang: {results['sglang']['detail']}"]


def sglang_note(peer: dict) -> str:
    """What became of one of SGLang's kernels."""
    if "us" in peer:
        return f"{peer['kernel']} {peer['us']:.1f}{' (eager)' if peer['timed'] == 'eager' else ''}"
    return f"{peer['kernel']} " + (
        f"differs ({peer['differs']})" if "differs" in peer else f"failed ({peer['failed']})"
    )


def main() -> int:
    """Runs the parts and prints the table last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; default: all")
    parser.add_argument("--wheel", type=Path, help="the package to test, as built by `make install` (dist/*.whl)")
    parser.add_argument("--json", type=Path, help="write everything that was found there")
    args = parser.parse_args()
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}, expected {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory(prefix="dflash-gpu-") as name:
        folder = Path(name)
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        if args.wheel is not None:
            with zipfile.ZipFile(args.wheel) as wheel:
                wheel.extractall(folder / "package")
            environment["PYTHONPATH"] = str(folder / "package")
        found = machine(environment)
        report = {"machine": found, "parts": {}}
        why = None
        if found["gpu"] is None:
            why = f"no GPU that torch {found['torch']} can use"
        elif not found["cuda"]["fatbin_bytes"]:
            why = "the package contains no CUDA kernels"
        for part in args.parts or PARTS:
            if why is not None:
                report["parts"][part] = {"status": NOT_RUN, "detail": why}
            else:
                print(f"\n== {part}", flush=True)
                report["parts"][part] = PARTS[part](environment, folder)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"\n{found['gpu'] or 'no GPU'}, driver CUDA {found['cuda']['driver']}, torch {found['torch']}")
    print(f"kernels for {' '.join(found['cuda']['architectures']) or 'nothing'}")
    for part, result in report["parts"].items():
        for line in kernel_rows(result["results"]) if part == "kernels" and "results" in result else ():
            print(f"  {line}")
    for part, result in report["parts"].items():
        print(f"{result['status']:<8} {part:<10} {result['detail']}")
    statuses = {result["status"] for result in report["parts"].values()}
    return 1 if FAILED in statuses else 2 if NOT_RUN in statuses else 0


if __name__ == "__main__":
    sys.exit(main())
