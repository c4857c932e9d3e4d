"""Memory that stays where it is: what goes up in one copy, and what comes down in one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Arena:
    """Named arrays in one piece of memory, on the host (pinned where that matters) and on the device, at the same offsets."""

    def __init__(self, device: torch.device, parts: dict[str, tuple[tuple[int, ...], np.dtype | type]]):
        self._ends: dict[str, int] = {}
        at, places = 0, {}
        for name, (shape, dtype) in parts.items():
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            places[name] = (at, size)
            self._ends[name] = at + size
            at += -(-size // 16) * 16
        self.memory = torch.zeros(max(at, 16), dtype=torch.uint8, device=device)
        self.staging = torch.zeros(max(at, 16), dtype=torch.uint8, pin_memory=device.type == "cuda")
        bytes_ = self.staging.numpy()
        self.host: dict[str, np.ndarray] = {}
        self.device: dict[str, Tensor] = {}
        for name, (shape, dtype) in parts.items():
            begin, size = places[name]
            self.host[name] = bytes_[begin : begin + size].view(dtype).reshape(shape)
            raw = self.memory[begin : begin + size]
            self.device[name] = raw.view(_TORCH[np.dtype(dtype)]).view(shape)

    def upload(self, last: str, rows: int | None = None) -> None:
        """Everything up to `last`, of which only the first `rows`."""
        array = self.host[last]
        end = self._ends[last] - array.nbytes + array[:rows].nbytes
        self.memory[:end].copy_(self.staging[:end], non_blocking=True)

    def download(self) -> None:
        """Everything; the caller waits for it."""
        self.staging.copy_(self.memory, non_blocking=True)


_TORCH = {
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
}
