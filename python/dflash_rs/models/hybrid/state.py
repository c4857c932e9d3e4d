"""States of all recurrent layers of a target, for all requests: a `models.state.TargetState` that folds in what was kept.

A state stands at the committed length of its request, or behind it by the tokens that the last pass kept: these are fed in again, from
what the layers keep of that pass, when the request's next pass begins. A rejected draft is never run over, and nothing is copied to
undo one. A row longer than a block is a chunk of prompt, of which all is kept: the state after it waits beside the row's until then.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import DflashError, InvalidArgument, UnsupportedModel, warn
from ..batch import StepBatch
from .device import DeviceStates
from .gated_delta import GatedDelta
from .mixer import Mixer, Room, Span


def _bytes(parts) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts)


class _Pass(NamedTuple):
    """The pass under way or the last one: its rows, by slot, and the ends of long ones, by layer."""

    spans: list[Span]
    by_row: dict[int, Span]
    ends: dict[int, dict[int, list[Tensor]]]


class MixerState:
    """See `TargetState`. `mixers` by layer; `device` that of their weights."""

    def __init__(self, mixers: dict[int, Mixer], device: torch.device):
        self.mixers, self._device = mixers, device
        self.bytes_per_slot = sum(_bytes(mixer.pieces) for mixer in mixers.values())
        self.bytes_per_token = sum(_bytes(mixer.fed) for mixer in mixers.values())
        self._rows = 0
        self._rooms: dict[int, Room] = {}
        # Tokens that the state of each slot stands for, what is pending included.
        self._lengths = np.zeros(0, dtype=np.int64)
        self._pass: _Pass | None = None
        self._inside = False
        self._told = False
        self._there: DeviceStates | None = None

    def on_device(self) -> DeviceStates | None:
        """The states that stay on a device, which have to be allocated on their own; None where a layer has no kernel for it."""
        if self._there is None:
            served = {
                index: (mixer, weights)
                for index, mixer in self.mixers.items()
                if isinstance(mixer, GatedDelta) and (weights := mixer.on_device()) is not None
            }
            if len(served) == len(self.mixers):
                self._there = DeviceStates(served, self._device)
        return self._there

    # ---- room ----------------------------------------------------------------------------------------------------

    def alloc(self, rows: int, checkpoints: int, block: int) -> None:
        self._rooms, self._pass = {}, None
        pending = torch.zeros(len(self.mixers), rows, dtype=torch.int32)
        rooms = {}
        for at, (index, mixer) in enumerate(self.mixers.items()):
            pieces = [
                torch.zeros(rows + checkpoints, *shape, dtype=dtype, device=self._device)
                for shape, dtype in mixer.pieces
            ]
            kept = [torch.zeros(rows, block, *shape, dtype=dtype, device=self._device) for shape, dtype in mixer.fed]
            rooms[index] = Room(pieces, kept, pending[at])
        self._rows, self._rooms, self._pending = rows, rooms, pending
        self._lengths = np.zeros(rows + checkpoints, dtype=np.int64)

    def free(self) -> None:
        self._rows, self._rooms, self._pass = 0, {}, None
        if self._there is not None:
            self._there.free()

    def pretend(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        self._lengths[rows] = lengths

    @contextlib.contextmanager
    def scratch(self) -> Iterator[None]:
        """Within it, a pass of row 0 has a state of its own."""
        kept = self._rows, self._rooms, self._pass, self._lengths, getattr(self, "_pending", None)
        try:
            self._rooms = {}
            self.alloc(1, 0, 1)
            yield
        finally:
            self._rows, self._rooms, self._pass, self._lengths, self._pending = kept

    # ---- a pass --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def running(self, batch: StepBatch) -> Iterator[None]:
        """Around a forward over `batch`: recurrent layers then know whose tokens they see."""
        if batch.ancestors is not None:
            raise UnsupportedModel(
                "trees of drafts are not supported by recurrent layers, whose state runs over one path"
            )
        rows, starts = batch.row_ids.tolist(), batch.query_starts.tolist()
        if rows and not 0 <= min(rows) <= max(rows) < self._rows:
            raise InvalidArgument(
                f"row_ids: got {min(rows)}..{max(rows)}, expected 0..{self._rows - 1}, the rows with a state"
            )
        spans = [
            Span(row, start, end, context == 0)
            for row, start, end, context in zip(rows, starts[:-1], starts[1:], batch.context_lens.tolist(), strict=True)
            if end > start
        ]
        by_row = {span.row: span for span in spans}
        if len(by_row) != len(spans):
            raise InvalidArgument("row_ids: got a row twice in one pass, expected each at most once")
        for row, context in zip(rows, batch.context_lens.tolist(), strict=True):
            if context == 0:
                self._lengths[row] = 0
            elif context != self._lengths[row]:
                raise DflashError(
                    f"state: got {context} tokens before those of row {row}, expected {self._lengths[row]}, which its state stands for, or a "
                    "checkpoint to go on from"
                )
        self._pass, self._inside = _Pass(spans, by_row, {}), True
        try:
            yield
        finally:
            self._inside = False

    def mix(self, index: int, hidden: Tensor) -> Tensor:
        """The layer's output for a pass's tokens, [1, T, H] -> [1, T, H]."""
        if self._there is not None and self._there.inside:
            return self._there.mix(index, hidden)
        step, room, mixer = self._pass, self._rooms.get(index), self.mixers[index]
        if step is None or room is None or not self._inside:
            raise DflashError("state: recurrent layers ran outside of a pass or without room for their states")
        fed, rest = mixer.feed(hidden[0])
        # A token's operations have the same shapes wherever its state moves on, in a pass or between passes: torch's own, nothing around them.
        with torch._C.DisableTorchFunction():
            out, ends = mixer.run(room, step.spans, fed)
        if ends:
            step.ends[index] = ends
        if not self._told and hidden.device.type == "cpu" and not bool(torch.isfinite(out).all()):
            self._tell(index, step, out)
        return mixer.finish(out, rest)[None]

    def _tell(self, index: int, step: _Pass, out: Tensor) -> None:
        # Its logits are no numbers, either, and so the request fails by itself; what else there is to say is where that began.
        bad = ~torch.isfinite(out).flatten(1).all(1)
        rows = [span.row for span in step.spans if bool(bad[span.start : span.end].any())]
        self._told = True
        warn(
            f"layer {index}: the recurrent state of {len(rows)} of {len(step.spans)} requests is not finite (row "
            f"{', '.join(map(str, rows[:4]))}); they fail, others are not affected"
        )

    # ---- between passes ------------------------------------------------------------------------------------------

    def restore(self, rows: np.ndarray, checkpoints: np.ndarray) -> None:
        for row, checkpoint in zip(rows.tolist(), checkpoints.tolist(), strict=True):
            self._lengths[row] = self._lengths[self._rows + checkpoint]
            for room in self._rooms.values():
                slots = [piece[row] for piece in room.pieces]
                copies = [piece[self._rows + checkpoint] for piece in room.pieces]
                torch._foreach_copy_([*slots, room.pending[row]], [*copies, torch.zeros_like(room.pending[row])])

    def save(self, rows: np.ndarray, counts: np.ndarray, checkpoints: np.ndarray) -> None:
        for row, count, checkpoint in zip(rows.tolist(), counts.tolist(), checkpoints.tolist(), strict=True):
            span = self._span(row, count)
            self._lengths[self._rows + checkpoint] = self._lengths[row] + count
            for index, room in self._rooms.items():
                copies = [piece[self._rows + checkpoint] for piece in room.pieces]
                if span.end - span.start > room.block:
                    torch._foreach_copy_(copies, self._ends(index, row))
                    continue
                torch._foreach_copy_(copies, [piece[row] for piece in room.pieces])
                self.mixers[index].advance(copies, [kept[row, :count] for kept in room.kept])

    def keep(self, rows: np.ndarray, counts: np.ndarray) -> None:
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
            span = self._span(row, count)
            self._lengths[row] += count
            for index, room in self._rooms.items():
                if span.end - span.start > room.block:
                    torch._foreach_copy_([piece[row] for piece in room.pieces], self._ends(index, row))
                else:
                    room.pending[row] = count
        self._pass = None

    def _span(self, row: int, count: int) -> Span:
        """A row's tokens in the last pass, of which `count` are kept."""
        if self._pass is None or row not in self._pass.by_row:
            raise DflashError(f"state: row {row} had no part in the last pass")
        span = self._pass.by_row[row]
        length, block = span.end - span.start, next(iter(self._rooms.values())).block
        if not 0 <= count <= length or (length > block and count != length):
            raise InvalidArgument(
                f"counts: got {count} for row {row}, expected {'0..' if length <= block else ''}{length}: of more than {block} tokens all "
                "or none are kept"
            )
        return span

    def _ends(self, index: int, row: int) -> list[Tensor]:
        assert self._pass is not None
        return self._pass.ends[index][row]


def attach(state: MixerState) -> None:
    """From now on the layers' modules run through `state`."""

    def forward_of(index: int):
        def forward(
            hidden_states: Tensor, cache_params=None, attention_mask: Tensor | None = None, past_key_values=None, **_
        ) -> Tensor:
            if any(given is not None for given in (cache_params, past_key_values, attention_mask)):
                raise UnsupportedModel(f"layer {index}: its recurrent layer gets a cache or a mask, expected neither")
            return state.mix(index, hidden_states)

        return forward

    for index, mixer in state.mixers.items():
        module: nn.Module = mixer.module
        module.forward = forward_of(index)  # type: ignore[method-assign]
