"""Steps that torch takes layer by layer, with the core's kernels on a CPU: everything between two stages is an array of the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _core, cuda
from ..models.batch import StepBatch
from .backend import Step
from .constraints import Constraint, Edited, edit
from .deferred import Deferred
from .policy import Policy
from .timing import StageTimes, stage


class HostBackend:
    """Drafts, asks the policy what of it pays, verifies, accepts and injects.

    A CPU has no queue of its own, so a launched step waits for whoever wants its result. `draws_there`: the target's tokens are drawn
    where its logits are, by a kernel, when all that a step's requests ask for is known to it.
    """

    asks_host = True
    num_graphs = 0
    injected_steps = 0

    def __init__(
        self,
        core: Any,
        target: Any,
        draft: Any,
        policy: Policy,
        *,
        page_size: int,
        constrained: Mapping[int, Constraint],
        draws_there: bool = False,
    ):
        self.core, self.target, self.draft, self.policy = core, target, draft, policy
        self.page_size, self.draws_there, self.times = page_size, draws_there, StageTimes()
        self._constrained = constrained
        self._deferred = Deferred(lambda features, **told: draft.inject(features, **told))

    def launch(self, step: Step) -> Step:
        return step

    def resolve(self, launched: Step) -> Any:
        step, self.injected_steps = launched, 0
        if step.plan.draft_rows.size:
            self._propose(step)
        rows, edited, features = self._verify(step)
        accepted = self._accept(step.plan, rows, edited)
        if step.inject and not self.draft.from_text:
            self._inject(step.plan, features, accepted)
        return accepted

    @stage("draft")
    def _propose(self, step: Step) -> None:
        plan = step.plan
        if self.draft.from_text:
            tokens, chances, found = self.core.look_up(plan, step.block)
            self.policy.admit(step, tokens[:, :, None], chances[:, :, None], found)
            return
        rows = plan.draft_rows
        if not self.policy.look_up:
            self.policy.admit(step, *self._ask(step, rows))
            return
        looked_up = self.core.look_up(plan, self.policy.look_up)
        asked, own = self.policy.ask(step, looked_up[1]), None
        if asked.size:
            tokens, probabilities = self._ask(step, asked)
            own = asked, np.ascontiguousarray(tokens[:, :, 0]), np.ascontiguousarray(probabilities[:, :, 0])
        self.policy.admit_either(step, looked_up, own)

    def _ask(self, step: Step, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The drafter's candidates for rows of a step, and their probabilities, [n, block - 1, k]; for rows that sample those that the target's own
        random numbers favour, and their shares."""
        plan = step.plan
        self._write()
        temperatures, k = plan.temperatures[rows], self.draft.branches if step.trees else 1
        sampled = self.draft.most_candidates > 1 and bool(temperatures.any())
        tokens, probabilities = self.draft.candidates(
            plan.token_ids[plan.query_starts[rows]],
            plan.context_lens[rows],
            self.core.page_table,
            plan.row_ids[rows],
            page_size=self.page_size,
            valid_from=plan.draft_valid_from[rows],
            block_size=step.block,
            k=self.draft.most_candidates if sampled else k,
        )
        if not sampled:
            return tokens, probabilities
        first = plan.context_lens[rows].astype(np.int64) + 1
        return _core.couple(tokens, probabilities, plan.seeds[rows], first, temperatures, k)

    @stage("verify")
    def _verify(self, step: Step) -> tuple[np.ndarray, Edited | None, Any]:
        """The target's logits float32 [N, V], or its tokens int64 [N] where they are drawn already; the rows that constraints edited; and the
        tapped features."""
        plan = step.plan
        batch = StepBatch.from_arrays(
            token_ids=plan.token_ids,
            positions=plan.positions,
            slots=plan.slots,
            query_starts=plan.query_starts,
            context_lens=plan.context_lens,
            page_table=self.core.page_table,
            row_ids=plan.row_ids,
            logit_rows=plan.logit_rows,
            page_size=self.page_size,
            ancestors=plan.ancestors.reshape(plan.token_ids.size, -1) if step.trees else None,
            device=self.target.device,
        )
        if (state := self.target.state) is not None:
            starting = plan.state_restore >= 0
            state.restore(plan.row_ids[starting], plan.state_restore[starting])
        logits, features = self.target.forward(batch)
        sampled = self._draw_there(plan, batch, logits)
        rows = logits.float().cpu().numpy() if sampled is None else sampled

        def fetch(wanted: np.ndarray) -> np.ndarray:
            if sampled is None:
                return rows[wanted]
            return logits[torch.from_numpy(wanted).to(logits.device)].float().cpu().numpy()

        return rows, edit(plan, self._constrained, fetch), features

    @stage("accept")
    def _accept(self, plan: Any, rows: np.ndarray, edited: Edited | None) -> Any:
        accept = self.core.accept if rows.ndim == 2 else self.core.accept_sampled
        accepted = accept(plan, rows, edited=edited)
        if accepted.move_from.size:
            self.target.move_kv(accepted.move_from, accepted.move_to)
        if (state := self.target.state) is not None:
            saved = plan.state_save >= 0
            state.save(plan.row_ids[saved], plan.block_len[saved], plan.state_save[saved])
        return accepted

    def keep(self, step: Step, accepted: Any) -> None:
        """Moves states over what was kept: chunks of prompts whole, of blocks the anchor and what was accepted."""
        if (state := self.target.state) is not None:
            plan = step.plan
            state.keep(plan.row_ids, np.where(plan.is_prefill, plan.block_len, accepted.accepted + 1).astype(np.int32))

    @stage("inject")
    def _inject(self, plan: Any, features: Any, accepted: Any) -> None:
        rows = accepted.commit_rows
        told = {"positions": plan.positions[rows], "slots": accepted.commit_slots}
        if self.draft.reads_tokens:
            told |= {"token_ids": plan.token_ids[rows], "before": self._before(plan, rows)}
        *_, prompts = plan.outline
        if not prompts:
            self._deferred.add(features, rows, **told)
            return
        # Many tokens, whose request may have found others of them in the cache: all of them are there from now on.
        self._deferred.write()
        self.draft.inject(features, rows=rows, **told)

    @stage("inject")
    def _write(self) -> None:
        self._deferred.write()
        self.injected_steps = self._deferred.written

    def _before(self, plan: Any, rows: np.ndarray) -> np.ndarray:
        """Slots int64 [M] of the tokens before those at `rows`; -1 at the begin of a text, and where the drafter was not told of them."""
        requests = np.searchsorted(plan.query_starts, rows, side="right") - 1
        places = plan.positions[rows] - 1
        pages, within = np.divmod(np.maximum(places, 0), self.page_size)
        slots = self.core.page_table[plan.row_ids[requests], pages].astype(np.int64) * self.page_size + within
        return np.where((places < 0) | (places < plan.draft_valid_from[requests]), -1, slots)

    def _draw_there(self, plan: Any, batch: StepBatch, logits: Tensor) -> np.ndarray | None:
        """The target's tokens, drawn where the logits are: the same ones, without moving a vocabulary's worth of numbers per row.

        None when the host has to: no kernel for this device, log-probabilities asked for, or a row that cannot be drawn, which the
        core explains.
        """
        if not self.draws_there or not logits.shape[0]:
            return None
        wanted = self.core.device_sampling(plan)
        if wanted.scores:
            return None
        device = logits.device
        sampled = cuda.sample_rows(
            logits,
            cuda.upload_sampling(wanted, device),
            query_starts=torch.from_numpy(plan.query_starts.copy()).to(device),
            token_ids=batch.token_ids,
            positions=batch.positions,
            row_tokens=torch.from_numpy(plan.logit_rows.copy()).to(device),
            parents=torch.from_numpy(plan.parents.copy()).to(device) if plan.parents.size else None,
        )
        tokens = sampled.tokens.cpu().numpy()
        return None if (tokens < 0).any() else tokens
