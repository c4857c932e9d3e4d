"""An engine without models: enough of `dflash_rs.LLM` to drive the command line and the benchmark by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class FakeOutput:
    request_id: int
    prompt: Any
    text: str
    token_ids: list[int]
    finish_reason: str = "length"
    logprobs: Any = None
    metrics: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    stop_reason: Any = None
    prompt_logprobs: Any = None
    answer: int = 0


@dataclass
class FakeEvent:
    index: int
    text: str
    token_ids: list[int]
    accepted: int
    finish_reason: str | None = None
    output: FakeOutput | None = None
    answer: int = 0


class FakeLLM:
    """Continues a prompt with its own tokens shifted by one, one character per token.

    With drafting a pass commits three tokens (two accepted drafts), without it one. `change` alters a token of the
    drafted output, which a lossless engine would never do.
    """

    block_size = 4
    dtype = "float32"
    device = "cpu"
    eos_token_ids = (0,)
    # Tokens of a pass with drafts.
    width = 3

    def __init__(self, change: int | None = None, seed_matters: bool = True, **options: Any) -> None:
        self.options = options
        self.change = change
        self.seed_matters = seed_matters
        self.closed = False
        self.calls: list[bool] = []
        self._stages = {"draft": 0.0, "verify": 0.0}

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def stats(self) -> dict[str, Any]:
        return {"stage_seconds": dict(self._stages), "steps": 10 * len(self.calls)}

    def next_token_logits(self, ids: list[int]) -> dict[int, float]:
        return _Logits(len(ids))

    def close(self) -> None:
        self.closed = True

    def _one(self, index: int, prompt: Any, params: Any, draft: bool) -> tuple[FakeOutput, list[tuple[list[int], int]]]:
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        shift = (params.seed or 0) % 5 if params.temperature else 0
        tokens = [97 + (ids[i % len(ids)] + i + shift) % 26 for i in range(params.max_tokens)]
        if draft and self.change is not None:
            tokens[self.change] = 63
        groups: list[tuple[list[int], int]] = [(tokens[:1], 0)]
        width = self.width if draft else 1
        for start in range(1, len(tokens), width):
            part = tokens[start : start + width]
            groups.append((part, len(part) - 1))
        histogram = [0] * self.block_size
        for _, accepted in groups[1:]:
            histogram[accepted] += 1
        steps = len(groups) - 1
        metrics = {
            "prompt_tokens": len(ids),
            "output_tokens": len(tokens),
            "steps": steps,
            "tau": (len(tokens) - 1) / steps if steps else 0.0,
            "accept_histogram": histogram,
            "ttft_s": 0.001,
            "total_s": 0.01,
            "tokens_per_s": 100.0,
            "seed": params.seed,
        }
        return FakeOutput(index, prompt, self.decode(tokens), tokens, metrics=metrics), groups

    def generate(self, prompts: Any, params: Any, draft: bool = True) -> list[FakeOutput]:
        draft = draft and self.options.get("draft", "auto") is not None
        self.calls.append(draft)
        self._stages["verify"] += 1.0
        self._stages["draft"] += 0.5 if draft else 0.0
        each = params if isinstance(params, list) else [params] * len(prompts)
        return [self._one(i, p, one, draft)[0] for i, (p, one) in enumerate(zip(prompts, each))]

    def stream(self, prompts: list[Any], params: Any, draft: bool = True):
        draft = draft and self.options.get("draft", "auto") is not None
        runs = [self._one(i, p, params, draft) for i, p in enumerate(prompts)]
        for turn in range(max(len(groups) for _, groups in runs)):
            for i, (output, groups) in enumerate(runs):
                if turn < len(groups):
                    tokens, accepted = groups[turn]
                    last = turn == len(groups) - 1
                    yield FakeEvent(
                        i,
                        self.decode(tokens),
                        tokens,
                        accepted,
                        output.finish_reason if last else None,
                        output if last else None,
                    )


class _Logits:
    """Every token's logit is its id over 1000, after whatever prefix."""

    def __init__(self, prefix: int) -> None:
        self.prefix = prefix

    def __getitem__(self, token: int) -> float:
        return token / 1000
