"""What callers asked for, from its arrival to its last token."""

from __future__ import annotations

import functools
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ..errors import DflashError
from ..options import Asked, core_params
from ..outputs import ABORT, ERROR, REASONS, Output, Prompt, StreamEvent, TokenLogprob
from ..sampling import SamplingParams
from ..text import Detokenizer
from .device.draws import Draws

_CALL = functools.partial.__call__


class Active:
    """A request on its way."""

    def __init__(
        self, index: int, prompt: Prompt, ids: list[int], params: SamplingParams, seed: int, text: Detokenizer | None
    ):
        self.index, self.prompt, self.ids, self.params, self.seed, self.text = index, prompt, ids, params, seed, text
        self.drafts = False
        self.draws: Draws | None = None
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self.steps = self.drafted_steps = 0
        self.decoded = 0
        self.cached = 0
        self.histogram: list[int] = []
        self.drafted_at: list[int] = []
        self.accepted_at: list[int] = []
        self.begin = time.perf_counter()
        self.first = 0.0
        self.events: deque[StreamEvent] = deque()
        self.output: Output | None = None

    def count(self, drafted: int, accepted: int, tokens: int) -> None:
        self.steps += 1
        self.drafted_steps += drafted > 0
        self.decoded += tokens
        _bump(self.histogram, accepted)
        for i in range(drafted):
            _bump(self.drafted_at, i)
        for i in range(accepted):
            _bump(self.accepted_at, i)

    def metrics(self) -> dict[str, Any]:
        total = time.perf_counter() - self.begin
        accepted = self.accepted_at + [0] * (len(self.drafted_at) - len(self.accepted_at))
        return {
            "prompt_tokens": len(self.ids),
            "cached_prompt_tokens": self.cached,
            "output_tokens": len(self.token_ids),
            "steps": self.steps,
            "drafted_steps": self.drafted_steps,
            "tau": self.decoded / self.steps if self.steps else 0.0,
            "accepted_per_position": [a / d for a, d in zip(accepted, self.drafted_at, strict=True)],
            "accept_histogram": self.histogram,
            "ttft_s": (self.first or time.perf_counter()) - self.begin,
            "total_s": total,
            "tokens_per_s": len(self.token_ids) / total if total > 0 else 0.0,
            "seed": self.seed,
        }


def refused(index: int, prompt: Prompt, params: Any, error: str) -> StreamEvent:
    """The one event of a prompt that was not taken."""
    metrics = Active(index, prompt, [], SamplingParams(), 0, None).metrics()
    own = isinstance(params, SamplingParams)
    metrics |= {"ttft_s": 0.0, "total_s": 0.0, "seed": params.seed if own else None}
    logprobs: list[TokenLogprob] | None = [] if own and params.logprobs is not None else None
    output = Output(None, prompt, "", [], REASONS[ERROR], logprobs, metrics, error)
    return StreamEvent(index, None, "", [], 0, REASONS[ERROR], output)


def _bump(counts: list[int], at: int) -> None:
    counts.extend([0] * (at + 1 - len(counts)))
    counts[at] += 1


