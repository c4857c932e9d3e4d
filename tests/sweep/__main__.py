"""Every causal architecture of transformers as a tiny random target: exact or refused by name, and nothing in between.

python -m tests.sweep --json build/sweep.json            # goes on where it was; --again starts over
python -m tests.sweep --json build/sweep.json --only phimoe,gemma2
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from . import tiny
from .checks import examine
from .table import render


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="results; entries that are there are not run again")
    parser.add_argument("--only", help="model types, separated by commas; they are run again")
    parser.add_argument("--table", type=Path, help="a page to write about the results, such as docs/models.md")
    parser.add_argument("--again", action="store_true", help="run everything again")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(arguments.json.read_text()) if arguments.json.exists() and not arguments.again else {}
    only = arguments.only.split(",") if arguments.only else None
    for unknown in sorted(set(only or ()) - set(tiny.classes())):
        parser.error(f"--only: got {unknown!r}, expected model types of AutoModelForCausalLM")
    for kind in only or [k for k in tiny.classes() if k not in found]:
        begin = time.perf_counter()
        result = examine(kind)
        seconds = time.perf_counter() - begin
        found[kind] = asdict(result)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
        print(f"{kind}: {result.status} {result.detail} {result.notes or ''} [{seconds:.1f} s]", flush=True)
    bad = [kind for kind, entry in found.items() if entry["status"] in ("different", "error")]
    counts = {s: sum(e["status"] == s for e in found.values()) for s in sorted({e["status"] for e in found.values()})}
    print(", ".join(f"{n} {status}" for status, n in counts.items()), *(f"\nwrong: {kind}" for kind in bad))
    if arguments.table:
        arguments.table.write_text(render(found, transformers.__version__), encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
