"""What the engine needs of a target, whoever made it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..batch import StepBatch
from ..state import TargetState


class Target(Protocol):
    """A causal LM that remembers texts in pages of KV and, if it has a `state`, in a state per request beside them.

    `max_context`: most tokens of a text. `kv_bytes_per_token` may be 0. A row's logits do not depend on the rows beside it, nor on how a
    text was cut into passes, up to rounding.
    """

    device: torch.device
    vocab_size: int
    hidden_size: int
    max_context: int
    kv_bytes_per_token: int
    num_slots: int
    state: TargetState | None

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """Tokens that end a text; may be empty."""

    def set_taps(self, layer_ids: Sequence[int]) -> None:
        """Outputs of these layers are the features of `forward`; none for an empty list."""

    def alloc_kv(self, num_slots: int) -> None:
        """Makes room for the KV of `num_slots` tokens."""

    def free(self) -> None:
        """Gives that room back."""

    def scratch(self, num_slots: int) -> AbstractContextManager[None]:
        """Within it, passes see KV of their own for `num_slots` tokens, empty, and a state of their own for row 0."""

    def forward(self, batch: StepBatch) -> tuple[Tensor, Tensor | None]:
        """A step: logits [N, V] of `batch.logit_rows` and features [T, len(taps) * H] (None without taps); writes the KV of every token at
        its slot and leaves states where they are."""

    def move_kv(self, sources: np.ndarray, places: np.ndarray) -> None:
        """Moves the KV of M tokens between slots, int64 [M]; all is read before anything is written."""
