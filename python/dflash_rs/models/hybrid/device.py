"""States of recurrent layers on a device, where a step's lengths are known before the host knows them.

A layer's states, and what its last pass fed in, stay at their addresses; a request finds its own by its slot, which is data. How many tokens
of its last pass were kept, the next pass sees from its context: the state knows where it stands, layer by layer. So there is nothing to
tell a layer after a step of decoding, a captured graph serves every step, and one that is run twice on the same inputs gives the same.
Only a chunk of prompt longer than a block leaves its states beside those of the rows, until the host says that it was kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import DflashError
from ...recurrent import DeltaEnds, DeltaStates, DeltaWeights, delta_copy, delta_rule
from .gated_delta import GatedDelta


class _Pass(NamedTuple):
    """Tensors of the device: query_starts, context_lens and slots of a pass, its longest request, and of how many longer than a block the
    states go to which places [R]."""

    query_starts: Tensor
    context_lens: Tensor
    slots: Tensor
    longest: int
    places: Tensor | None
    long: int


class DeviceStates:
    """States of all recurrent layers, `mixers` by layer, for the rows of the page table and as many checkpoints."""

    def __init__(self, mixers: dict[int, tuple[GatedDelta, DeltaWeights]], device: torch.device):
        self._mixers, self._device = mixers, device
        self._rooms: dict[int, DeltaStates] = {}
        self._rows = self.block = 0
        self._pass: _Pass | None = None
        self._ends: dict[int, DeltaEnds] = {}
        self._long: dict[int, int] = {}

    # ---- room ----------------------------------------------------------------------------------------------------

    def alloc(self, rows: int, checkpoints: int, block: int) -> None:
        """See `TargetState.alloc`."""
        self.free()
        self._rows, self.block = rows, block
        for index, (mixer, _) in self._mixers.items():
            (state, state_dtype), (window, dtype) = mixer.pieces
            (fed, _), (gates, _) = mixer.fed

            def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.zeros(shape, dtype=dtype, device=self._device)

            slots = rows + checkpoints
            self._rooms[index] = DeltaStates(
                empty(slots, *state, dtype=state_dtype),
                empty(slots, *window),
                empty(rows, block, *fed),
                empty(rows, block, gates[0] * gates[1]),
                empty(slots, dtype=torch.int32),
            )

    def free(self) -> None:
        """Gives that room back."""
        self._rooms, self._ends, self._long = {}, {}, {}
        self._rows = self.block = 0

    # ---- a pass --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def running(
        self, query_starts: Tensor, context_lens: Tensor, slots: Tensor, longest: int, lens: np.ndarray | None = None,
        rows: np.ndarray | None = None,
    ) -> Iterator[None]:  # fmt: skip
        """Around a pass: query_starts int32 [R+1], context_lens int32 [R] and slots int64 [R] (rows of the page table) on the device. Where
        requests may be longer than a block, `lens` and `rows` int32 [R] of the host say which."""
        places = None
        self._ends, self._long = {}, {}
        if lens is not None and rows is not None and longest > self.block:
            long = lens > self.block
            numbers = np.where(long, np.cumsum(long) - 1, -1).astype(np.int32)
            self._long = dict(zip(rows[long].tolist(), numbers[long].tolist(), strict=True))
            places = torch.from_numpy(numbers).to(self._device)
        self._pass = _Pass(query_starts, context_lens, slots, longest, places, len(self._long))
        try:
            yield
        finally:
            self._pass = None

    @property
    def inside(self) -> bool:
        """Whether a pass is under way."""
        return self._pass is not None

    def mix(self, index: int, hidden: Tensor) -> Tensor:
        """The layer's output for a pass's tokens, [1, T, H] -> [1, T, H]."""
        step, room = self._pass, self._rooms.get(index)
        if step is None or room is None:
            raise DflashError("state: recurrent layers ran outside of a pass or without room for their states")
        mixer, weights = self._mixers[index]
        (mixed, gates), rest = mixer.feed(hidden[0])
        if step.places is not None:
            self._ends[index] = DeltaEnds(
                step.places,
                room.memory.new_empty(step.long, *room.memory.shape[1:]),
                room.window.new_empty(step.long, *room.window.shape[1:]),
            )
        out = delta_rule(
            mixed, gates.flatten(1), weights, room, query_starts=step.query_starts, context_lens=step.context_lens, slots=step.slots,
            longest=step.longest, ends=self._ends.get(index),
        )  # fmt: skip
        return mixer.finish(out, rest)[None]

    # ---- between passes ------------------------------------------------------------------------------------------

    def restore(self, rows: np.ndarray, checkpoints: np.ndarray) -> None:
        """Copies checkpoints into the rows' slots, before the rows' first pass."""
        if not rows.size:
            return
        to, source = self._index(rows), self._index(checkpoints + self._rows)
        for room in self._rooms.values():
            for part in (room.memory, room.window, room.stands):
                part.index_copy_(0, to, part.index_select(0, source))

    def save(self, rows: np.ndarray, lengths: np.ndarray, checkpoints: np.ndarray) -> None:
        """Copies the states of rows, at `lengths` tokens, all of which their last pass fed in or had before, to checkpoints."""
        long = np.array([row in self._long for row in rows.tolist()], dtype=bool)
        self._take(rows[long], lengths[long], checkpoints[long] + self._rows)
        if long.all():
            return
        rows, into = self._index(rows[~long]), self._index(checkpoints[~long] + self._rows)
        lens = torch.from_numpy(lengths[~long].astype(np.int32)).to(self._device)
        for index, room in self._rooms.items():
            delta_copy(self._mixers[index][1], room, context_lens=lens, slots=rows, into=into)

    def keep(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        """Those of `rows` that were longer than a block in the last pass are kept: their states now stand at `lengths`. What became of others
        shows in their next context."""
        long = np.array([row in self._long for row in rows.tolist()], dtype=bool)
        self._take(rows[long], lengths[long], rows[long])
        self._ends, self._long = {}, {}

    def _take(self, rows: np.ndarray, lengths: np.ndarray, slots: np.ndarray) -> None:
        """Copies the ends of rows, at `lengths` tokens, into slots."""
        if not rows.size:
            return
        to, source = self._index(slots), self._index(np.array([self._long[row] for row in rows.tolist()]))
        lens = torch.from_numpy(lengths.astype(np.int32)).to(self._device)
        for index, room in self._rooms.items():
            ends = self._ends[index]
            room.memory.index_copy_(0, to, ends.memory.index_select(0, source))
            room.window.index_copy_(0, to, ends.window.index_select(0, source))
            room.stands.index_copy_(0, to, lens)

    def _index(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers.astype(np.int64)).to(self._device)
