"""A step of the engine, read aloud: decide, plan, launch, resolve, commit, route."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..errors import DflashError
from .backend import Backend, Step
from .policy import Policy
from .requests import Requests
from .timing import stage


class Flight(NamedTuple):
    """A launched step, and what its backend wants to have back."""

    step: Step
    launched: Any


class Loop:
    """Takes steps for whoever runs. An interruption calls steps off; the requests go on from where they were.

    With `overlap` the next step is launched before the results of the last one are read, wherever the core can plan it by then. The
    text is the same; a request that ends meanwhile has taken part in one step too many, of which nobody hears.
    """

    def __init__(
        self,
        core: Any,
        backend: Backend,
        policy: Policy,
        requests: Requests,
        *,
        overlap: bool = False,
        state_bytes: int = 0,
    ):
        self.core, self.backend, self.policy, self.requests = core, backend, policy, requests
        self.overlap, self.times = overlap, backend.times
        self.steps = self.steps_ahead = 0
        # Memory that a target keeps states of requests in, and copies of them.
        self.state_bytes = state_bytes
        # Graphs, seconds and bytes of `device.ahead.capture`, where it was asked for.
        self.captured_ahead: dict[str, float] = {}
        self._ahead: Flight | None = None

    def step(self) -> None:
        """One step, up to everyone's record."""
        self.times.begin()
        if self._ahead is not None and not self.core.is_wanted(self._ahead.step.plan):
            self.drop()
        flight, self._ahead = self._ahead, None
        try:
            with torch.inference_mode():
                flight = flight or self._launch(self._plan())
                ahead = self._launch_ahead() if self.overlap else None
                events = self._resolve(flight)
            self._route(events)
        except BaseException:
            self._call_off(flight)
            raise
        self._ahead = ahead
        self.steps += 1
        self.policy.observe(flight.step, self.times, self.backend.injected_steps)
        if not self.requests:
            self.drop()

    def drop(self) -> None:
        """Calls off the step that is ahead, if there is one."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            self.core.cancel(ahead.step.plan)

    @stage("plan")
    def _plan(self) -> Step:
        decision = self.policy.decide()
        plan = self.core.plan(decision.row)
        if plan is None:
            raise DflashError(
                f"nothing can run although {len(self.requests)} requests are unfinished; this is a defect"
            )
        return self.policy.shape(plan, decision)

    def _launch(self, step: Step) -> Flight:
        return Flight(step, self.backend.launch(step))

    def _launch_ahead(self) -> Flight | None:
        """The step after the one in flight, unless its results have to come first."""
        step = self._plan_ahead()
        if step is None:
            return None
        self.steps_ahead += 1
        return self._launch(step)

    @stage("plan")
    def _plan_ahead(self) -> Step | None:
        decision = self.policy.decide()
        plan = self.core.plan_ahead(decision.row)
        return None if plan is None else self.policy.shape(plan, decision)

    def _resolve(self, flight: Flight) -> Any:
        step, launched = flight
        # Launched ahead, it was not known where rows start; now it is.
        self.core.settle(step.plan)
        accepted = self.backend.resolve(launched)
        return self._commit(step, accepted)

    @stage("commit")
    def _commit(self, step: Step, accepted: Any) -> Any:
        events = self.core.commit(step.plan, accepted, injected=step.inject)
        self.backend.keep(step, accepted)
        self.policy.learn(step, accepted)
        return events

    @stage("text")
    def _route(self, events: Any) -> None:
        self.requests.route(events)

    def _call_off(self, flight: Flight | None) -> None:
        committed = (
            [] if flight is None or self.core.cancel(flight.step.plan) else flight.step.plan.request_ids.tolist()
        )
        self.core.cancel_all()
        # What follows a commit was left out: the target's states may lag behind.
        for request in committed:
            self.requests.abort(request)
