"""What steps leave for the drafter, written when it is next asked.

A drafter reads its context when it drafts, and only then. So the features of committed tokens wait, and one call projects and writes
those of many steps: steps in which nobody asks the drafter, because plain decoding or the text itself promises more, cost it nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Steps and tokens that wait at most: a thirty-second of a small cost is none, and a product over more rows is no cheaper per row.
STEPS = 32
TOKENS = 512


class Deferred:
    """The features of committed tokens on their way to a drafter's `inject`.

    Whoever drafts calls `write` first, and so does whoever writes other tokens' keys and values himself. A slot that gets another token is
    written in the order in which it was told.
    """

    def __init__(self, inject: Callable[..., None], steps: int = STEPS, tokens: int = TOKENS):
        self._inject, self._most_steps, self._most_tokens = inject, steps, tokens
        self._waiting: list[tuple[Any, dict[str, np.ndarray]]] = []
        self._dtype: torch.dtype | None = None
        self._slots: set[int] = set()
        # How many steps the last call of `inject` was for.
        self.written = 0

    def __len__(self) -> int:
        return len(self._slots)

    def add(self, features: Tensor | None, rows: np.ndarray, **told: Any) -> None:
        """Tokens of a step: `features` ``[T, C]`` (None of drafters without taps), of which theirs are at `rows` int64 ``[M]``, and what else `inject`
        is told of each, ``[M]``: positions, slots, and what drafters that read tokens need. Features are copied: the next pass may work in the
        same memory."""
        slots = told["slots"].tolist()
        if not self._slots.isdisjoint(slots) or len(self._slots) + len(slots) > self._most_tokens:
            self.write()
        self._slots.update(slots)
        self._waiting.append((self._copy(features, rows), told))
        if len(self._waiting) == self._most_steps or len(self._slots) >= self._most_tokens:
            self.write()

    def write(self) -> None:
        """Hands over all that waits."""
        waiting, self._waiting = self._waiting, []
        self._slots.clear()
        self.written = len(waiting)
        if not waiting:
            return
        told = {name: np.concatenate([told[name] for _, told in waiting]) for name in waiting[0][1]}
        self._inject(self._together([features for features, _ in waiting]), **told)

    def _together(self, copies: list[Any]) -> Tensor | None:
        if copies[0] is None:
            return None
        if isinstance(copies[0], Tensor):
            return torch.cat(copies)
        assert self._dtype is not None
        return torch.from_numpy(np.concatenate(copies)).view(self._dtype)

    def _copy(self, features: Tensor | None, rows: np.ndarray) -> Any:
        """Rows of `features`; of a CPU their bytes, by numpy: torch would wake its threads for a few rows, which takes longer than to copy them."""
        if features is None:
            return None
        self._dtype = features.dtype
        if features.device.type != "cpu":
            return features[torch.from_numpy(rows).to(features.device)]
        return features.contiguous().view(torch.uint8).numpy()[rows]
