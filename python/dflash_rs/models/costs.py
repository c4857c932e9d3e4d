"""How long passes take here: what the planner weighs an extra row against."""

from __future__ import annotations

import time

import numpy as np
import torch

from ..config import StepCosts
from .batch import StepBatch
from .draft import DFlashDraft
from .target import TargetModel

# Enough repeats for a minimum to be near the truth, and no more once a big model has taken this long.
_REPEATS = 6
_PATIENCE_S = 2.0
_ROWS = 16


def measure(target: TargetModel, draft: DFlashDraft, block_size: int) -> StepCosts:
    """Times passes with few and with more rows on empty context and draws lines through them.

    Uses the first slots of the caches, which hold nothing yet.
    """
    rows = min(_ROWS, target.num_slots)
    one, many = _fastest(lambda: _verify(target, 1)), _fastest(lambda: _verify(target, rows))
    row = max(0.0, (many - one) / max(1, rows - 1))
    short, long = _fastest(lambda: _propose(draft, 2)), _fastest(lambda: _propose(draft, block_size))
    draft_row = max(0.0, (long - short) / (block_size - 2)) if block_size > 2 else 0.0
    return StepCosts(max(one - row, 1e-9), row, max(0.0, short - 2 * draft_row), draft_row)


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


def _fastest(run) -> float:
    """Shortest time of a few calls in seconds, the first one not counted."""
    times = []
    begun = time.perf_counter()
    for _ in range(1 + _REPEATS):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        if len(times) > 1 and time.perf_counter() - begun > _PATIENCE_S:
            break
    return min(times[1:])
