"""Chains against trees of up to N drafts on the bundled pair: tokens per second, tokens per pass, drafts verified per pass.

Every engine is loaded first; they take turns, in another order each round, one request at a time, and the text has to be the plain one.
Run in the environment of ``make install``: ``.venv/bin/python benchmarks/trees.py --json OUT``
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dflash_rs import LLM, SamplingParams
from dflash_rs.bench.report import cpu_model, usable_cpus, version
from dflash_rs.bench.workloads import held_out_prompts


def run(engine: LLM, prompts: list[str], params: list[SamplingParams], draft: bool) -> dict[str, Any]:
    """One round of an engine."""
    before, begun = engine.stats(), time.perf_counter()
    outputs = engine.generate(prompts, params, draft=draft)
    seconds, after = time.perf_counter() - begun, engine.stats()
    gained = {key: after[key] - before[key] for key in ("passes", "committed", "verified", "steps")}
    return {
        "tokens_per_s": sum(len(output.token_ids) for output in outputs) / seconds,
        "tau": gained["committed"] / gained["passes"],
        "verified": gained["verified"] / gained["passes"],
        "ms_per_step": 1000 * seconds / gained["steps"],
        "texts": [output.token_ids for output in outputs],
    }


def write(args: argparse.Namespace, threads: int, rows: list[dict[str, Any]]) -> None:
    """Keeps what was measured, and with what, at ``args.json``, if that is given."""
    result = {
        "command": f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_model(), "cores": usable_cpus(), "threads": threads},
        "versions": {name: version(name) for name in ("dflash-rs", "torch")},
        "prompts": args.prompts,
        "max_tokens": args.max_tokens,
        "rounds": args.rounds,
        "rows": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """0 if every text is the plain one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", default="8,15,31", help="most drafts of a tree, several with commas")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    prompts = [prompt.text for prompt in held_out_prompts(args.prompts)]
    options = {"threads": min(2, usable_cpus()), "matmul_precision": "auto", "max_running": 1}
    engines = {"chains": LLM(lookup=False, **options)}
    engines |= {f"trees of {n}": LLM(tree_nodes=int(n), **options) for n in args.nodes.split(",")}
    names, rows, same = ["plain", *engines], [], True
    for temperature in (0.0, 0.7):
        params = [
            SamplingParams(temperature=temperature, seed=i, max_tokens=args.max_tokens) for i in range(len(prompts))
        ]
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for number in range(args.rounds + 1):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                done = run(engines.get(name, engines["chains"]), prompts, params, name != "plain")
                if number:  # the first round warms up
                    runs[name].append(done)
        texts = runs["plain"][0]["texts"]
        for name, own in runs.items():
            over = [r["tokens_per_s"] / p["tokens_per_s"] for r, p in zip(own, runs["plain"], strict=True)]
            low, middle, high = statistics.quantiles(over, n=4, method="inclusive")
            row = {
                "drafts": name,
                "temperature": temperature,
                "tokens_per_s": round(statistics.median(r["tokens_per_s"] for r in own), 1),
                "over_plain": {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]},
                **{key: round(statistics.median(r[key] for r in own), 2) for key in ("tau", "verified", "ms_per_step")},
                "same_text": all(r["texts"] == texts for r in own),
            }
            same = same and row["same_text"]
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    write(args, options["threads"], rows)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
