"""What a request is given back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import _core

# A mapping has "prompt", a string, or "prompt_token_ids".
Prompt = str | Sequence[int] | Mapping[str, Any]
# The core's number of a request, or what its caller calls it.
RequestId = int | str
REASONS = {1: "stop", 2: "stop", 3: "length", 4: "error", 5: "abort"}
STOP_TOKEN, ERROR, ABORT = 1, 4, 5


@dataclass
class TokenLogprob:
    """One output token under the model's own softmax (raw logits): its log-probability in nats, and the likeliest tokens."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


def prompt_scores(logits: np.ndarray, tokens: Sequence[int], most: int) -> list[TokenLogprob | None]:
    """The tokens that came after rows of logits, float32 [n, vocab_size], scored by these; `tokens` has at least n."""
    scores: list[TokenLogprob | None] = []
    for row, token in zip(logits, tokens):
        wide = row.astype(np.float64)
        top = wide.max()
        norm = top + np.log(np.exp(wide - top).sum())
        best = zip(*(part.tolist() for part in _core.top_logprobs(row, most))) if most else ()
        scores.append(TokenLogprob(token, float(np.float32(wide[token] - norm)), list(best)))
    return scores


@dataclass
class Output:
    """A finished request, or a prompt that was refused.

    `prompt` is what was asked: a string as it was passed, token ids as a plain list of ints whatever they came in. `text` ends before a stop string and shows neither the end-of-text token nor a stop token; `token_ids` holds every token that was produced.
    `finish_reason`: ``stop``, ``length``, ``abort`` or ``error`` (then `error` says why). `stop_reason`: the string of `stop` or the id of
    `stop_token_ids` that ended it; None for the end-of-text token and for anything else. `logprobs` is None unless asked for, and so is
    `prompt_logprobs`, which has an entry for each token of the prompt, None for the first. `answer` counts the answers to a prompt from 0 on
    (`SamplingParams.n`); `outputs` are all of them.
    `request_id` is None for a prompt that was refused (``on_error="return"``); it has no tokens, and its metrics are zeros.
    `metrics`: prompt_tokens, cached_prompt_tokens, output_tokens, steps (target passes after the prefill), drafted_steps
    (those that had drafts to verify), tau (tokens per pass), accepted_per_position (share of drafted positions accepted), accept_histogram (passes by number of drafts accepted),
    ttft_s, total_s, tokens_per_s, seed.
    """

    request_id: RequestId | None
    prompt: Prompt
    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[TokenLogprob] | None
    metrics: dict[str, Any]
    error: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    answer: int = 0

    @property
    def outputs(self) -> list[Output]:
        """All answers to the prompt, in order, where `generate` gave them; else this one alone."""
        return self.__dict__.get("_outputs") or [self]


def first_of(answers: list[Output]) -> Output:
    """The first answer to a prompt, which knows the others."""
    answers.sort(key=lambda output: output.answer)
    if len(answers) > 1:
        for output in answers:
            output.__dict__["_outputs"] = answers
    return answers[0]


@dataclass
class StreamEvent:
    """What one step added to one request.

    `index` is the prompt's place in the call, `answer` which of its answers this is (`SamplingParams.n`). `text` is the new text, `token_ids` the new tokens; the first `accepted` of them
    were drafts. `output` comes with the last event. A prompt that was refused has one event, with neither tokens nor a `request_id`.
    """

    index: int
    request_id: RequestId | None
    text: str
    token_ids: list[int]
    accepted: int
    finish_reason: str | None = None
    output: Output | None = None
    answer: int = 0
