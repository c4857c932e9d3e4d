"""Memory that stays where it is: what goes up in one copy, and what comes down in one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

# A copy to or from the device may be under way when the host fills in the next step.
_COPIES = 2


class Arena:
    """Named arrays in one piece of memory, on the host (pinned where that matters) and on the device, at the same offsets.

    The host has two copies, which `turn` swaps: one belongs to the step that is being made up, the other to the step before it.
    """

    def __init__(self, device: torch.device, parts: dict[str, tuple[tuple[int, ...], np.dtype | type]]):
        self._ends: dict[str, int] = {}
        at, places = 0, {}
        for name, (shape, dtype) in parts.items():
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            places[name] = (at, size)
            self._ends[name] = at + size
            at += -(-size // 16) * 16
        pinned = device.type == "cuda"
        self.memory = torch.zeros(max(at, 16), dtype=torch.uint8, device=device)
        self._staging = [torch.zeros(max(at, 16), dtype=torch.uint8, pin_memory=pinned) for _ in range(_COPIES)]
        self._hosts: list[dict[str, np.ndarray]] = [{} for _ in range(_COPIES)]
        # When the last copy to or from each of them is through; on a CPU it is at once.
        self._copied: list[Any] = [None] * _COPIES
        self._turn = 0
        # What is copied when so much of it is wanted: on the device, and of each copy of the host.
        self._fronts: dict[tuple[str, int | None], tuple[Tensor, list[Tensor]]] = {}
        self.device: dict[str, Tensor] = {}
        for name, (shape, dtype) in parts.items():
            begin, size = places[name]
            for host, staging in zip(self._hosts, self._staging, strict=True):
                host[name] = staging.numpy()[begin : begin + size].view(dtype).reshape(shape)
            raw = self.memory[begin : begin + size]
            self.device[name] = raw.view(_TORCH[np.dtype(dtype)]).view(shape)

    @property
    def host(self) -> dict[str, np.ndarray]:
        """The host's arrays of the step that is being made up."""
        return self._hosts[self._turn]

    def turn(self) -> None:
        """A new step: the arrays of the last one stay as they are until the one after this. Waits where these are still being copied, as those
        of a step that was called off may be."""
        self._turn = (self._turn + 1) % _COPIES
        if self._copied[self._turn] is not None:
            self._copied[self._turn].synchronize()

    def upload(self, last: str, rows: int | None = None) -> None:
        """Everything up to `last`, of which only the first `rows`."""
        if (last, rows) not in self._fronts:
            array = self.host[last]
            end = self._ends[last] - array.nbytes + array[:rows].nbytes
            self._fronts[last, rows] = self.memory[:end], [staging[:end] for staging in self._staging]
        memory, staging = self._fronts[last, rows]
        memory.copy_(staging[self._turn], non_blocking=True)
        self._record()

    def download(self) -> dict[str, np.ndarray]:
        """Everything, into arrays that are there when `copied` has come."""
        self._staging[self._turn].copy_(self.memory, non_blocking=True)
        self._record()
        return self.host

    @property
    def copied(self) -> Any:
        """The event after the last copy, a `torch.cuda.Event`; None on a CPU, where it is through."""
        return self._copied[self._turn]

    def _record(self) -> None:
        if self.memory.device.type == "cuda":
            event = self._copied[self._turn] = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.memory.device))


_TORCH = {
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
}
