"""How much is drafted, and how much of it is verified: what the core's planner is asked, and what it is told."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .. import _core
from ..config import StepCosts
from .backend import Step
from .timing import StageTimes


class Decision(NamedTuple):
    """Most tokens of the next step's decoding rows, tokens of the blocks that the drafter computes (both count the anchor), and whether to
    draft trees."""

    row: int
    block: int
    trees: bool


class Policy:
    """Decides for blocks of `block_size` tokens and trees of up to `tree_nodes` drafts, 0 for chains.

    By `costs` it drafts what pays; without, whole blocks and trees. `asks_host`, `widths`: whether the drafter's probabilities are seen
    before verifying; where they are not, trees come in these numbers of tokens, the anchor counted. `observes`: the costs come down to what steps take.
    `from_text`: drafts are looked up and cost nothing, so as many as there are are looked at before it is decided what of them pays.
    """

    def __init__(
        self,
        core: Any,
        *,
        block_size: int,
        tree_nodes: int,
        costs: StepCosts | None,
        observes: bool,
        max_running: int,
        max_batch_tokens: int,
        asks_host: bool,
        widths: list[int],
        from_text: bool = False,
    ):
        self.core, self.costs, self._observes = core, costs, observes
        self._max_running, self._max_batch_tokens = max_running, max_batch_tokens
        self._from_text, self._block = from_text, block_size
        self._widths = [] if asks_host or not tree_nodes else widths
        self.planner = (
            _core.Planner(block_size, tree_nodes=tree_nodes) if costs is None else costs.planner(block_size, tree_nodes)
        )

    # ---- before a step -------------------------------------------------------------------------------------------

    def decide(self) -> Decision:
        """For the next step of whoever runs."""
        temperatures, others = self.core.drafting(self._max_running)
        decided = self.planner.decide(temperatures, others, widths=self._widths, room=self._max_batch_tokens)
        if self._from_text:
            return Decision(self._block, self._block, False)
        return Decision(*decided)

    def shape(self, plan: Any, decision: Decision) -> Step:
        """What the planned step is to do."""
        *_, drafting, _, longest, prompts = plan.outline
        # Prompts take their share of a step: what drafts beside them drafts chains.
        trees = bool(decision.trees and drafting and not prompts)
        if decision.trees and drafting and not trees:
            plan.narrow(np.minimum(plan.block_len[plan.draft_rows], decision.block))
            *_, drafting, _, longest, _ = plan.outline
        block = decision.block if trees else min(decision.block, longest)
        # Plain requests among themselves owe the drafter nothing; the core notes what it has not seen. A look-up has no KV that could be missing.
        return Step(plan, block, trees, self._from_text or plan.drafts, drafting * block)

    # ---- between drafting and verifying --------------------------------------------------------------------------

    def admit(self, step: Step, tokens: np.ndarray, probabilities: np.ndarray, found: np.ndarray | None = None) -> None:
        """Fills in the drafts that pay, out of the drafter's candidates: see `Drafter.candidates`. `found` int32 [n]: how many places have any
        (None: all of them)."""
        plan, rows = step.plan, step.plan.draft_rows
        temperatures, most = plan.temperatures[rows], plan.block_len[rows]
        if found is not None:
            most = np.minimum(most, found + 1)
        others = plan.token_ids.size - int(most.sum())
        if step.trees:
            anchors = plan.token_ids[plan.query_starts[rows]]
            trees = self.planner.admit_trees(anchors, tokens, probabilities, temperatures, most, others, plan=plan)
            plan.set_trees(*trees)
            return
        first, its = np.ascontiguousarray(tokens[:, :, 0]), np.ascontiguousarray(probabilities[:, :, 0])
        plan.set_drafts(first)
        plan.narrow(self.planner.admit(its, temperatures, most, others, plan=plan))

    # ---- after a step --------------------------------------------------------------------------------------------

    def learn(self, step: Step, accepted: Any) -> None:
        """Remembers what was accepted."""
        if step.drafted_rows:
            self.planner.record_step(step.plan, accepted)

    def observe(self, step: Step, times: StageTimes) -> None:
        """Sees what a step took."""
        plan, took = step.plan, times.step
        # A prefill computes fewer logits than rows.
        if self._observes and plan.logit_rows.size == plan.token_ids.size:
            drafted = step.drafted_rows if step.inject else 0
            self.planner.observe(plan.token_ids.size, took["verify"], drafted, took["draft"] + took["inject"])
