"""Rows whose tokens are drawn on the host, in a step that otherwise stays on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..constraints import Edited, edit

if TYPE_CHECKING:
    from .step import DeviceBackend


class Aside:
    """The rows of constrained requests in one step, drawn on the host. `block`: tokens of its blocks or nodes of its trees, 0 without drafts."""

    def __init__(self, backend: DeviceBackend, plan: Any, block: int, trees: bool):
        self._backend, self._plan, self._block, self._trees = backend, plan, block, trees
        self.edited: Edited | None = None

    def draw(self, logits: Tensor, sampled: Tensor) -> None:
        """Replaces tokens in `sampled`. Waits for the device."""
        self._backend.tell_drafts(self._plan, self._block, self._trees)

        def fetch(rows: np.ndarray) -> np.ndarray:
            return logits[torch.from_numpy(rows).to(logits.device)].float().cpu().numpy()

        self.edited = edit(self._plan, self._backend.constrained, fetch)
        if self.edited is None:
            return
        tokens = self._backend.core.draw_edited(self._plan, self.edited)
        rows = torch.from_numpy(self.edited.rows).to(sampled.device)
        sampled.index_copy_(0, rows, torch.from_numpy(tokens).to(sampled.device))
