"""A step of the engine, read aloud: decide, plan, launch, resolve, commit, route."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import DflashError
from .backend import Backend, Step
from .policy import Policy
from .requests import Requests
from .timing import stage


class Loop:
    """Takes steps for whoever runs. An interruption calls the step off; the requests go on from where they were."""

    def __init__(self, core: Any, backend: Backend, policy: Policy, requests: Requests):
        self.core, self.backend, self.policy, self.requests = core, backend, policy, requests
        self.times, self.steps = backend.times, 0

    def step(self) -> None:
        """One step, from the choice of who runs to everyone's text."""
        self.times.begin()
        step = None
        try:
            with torch.inference_mode():
                step = self._plan()
                accepted = self.backend.resolve(self.backend.launch(step))
                events = self._commit(step, accepted)
            self._route(events)
        except BaseException:
            self._call_off(step)
            raise
        self.steps += 1
        self.policy.observe(step, self.times)

    @stage("plan")
    def _plan(self) -> Step:
        decision = self.policy.decide(self.requests)
        plan = self.core.plan(decision.row)
        if plan is None:
            raise DflashError(
                f"nothing can run although {len(self.requests)} requests are unfinished; this is a defect"
            )
        return self.policy.shape(plan, decision, self.requests)

    @stage("commit")
    def _commit(self, step: Step, accepted: Any) -> Any:
        events = self.core.commit(step.plan, accepted, injected=step.inject)
        self.policy.learn(step, accepted, self.requests)
        return events

    @stage("text")
    def _route(self, events: Any) -> None:
        self.requests.route(events)

    def _call_off(self, step: Step | None) -> None:
        if step is None:
            self.core.cancel_all()
        elif not self.core.cancel(step.plan):
            # Committed, and somebody's tokens did not arrive: nobody gets a text with a hole.
            for request in step.plan.request_ids.tolist():
                self.requests.abort(request)
