"""What callers asked for, from its arrival to its last token."""

from __future__ import annotations

import functools
import secrets
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from .. import _core
from ..errors import DflashError
from ..options import Asked
from ..outputs import ABORT, ERROR, REASONS, Output, Prompt, StreamEvent, TokenLogprob
from ..sampling import SamplingParams
from ..text import Detokenizer
from .constraints import Constraint

_CALL = functools.partial.__call__


class Active:
    """A request on its way. The core keeps what it is given, in `record`; what is made of it here is made when somebody asks.

    `text` makes it where tokens have no bytes of their own, else it is None. `ended` is told of its end.
    """

    def __init__(
        self,
        index: int,
        prompt: Prompt,
        ids: list[int],
        params: SamplingParams,
        seed: int,
        text: Detokenizer | None,
        ended: deque[Active],
    ):
        self.index, self.prompt, self.ids, self.params, self.seed, self.text = index, prompt, ids, params, seed, text
        self.ended = ended
        self.request_id = -1
        self.record: Any = None

    def piece(self, tokens: list[int], code: int) -> str:
        """The text that the next tokens make certain, where the core cannot tell."""
        if self.text is None or code == ABORT:
            return ""
        return self.text.push(tokens, None, code != 0)

    def output(self) -> Output:
        """What the finished request is given back; all of it counts as read."""
        record, params = self.record, self.params
        text = record.text()
        if text is None:
            for _, tokens, _, code in record.read():
                self.piece(tokens, code)
            text = "" if self.text is None else self.text.text
        metrics = record.metrics()
        total, tokens = metrics["total_s"], record.tokens()
        logprobs = None if params.logprobs is None else [TokenLogprob(*score) for score in record.scores()]
        return Output(
            self.request_id,
            self.prompt,
            text,
            tokens,
            REASONS[record.finish],
            logprobs,
            {
                "prompt_tokens": len(self.ids),
                **metrics,
                "tokens_per_s": len(tokens) / total if total > 0 else 0.0,
                "seed": self.seed,
            },
            record.error,
        )


_NOTHING_DONE: dict[str, Any] = {
    "prompt_tokens": 0, "cached_prompt_tokens": 0, "output_tokens": 0, "steps": 0, "drafted_steps": 0, "tau": 0.0, "ttft_s": 0.0, "total_s": 0.0,
    "tokens_per_s": 0.0,
}  # fmt: skip


def refused(index: int, prompt: Prompt, params: Any, error: str) -> StreamEvent:
    """The one event of a prompt that was not taken."""
    own = isinstance(params, SamplingParams)
    lists: dict[str, Any] = {"accepted_per_position": [], "accept_histogram": []}
    metrics = _NOTHING_DONE | lists | {"seed": params.seed if own else None}
    logprobs: list[TokenLogprob] | None = [] if own and params.logprobs is not None else None
    output = Output(None, prompt, "", [], REASONS[ERROR], logprobs, metrics, error)
    return StreamEvent(index, None, "", [], 0, REASONS[ERROR], output)


class Requests:
    """The unfinished requests of an engine by their numbers in the core."""

    def __init__(self, core: Any, detokenizer: Callable[[], Detokenizer] | None):
        """`detokenizer` for an engine whose core has no vocabulary."""
        self.core, self._detokenizer = core, detokenizer
        self.active: dict[int, Active] = {}
        # Of these, those that constrain what may be drawn; the backend edits their rows.
        self.constrained: dict[int, Constraint] = {}

    def __len__(self) -> int:
        return len(self.active)

    def submit(
        self,
        taken: Iterable[tuple[Asked, list[int]]],
        drafts: bool,
        refuse: Callable[[StreamEvent], None] | None,
        ended: deque[Active],
    ) -> dict[int, Active]:
        """Gives the core what can run, all or nothing; with `refuse`, what it does not take becomes an event given to that. `ended` gets each
        request that ends."""
        ids: list[int] = []
        actives: list[Active] = []
        try:
            for one, tokens in taken:
                seed = secrets.randbits(63) if one.params.seed is None else one.params.seed
                text = None if self._detokenizer is None else self._detokenizer()
                active = Active(one.index, one.prompt, tokens, one.params, seed, text, ended)
                add = functools.partial(
                    self.core.add, tokens, one.params.for_core(seed, drafts, one.constraint is not None)
                )
                try:
                    # In one call: no interruption comes between a request's beginning and our knowing its number.
                    ids.extend(map(_CALL, (add,)))
                except DflashError as error:
                    told = one.tell(error)
                    if refuse is None:
                        raise told from None
                    refuse(refused(one.index, one.prompt, one.params, str(told)))
                else:
                    active.request_id, active.record = ids[-1], self.core.record(ids[-1])
                    if one.constraint is not None:
                        one.constraint.begin(tokens, active.record)
                        self.constrained[active.request_id] = one.constraint
                    actives.append(active)
            found = dict(zip(ids, actives, strict=True))
            self.active.update(found)
            return found
        except BaseException:
            for request in ids:
                self.core.abort(request)
                self.active.pop(request, None)
                self.constrained.pop(request, None)
            raise

    def abort(self, request: int | None) -> bool:
        """Ends a request wherever it is; False when it is unknown or finished."""
        if request is None or request not in self.active:
            return False
        self.core.abort(request)
        self._end(request)
        return True

    def route(self, events: Any) -> None:
        """Sees who has ended with a step. What everyone was given is in their records already."""
        for request in events.ended:
            self._end(request)

    def _end(self, request: int) -> None:
        active = self.active.pop(request, None)
        self.constrained.pop(request, None)
        if active is not None:
            active.ended.append(active)


def read(waiting: dict[int, Active]) -> list[StreamEvent]:
    """What these requests were given since they were last read, request by request. Those that have ended leave `waiting`."""
    actives = list(waiting.values())
    events = []
    for place, text, tokens, accepted, code in _core.read_records([active.record for active in actives]):
        active = actives[place]
        if text is None:
            text = active.piece(tokens, code)
        if code:
            output = active.output()
            del waiting[active.request_id]
            events.append(
                StreamEvent(active.index, active.request_id, text, tokens, accepted, output.finish_reason, output)
            )
        else:
            events.append(StreamEvent(active.index, active.request_id, text, tokens, accepted))
    return events
