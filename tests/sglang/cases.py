"""The sampling matrix: what is asked, by name. Token ids and texts come from the bundled tokenizer, never from here."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

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
        "stop_regex": base | {"stop_regex": r"ret\w+|[)\]]:"},
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


GRAMMAR = {
    "regex": r"(def|class) [a-z]{2,6}(\(self\)|):",
    "json_schema": '{"type": "object", "properties": {"n": {"type": "integer"}}}',
}


def constrained() -> dict[str, dict[str, Any]]:
    """Cases with a grammar."""
    base = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": False}
    return {
        "regex": base | {"regex": GRAMMAR["regex"]},
        "regex, seed": base | {"regex": GRAMMAR["regex"], "temperature": 1.0, "sampling_seed": 3},
        "regex, penalties": base | {"regex": "[a-f ]+", "frequency_penalty": 1.0, "repetition_penalty": 1.3},
        "json_schema": base | {"json_schema": GRAMMAR["json_schema"]},
        # What follows the end of a grammar that does not end its request; the last grammar ends with the first token.
        "regex, ignore_eos": base | {"regex": "[a-z]{3}", "ignore_eos": True},
        "regex, ignore_eos, seed": base
        | {"regex": "[a-z]{2,5}", "ignore_eos": True, "temperature": 1.0, "sampling_seed": 7, "top_k": 50},
        "regex, ignore_eos, penalties": base
        | {"regex": "[a-c ]{1,6}", "ignore_eos": True, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
        "regex, ignore_eos, at once": base | {"regex": "(ab)?", "ignore_eos": True, "logit_bias": {"0": 50.0}},
    }


def matrix() -> dict[str, dict[str, Any]]:
    """Everything that must be equal token for token."""
    return all_cases() | constrained()


# Sent to the server as source: dill stores a class of __main__ by value.
PROCESSORS = '''
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

class NoRepeat(CustomLogitProcessor):
    """Forbids the last three tokens of the output: what it does depends on what was written at this very place."""
    def __call__(self, logits, params):
        for row, param in enumerate(params):
            if param is not None:
                logits[row, list(param["__req__"].output_ids)[-3:]] = -float("inf")
        return logits

class Forbid(CustomLogitProcessor):
    """Forbids fixed tokens."""
    def __call__(self, logits, params):
        for row, param in enumerate(params):
            if param is not None:
                logits[row, param["tokens"]] = -float("inf")
        return logits
'''


def custom() -> dict[str, dict[str, Any]]:
    """Cases with custom processors: arguments of `bodies`."""
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(PROCESSORS, space)
    base = {"max_new_tokens": 24, "ignore_eos": True}
    common = sorted(set(ids("\n def self ( ) : return")))
    out = {}
    for name, extra in (("", {"temperature": 0}), (", seed", {"temperature": 0.9, "sampling_seed": 5})):
        for label, kind, given in (
            ("custom, fixed", "Forbid", {"tokens": common}),
            ("custom, by history", "NoRepeat", {"any": 1}),
        ):
            params = base | extra | {"custom_params": given}
            out[label + name] = {"params": params, "custom_logit_processor": space[kind].to_str()}
    return out


def crowd() -> list[dict[str, Any]]:
    """Sixteen /generate bodies, greedy with penalties and seeded in turn; both kinds filter, so that no draw depends on the other.

    Forbidding the end token, rather than ignoring it, has SGLang admit requests that a small pool cannot hold to their end.
    """
    kinds = (
        {"temperature": 0, "frequency_penalty": 0.75},
        {"temperature": 0.9, "sampling_seed": 29, "top_k": 20, "repetition_penalty": 1.1},
    )
    base = {"max_new_tokens": 120, "logit_bias": {"0": -1000.0}}
    return [{"text": prompt, "sampling_params": base | kind} for kind in kinds for prompt in prompts(8)]


def converse(server: Any, rounds: int = 3) -> list[list[dict[str, Any]]]:
    """Conversations of token ids: every round sends what was said so far and something new. Answers with their prompts, by round."""
    params = [greedy()["greedy"], greedy()["all penalties"]] * 2
    said, talk = [ids(prompt) for prompt in prompts(4)], []
    for number in range(rounds):
        answers = server.together([{"input_ids": text, "sampling_params": p} for text, p in zip(said, params)])
        talk.append([answer | {"prompt": text} for answer, text in zip(answers, said)])
        new = [ids(prompt)[number : number + 20] for prompt in prompts(8)[4:]]
        said = [text + answer["output_ids"] + more for text, answer, more in zip(said, answers, new)]
    return talk


def kit_prompts() -> list[str]:
    """Prompts of SGLang's own parity test."""
    from kits import spec_server_kits

    return spec_server_kits.SpecParityKit.parity_prompts


def tokens(answers: list[dict[str, Any]]) -> list[list[int]]:
    """Token ids of several answers."""
    return [answer["output_ids"] for answer in answers]


def flat(value: Any) -> list[float]:
    """The numbers in nested lists of log-probabilities."""
    if isinstance(value, list | tuple):
        return [number for part in value for number in flat(part)]
    return [max(float(value), -1e4)] if isinstance(value, int | float) else []


def scored_alike(answers: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Asserts that the log-probabilities of several answers are those expected, up to rounding."""
    assert len(answers) == len(expected)
    for answer, want in zip(answers, expected):
        for key in ("output_token_logprobs", "output_top_logprobs"):
            numbers = flat(answer["meta_info"][key])
            assert numbers and numbers == pytest.approx(flat(want["meta_info"][key]), abs=2e-3, rel=2e-3), key


# How many texts of each case equal plain SGLang's, by algorithm; printed at the end.
OURS: dict[str, int] = {}
STOCK: dict[str, int] = {}
