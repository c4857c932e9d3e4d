"""What a request is given back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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
    `metrics`: prompt_tokens, cached_prompt_tokens, output_tokens, steps (target passes after the prefill), drafted_steps
    (those that had drafts to verify), tau (tokens per pass), accepted_per_position (share of drafted positions accepted), accept_histogram (passes by number of drafts accepted),
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
