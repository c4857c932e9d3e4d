"""How long passes take here: what the planner weighs an extra row against."""

from __future__ import annotations

import time

import numpy as np
import torch

from ..config import StepCosts
from .batch import StepBatch
from .draft import DFlashDraft
from .target import TargetModel

# Enough rounds for each minimum to be near the truth even on a busy machine, and no more once a big model has taken this long.
_ROUNDS = 12
_PATIENCE_S = 1.0
_ROWS = 16


def measure(target: TargetModel, draft: DFlashDraft, block_size: int) -> StepCosts:
    """Times passes with few and with more rows on empty context and draws lines through them.

    Uses the first slots of the caches, which hold nothing yet.
    """
    rows = min(_ROWS, target.num_slots)
    features = torch.zeros(1, draft.config.feature_size, dtype=target.dtype, device=target.device)
    one, many, short, long, inject = _fastest(
        [
            lambda: _verify(target, 1),
            lambda: _verify(target, rows),
            lambda: _propose(draft, 2),
            lambda: _propose(draft, block_size),
            lambda: draft.inject(features, np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)),
        ]
    )
    row = max(0.0, (many - one) / max(1, rows - 1))
    draft_row = max(0.0, (long - short) / (block_size - 2)) if block_size > 2 else 0.0
    # Every pass that drafts is followed by an injection.
    return StepCosts(max(one - row, 1e-9), row, max(0.0, short + inject - 2 * draft_row), draft_row)


def _verify(target: TargetModel, rows: int) -> None:
    index = np.arange(rows)
    batch = StepBatch.from_arrays(
        token_ids=np.zeros(rows, dtype=np.int64),
        positions=index,
        slots=index,
        query_starts=np.array([0, rows]),
        context_lens=np.array([0]),
        page_table=np.zeros((1, 1), dtype=np.int32),
        row_ids=np.array([0]),
        logit_rows=index,
        page_size=rows,
        device=target.device,
    )
    target.forward(batch)


def _propose(draft: DFlashDraft, block: int) -> None:
    draft.draft(
        np.zeros(1, dtype=np.int64), np.zeros(1), np.zeros((1, 1), dtype=np.int32), page_size=1, block_size=block
    )


def _fastest(passes) -> list[float]:
    """Shortest time of each pass in seconds. They take turns, so that a busy moment does not single one out."""
    times: list[list[float]] = [[] for _ in passes]
    begun = time.perf_counter()
    for turn in range(1 + _ROUNDS):
        for run, taken in zip(passes, times, strict=True):
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        if turn > 0 and time.perf_counter() - begun > _PATIENCE_S:
            break
    # The first round warms up.
    return [min(taken[1:]) for taken in times]
