"""Collects what criterion measured (target/criterion/**/new/estimates.json) into one small JSON file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dflash_rs.bench.report import header


def collect(folder: Path) -> dict[str, dict[str, float]]:
    """{benchmark: {"median_ns", "mean_ns"}} for every estimate below `folder`."""
    found = {}
    for path in sorted(folder.glob("**/new/estimates.json")):
        name = path.parent.parent.relative_to(folder).as_posix()
        estimates = json.loads(path.read_text(encoding="utf-8"))
        found[name] = {f"{kind}_ns": estimates[kind]["point_estimate"] for kind in ("median", "mean")}
    return found


def main() -> None:
    """Writes sys.argv[1]."""
    results = collect(Path("target/criterion"))
    if not results:
        sys.exit("target/criterion holds no results: run `cargo bench` first")
    head = header([]) | {"command": "cargo bench"}
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"header": head, "benchmarks": results}, indent=2) + "\n", encoding="utf-8")
    print(f"{target}: {len(results)} benchmarks")


if __name__ == "__main__":
    main()
