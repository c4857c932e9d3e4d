"""What the host does in a step of the GPU engine: everything but the device's own work, which is left out.

The engine is the real one (planner, core, buffers, copies, walk), on a CPU, with CUDA graphs that do nothing: every draft is taken to
be accepted. Neither model computes anything, so no row contains a pass of one. What a row contains:

- "plan": choosing a block length, pages, the layout. "verify": what the draws ask for, the step's numbers into the arrays that go to the device, the
  copy there and the copy of the results back, which are copies of the host's memory here: a GPU makes them beside the host, for some microseconds a
  launch. "accept": the walk along the drafts. "commit": pages, stops, records of what everyone was given, what the planner learns. "text": who ended.
- "generate" takes steps and makes nothing of the records before their requests end: the end is in no row. "stream" reads them after each step: text
  and one event per request, in "events".
- What a GPU adds: the launches of two graphs and the events after the copies.

With overlap all of it happens while the device computes; without, the device waits for it.

Run in the environment of ``make install``: ``.venv/bin/python benchmarks/host_step.py --json OUT``
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from dflash_rs import LLM, SamplingParams, StepCosts, cuda
from dflash_rs.bench.report import cpu_model, version
from dflash_rs.config import assets
from dflash_rs.engine.build import Models
from dflash_rs.engine.device.step import DeviceBackend
from dflash_rs.engine.requests import read

TOKEN = 100
# Of the shortest steps: the machine may have had other things to do in the rest.
SHARE = 0.25


def engine(models: Models, requests: int, overlap: bool) -> LLM:
    """An engine whose graphs do nothing and whose rows all say `TOKEN`."""
    costs = StepCosts.lines(1.0, 0.0, 0.1, 0.0)
    made = LLM.from_parts(
        models.target, models.draft, tokenizer=models.tokenizer, token_bytes=models.bytes, max_running=requests, max_context=1024,
        max_batch_tokens=4096, costs=costs, num_pages=requests * 65, overlap=overlap, lookup=False,
    )  # fmt: skip
    backend = made._loop.backend
    assert isinstance(backend, DeviceBackend)
    backend._run = lambda key, work: None
    backend._mixed = lambda *_: None
    for name in ("tokens", "drafts"):
        backend._out.device[name].fill_(TOKEN)
    backend._out.device["accepted"].fill_(made.block_size - 1)
    return made


def measure(
    models: Models, requests: int, overlap: bool, steps: int, params: dict[str, Any], streams: bool
) -> dict[str, Any]:
    """Microseconds of a step of `requests` requests, in all and by stage."""
    with engine(models, requests, overlap) as made:
        loop = made._loop
        prompts = [[TOKEN] * 32 for _ in range(requests)]
        each = [SamplingParams(max_tokens=960, ignore_eos=True, seed=i, **params) for i in range(requests)]
        with made.stream(prompts, each) as stream:
            while loop.core.counts()["waiting"] or loop.steps < 4:
                loop.step()
            made._ready(stream._waiting)
            taken: list[tuple[float, dict[str, float]]] = []
            for _ in range(steps):
                begun = time.perf_counter()
                loop.step()
                stages, stepped = dict(loop.times.step), time.perf_counter()
                if streams:
                    assert len(read(stream._waiting)) == requests
                    stages["events"] = time.perf_counter() - stepped
                taken.append((time.perf_counter() - begun, stages))
            accepted = loop.core.stats()["accepted"]
    assert accepted > 0
    taken.sort(key=lambda one: one[0])
    best = taken[: max(1, int(SHARE * len(taken)))]
    stages = {name: round(1e6 * statistics.mean(step[name] for _, step in best), 1) for name in best[0][1]}
    return {
        "requests": requests,
        "overlap": overlap,
        "call": "stream" if streams else "generate",
        "us": round(1e6 * statistics.mean(seconds for seconds, _ in best), 1),
        "us_median": round(1e6 * statistics.median(seconds for seconds, _ in taken), 1),
        "us_by_stage": {name: us for name, us in stages.items() if us},
    }


def main() -> None:
    """Prints a line per size of the batch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", default="1,16,64,256", help="sizes of the batch, with commas")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    # What a copy to a device would be is one of the host here: it is not to wait for helpers that are busy elsewhere.
    torch.set_num_threads(1)
    # Loading compares the target with itself, which takes kernels that work.
    folder = assets()
    models = Models.load(
        folder / "target", folder / "draft", device=torch.device("cpu"), dtype=torch.bfloat16, precision="highest"
    )
    with (
        mock.patch.object(cuda, "available", lambda device="cuda": True),
        mock.patch.object(cuda, "load", lambda device="cuda": None),
    ):
        for requests in map(int, args.requests.split(",")):
            for streams, overlap in ((False, False), (False, True), (True, True)):
                row = measure(models, requests, overlap, args.steps, {"temperature": 0.8, "top_p": 0.95}, streams)
                rows.append(row)
                parts = ", ".join(f"{name} {us}" for name, us in row["us_by_stage"].items())
                print(
                    f"{requests:4} requests, {row['call']:8}, overlap {overlap!s:5}: {row['us']:8.1f} us a step ({parts})",
                    flush=True,
                )
    if args.json is not None:
        head = {
            "command": "python benchmarks/host_step.py",
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "cpu": cpu_model(),
            "dflash_rs": version("dflash_rs"),
        }
        args.json.write_text(json.dumps({"header": head, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
