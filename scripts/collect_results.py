"""Boils the microbenchmarks' own files down to one small JSON that can be committed.

python scripts/collect_results.py target/criterion .benchmarks/crossing.json benchmarks/results/core.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dflash_rs.bench.report import header


def from_criterion(folder: Path) -> dict[str, dict[str, float]]:
    """{benchmark: {"median_us", "mean_us"}} for every estimate below `folder`, criterion's output directory."""
    found = {}
    for path in sorted(folder.glob("**/new/estimates.json")):
        estimates = json.loads(path.read_text(encoding="utf-8"))
        found[path.parent.parent.relative_to(folder).as_posix()] = {
            f"{kind}_us": round(estimates[kind]["point_estimate"] / 1000, 4) for kind in ("median", "mean")
        }
    return found


def from_pytest(path: Path) -> dict[str, dict[str, float]]:
    """The same for a file that `pytest --benchmark-json` wrote."""
    benchmarks = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
    return {
        one["name"]: {f"{kind}_us": round(one["stats"][kind] * 1e6, 4) for kind in ("median", "mean")}
        for one in benchmarks
    }


def main(criterion: str, crossing: str, target: str) -> None:
    """Reads the first two, writes the third."""
    results = {"core": from_criterion(Path(criterion)), "crossing": from_pytest(Path(crossing))}
    for name, found in results.items():
        if not found:
            sys.exit(f"no {name} results: run `make bench-core`")
    head = header([]) | {"command": "make bench-core"}
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_text(json.dumps({"header": head, **results}, indent=2) + "\n", encoding="utf-8")
    print(f"{target}: {', '.join(f'{len(found)} {name}' for name, found in results.items())}")


if __name__ == "__main__":
    main(*sys.argv[1:])