class Requests:
    """The unfinished requests of an engine by their numbers in the core."""

    def __init__(self, core: Any, detokenizer: Callable[[], Detokenizer]):
        self.core, self._detokenizer = core, detokenizer
        self.active: dict[int, Active] = {}

    def __len__(self) -> int:
        return len(self.active)

    def submit(
        self, taken: Iterable[tuple[Asked, list[int]]], drafts: bool, refuse: Callable[[StreamEvent], None] | None
    ) -> dict[int, Active]:
        """Gives the core what can run, all or nothing; with `refuse`, what it does not take becomes an event given to that."""
        ids: list[int] = []
        actives: list[Active] = []
        try:
            for one, tokens in taken:
                seed = secrets.randbits(63) if one.params.seed is None else one.params.seed
                active = Active(one.index, one.prompt, tokens, one.params, seed, self._detokenizer())
                active.drafts = drafts
                add = functools.partial(self.core.add, tokens, **core_params(one.params, seed, drafts))
                try:
                    # In one call: no interruption comes between a request's beginning and our knowing its number.
                    ids.extend(map(_CALL, (add,)))
                except DflashError as error:
                    told = one.tell(error)
                    if refuse is None:
                        raise told from None
                    refuse(refused(one.index, one.prompt, one.params, str(told)))
                else:
                    actives.append(active)
            found = dict(zip(ids, actives, strict=True))
            self.active.update(found)
            return found
        except BaseException:
            for request in ids:
                self.core.abort(request)
                self.active.pop(request, None)
            raise

    def abort(self, request: int) -> bool:
        """Ends a request wherever it is; False when it is unknown or finished."""
        active = self.active.get(request)
        if active is None:
            return False
        self.core.abort(request)
        self._finish(active, request, ABORT, [], 0, "")
        return True

    def drafting(self, most: int) -> tuple[int, int]:
        """How many of the `most` oldest draft, and how many do not."""
        oldest = list(self.active.values())[:most]
        drafting = sum(active.drafts for active in oldest)
        return drafting, len(oldest) - drafting

    def any_active(self, request_ids: np.ndarray) -> bool:
        """Whether any of them is unfinished."""
        return any(request in self.active for request in request_ids.tolist())

    def any_drafts(self, request_ids: np.ndarray) -> bool:
        """Whether any of them drafts."""
        return any(self.active[request].drafts for request in request_ids.tolist() if request in self.active)

    def temperatures(self, request_ids: np.ndarray) -> np.ndarray:
        """Float32 [n]."""
        found = [self.active[r].params.temperature if r in self.active else 1.0 for r in request_ids.tolist()]
        return np.asarray(found, dtype=np.float32)

    def draws(self, request: int) -> Draws:
        """How a request's tokens are drawn on a device."""
        active = self.active[request]
        if active.draws is None:
            active.draws = Draws.of(active.params, active.seed)
        return active.draws

    def route(self, events: Any) -> None:
        """Gives everyone what a step brought: tokens, text, and the end."""
        errors = dict(events.errors)
        ids, tokens, starts = events.request_ids.tolist(), events.tokens.tolist(), events.token_starts.tolist()
        finish, drafted, accepted = events.finish.tolist(), events.drafted.tolist(), events.accepted.tolist()
        ends, cached = events.text_ends.tolist(), events.cached_tokens.tolist()
        for e, request in enumerate(ids):
            active = self.active.get(request)
            if active is None:
                continue
            new = tokens[starts[e] : starts[e + 1]]
            active.cached = cached[e]
            if active.logprobs is not None:
                active.logprobs.extend(_token_logprobs(events, starts[e], starts[e + 1]))
            if active.token_ids and new:
                active.count(drafted[e], accepted[e], len(new))
            elif new:
                active.first = time.perf_counter()
            active.token_ids += new
            final = finish[e] != 0
            # The accepted drafts come first; a stop may have cut the block short.
            kept = min(accepted[e], len(new))
            piece = active.text.push(new, None if ends[e] < 0 else ends[e], final)
            if final:
                self._finish(active, request, finish[e], new, kept, piece, errors.get(request))
            elif new:
                active.events.append(StreamEvent(active.index, request, piece, new, kept))

    def _finish(
        self,
        active: Active,
        request: int,
        code: int,
        new: list[int],
        accepted: int,
        piece: str,
        error: str | None = None,
    ) -> None:
        reason = REASONS[code]
        active.output = Output(
            request, active.prompt, active.text.text, active.token_ids, reason, active.logprobs, active.metrics(), error
        )
        active.events.append(StreamEvent(active.index, request, piece, new, accepted, reason, active.output))
        self.active.pop(request, None)


def _token_logprobs(events: Any, begin: int, end: int) -> list[TokenLogprob]:
    tops = events.top_starts
    found = []
    for j in range(begin, end):
        span = slice(int(tops[j]), int(tops[j + 1]))
        top = list(zip(events.top_tokens[span].tolist(), events.top_logprobs[span].tolist(), strict=True))
        found.append(TokenLogprob(int(events.tokens[j]), float(events.logprobs[j]), top))
    return found
