"""The sampling matrix: what is asked, by name. Token ids and texts come from the bundled tokenizer, never from here."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from dflash_rs.config import assets

TOKENS = 40


@cache
def prompts(count: int = 4) -> tuple[str, ...]:
    """Held-out prompts of the bundled pair."""
    stored = json.loads((assets() / "prompts.json").read_text(encoding="utf-8"))
    stored = stored["prompts"] if isinstance(stored, dict) else stored
    texts = [entry if isinstance(entry, str) else entry["prompt"] for entry in stored]
    return tuple(texts[:count])


@cache
def tokenizer() -> Any:
    """The bundled pair's tokenizer."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(assets() / "target" / "tokenizer.json"))


def ids(text: str) -> list[int]:
    """Token ids of a text."""
    return tokenizer().encode(text, add_special_tokens=False).ids


def bias() -> dict[str, float]:
    """Pushes some tokens up and some down."""
    return {
        str(t): (4.0 if n % 2 else -8.0)
        for n, t in enumerate(sorted(set(ids("def class return self None import(\n)")))[:12])
    }


def greedy() -> dict[str, dict[str, Any]]:
    """Without random numbers: exact everywhere."""
    base = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    return {
        "greedy": base,
        "frequency_penalty": base | {"frequency_penalty": 1.5},
        "presence_penalty": base | {"presence_penalty": 2.0},
        "repetition_penalty": base | {"repetition_penalty": 1.5},
        "all penalties": base | {"frequency_penalty": 0.5, "presence_penalty": 0.5, "repetition_penalty": 1.25},
        "logit_bias": base | {"logit_bias": bias()},
        "min_new_tokens": base
        | {"ignore_eos": False, "min_new_tokens": 24, "stop_token_ids": sorted(set(ids("\n() .:=,self")))},
        "stop_token_ids": base | {"stop_token_ids": ids("\n")[:1]},
        "stop": base | {"stop": ["return", "):"]},
        "eos": base | {"ignore_eos": False, "logit_bias": {"0": 6.0}},
    }


def seeded() -> dict[str, dict[str, Any]]:
    """With ``sampling_seed``: exact where the server is deterministic."""
    base = {"temperature": 0.8, "sampling_seed": 11, "max_new_tokens": TOKENS, "ignore_eos": True}
    return {
        "seed": base,
        "seed, hot": base | {"temperature": 1.4, "sampling_seed": 12345},
        "seed, top_k": base | {"top_k": 5},
        "seed, top_p": base | {"top_p": 0.8},
        "seed, top_k and top_p": base | {"top_k": 20, "top_p": 0.9, "temperature": 1.2},
        "seed, penalties": base | {"frequency_penalty": 0.5, "repetition_penalty": 1.2, "presence_penalty": 0.25},
        "seed, bias": base | {"logit_bias": bias(), "top_p": 0.95},
    }


def bodies(params: dict[str, Any], count: int = 4, **fields: Any) -> list[dict[str, Any]]:
    """One /generate body per prompt."""
    return [{"text": prompt, "sampling_params": params, **fields} for prompt in prompts(count)]


def all_cases() -> dict[str, dict[str, Any]]:
    """The whole matrix."""
    return greedy() | seeded()
