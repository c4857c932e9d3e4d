"""How much is drafted, and how much of it is verified: what is asked of the core's planner, and what it is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import _core
from ..config import StepCosts
from .backend import Step
from .requests import Requests
from .timing import StageTimes

# Measured with the bundled pair, what makes the mean chance of a draft its share of acceptances: 0.43 at temperature 0, 0.51 at
# 0.4, 0.66 at 0.7, 0.92 at 1. A square passes through these.
_GREEDY_SHARPNESS, _MORE_SHARPNESS = np.float32(0.43), np.float32(0.49)


@dataclass(frozen=True)
class Decision:
    """Most tokens of the next step's decoding rows, and tokens of the blocks that the drafter computes; both count the anchor."""

    row: int
    block: int


class Policy:
    """Decides for blocks of `block_size` tokens and trees of up to `tree_nodes` drafts, 0 for chains.

    By `costs` it drafts what pays; without, whole blocks and trees. `asks_host`, `tiers`: whether the drafter's chances are seen before
    verifying; where they are not, trees come in these numbers of drafts. `observes`: the costs come down to what steps take.
    """

    def __init__(
        self,
        *,
        block_size: int,
        tree_nodes: int,
        costs: StepCosts | None,
        observes: bool,
        max_running: int,
        max_batch_tokens: int,
        asks_host: bool,
        tiers: list[int],
    ):
        self.block_size, self.tree_nodes, self.costs = block_size, tree_nodes, costs
        self._max_running, self._max_batch_tokens = max_running, max_batch_tokens
        self._asks_host, self._tiers, self._observes = asks_host, tiers, observes
        self.planner: _core.Planner | None = None if costs is None else costs.planner(block_size, tree_nodes)
        # Without costs a planner of trees lets them have all their drafts.
        self._tree_planner: _core.Planner | None = None
        if tree_nodes:
            self._tree_planner = self.planner or _core.Planner(block_size, tree_nodes=tree_nodes)

    # ---- before a step -------------------------------------------------------------------------------------------

    def decide(self, requests: Requests) -> Decision:
        """For the next step of whoever runs."""
        if self.planner is None:
            return Decision(self.tree_nodes + 1 if self.tree_nodes else self.block_size, self.block_size)
        drafting, others = requests.drafting(self._max_running)
        if self._tree_planner is None:
            block = self.planner.block(drafting, others)
            return Decision(block, block)
        if not self._asks_host:
            room = self._max_batch_tokens - drafting - others
            tiers = [nodes for nodes in self._tiers if drafting * nodes <= room]
            if not tiers:
                return Decision(1, 1)
            nodes, block = self.planner.tree(drafting, others, tiers=tiers, shortest=self.block_size)
            return Decision(nodes + 1, block)
        nodes, block = self.planner.tree(drafting, others)
        # How many of them pay is seen when the drafter has said how sure it is: some will want more, some fewer.
        return (
            Decision(min(self.tree_nodes, max(2 * nodes, self.block_size - 1)) + 1, block) if nodes else Decision(1, 1)
        )

    def shape(self, plan: Any, decision: Decision, requests: Requests) -> Step:
        """What the planned step is to do."""
        # Plain requests among themselves owe the drafter nothing; the core notes what it has not seen.
        inject = requests.any_drafts(plan.request_ids)
        # Prompts take their share of a step: what drafts beside them drafts chains.
        trees = bool(self._tree_planner is not None and plan.draft_rows.size > 0 and not plan.is_prefill.any())
        if self._tree_planner is not None and not trees:
            plan.narrow(np.minimum(plan.block_len[plan.draft_rows], decision.block) - 1)
        longest = int(plan.block_len[plan.draft_rows].max(initial=0))
        block = decision.block if trees else min(decision.block, longest)
        return Step(plan, block, trees, inject, int(plan.draft_rows.size) * block)

    # ---- between drafting and verifying --------------------------------------------------------------------------

    def admit(self, step: Step, tokens: np.ndarray, probabilities: np.ndarray, requests: Requests) -> None:
        """Fills in the drafts that pay, out of the drafter's candidates: see `Drafter.candidates`."""
        (self._admit_trees if step.trees else self._admit_chains)(step.plan, tokens, probabilities, requests)

    def _admit_chains(self, plan: Any, tokens: np.ndarray, probabilities: np.ndarray, requests: Requests) -> None:
        rows = plan.draft_rows
        plan.set_drafts(np.ascontiguousarray(tokens[:, :, 0]))
        if self.planner is not None:
            lengths = plan.block_len[rows]
            others = plan.token_ids.size - int(lengths.sum())
            exponents = _sharpness(requests.temperatures(plan.request_ids[rows]))
            chances = _chances(probabilities[:, :, 0] ** exponents[:, None])
            keep = np.minimum(self.planner.widths(chances, others), lengths - 1)
            plan.narrow(keep.astype(np.int32))

    def _admit_trees(self, plan: Any, tokens: np.ndarray, probabilities: np.ndarray, requests: Requests) -> None:
        assert self._tree_planner is not None
        rows = plan.draft_rows
        anchors = plan.token_ids[plan.query_starts[rows]]
        first = probabilities[:, :, :1]
        chances = first ** _sharpness(requests.temperatures(plan.request_ids[rows]))[:, None, None]
        # What the likeliest token leaves, its rivals share as the drafter would have them share it.
        rest = (1 - chances) * probabilities[:, :, 1:] / np.maximum(1 - first, np.float32(1e-6))
        # In every rounding: no rival is likelier than what comes before it.
        chances = np.minimum.accumulate(_chances(np.concatenate((chances, rest), axis=2)), axis=2)
        lens = plan.block_len[rows]
        others = plan.token_ids.size - int(lens.sum())
        plan.set_trees(*self._tree_planner.trees(anchors, tokens, chances, lens - 1, others))

    # ---- after a step --------------------------------------------------------------------------------------------

    def learn(self, step: Step, accepted: Any, events: Any) -> None:
        """Remembers what was accepted."""
        if self.planner is None:
            return
        if step.trees:
            self.planner.record_trees(step.plan, accepted)
            return
        for drafted, kept in zip(events.drafted.tolist(), events.accepted.tolist(), strict=True):
            if drafted:
                self.planner.record(drafted, kept)

    def observe(self, step: Step, times: StageTimes) -> None:
        """Sees what a step took."""
        plan, took = step.plan, times.step
        # A prefill computes fewer logits than rows.
        if self._observes and self.planner is not None and plan.logit_rows.size == plan.token_ids.size:
            drafted = step.drafted_rows if step.inject else 0
            self.planner.observe(plan.token_ids.size, took["verify"], drafted, took["draft"] + took["inject"])


def _sharpness(temperatures: np.ndarray) -> np.ndarray:
    """Exponents float32 [n] that turn the drafter's probabilities into chances of acceptance.

    A drafter is trained on the target's law at temperature 1. A request at a lower one draws the likeliest token more often.
    """
    return _GREEDY_SHARPNESS + _MORE_SHARPNESS * np.minimum(temperatures, 1) ** 2


def _chances(numbers: np.ndarray) -> np.ndarray:
    """Chances of acceptance in [0, 1]; one that a drafter could not make a number of is no reason to draft."""
    return np.clip(np.nan_to_num(numbers, copy=False, nan=0.0), 0, 1)
