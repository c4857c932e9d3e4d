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
    before verifying; where they are not, trees come in these numbers of tokens, the anchor counted. `observes`: the costs follow what steps take.
    `from_text`: drafts are looked up and cost nothing, so as many as there are are looked at before it is decided what of them pays.
    `look_up`: most tokens of a block that is looked up beside a drafter, the anchor counted; 0 looks nothing up. A request's drafts are then
    those that promise more, its drafter's or its own text's, and a drafter is not asked where the text promises more already.
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
        look_up: int = 0,
    ):
        self.core, self.costs, self._observes = core, costs, observes
        self._max_running, self._max_batch_tokens = max_running, max_batch_tokens
        self._from_text, self._block, self.look_up = from_text, block_size, look_up
        self._asks_host = asks_host
        # Rows of the drafter's pass in the step at hand.
        self._asked_rows = 0
        self._widths = [] if asks_host or not tree_nodes else widths
        self.planner = (
            _core.Planner(block_size, tree_nodes=tree_nodes) if costs is None else costs.planner(block_size, tree_nodes)
        )

    # ---- before a step -------------------------------------------------------------------------------------------

    def decide(self) -> Decision:
        """For the next step of whoever runs."""
        temperatures, others, context = self.core.drafting(self._max_running)
        decided = self.planner.decide(
            temperatures, others, context=context, widths=self._widths, room=self._max_batch_tokens
        )
        if self._from_text:
            return Decision(self._block, self._block, False)
        row, block, trees = decided
        if self._asks_host:
            # On a device to owe the drafter nothing would be another graph.
            self.core.let_drafter_rest(block == 1 and self.planner.rests)
        if self.look_up:
            # As long as there is room for everyone's; a quarter of a step is the prompts'.
            requests = max(1, len(temperatures))
            row = max(row, min(self.look_up, self._max_batch_tokens * 3 // 4 // requests))
        return Decision(row, block, trees)

    def shape(self, plan: Any, decision: Decision) -> Step:
        """What the planned step is to do."""
        self._asked_rows = 0
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

    def ask(self, step: Step, chances: np.ndarray) -> np.ndarray:
        """Which rows of the step the drafter is asked for, int32 [m], beside drafts that were looked up, with `chances` float32 [n, D] of each when all
        before it are right, 0 where there is none."""
        rows = self.planner.ask(step.plan, chances, step.block)
        self._asked_rows = rows.size * step.block
        return rows

    def admit_either(
        self,
        step: Step,
        looked_up: tuple[np.ndarray, np.ndarray, np.ndarray],
        own: tuple[np.ndarray, np.ndarray, np.ndarray] | None,
    ) -> None:
        """Fills in what pays of the drafts that promise more. `looked_up`: tokens int64 [n, D], chances float32 [n, D], and how many there are,
        int32 [n]; `own`: the rows that the drafter was asked for, int32 [m], its chains and their probabilities [m, B-1], None where there are none."""
        self.planner.admit_either(step.plan, looked_up, own)

    def admit(self, step: Step, tokens: np.ndarray, probabilities: np.ndarray, found: np.ndarray | None = None) -> None:
        """Fills in the drafts that pay, out of the drafter's candidates: see `Drafter.candidates`. `found` int32 [n]: how many places have any
        (None: all of them)."""
        plan, rows = step.plan, step.plan.draft_rows
        temperatures, most = plan.temperatures[rows], plan.block_len[rows]
        others = plan.token_ids.size - int(most.sum())
        if found is not None:
            most = np.minimum(most, found + 1)
        if step.trees:
            anchors = plan.token_ids[plan.query_starts[rows]]
            trees = self.planner.admit_trees(anchors, tokens, probabilities, temperatures, most, others, plan=plan)
            plan.set_trees(*trees)
            return
        first, its = np.ascontiguousarray(tokens[:, :, 0]), np.ascontiguousarray(probabilities[:, :, 0])
        plan.set_drafts(first)
        plan.narrow(self.planner.admit(its, temperatures, most, others, plan=plan, tokens=first))

    # ---- after a step --------------------------------------------------------------------------------------------

    def learn(self, step: Step, accepted: Any) -> None:
        """Remembers what was accepted."""
        if step.drafted_rows:
            self.planner.record_step(step.plan, accepted)

    def observe(self, step: Step, times: StageTimes, injected_steps: int) -> None:
        """Sees what a step took, which wrote draft KV for so many before it drafted: each has its share of that."""
        if not self._observes:
            return
        took, asked = times.step, self._asked_rows if self.look_up else step.drafted_rows
        drafted = asked if step.inject else 0
        drafting = took["draft"] + took["inject"] / max(1, injected_steps)
        # To draw a token from its logits is a row's cost like any other.
        self.planner.observe_step(step.plan, took["verify"] + took["accept"], drafted, drafting)
