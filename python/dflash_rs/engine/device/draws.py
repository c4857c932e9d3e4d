"""What a step on the device brought home."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import DflashError


@dataclass
class Drawn:
    """What a step brought home: `drafts` int64 [n, g] (None without; with `parents` int32 [n, g] they are trees, the anchor first), and per logit row `tokens` int64, `status` int32, `logprobs`
    float32 (None unless asked for) and the likeliest tokens with their scores [N, k] (None unless asked for). `accepted` int32 [R]
    is the device's own count."""

    drafts: np.ndarray | None
    parents: np.ndarray | None
    tokens: np.ndarray
    status: np.ndarray
    logprobs: np.ndarray | None
    top_tokens: np.ndarray | None
    top_logprobs: np.ndarray | None
    accepted: np.ndarray

    def check(self, accepted: Any, prefills: np.ndarray) -> None:
        """Raises DflashError when the core's walk kept something else, which only a defect can do: draft KV went elsewhere."""
        # A row without tokens failed, or its request had ended when the step was launched ahead: the device does not know.
        gained = np.diff(accepted.token_starts) > 0
        for row, (there, here) in enumerate(zip(self.accepted.tolist(), accepted.accepted.tolist())):
            if there != here and gained[row] and not prefills[row]:
                raise DflashError(f"accepted[{row}]: the device kept {there} drafts, the core {here}; this is a defect")
