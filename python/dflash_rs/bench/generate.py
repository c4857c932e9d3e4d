"""transformers' own `generate` on the same checkpoint and prompts: what most people run, plain and with its prompt look-up.

Requests at once are a batch, padded on the left, that ends when its longest text does; its prompt look-up takes one request at a time. It draws from
torch's generator, so its sampled texts are others than ours; its greedy ones are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Tokens it looks up at a time, the value of transformers' documentation.
PROMPT_LOOKUP_TOKENS = 10


class GenerateLoop:
    """A target as transformers loads it, with no option set but those that a benchmark asks for."""

    @classmethod
    def beside(cls, llm: Any) -> GenerateLoop:
        """On the very checkpoint, dtype and device of an engine."""
        from dflash_rs.models.checkpoint import load_causal_lm

        return cls(load_causal_lm(llm.model_dir, llm.dtype)[0].to(llm.device))

    def __init__(self, target: Any) -> None:
        self.target = target.eval()
        self.passes = 0
        self.target.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.passes += 1

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        stop_ids: Sequence[int],
        temperature: float = 0.0,
        seed: int | None = None,
        look_up: bool = False,
    ) -> tuple[list[list[int]], int]:
        """The continuations of a batch, ended by the first of `stop_ids` (kept), and the passes it took, those over the prompts included."""
        import torch
        from transformers import GenerationConfig

        options: dict[str, Any] = {"max_new_tokens": max_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            # The defaults keep the 50 likeliest tokens.
            options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
        if look_up:
            options["prompt_lookup_num_tokens"] = PROMPT_LOOKUP_TOKENS
        ends = list(stop_ids)
        config = GenerationConfig(**options, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0)
        # What a checkpoint's own configuration sets would fill in what is not set here.
        self.target.generation_config = config
        width = max(map(len, prompts))
        ids = torch.zeros((len(prompts), width), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.int64)
            mask[row, width - len(prompt) :] = 1
        if seed is not None:
            torch.manual_seed(seed)
        self.passes = 0
        device = self.target.device
        with torch.inference_mode():
            output = self.target.generate(ids.to(device), attention_mask=mask.to(device), generation_config=config)
        return [ended(row, ends) for row in output[:, width:].tolist()], self.passes


def ended(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    """`tokens` up to the first of `stop_ids`, which is kept; what pads a batch comes after it."""
    for place, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[: place + 1]
    return tokens
