"""Watches what a step costs Python beside the two models: plan, set_drafts, accept_sampled, commit, block 16.

At a thousand tokens a second and six tokens a step, a step lasts 6 ms; the bookkeeping has to vanish in it.
Run: ``python -m pytest benchmarks/test_crossing.py --benchmark-only``
"""

from __future__ import annotations

import numpy as np
import pytest

from dflash_rs._core import Engine

pytest.importorskip("pytest_benchmark")

BLOCK = 16
CONTEXT = 8192
ROUNDS = 400


def decoding_batch(size: int) -> tuple[Engine, np.ndarray, np.ndarray]:
    """An engine with `size` requests past their prompts, drafts, and tokens that accept five drafts a row on average."""
    engine = Engine(
        num_pages=size * (CONTEXT // 16 + 4),
        page_size=16,
        max_running=size,
        max_context=CONTEXT,
        block_size=BLOCK,
        max_batch_tokens=size * BLOCK * 4,
        vocab_size=151_936,
    )
    for request in range(size):
        engine.add(list(range(100 + request, 132 + request)), {"max_tokens": CONTEXT})
    plan = engine.plan()
    engine.commit(plan, engine.accept_sampled(plan, np.ones(size, np.int64)))
    accepted = (np.arange(size) * 7 % 11)[:, None]
    sampled = np.where(np.arange(BLOCK)[None, :] < accepted, 1, 2).astype(np.int64).reshape(-1)
    return engine, np.ones((size, BLOCK - 1), np.int64), sampled


@pytest.mark.parametrize("size", [1, 16, 64, 256])
def test_plan_accept_commit(benchmark, size: int) -> None:
    engine, drafts, sampled = decoding_batch(size)

    def step():
        plan = engine.plan()
        plan.set_drafts(drafts)
        accepted = engine.accept_sampled(plan, sampled)
        return engine.commit(plan, accepted)

    events = benchmark.pedantic(step, rounds=ROUNDS, warmup_rounds=20)
    assert len(events.request_ids) == size
    assert engine.counts()["running"] == size, "nobody may finish while the clock runs"
