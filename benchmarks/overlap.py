"""Steps launched before the last one's results are read, against steps that wait for them, on the bundled pair and a CPU: tokens per second.

Watches what overlap costs where it cannot gain: host and device are one processor, and what was launched ahead for a text that ended was in vain.
Two engines take turns, in another order each round; the text has to be the same.
Run in the environment of ``make install``: ``.venv/bin/python benchmarks/overlap.py --json OUT``
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from trees import run, write  # beside this file

from dflash_rs import LLM, SamplingParams
from dflash_rs.bench.report import usable_cpus
from dflash_rs.bench.workloads import held_out_prompts


def main() -> int:
    """0 if all texts are the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", default="1,8", help="requests at once, several with commas")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    prompts = [prompt.text for prompt in held_out_prompts(args.prompts)]
    params = [SamplingParams(temperature=0.0, max_tokens=args.max_tokens)] * len(prompts)
    threads, rows, same = min(2, usable_cpus()), [], True
    for requests in map(int, args.requests.split(",")):
        options = {"threads": threads, "matmul_precision": "auto", "max_running": requests, "device": "cpu"}
        engines = {overlap: LLM(overlap=overlap, lookup=False, **options) for overlap in (False, True)}
        runs: dict[bool, list[dict[str, Any]]] = {overlap: [] for overlap in engines}
        for number in range(args.rounds + 1):
            for overlap in sorted(engines, reverse=bool(number % 2)):
                done = run(engines[overlap], prompts, params, True)
                if number:  # the first round warms up
                    runs[overlap].append(done)
        over = [r["tokens_per_s"] / w["tokens_per_s"] for r, w in zip(runs[True], runs[False], strict=True)]
        low, middle, high = statistics.quantiles(over, n=4, method="inclusive")
        row = {
            "requests": requests,
            "tokens_per_s": {
                name: round(statistics.median(r["tokens_per_s"] for r in runs[overlap]), 1)
                for name, overlap in (("without", False), ("with", True))
            },
            "with_over_without": {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]},
            "same_text": all(r["texts"] == runs[False][0]["texts"] for own in runs.values() for r in own),
        }
        same = same and row["same_text"]
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        for engine in engines.values():
            engine.close()
    write(args, threads, rows)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
