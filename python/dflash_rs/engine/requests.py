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
from ..outputs import ABORT, ERROR, REASONS, STOP_TOKEN, Output, RequestId, StreamEvent, TokenLogprob
from ..sampling import SamplingParams
from ..text import Detokenizer
from .constraints import Constraint

_SEEDS = 2**64
_CALL = functools.partial.__call__


class Active:
    """A request on its way. The core keeps what it is given, in `record`; what is made of it here is made when somebody asks.

    `answer`: which of the answers to its prompt it is. `text` makes it where tokens have no bytes of their own, else it is None. `ended` is told
    of its end.
    """

    def __init__(
        self, asked: Asked, ids: list[int], answer: int, seed: int, text: Detokenizer | None, ended: deque[Active]
    ):
        self.index, self.prompt, self.params, self.own_id = asked.index, asked.prompt, asked.params, asked.request_id
        self.prompt_logprobs = asked.prompt_logprobs
        self.ids, self.answer, self.seed, self.text, self.ended = ids, answer, seed, text, ended
        self.request_id = -1
        self.record: Any = None

    @property
    def name(self) -> RequestId:
        """What the caller calls it, else its number in the core."""
        return self.request_id if self.own_id is None else self.own_id

    def piece(self, tokens: list[int], code: int) -> str:
        """The text that the next tokens make certain, where the core cannot tell."""
        if self.text is None or code == ABORT:
            return ""
        if code == STOP_TOKEN and not self.params.include_stop_str_in_output:
            tokens = tokens[:-1]
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
            self.name,
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
            self._stop_reason(tokens, record),
            self.prompt_logprobs,
            self.answer,
        )

    def _stop_reason(self, tokens: list[int], record: Any) -> str | int | None:
        if record.stopped_by is not None:
            return self.params.stop[record.stopped_by]
        # An end-of-text token is none of these unless it was named, and then it is meant as one.
        named = record.finish == STOP_TOKEN and tokens[-1] in self.params.stop_token_ids
        return tokens[-1] if named else None


_NOTHING_DONE: dict[str, Any] = {
    "prompt_tokens": 0, "cached_prompt_tokens": 0, "output_tokens": 0, "steps": 0, "drafted_steps": 0, "tau": 0.0, "ttft_s": 0.0, "total_s": 0.0,
    "tokens_per_s": 0.0,
}  # fmt: skip


def refused(asked: Asked, error: str) -> StreamEvent:
    """The one event of a prompt that was not taken."""
    params = asked.params
    own = isinstance(params, SamplingParams)
    lists: dict[str, Any] = {"accepted_per_position": [], "accept_histogram": []}
    metrics = _NOTHING_DONE | lists | {"seed": params.seed if own else None}
    logprobs: list[TokenLogprob] | None = [] if own and params.logprobs is not None else None
    output = Output(None, asked.prompt, "", [], REASONS[ERROR], logprobs, metrics, error)
    return StreamEvent(asked.index, None, "", [], 0, REASONS[ERROR], output)


class Requests:
    """The unfinished requests of an engine by their numbers in the core."""

    def __init__(self, core: Any, detokenizer: Callable[[bool], Detokenizer] | None):
        """`detokenizer` for an engine whose core has no vocabulary; it is told whether to leave special tokens out."""
        self.core, self._detokenizer = core, detokenizer
        self.active: dict[int, Active] = {}
        # By what callers call them, all answers to a prompt together.
        self.named: dict[str, list[int]] = {}
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
        names: dict[int, str] = {}
        try:
            for one, tokens in taken:
                first = secrets.randbits(63) if one.params.seed is None else one.params.seed
                for answer, constraint in enumerate(one.constraints):
                    seed = (first + answer) % _SEEDS
                    text = None if self._detokenizer is None else self._detokenizer(one.params.skip_special_tokens)
                    active = Active(one, tokens, answer, seed, text, ended)
                    told = one.params.for_core(seed, drafts, constraint is not None)
                    add = functools.partial(self.core.add, tokens, told)
                    try:
                        # In one call: no interruption comes between a request's beginning and our knowing its number.
                        ids.extend(map(_CALL, (add,)))
                    except DflashError as error:
                        wrong = one.tell(error)
                        if refuse is None:
                            raise wrong from None
                        # The others would be refused with the same words.
                        refuse(refused(one, str(wrong)))
                        break
                    active.request_id, active.record = ids[-1], self.core.record(ids[-1])
                    if one.request_id is not None:
                        names[ids[-1]] = one.request_id
                        self.named.setdefault(one.request_id, []).append(ids[-1])
                    if constraint is not None:
                        constraint.begin(tokens, active.record)
                        self.constrained[active.request_id] = constraint
                    actives.append(active)
            found = dict(zip(ids, actives, strict=True))
            self.active.update(found)
            return found
        except BaseException:
            for request in ids:
                self.core.abort(request)
                self.active.pop(request, None)
                self._forget(request, names.get(request))
            raise

    def runs(self, request: RequestId | None) -> list[int]:
        """The numbers of what is unfinished of a request."""
        if isinstance(request, str):
            return list(self.named.get(request, ()))
        return [request] if request in self.active else []

    def abort(self, request: RequestId | None) -> bool:
        """Ends a request wherever it is, by what its caller calls it all of its answers; False when it is unknown or finished."""
        its = self.runs(request)
        for number in its:
            self.core.abort(number)
            self._end(number)
        return bool(its)

    def route(self, events: Any) -> None:
        """Sees who has ended with a step. What everyone was given is in their records already."""
        for request in events.ended:
            self._end(request)

    def _end(self, request: int) -> None:
        active = self.active.pop(request, None)
        self._forget(request, None if active is None else active.own_id)
        if active is not None:
            active.ended.append(active)

    def _forget(self, request: int, name: str | None) -> None:
        self.constrained.pop(request, None)
        if name is not None and request in (its := self.named.get(name, [])):
            its.remove(request)
            if not its:
                del self.named[name]


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
                StreamEvent(
                    active.index, active.name, text, tokens, accepted, output.finish_reason, output, active.answer
                )
            )
        else:
            events.append(StreamEvent(active.index, active.name, text, tokens, accepted, answer=active.answer))
    return events
