"""The packed ragged batch that both models take: one step, one row per token, no padding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Tokens of R requests laid end to end.

    Request r owns packed rows `query_starts[r] .. query_starts[r+1]`; its first row sits at position
    `context_lens[r]`, which is also how many of its tokens already have KV. Device tensors (int64): `token_ids [T]`,
    `positions [T]`, `slots [T]` (where each token's KV is written, slot = page * page_size + offset), `logit_rows [N]`
    (packed rows whose logits are wanted). Host arrays: `query_starts` int32 [R+1], `context_lens` int32 [R],
    `row_ids` int32 [R] into `page_table` int32 [rows, pages_per_row], `slots_host` int64 [T]. `ancestors` uint64 [T, words], where a
    request's tokens are a tree: bit j of a token is set when token j of its request is itself or before it; None for chains.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    logit_rows: Tensor
    query_starts: np.ndarray
    context_lens: np.ndarray
    page_table: np.ndarray
    row_ids: np.ndarray
    slots_host: np.ndarray
    page_size: int
    ancestors: np.ndarray | None = None

    @classmethod
    def from_arrays(
        cls,
        *,
        token_ids,
        positions,
        slots,
        query_starts,
        context_lens,
        page_table,
        row_ids,
        logit_rows,
        page_size: int,
        ancestors: np.ndarray | None = None,
        device: torch.device | str = "cpu",
    ) -> StepBatch:
        """Wraps the arrays of a step (NumPy or anything `numpy.asarray` takes); on a CPU nothing is copied."""
        token_ids, positions = _int64("token_ids", token_ids), _int64("positions", positions)
        slots_host, logit_rows = _int64("slots", slots), _int64("logit_rows", logit_rows)
        query_starts, context_lens = _int32("query_starts", query_starts), _int32("context_lens", context_lens)
        row_ids = _int32("row_ids", row_ids)
        page_table = np.asarray(page_table, dtype=np.int32)
        tokens, requests = token_ids.size, context_lens.size
        if page_size < 1:
            raise InvalidArgument(f"page_size: got {page_size}, expected at least 1")
        if page_table.ndim != 2:
            raise InvalidArgument(f"page_table: got {page_table.ndim} dimensions, expected [rows, pages_per_row]")
        expected = (
            ("positions", positions.size, tokens),
            ("slots", slots_host.size, tokens),
            ("query_starts", query_starts.size, requests + 1),
            ("row_ids", row_ids.size, requests),
        )
        for name, got, wanted in expected:
            if got != wanted:
                raise InvalidArgument(f"{name}: got {got} entries, expected {wanted}")
        if requests and (query_starts[0] != 0 or query_starts[-1] != tokens):
            raise InvalidArgument(
                f"query_starts: runs from {query_starts[0]} to {query_starts[-1]}, expected 0 to {tokens} (token_ids)"
            )
        return cls(
            _tensor(token_ids, device),
            _tensor(positions, device),
            _tensor(slots_host, device),
            _tensor(logit_rows, device),
            query_starts,
            context_lens,
            page_table,
            row_ids,
            slots_host,
            int(page_size),
            ancestors,
        )

    @property
    def max_length(self) -> int:
        """Longest request of the step in tokens, this step's included."""
        if not self.context_lens.size:
            return 0
        return int((self.context_lens + np.diff(self.query_starts)).max())


def _int64(name: str, values) -> np.ndarray:
    return _vector(name, values, np.int64)


def _int32(name: str, values) -> np.ndarray:
    return _vector(name, values, np.int32)


def _vector(name: str, values, dtype) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InvalidArgument(f"{name}: got {array.dtype} of shape {array.shape}, expected a vector of integers")
    return np.ascontiguousarray(array, dtype=dtype)


def _tensor(array: np.ndarray, device) -> Tensor:
    if not array.flags.writeable:
        array = array.copy()
    tensor = torch.from_numpy(array)
    return tensor if str(device) == "cpu" else tensor.to(device, non_blocking=True)
