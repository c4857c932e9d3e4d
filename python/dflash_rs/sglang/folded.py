"""The samplers in the drafter's CUDA graphs: SGLang's likeliest drafts, and what they were chosen from.

SGLang has the head's product, and the choice of the likeliest, in the drafter's graph. Drafts that are chosen another way, coupled ones and trees, need the same
product. So the graph leaves it behind, in memory that is the same in every replay::

    in the graph     drafter's pass ──> head's product, kept ──> the likeliest ──> SGLang's step
    after it                                 └──> coupled drafts, trees ──> SGLang's step, which takes them for the graph's

Where no graph runs, for batches that are too large for one, SGLang hands the hidden states to the worker's own methods as ever.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dflash_rs.sglang import ALGORITHM, compat
from dflash_rs.sglang.trees import Computed

logger = logging.getLogger(__name__)


class Logits:
    """Of a DFlash: drafts are chosen from the logits of each place."""

    def __init__(self, theirs: Any, room: Tensor | None):
        """`theirs`: SGLang's sampler; `room`: that of a longer block's graphs, which never run at the same time, None makes some."""
        self._weight = theirs.weight[: theirs.num_org]
        self._block, self._start, self._group = int(theirs.block_size), int(theirs.org_vocab_start), theirs.tp_group
        self.out = theirs.out
        if room is None or len(room) < len(self.out):
            room = self._weight.new_empty((len(self.out), len(self._weight)))
            size = room.numel() * room.element_size() / 2**20
            logger.info("%s: the drafter's graphs leave logits of %d drafts in %.1f MiB", ALGORITHM, len(room), size)
        self.room = room

    def __call__(self, hidden_states: Tensor, input_ids: Tensor | None = None) -> None:
        """Captured: the drafter's hidden states ``[R * B, H]``, anchors included."""
        rows = hidden_states.view(-1, self._block, hidden_states.shape[-1])[:, 1:].flatten(0, 1)
        logits = torch.mm(rows.to(self._weight.dtype), self._weight.T, out=self.room[: len(rows)])
        if self._group is None:
            tokens = logits.argmax(-1)
        else:
            # Ranks have rising parts of the vocabulary: of equals the first token is taken, as without ranks.
            best, mine = logits.max(-1, keepdim=True)
            values, tokens = (self._group.all_gather(part, dim=-1) for part in (best, mine + self._start))
            tokens = tokens.gather(1, values.argmax(-1, keepdim=True))[:, 0]
        self.out[: len(tokens)].copy_(tokens)

    def choose(self, worker: Any, requests: int) -> Tensor:
        """Drafts of the step that runs, i64 ``[R * (B - 1)]``."""
        return worker.drafts_of(self.room[: requests * (self._block - 1)], Computed(self._start))


class Lattices:
    """Of a DFlash 2: drafts are chosen along the candidates of all places."""

    def __init__(self, theirs: Any, worker: Any, lm_head: Any):
        self._worker, self._head, self._block, self.out = worker, lm_head, int(theirs.block_size), theirs.out
        self._tokens = torch.empty_like(theirs.candidate_out)
        self._scores: Tensor | None = None

    def stage_sampling_params(self, *, bs: int, sampling_info: Any) -> None:
        """SGLang tells what a drafter is to sample with; this one drafts its best path, see ``Seams.follow_all_drafts``."""

    def __call__(self, hidden_states: Tensor, input_ids: Tensor) -> None:
        """Captured: see ``Logits``; `input_ids` ``[R * B]`` of the block."""
        anchors = input_ids.view(-1, self._block)[:, 0]
        tokens, scores = compat.installed().lattice(self._worker, hidden_states, anchors, self._head)
        if self._scores is None:
            # The first graphs are the largest batch's.
            self._scores = scores.new_empty((len(self._tokens), *scores.shape[1:]))
        self._tokens[: len(tokens)].copy_(tokens)
        self._scores[: len(scores)].copy_(scores)
        path = compat.installed().best_path(self._worker, tokens, scores).reshape(-1)
        self.out[: len(path)].copy_(path)

    def choose(self, worker: Any, requests: int) -> Tensor:
        """See ``Logits``."""
        assert self._scores is not None
        return worker.drafts_along(self._tokens[:requests], self._scores[:requests]).reshape(-1)


class Chosen:
    """In the place of a sampler for one step. SGLang asks it for drafts where the graph has run, and asks nothing where none has."""

    def __init__(self, sampler: Logits | Lattices, choose: Callable[[], Tensor]):
        self._sampler, self._choose = sampler, choose

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    @property
    def out(self) -> Tensor:
        """Instead of the likeliest drafts."""
        return self._choose()
