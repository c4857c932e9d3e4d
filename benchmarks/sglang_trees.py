"""Tokens per pass of the target in real SGLang servers on this CPU, on the bundled pair: chains, and trees of several sizes.

Nothing is timed: what is counted hangs on texts and drafts alone. One request at a time, seeded, so that all servers write the same texts, which
is looked at.

Run in the environment of ``make sglang-test``: ``.venv-sglang/bin/python benchmarks/sglang_trees.py --json OUT``
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from sglang_serving import where_and_when  # also finds the tests' servers

import cases  # isort: skip
from servers import Server, speculative  # isort: skip

TEMPERATURES = (0.0, 0.7, 1.0)
OPTIONS = {"grammar_backend": "none", "enable_deterministic_inference": True}


def run(logs: Path, drafts: int, prompts: int, tokens: int) -> list[dict[str, Any]]:
    """One row per temperature, of trees of so many drafts; 0 drafts chains."""
    given = {"adaptive": False, "tree_nodes": drafts}
    rows = []
    with Server(
        logs / f"trees-{drafts}.log", env={"DFLASH_RS_CONFIG": json.dumps(given)}, **speculative(**OPTIONS)
    ) as server:
        for temperature in TEMPERATURES:
            bodies = [
                {
                    "text": prompt,
                    "sampling_params": {
                        "temperature": temperature,
                        "sampling_seed": 7 + number,
                        "max_new_tokens": tokens,
                        "ignore_eos": True,
                    },
                }
                for number, prompt in enumerate(cases.prompts(prompts))
            ]
            answers = server.together(bodies, at_once=1)
            infos = [answer["meta_info"] for answer in answers]
            written, passes = (sum(info[key] for info in infos) for key in ("completion_tokens", "spec_verify_ct"))
            rows.append(
                {
                    "tree_nodes": drafts,
                    "temperature": temperature,
                    "tokens": written,
                    "passes": passes,
                    "tau": round(written / passes, 3),
                    "texts": [answer["output_ids"] for answer in answers],
                }
            )
            print(f"tree_nodes {drafts:>3}  temperature {temperature}  tau {rows[-1]['tau']:.2f}", file=sys.stderr)
    return rows


def main() -> int:
    """0 if all servers wrote the same texts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tree-nodes", default="0,8,16,32", help="drafts of a tree, several with commas; 0 drafts chains"
    )
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logs = Path(tempfile.mkdtemp(prefix="sglang-trees-"))
    rows = [row for n in args.tree_nodes.split(",") for row in run(logs, int(n), args.prompts, args.max_tokens)]
    texts: dict[float, Any] = {}
    for row in rows:
        own = row.pop("texts")
        row["same_text"] = texts.setdefault(row["temperature"], own) == own
    result = where_and_when() | {"prompts": args.prompts, "max_tokens": args.max_tokens, "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["same_text"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
