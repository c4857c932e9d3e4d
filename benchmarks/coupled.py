"""Drafts by the target's own random numbers against the likeliest candidates: tokens per pass of requests that sample, whole blocks, no look-up.

Counts, and times nothing: the same seeds give the same figures on every machine, up to what rounding decides. Texts are compared with plain decoding.
Run in the environment of ``make install``: ``.venv/bin/python benchmarks/coupled.py --json OUT``
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from trees import run, write  # beside this file

from dflash_rs import LLM, SamplingParams
from dflash_rs.bench.report import usable_cpus
from dflash_rs.bench.workloads import held_out_prompts
from dflash_rs.models.dflash.model import DFlashDraft


def main() -> int:
    """0 if every text is the plain one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--temperatures", default="0.7,1", help="several with commas")
    parser.add_argument("--nodes", default="0,15", help="most drafts of a tree, 0 for chains, several with commas")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.rounds = 1
    prompts = [prompt.text for prompt in held_out_prompts(args.prompts)]
    threads, rows, same = min(2, usable_cpus()), [], True
    for nodes in map(int, args.nodes.split(",")):
        options = {"threads": threads, "matmul_precision": "auto", "device": "cpu", "adaptive": False, "lookup": False}
        with LLM(tree_nodes=nodes, **options) as llm:
            for temperature in map(float, args.temperatures.split(",")):
                params = [
                    SamplingParams(temperature=temperature, seed=seed, max_tokens=args.max_tokens)
                    for seed in range(len(prompts))
                ]
                done = {"plain": run(llm, prompts, params, False), "coupled": run(llm, prompts, params, True)}
                # One candidate leaves nothing to choose from by numbers.
                with mock.patch.object(DFlashDraft, "most_candidates", 1):
                    done["likeliest"] = run(llm, prompts, params, True)
                row: dict[str, Any] = {"tree_nodes": nodes, "temperature": temperature}
                row |= {"tau": {name: round(done[name]["tau"], 3) for name in ("likeliest", "coupled")}}
                row["same_text"] = all(one["texts"] == done["plain"]["texts"] for one in done.values())
                same = same and row["same_text"]
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    write(args, threads, rows)
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
