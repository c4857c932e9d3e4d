"""How the tokens of a step are drawn on the device, and what it brought home."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import cuda
from ...errors import DflashError


@dataclass(frozen=True)
class Draws:
    """How one request's tokens are drawn: a `cuda.SAMPLING_ROW`, its bias (ascending), and the alternatives it wants scored."""

    row: np.void
    bias_tokens: np.ndarray
    bias_values: np.ndarray
    penalises: bool
    logprobs: int | None

    @classmethod
    def of(cls, params: Any, seed: int) -> Draws:
        """From `SamplingParams`."""
        row = np.zeros((), dtype=cuda.SAMPLING_ROW)
        row["seed"] = seed
        penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        for name in ("temperature", "top_p", "min_p", "top_k", *penalties):
            row[name] = getattr(params, name)
        bias = sorted(params.logit_bias.items())
        return cls(
            row[()],
            np.array([token for token, _ in bias], dtype=np.int32),
            np.array([value for _, value in bias], dtype=np.float32),
            params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0,
            params.logprobs,
        )

    @property
    def filters(self) -> bool:
        """Whether part of the vocabulary is left out."""
        return bool(self.row["top_k"] > 0 or self.row["top_p"] < 1 or self.row["min_p"] > 0)


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
