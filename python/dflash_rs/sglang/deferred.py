"""The drafter's keys and values of plain steps, written many steps at a time.

A plain step drafts nothing, so nobody reads the drafter's context before the next step that does. What the target's pass left for it (the
tapped features ``[R, C]`` of the step's tokens, their slots and positions) is kept instead of projected::

    plain step ──> keep ──┐
    plain step ──> keep ──┼──> inject: one product over all of them, written to their slots
    plain step ──> keep ──┘
                             before a step that drafts, before a prefill, when others run than those kept, when there is no room for one more

Promises:

- A step that drafts finds the context it would have found without any of this; nothing is ever dropped.
- What is kept belongs to the requests of the last step, which still own their slots, or gave them back after that step was launched: only
  then can a slot get another owner, whose first write to it comes with a later step or prefill, and both inject first. So old keys never
  overwrite new ones, no slot is kept twice, and a prefix that other requests find in the cache is complete before they run.
- All on the stream of the steps, in their order; the host waits for nothing, and decides from what every tensor-parallel rank knows.
- Memory is bounded: ``TOKENS`` rows of features.

A cache that copies the drafter's pages away when a request ends (a hierarchical one) would copy them too early, and a prefill server that writes prompts
to pages that a request has given back knows of no step: there nothing is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dflash_rs.sglang import ALGORITHM
from dflash_rs.sglang.metrics import Exporter

logger = logging.getLogger(__name__)

# Plain steps between two injections, at most: a thirty-second of a small cost is none.
STEPS = 32
# Tokens kept at most, for all requests together. A product over more rows is no cheaper per row.
TOKENS = 512


class Deferred:
    """What plain steps have left for the drafter.

    - `inject`: SGLang's ``_append_target_hidden_to_draft_kv_by_loc``, which writes keys and values of features to slots.
    - `exporter`: counts what is kept and written.
    - `steps`, `tokens`: what is kept at most. 0 keeps nothing.
    """

    def __init__(
        self, inject: Callable[..., None], exporter: Exporter | None = None, steps: int = STEPS, tokens: int = TOKENS
    ):
        self._write, self._exporter, self._most_steps, self._most_tokens = inject, exporter, steps, tokens
        self._room: torch.Tensor | None = None
        # Whose features are kept, the slots and positions of each step's tokens, and how many tokens these are.
        self._owners: list[Any] = []
        self._where: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._waiting = 0
        # Whether the step that runs is a plain one of requests whose features may be kept.
        self._plain = False

    def begin(self, plain: bool, owners: Sequence[Any]) -> None:
        """A step or prefill starts; `owners` names its requests. Writes what it must find written."""
        owners = list(owners)
        # Fewer than two steps would be written one at a time anyway.
        self._plain = plain and self._most_steps > 1 and 2 * len(owners) <= self._most_tokens
        if not self._plain or owners != self._owners:
            self.inject()
        self._owners = owners

    def keep(self, hidden: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> bool:
        """Features ``[>= R, C]`` of the running step, slots and positions ``[R]`` of its tokens, which nobody changes any more. Says whether they are kept;
        otherwise they are to be written at once."""
        if not self._plain:
            return False
        rows, begin = int(slots.numel()), self._waiting
        if self._room is None:
            self._room = hidden.new_empty((self._most_tokens, hidden.shape[1]))
            size = self._room.numel() * self._room.element_size() / 2**20
            logger.info(
                "%s: features of up to %d tokens of plain steps wait in %.1f MiB", ALGORITHM, self._most_tokens, size
            )
        # The pass works in the same memory every time: a copy, on its stream.
        self._room[begin : begin + rows].copy_(hidden[:rows])
        self._where.append((slots, positions))
        self._waiting = begin + rows
        if self._exporter is not None:
            self._exporter.deferred_tokens.inc(rows)
        if len(self._where) == self._most_steps or self._waiting + rows > self._most_tokens:
            self.inject()
        return True

    def inject(self) -> None:
        """Writes what is kept."""
        if not self._waiting:
            return
        assert self._room is not None
        hidden = self._room[: self._waiting]
        slots, positions = (torch.cat(parts) for parts in zip(*self._where))
        if self._exporter is not None:
            self._exporter.injected_tokens.inc(self._waiting)
            self._exporter.injections.inc()
        self._where, self._waiting = [], 0
        self._write(target_hidden=hidden, cache_loc=slots, positions=positions)
