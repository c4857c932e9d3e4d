"""Tokens per second of real SGLang servers on this CPU, on the bundled pair: without speculation, with SGLang's own DFLASH, and with
DFLASH_RS in whole blocks, in widths as they pay, and in widths and trees as they pay.

All servers are up at once and idle but for the one that is measured; they take turns, in another order each round, so that a slow
minute of the machine falls on all of them. A run is a number of requests, so many of them at once; its tokens per second are output
tokens over the time from the first request sent to the last answer, HTTP and tokenizer included. What is divided is divided within
a round. A first round is not counted. The platform is that of the tests (``tests/sglang/host``): correct and slow, with attention
request by request, so what it says of small models on a CPU is not what a GPU would.

Run in the environment of ``make sglang-test``: ``.venv-sglang/bin/python benchmarks/sglang_serving.py --json OUT``
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

os.environ.setdefault("SGLANG_PLATFORM", "host")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "sglang"))

import cases  # noqa: E402
from servers import Server, speculative, widths  # noqa: E402

MOST = 16
# Temperature, and the least tokens of a prompt.
WORKLOADS = {
    "greedy": (0, 0),
    "long": (0, 600),
    # SGLang's own DFLASH takes the likeliest token on a CPU, which is another text.
    "warm": (0.7, 0),
    # Few drafts are accepted.
    "sampled": (1.3, 0),
}
NODES = 16
OPTIONS = {
    "grammar_backend": "none",
    "page_size": 16,
    "max_running_requests": MOST,
    "max_total_tokens": 24576,
    "enable_metrics": True,
}


def start(logs: Path) -> dict[str, Server]:
    """The servers, by the name of their row."""
    ours = speculative(**OPTIONS)
    return {
        "plain": Server(logs / "plain.log", **OPTIONS),
        "DFLASH": Server(logs / "stock.log", **speculative("DFLASH", **OPTIONS)),
        "DFLASH_RS, whole blocks": Server(logs / "whole.log", env=widths(False), **ours),
        "DFLASH_RS": Server(logs / "adaptive.log", env=widths(True), **ours),
        "DFLASH_RS, trees": Server(
            logs / "trees.log", env={"DFLASH_RS_CONFIG": json.dumps({"tree_nodes": NODES, "adaptive": True})}, **ours
        ),
    }


def passes(server: Server) -> dict[str, float]:
    """Passes of the target by width, as DFLASH_RS counts them."""
    found = re.findall(
        r'^dflash_rs_spec_passes_total{[^}]*width="(\d+)"} ([0-9.e+]+)$', server.get("/metrics"), re.MULTILINE
    )
    return {width: float(count) for width, count in found}


def prompt_of(number: int, least: int) -> list[int]:
    """Token ids of a held-out prompt, with as many others before it as make at least so many tokens."""
    stored = cases.prompts(64)
    ids = cases.ids(stored[number % len(stored)])
    before = number
    while len(ids) < least:
        before += 7
        ids = (cases.ids(stored[before % len(stored)]) + ids)[-max(least, len(ids)) :]
    return ids


def run(server: Server, params: dict[str, Any], least: int, at_once: int, count: int) -> dict[str, Any]:
    """One run: tokens per second, tokens per pass, passes by width, texts."""
    bodies = [{"input_ids": prompt_of(n, least), "sampling_params": params} for n in range(count)]
    before = passes(server)
    begun = time.perf_counter()
    answers = server.together(bodies, at_once=at_once)
    seconds = time.perf_counter() - begun
    infos = [answer["meta_info"] for answer in answers]
    tokens = sum(info["completion_tokens"] for info in infos)
    return {
        "tokens_per_s": tokens / seconds,
        "tau": tokens / sum(info.get("spec_verify_ct", info["completion_tokens"]) for info in infos),
        "passes": {width: count - before[width] for width, count in passes(server).items()},
        "texts": [answer["output_ids"] for answer in answers],
    }


def spread(values: list[float], digits: int) -> dict[str, Any]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": round(middle, digits), "quartiles": [round(low, digits), round(high, digits)]}


def measure(servers: dict[str, Server], workload: str, at_once: int, rounds: int, tokens: int) -> list[dict[str, Any]]:
    """One row per server."""
    temperature, least = WORKLOADS[workload]
    names = [name for name in servers if temperature == 0 or name != "DFLASH"]
    params = {"temperature": temperature, "max_new_tokens": tokens, "ignore_eos": True}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            done = run(servers[name], params, least, at_once, max(8, 2 * at_once))
            if number:
                runs[name].append(done)
    plain, rows = runs["plain"], []
    for name in names:
        own = runs[name]
        row = {
            "server": name,
            "workload": workload,
            "at_once": at_once,
            "tokens_per_s": spread([r["tokens_per_s"] for r in own], 1),
            "over_plain": spread([r["tokens_per_s"] / p["tokens_per_s"] for r, p in zip(own, plain)], 3),
            "tau": round(statistics.median(r["tau"] for r in own), 2),
            "runs_tokens_per_s": [round(r["tokens_per_s"], 1) for r in own],
        }
        if own[0]["passes"]:
            total = sum(sum(r["passes"].values()) for r in own)
            row["width_share"] = {w: round(sum(r["passes"][w] for r in own) / total, 3) for w in own[0]["passes"]}
        if temperature == 0:
            row["same_text"] = all(r["texts"] == p["texts"] for r, p in zip(own, plain))
        rows.append(row)
        times, over = row["tokens_per_s"], row["over_plain"]
        print(
            f"{workload:<8} {at_once:>3}  {name:<24} {times['median']:>7.1f} tokens/s  {over['median']:>5.2f}x "
            f"({over['quartiles'][0]:.2f} to {over['quartiles'][1]:.2f})  tau {row['tau']:.2f}  {row.get('width_share', '')}"
            + ("" if row.get("same_text", True) else "  TEXTS DIFFER"),
            file=sys.stderr,
            flush=True,
        )
    return rows


def where_and_when() -> dict[str, Any]:
    """What results are to be read with: date, machine, versions."""
    from dflash_rs.bench.report import cpu_model, usable_cpus, version

    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_model(), "cores": usable_cpus(), "python": platform.python_version(), "threads": 1},
        "versions": {name: version(name) for name in ("dflash-rs", "sglang", "torch")},
    }


def main() -> int:
    """0 if all greedy texts are the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", default="1,2,4,8,16", help="requests at once, several with commas, at most 16")
    parser.add_argument("--workload", default=",".join(WORKLOADS), help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    at_once = [int(n) for n in args.concurrency.split(",")]
    if not all(1 <= n <= MOST for n in at_once):
        parser.error(f"--concurrency: got {args.concurrency}, expected numbers from 1 to {MOST}")
    workloads = args.workload.split(",")
    if unknown := sorted(set(workloads) - set(WORKLOADS)):
        parser.error(f"--workload: got {', '.join(unknown)}, expected some of {', '.join(WORKLOADS)}")
    if args.rounds < 1:
        parser.error(f"--rounds: got {args.rounds}, expected at least 1")

    logs = Path(tempfile.mkdtemp(prefix="sglang-serving-"))
    print(f"Servers start, logs in {logs}", file=sys.stderr)
    servers = start(logs)
    try:
        for server in servers.values():
            server.wait()
        rows = [
            row
            for workload in workloads
            for n in at_once
            for row in measure(servers, workload, n, args.rounds, args.max_tokens)
        ]
    finally:
        for server in servers.values():
            server.close()
    result = where_and_when() | {
        "rounds": args.rounds,
        "max_tokens": args.max_tokens,
        "rows": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row.get("same_text", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
