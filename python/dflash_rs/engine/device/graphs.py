"""CUDA graphs by key: captured when a key is first met, replayed afterwards, the least recently used dropped when there are too many."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch

from ...config import MOST_GRAPHS


class Graphs:
    """Runs `work` as a graph; all graphs share one pool of scratch memory, so only one of them may run at a time.

    `work` takes nothing, reads and writes tensors that stay where they are, never asks the host for a value, and may be run more than
    once on the same inputs. What it returns is filled anew by every replay. At most `most` graphs are kept.
    """

    def __init__(self, device: torch.device, most: int = MOST_GRAPHS):
        self.device, self.most = device, most
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._captured: OrderedDict[Hashable, tuple[Callable[[], None], Any]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, key: Hashable, work: Callable[[], Any]) -> Any:
        """What `work` returns; equal keys must mean equal work."""
        if key not in self._captured:
            if len(self._captured) >= self.most:
                self._quiet()
                self._captured.popitem(last=False)
            self._captured[key] = self._capture(work)
        self._captured.move_to_end(key)
        replay, outputs = self._captured[key]
        replay()
        return outputs

    def forget(self) -> None:
        """Drops all graphs: an address they know is about to change."""
        self._quiet()
        self._captured.clear()
        self._pool = None

    def _quiet(self) -> None:
        """Waits until no graph runs: one that is dropped must not be."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        # Torch's own stream for captures is one for the process, of whichever device was current first; and each stream gets workspaces
        # of its own from the libraries, tens of megabytes. So: this device, one stream, for trying out and for capturing.
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream(self.device)
            if self._stream is None:
                self._stream = torch.cuda.Stream(self.device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(2):  # libraries choose algorithms and allocate at first
                    work()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads of the process may use the GPU meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = work()
        self._pool = graph.pool()

        def replay() -> None:
            with torch.cuda.device(self.device):
                graph.replay()

        return replay, outputs
