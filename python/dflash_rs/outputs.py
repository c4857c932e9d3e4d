"""What a request is given back, and what is kept of it on the way."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .sampling import SamplingParams
from .text import Detokenizer

if TYPE_CHECKING:
    from .device_step import Draws

Prompt = str | Sequence[int]
REASONS = {1: "stop", 2: "stop", 3: "length", 4: "error", 5: "abort"}
ERROR, ABORT = 4, 5


@dataclass
class TokenLogprob:
    """One output token under the model's own softmax (raw logits): its log-probability in nats, and the likeliest tokens."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Output:
    """A finished request, or a prompt that was refused.

    `prompt` is what was asked: a string as it was passed, token ids as a plain list of ints whatever they came in. `text` ends before a stop string and does not show the end-of-text token; `token_ids` holds every token that was produced.
    `finish_reason`: ``stop``, ``length``, ``abort`` or ``error`` (then `error` says why). `logprobs` is None unless asked for.
    `request_id` is None for a prompt that was refused (``on_error="return"``); it has no tokens, and its metrics are zeros.
    `metrics`: prompt_tokens, cached_prompt_tokens, output_tokens, steps (target passes after the prefill), tau (tokens per such
    pass), accepted_per_position (share of drafted positions accepted), accept_histogram (passes by number of drafts accepted),
    ttft_s, total_s, tokens_per_s, seed.
    """

    request_id: int | None
    prompt: Prompt
    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[TokenLogprob] | None
    metrics: dict[str, Any]
    error: str | None = None


@dataclass
class StreamEvent:
    """What one step added to one request.

    `index` is the prompt's place in the call. `text` is the new text, `token_ids` the new tokens; the first `accepted` of them
    were drafts. `output` comes with the last event. A prompt that was refused has one event, with neither tokens nor a `request_id`.
    """

    index: int
    request_id: int | None
    text: str
    token_ids: list[int]
    accepted: int
    finish_reason: str | None = None
    output: Output | None = None


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
        self.steps = 0
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


def token_logprobs(events: Any, begin: int, end: int) -> list[TokenLogprob]:
    tops = events.top_starts
    found = []
    for j in range(begin, end):
        span = slice(int(tops[j]), int(tops[j + 1]))
        top = list(zip(events.top_tokens[span].tolist(), events.top_logprobs[span].tolist(), strict=True))
        found.append(TokenLogprob(int(events.tokens[j]), float(events.logprobs[j]), top))
    return found
