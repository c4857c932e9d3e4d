"""CUDA graphs by key: captured when a key is first met, replayed afterwards."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch


class Graphs:
    """Runs `work` as a graph; all graphs share one pool of scratch memory, so only one of them may run at a time.

    `work` takes nothing, reads and writes tensors that stay where they are, never asks the host for a value, and may be run more than
    once on the same inputs. What it returns is filled anew by every replay.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._pool: Any = None
        self._captured: dict[Hashable, tuple[Callable[[], None], Any]] = {}

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, key: Hashable, work: Callable[[], Any]) -> Any:
        """What `work` returns; equal keys must mean equal work."""
        if key not in self._captured:
            self._captured[key] = self._capture(work)
        replay, outputs = self._captured[key]
        replay()
        return outputs

    def forget(self) -> None:
        """Drops all graphs: an address they know is about to change."""
        self._captured.clear()
        self._pool = None

    def _capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        current, side = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(2):  # libraries choose algorithms and allocate at first
                work()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = work()
        self._pool = graph.pool()
        return graph.replay, outputs
