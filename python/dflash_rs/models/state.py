"""State of a target that pages do not hold: what the engine asks of recurrent layers.

Keys and values of a rejected draft are simply overwritten. A recurrent state that has run over a rejected draft is spoilt, so a pass never
moves it: it stands before the pass until the engine says what was kept.

    restore ──> target.forward ──> [accept] ──> save ──> [commit] ──> keep
    copies in   states untouched                copies out            states move on

Slots are rows of the page table (`StepBatch.row_ids`): a request has one for as long as it runs, and nobody else. A row at position 0 starts
from nothing, whatever its slot held; any other row goes on from its slot. Checkpoint slots lie apart and are numbered from 0; which text one
stands for, and when it goes, is the core's business. A step that is called off is never kept: its rows' states are as they were.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
from torch import Tensor


class DeviceState(Protocol):
    """States on a device. Slots and checkpoints are those of `TargetState`; lengths int32 [n] are tokens of a request. Whether the tokens of a
    pass were kept shows in the context of the row's next pass, but for passes of more than a block."""

    block: int
    """Most tokens of a row in a pass that may be kept in part."""

    def alloc(self, rows: int, checkpoints: int, block: int) -> None:
        """As `TargetState.alloc`."""

    def free(self) -> None:
        """Gives that room back."""

    def running(
        self, query_starts: Tensor, context_lens: Tensor, slots: Tensor, longest: int, lens: np.ndarray | None = None,
        rows: np.ndarray | None = None,
    ) -> AbstractContextManager[None]:  # fmt: skip
        """Around the target's pass: query_starts int32 [R+1], context_lens int32 [R] and slots int64 [R] on the device, where they stay for as
        long as a graph is replayed; lens and rows int32 [R] of the host where a request may be longer than a block."""

    def restore(self, rows: np.ndarray, checkpoints: np.ndarray) -> None:
        """As `TargetState.restore`."""

    def save(self, rows: np.ndarray, lengths: np.ndarray, checkpoints: np.ndarray) -> None:
        """Copies the rows' states at `lengths`, the ends of their last pass, to checkpoints."""

    def keep(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        """Rows whose last pass had more than a block are kept, and now are at `lengths`; of others there is nothing to be said."""


class TargetState(Protocol):
    """Per-request state of a target (`target.state`; None where pages hold everything). All arrays are int32 [n], of the host."""

    bytes_per_slot: int
    bytes_per_token: int
    """What is remembered of a token of a block until it is decided."""

    def alloc(self, rows: int, checkpoints: int, block: int) -> None:
        """Makes room for so many requests and checkpoints. A pass's rows of up to `block` tokens may be kept in part, longer ones whole or
        not at all."""

    def free(self) -> None:
        """Gives that room back."""

    def pretend(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        """Takes the rows' states, whatever they are, for those of texts of `lengths` tokens: for passes whose time alone is wanted. Elsewhere
        a row has to go on where its state stands."""

    def restore(self, rows: np.ndarray, checkpoints: np.ndarray) -> None:
        """Copies checkpoints into the rows' slots, before the rows' first pass."""

    def save(self, rows: np.ndarray, counts: np.ndarray, checkpoints: np.ndarray) -> None:
        """Copies the state after the first `counts` tokens of each row's last pass to a checkpoint; the row's own state stays where it is."""

    def keep(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Moves the states over the first `counts` tokens of each row's last pass: a chunk of prompt is kept whole, of a block its anchor and
        what was accepted."""

    def on_device(self) -> DeviceState | None:
        """The half that stays on a device, inside its steps; None where it cannot."""
