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

from typing import Protocol

import numpy as np


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

    def restore(self, rows: np.ndarray, checkpoints: np.ndarray) -> None:
        """Copies checkpoints into the rows' slots, before the rows' first pass."""

    def save(self, rows: np.ndarray, counts: np.ndarray, checkpoints: np.ndarray) -> None:
        """Copies the state after the first `counts` tokens of each row's last pass to a checkpoint; the row's own state stays where it is."""

    def keep(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Moves the states over the first `counts` tokens of each row's last pass: a chunk of prompt is kept whole, of a block its anchor and
        what was accepted."""
