"""How long passes take here: what the planner weighs an extra row against."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from ..config import StepCosts
from ..models.batch import StepBatch
from ..models.drafter import Drafter
from ..models.target import TargetModel

# Enough rounds for each minimum to be near the truth even on a busy machine, and no more once a big model has taken this long.
_ROUNDS = 12
_PATIENCE_S = 1.0
# A pass is flat where memory limits it, then a line: few points show where it turns.
_ROWS = (1, 2, 4, 8, 16, 32, 64)
# Requests that draft a whole block each.
_REQUESTS = (1, 4, 8)
# Tokens of context with which one row is timed beside a row without: enough to be seen beside the weights.
_CONTEXT = 256


def measure(target: TargetModel, draft: Drafter, block_size: int, requests: int = 1) -> StepCosts:
    """Times passes of both models over numbers of rows, on empty context; `requests` may run at a time.

    Uses the first slots of the caches, which hold nothing yet. A target with state is given blocks that follow on a token, half of the last
    ones kept, as steps give them to it; its context is taken to cost nothing.
    """
    slots = target.num_slots
    rows = [n for n in _ROWS if n <= slots]
    if target.state is not None:
        # A token of context before each block.
        rows = [n for n in rows if -(-n // block_size) <= requests and -(-n // block_size) * (block_size + 1) <= slots]
    verify_rows = partial(_verify if target.state is None else partial(_fold_and_verify, block=block_size), target)
    passes: list[Callable[[], Any]] = [partial(verify_rows, n) for n in rows]
    if draft.from_text:
        times = _fastest(passes)
        return StepCosts(rising(zip(rows, times, strict=True)), context=_context_cost(target, rows[-1], times[-1]))
    blocks = sorted({(1, 2), (1, (block_size + 2) // 2), *((n, block_size) for n in _REQUESTS)})
    features = None
    if draft.taps:
        features = torch.zeros(1, len(draft.taps) * target.hidden_size, dtype=target.dtype, device=target.device)
    first = np.zeros(1, dtype=np.int64)
    passes += [partial(_propose, draft, n, size) for n, size in blocks]
    told = {"token_ids": first, "before": first - 1} if draft.reads_tokens else {}
    passes.append(lambda: draft.inject(features, first, first, **told))
    times = _fastest(passes)
    verify, propose, inject = times[: len(rows)], times[len(rows) : -1], times[-1]
    # Every pass that drafts is followed by an injection.
    drafting = sorted((n * size, time + inject) for (n, size), time in zip(blocks, propose, strict=True))
    context = _context_cost(target, rows[-1], verify[-1])
    return StepCosts(rising(zip(rows, verify, strict=True)), rising(drafting), context)


def _context_cost(target: TargetModel, rows: int, taken: float) -> float:
    """What a token of context adds to a pass, in seconds: of one row behind some tokens, against one without. 0 where it would take too long to
    write those, `rows` in `taken` seconds: beside so large a target they weigh little."""
    tokens = min(_CONTEXT, target.num_slots - 1, target.max_context - 1)
    if target.state is not None or tokens < 1 or taken * tokens / rows > _PATIENCE_S:
        return 0.0
    # Memory that nobody wrote to yet is read faster than any other.
    for begin in range(0, tokens, rows):
        _verify(target, min(rows, tokens - begin), begin)
    without, behind = _fastest([partial(_verify, target, 1), partial(_verify, target, 1, tokens)])
    return max(0.0, behind - without) / tokens


def rising(points) -> tuple[tuple[int, float], ...]:
    """What was measured, by rising rows, without the falls that are noise, one point for each number of rows. A busy moment only adds to a time,
    and fewer rows never take longer: where they seemed to, the time of more rows is nearer the truth."""
    curve: dict[int, float] = {}
    least = math.inf
    for rows, taken in reversed(list(points)):
        least = min(least, max(taken, 1e-9))
        curve[rows] = least
    return tuple(sorted(curve.items()))


def _tokens(target: TargetModel, rows: int) -> np.ndarray:
    """Different ones, as a text has them: equal ones would all go to the same experts, and many rows would seem to cost what one does."""
    return np.arange(1, rows + 1) * 7919 % target.vocab_size


def _verify(target: TargetModel, rows: int, context: int = 0) -> None:
    index = np.arange(rows)
    batch = StepBatch.from_arrays(
        token_ids=_tokens(target, rows),
        positions=context + index,
        slots=context + index,
        query_starts=np.array([0, rows]),
        context_lens=np.array([context]),
        page_table=np.zeros((1, 1), dtype=np.int32),
        row_ids=np.array([0]),
        logit_rows=index,
        page_size=context + rows,
        device=target.device,
    )
    if target.state is not None:
        target.state.pretend(batch.row_ids, batch.context_lens)
    target.forward(batch)


def _fold_and_verify(target: TargetModel, rows: int, *, block: int) -> None:
    """A pass over blocks that goes on from half of the last ones."""
    requests, page = -(-rows // block), block + 1
    starts = np.minimum(np.arange(requests + 1) * block, rows)
    index, lengths = np.arange(requests), np.diff(starts)
    assert target.state is not None
    positions = np.arange(rows) - np.repeat(starts[:-1], lengths) + 1
    batch = StepBatch.from_arrays(
        token_ids=_tokens(target, rows),
        positions=positions,
        slots=np.repeat(index, lengths) * page + positions,
        query_starts=starts,
        context_lens=np.ones(requests, dtype=np.int32),
        page_table=index[:, None].astype(np.int32),
        row_ids=index,
        logit_rows=np.arange(rows),
        page_size=page,
        device=target.device,
    )
    target.state.pretend(batch.row_ids, batch.context_lens)
    target.forward(batch)
    target.state.keep(index.astype(np.int32), ((lengths + 1) // 2).astype(np.int32))


def _propose(draft: Drafter, requests: int, block: int) -> None:
    anchors, table = np.zeros(requests, dtype=np.int64), np.zeros((requests, 1), dtype=np.int32)
    draft.candidates(anchors, np.zeros(requests, dtype=np.int32), table, page_size=1, block_size=block, k=1)


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
