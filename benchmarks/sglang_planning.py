"""Watches what the scheduler's thread pays per decode step for planning: KV room for every request of the batch.

SGLang's DFLASH draft input against ours, on the same batch of stand-in requests with SGLang's real types around them; slots are
counted, not allocated, in both. Six tokens are committed per request and step, blocks are 16. It matters because at a thousand
tokens a second a step lasts 6 ms and nothing is launched while the host plans.

Run in the environment of ``make sglang-test``: ``.venv-sglang/bin/python benchmarks/sglang_planning.py --json OUT``
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("SGLANG_PLATFORM", "host")

BLOCK, COMMITTED, ROUNDS, WARM = 16, 6, 200, 20


def batch(size: int, page: int) -> SimpleNamespace:
    """A running batch as far as planning looks at it."""
    reqs = [
        SimpleNamespace(
            kv=SimpleNamespace(kv_committed_len=500 + i, kv_allocated_len=0),
            sampling_params=SimpleNamespace(top_k=1),
            decode_batch_idx=0,
        )
        for i in range(size)
    ]
    return SimpleNamespace(
        reqs=reqs,
        device="cpu",
        tree_cache=None,
        req_to_token_pool=None,
        req_pool_indices=None,
        token_to_kv_pool_allocator=SimpleNamespace(page_size=page),
        batch_size=lambda: size,
        maybe_evict_swa=lambda: None,
    )


def grow(*args: Any, reqs: list[Any], nxt_kv_lens_cpu: Any, **kwargs: Any) -> None:
    """In place of the allocator: what it does to requests once slots are there."""
    for req, allocated in zip(reqs, nxt_kv_lens_cpu.tolist()):
        req.kv.kv_allocated_len = max(req.kv.kv_allocated_len, allocated)


def microseconds(draft_input: Any, size: int, page: int) -> dict[str, float]:
    """Median and quartiles of one step, in CPU time of this thread: a busy machine does not show."""
    running, times = batch(size, page), []
    for number in range(ROUNDS + WARM):
        for req in running.reqs:
            req.kv.kv_committed_len += COMMITTED
        start = time.thread_time()
        draft_input.prepare_for_decode(running)
        if number >= WARM:
            times.append((time.thread_time() - start) * 1e6)
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median_us": round(middle, 1), "quartiles_us": [round(low, 1), round(high, 1)]}


def main() -> None:
    """Prints a table; with --json writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    import sglang.srt.mem_cache.allocation as allocation
    import sglang.srt.runtime_context as runtime
    import sglang.srt.speculative.dflash_info_v2 as stock
    import torch

    from dflash_rs.bench.report import cpu_model, usable_cpus, version
    from dflash_rs.sglang import planning

    torch.set_num_threads(1)
    allocation.alloc_for_spec_decode = stock.alloc_for_spec_decode = grow
    runtime.get_spec = stock.get_spec = lambda: SimpleNamespace(speculative_num_draft_tokens=BLOCK)
    cells = []
    for page in (1, 16):
        for size in (1, 16, 64, 256):
            ours = microseconds(planning.DraftInput.create_idle_input("cpu"), size, page)
            theirs = microseconds(stock.DFlashDraftInputV2.create_idle_input("cpu"), size, page)
            ratio = round(theirs["median_us"] / ours["median_us"], 1)
            cells.append({"page_size": page, "batch": size, "dflash_rs": ours, "stock": theirs, "times_faster": ratio})
            print(
                f"page {page:>2}  batch {size:>3}  DFLASH_RS {ours['median_us']:>7.1f} us  DFLASH {theirs['median_us']:>7.1f} us  "
                f"{ratio:>4}x",
                file=sys.stderr,
            )
    result = {
        "machine": {"cpu": cpu_model(), "cores": usable_cpus(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("dflash-rs", "sglang", "torch")},
        "block": BLOCK,
        "committed_per_step": COMMITTED,
        "cells": cells,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
