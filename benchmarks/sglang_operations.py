"""What a decoding step of real SGLang servers has torch do outside of the models' passes: without speculation, with SGLang's own DFLASH, with DFLASH_RS.

Nothing is timed: operations are counted on torch's dispatcher (tests/sglang/host/sglang_host/counting.py). On a GPU
an operation is about a launch, which SGLang has kernels of its own for here and there. DFLASH_RS runs its CUDA kernels on the stand-in of the tests for CUDA's driver.

Run in the environment of ``make sglang-test``: ``.venv-sglang/bin/python benchmarks/sglang_operations.py --json OUT``
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

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "emulated"))
import emulated_driver  # noqa: E402

AT_ONCE = 4
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.8, "top_p": 0.9},
    "penalties": {"temperature": 0, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
}


def count(name: str, logs: Path, kind: str, env: dict[str, str], options: dict[str, Any]) -> dict[str, Any]:
    """One row: what most steps of a server had."""
    file = logs / f"{name}-{kind}.json".replace(" ", "-").replace(",", "")
    with Server(file.with_suffix(".log"), env=env | {"SGLANG_HOST_COUNT": str(file)}, **options) as server:
        server.wait()
        params = KINDS[kind] | {"max_new_tokens": 64, "ignore_eos": True}
        server.together(cases.bodies(params, AT_ONCE), at_once=AT_ONCE)
    found = json.loads(file.read_text(encoding="utf-8")).get(str(AT_ONCE))
    row = {"server": name, "requests": kind, **(found or {})}
    print(row, file=sys.stderr)
    return row


def main() -> int:
    """0 if every server was counted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logs = Path(tempfile.mkdtemp(prefix="sglang-operations-"))
    driver = {"SGLANG_HOST_CUDA": str(emulated_driver.build(logs))}
    common = {"grammar_backend": "none", "dtype": "bfloat16"}
    ours = speculative(**common)

    def config(**given: Any) -> dict[str, str]:
        return {"DFLASH_RS_CONFIG": json.dumps(given)}

    servers: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
        "plain": ({}, common),
        "DFLASH": ({}, speculative("DFLASH", **common)),
        "DFLASH_RS, without its kernels": (config(adaptive=False, kernels=False), ours),
        "DFLASH_RS": (driver | config(adaptive=False), ours),
        "DFLASH_RS, plain steps": (driver | config(max_drafts=0), ours),
    }
    rows = [
        count(name, logs, kind, env, options)
        for name, (env, options) in servers.items()
        for kind in KINDS
        # On a CPU SGLang's own DFLASH takes the likeliest token, and it drops penalties.
        if name != "DFLASH" or kind == "greedy"
    ]
    if args.json:
        result = where_and_when() | {"at_once": AT_ONCE, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if all("operations" in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
