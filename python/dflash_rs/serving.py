"""Bookkeeping for a serving engine that keeps its own requests: one crossing to the core per step, no Python loop over the batch.

``dflash_rs.sglang`` plans its KV room with it; other engines can, if their requests carry the two lengths that are read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dflash_rs import _core

__all__ = ["plan_decode"]


def plan_decode(
    requests: list[Any],
    ahead: int,
    page_size: int,
    committed: NDArray[np.int64],
    allocated: NDArray[np.int32],
    next: NDArray[np.int32],
) -> tuple[int, int, int]:
    """KV slots that each of ``R`` requests must own before the next step.

    ``requests`` is a list; each has ``kv.kv_committed_len``, the tokens that the host knows to be committed, and
    ``kv.kv_allocated_len``, the slots it owns. A step may write ``ahead`` slots behind the former: with blocks of ``B`` and one
    step whose result the host has not seen, ``2 * B``.

    Written in place, the first ``R`` entries of each: ``committed`` i64 and ``allocated`` i32, the two lengths; ``next`` i32, the
    slots to own, in whole pages of ``page_size`` and never fewer than are owned. The arrays are contiguous and have at least
    ``R`` entries; what is behind those is left alone. Nothing is allocated: take the pages, then set ``kv_allocated_len``.

    Returns the slots to allocate (the sum of ``next - allocated``), the sum of ``committed`` and the sum of ``next``.
    Raises ``InvalidArgument`` for ``requests`` that are no list, an ``ahead`` or ``page_size`` out of range, an array of another
    type, read-only, strided or too short, and for more than 2^31 - 1 slots.
    """
    return _core.plan_decode(requests, ahead, page_size, committed, allocated, next)
