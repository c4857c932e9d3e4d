"""A layer that remembers a text in a state of fixed size: what it feeds in, how its state moves on, what it gives.

    hidden ──feed──> fed, one row per token ──advance──> state moves on, token by token ──> outputs ──finish──> hidden
                      │ kept until the next pass says how many of them count

A mixer never looks at more than one token at a time while its state moves, so a token's output and the state after it are the same
bits whatever stands beside or behind it: in a block, in a chunk of prompt or alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Span(NamedTuple):
    """A request's tokens in a pass: packed rows `start .. end`, of the request in slot `row`; `fresh`: its text begins with them."""

    row: int
    start: int
    end: int
    fresh: bool


class Room(NamedTuple):
    """What a layer remembers of all requests.

    `pieces`: parts of the state, each [slots, ...], a slot for each row and then one for each checkpoint. `kept`: what the last pass of
    every row fed in, each [rows, block, ...]. `pending` int32 [rows], on the host: how many of these tokens the state has yet to fold in.
    """

    pieces: list[Tensor]
    kept: list[Tensor]
    pending: Tensor

    @property
    def block(self) -> int:
        """Most tokens of a row that may be kept in part."""
        return self.kept[0].shape[1]


class Mixer(ABC):
    """One layer. `pieces`, `fed`: shapes and types of the parts of a state, and of what one token feeds in; `gives`: shape of a token's output."""

    pieces: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    fed: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    gives: tuple[int, ...]
    # Where outputs have another type than what is fed in.
    gives_dtype: torch.dtype | None = None

    def __init__(self, module: nn.Module):
        self.module = module

    @abstractmethod
    def feed(self, hidden: Tensor) -> tuple[list[Tensor], Any]:
        """hidden [T, H] -> what the tokens feed in, each [T, ...] contiguous, and what `finish` needs besides."""

    @abstractmethod
    def advance(self, state: Sequence[Tensor], fed: Sequence[Tensor]) -> Tensor:
        """Moves a state over n tokens, in place, one at a time; their outputs [n, *gives]."""

    @abstractmethod
    def finish(self, out: Tensor, rest: Any) -> Tensor:
        """Outputs [T, *gives] -> [T, H]."""

    def run(self, room: Room, spans: Sequence[Span], fed: Sequence[Tensor]) -> tuple[Tensor, dict[int, list[Tensor]]]:
        """Folds into the rows' states what was kept of their last pass, then runs the new tokens from there without moving the states.

        Outputs [T, *gives], and the states after the rows that are longer than a block, by row: these are kept whole or not at all.
        """
        out = fed[0].new_empty(fed[0].shape[0], *self.gives, dtype=self.gives_dtype)
        ends = {}
        for row, start, end, fresh in spans:
            self.settle(room, row, fresh)
            work = [piece[row].clone() for piece in room.pieces]
            now = [part[start:end] for part in fed]
            out[start:end] = self.advance(work, now)
            if end - start > room.block:
                ends[row] = work
            else:
                for kept, part in zip(room.kept, now, strict=True):
                    kept[row, : end - start] = part
        return out, ends

    def settle(self, room: Room, row: int, fresh: bool) -> None:
        """Brings a row's state to where its text stands. Each copy takes state and count at once, so an interruption finds both or neither."""
        slot, pending = [piece[row] for piece in room.pieces], room.pending[row]
        count = int(pending)
        if fresh:
            torch._foreach_zero_([*slot, pending])
        elif count:
            moved = [piece.clone() for piece in slot]
            self.advance(moved, [kept[row, :count] for kept in room.kept])
            torch._foreach_copy_([*slot, pending], [*moved, torch.zeros_like(pending)])
