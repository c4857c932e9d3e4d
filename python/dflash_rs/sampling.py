"""What a request may ask for, checked before anything runs: the one place in Python that knows the options one by one.

The transform is applied in this order (the same function with and without speculation): processors, constraints, masks, repetition, presence and frequency
penalties, logit bias, temperature, softmax, top-k and top-p jointly on the tempered distribution, min-p, renormalise, draw.

The core reads the same options by the same names (src/verify/sampling.rs), the command line takes its own from `SamplingParams`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

from . import elsewhere
from .arguments import bad, flag, integer, is_list, real
from .structured import StructuredOutputsParams

MAX_LOGPROBS = 64
MAX_ANSWERS = 1024
# Half a character, which no text has.
_SURROGATE = re.compile("[\ud800-\udfff]")
# Below this a temperature is meant to be 0, and the tempered logits would leave float32.
MIN_TEMPERATURE = 1e-5
# The core computes in float32: its largest number, and the smallest above 0 that keeps all its digits.
_FLOAT32 = 3.4028234e38
_TINY = 1.1754944e-38
_SEEDS = 2**64


class Biases(dict):
    """Token id -> bias, unchangeable, so that parameters can be members of sets and keys of dicts."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def _unchangeable(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("logit_bias of SamplingParams cannot be changed: dataclasses.replace makes other parameters")

    __setitem__ = __delitem__ = __ior__ = _unchangeable
    clear = pop = popitem = setdefault = update = _unchangeable

    def __reduce__(self) -> tuple[type[Biases], tuple[dict[int, float]]]:
        return Biases, (dict(self),)


def _option(default: Any, metavar: str | None, help: str | None, core: bool = True) -> Any:
    """A field with what the command line says of it; `metavar` is None for a switch, `help` for what it has in another form. `core`: whether the
    core is told of it."""
    told = {"metavar": metavar, "help": help, "core": core}
    return field(default_factory=dict, metadata=told) if default == {} else field(default=default, metadata=told)


@elsewhere.explained(elsewhere.SAMPLING)
@dataclass(frozen=True)
class SamplingParams:
    """Sampling options of one request.

    - `temperature`: at least 1e-5, or 0, which is greedy (the lowest id wins ties), and then top_k, top_p, min_p and seed have nothing to do.
    - `top_k` >= 0 keeps the k likeliest tokens; 0 keeps all. `top_p` in (0, 1] keeps the nucleus of the unfiltered
      distribution. `min_p` in [0, 1] keeps tokens with p >= min_p * max p.
    - `seed` in 0..2^64-1 fixes every draw by (seed, position): the text is then the same in any batch, with and without
      drafting. None takes a fresh seed, reported in the output's metrics.
    - `max_tokens` >= 1. `min_tokens` in 0..max_tokens: so many output tokens come before anything else may end the text: until then
      neither end-of-text tokens nor `stop_token_ids` can be drawn, and `stop` strings are text like any other. `stop`: a string or strings that end the output and are not part of it. `stop_token_ids` end it and
      are the last of its token_ids. `ignore_eos` treats the end-of-text token like any other.
    - `repetition_penalty` > 0 counts prompt and output; `presence_penalty` and `frequency_penalty` in [-2, 2] count the output.
    - `logit_bias`: token id -> finite number added to its logit.
    - `logprobs`: None, or n >= 0: the log-probability of every output token under the model's own softmax (before the
      transform above), and the n likeliest tokens beside it.
    - `n`: answers to each prompt, with the seeds ``seed``, ``seed + 1`` and so on (modulo 2^64). More than one need a temperature above 0.
    - `max_drafts`: drafts verified in a step at most; 0 decodes plainly, None leaves it to the engine. The text is the same.
    - `prompt_logprobs`: like `logprobs`, for the prompt's tokens, each after those before it. It takes a pass of its own over the prompt.
    - `truncate_prompt_tokens`: the last so many tokens of the prompt are taken; -1 is as many as the context has room for.
    - `skip_special_tokens`: leave tokens that are no text out of it; False writes their names, and `stop` strings see them.
    - `include_stop_str_in_output`: what ended the text, a stop string or the text of a stop token, is part of it.
    - `allowed_token_ids`: the only tokens that may be drawn; None allows all. End-of-text tokens are not among them unless they are named.
    - `bad_words`: strings with more than white space whose tokens, alone or behind a space, the output may not hold one after the other.
    - `logits_processors`: functions ``(output tokens, row) -> row`` or ``(prompt tokens, output tokens, row) -> row``, applied in order before
      everything else. Tokens are lists of ints, the row a float32 torch tensor ``[vocab_size]`` on the CPU, theirs to change; a tensor or a
      NumPy array of that shape comes back. What one returns may depend on its arguments alone: with drafts they are asked about texts, too,
      that are not taken in the end. One that raises ends its request with an error.
    - `structured_outputs`: a `StructuredOutputsParams` (or a mapping with its names): the output follows a JSON schema, a regular expression,
      a grammar, or is one of several strings.

    Parameters never change: they can be hashed, compared, copied and pickled, and ``dataclasses.replace(params, seed=2)`` makes others.

    Raises InvalidArgument (a ValueError) naming the option, what was got and what was expected.
    """

    temperature: float = _option(0.0, "T", "0 is greedy; default: 0")
    top_k: int = _option(0, "K", "the K likeliest tokens; default: all")
    top_p: float = _option(1.0, "P", "the likeliest tokens that hold P together; default: 1")
    min_p: float = _option(0.0, "P", "tokens with P times the likeliest's share; default: 0")
    seed: int | None = _option(None, "N", "the same seed gives the same text")
    max_tokens: int = _option(128, "N", "default: 128")
    stop: str | Sequence[str] = _option((), "TEXT", "may be given repeatedly; \\n means a new line")
    stop_token_ids: Sequence[int] = _option((), "ID", "may be given repeatedly")
    repetition_penalty: float = _option(1.0, "X", "above 1 against tokens of prompt and output")
    presence_penalty: float = _option(0.0, "X", "taken off tokens of the output")
    frequency_penalty: float = _option(0.0, "X", "the same for every time they occurred")
    logit_bias: Mapping[int, float] = _option({}, "ID=BIAS", "may be given repeatedly")
    logprobs: int | None = _option(None, "N", "with --json only: log-probabilities, and the N likeliest tokens")
    ignore_eos: bool = _option(False, None, "go on after the end-of-text token")
    min_tokens: int = _option(0, "N", "tokens before anything but --max-tokens may end the text; default: 0")
    n: int = _option(1, "N", "answers to each prompt, with the seeds S, S + 1 ...; default: 1", False)
    max_drafts: int | None = _option(None, "N", "drafts verified in a step at most; 0 decodes plainly: the same text")
    prompt_logprobs: int | None = _option(None, "N", "with --json only: the same for the prompt's tokens", False)
    truncate_prompt_tokens: int | None = _option(
        None, "N", "take the last N tokens of a prompt; -1: what has room", False
    )
    skip_special_tokens: bool = _option(True, None, None)
    include_stop_str_in_output: bool = _option(False, None, "the text ends with what stopped it")
    allowed_token_ids: Sequence[int] | None = _option(
        None, "ID", "the only tokens that may be drawn; may be given repeatedly; default: all", False
    )
    bad_words: Sequence[str] = _option(
        (), "TEXT", "tokens that may not follow each other; may be given repeatedly", False
    )
    logits_processors: Sequence[Callable[..., Any]] = _option((), None, None, False)
    structured_outputs: StructuredOutputsParams | None = _option(None, None, None, False)

    def __post_init__(self) -> None:
        self._real(
            "temperature",
            0.0,
            _FLOAT32,
            f"0 (greedy) or a number in [{MIN_TEMPERATURE:g}, {_FLOAT32:g}]",
            MIN_TEMPERATURE,
        )
        self._integer("top_k", 0, 2**31 - 1)
        self._real("top_p", _TINY, 1.0, "a number in (0, 1]")
        self._real("min_p", 0.0, 1.0)
        if self.seed is not None:
            self._integer("seed", 0, _SEEDS - 1)
        self._integer("max_tokens", 1, 2**31 - 1)
        self._integer("min_tokens", 0, self.max_tokens, f"an integer in 0..{self.max_tokens} (max_tokens)")
        self._real("repetition_penalty", _TINY, _FLOAT32, f"a number in (0, {_FLOAT32:g}]")
        self._real("presence_penalty", -2.0, 2.0)
        self._real("frequency_penalty", -2.0, 2.0)
        if self.logprobs is not None:
            self._integer("logprobs", 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            self._integer("prompt_logprobs", 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            flag(name, getattr(self, name))
        self._integer("n", 1, MAX_ANSWERS)
        if self.n > 1 and self.temperature == 0:
            raise bad("n", self.n, "1 with temperature 0: greedy answers are all the same")
        if self.max_drafts is not None:
            self._integer("max_drafts", 0, 2**31 - 1)
        if self.truncate_prompt_tokens is not None:
            expected = f"-1 or an integer in 1..{2**31 - 1}"
            self._integer("truncate_prompt_tokens", -1, 2**31 - 1, expected)
            if self.truncate_prompt_tokens == 0:
                raise bad("truncate_prompt_tokens", 0, expected)

        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not is_list(stops):
            raise bad("stop", self.stop, "a non-empty string or a list of them")
        for i, text in enumerate(stops):
            if not isinstance(text, str) or not text or _SURROGATE.search(text):
                name = "stop" if isinstance(self.stop, str) else f"stop[{i}]"
                raise bad(name, text, "a non-empty string without lone surrogates")
        object.__setattr__(self, "stop", tuple(stops))
        if not is_list(self.stop_token_ids):
            raise bad("stop_token_ids", self.stop_token_ids, "a list of token ids")
        ids = tuple(integer("stop_token_ids", token, 0, 2**31 - 1) for token in self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", ids)
        if not isinstance(self.logit_bias, Mapping):
            raise bad("logit_bias", self.logit_bias, "a mapping from token id to number")
        biases = {
            integer("logit_bias (token id)", token, 0, 2**31 - 1): real(
                f"logit_bias[{token}]", bias, -_FLOAT32, _FLOAT32
            )
            for token, bias in self.logit_bias.items()
        }
        if len(biases) != len(self.logit_bias):
            raise bad("logit_bias", self.logit_bias, "each token id once")
        object.__setattr__(self, "logit_bias", Biases(biases))
        self._check_constraints()

    def _check_constraints(self) -> None:
        ids = self.allowed_token_ids
        if ids is not None:
            if not is_list(ids) or not ids:
                raise bad("allowed_token_ids", ids, "a list of at least one token id, or None")
            allowed = tuple(integer("allowed_token_ids", token, 0, 2**31 - 1) for token in ids)
            object.__setattr__(self, "allowed_token_ids", allowed)
        words = self.bad_words
        if not is_list(words):
            raise bad("bad_words", words, "a list of strings")
        for i, word in enumerate(words):
            if not isinstance(word, str) or not word.strip() or _SURROGATE.search(word):
                raise bad(f"bad_words[{i}]", word, "a string with more than white space, and without lone surrogates")
        object.__setattr__(self, "bad_words", tuple(words))
        if not is_list(self.logits_processors):
            raise bad("logits_processors", self.logits_processors, "a list of functions")
        for i, process in enumerate(self.logits_processors):
            if not callable(process):
                raise bad(f"logits_processors[{i}]", process, "a function")
        object.__setattr__(self, "logits_processors", tuple(self.logits_processors))
        if self.structured_outputs is not None:
            wanted = StructuredOutputsParams.of("structured_outputs", self.structured_outputs)
            object.__setattr__(self, "structured_outputs", wanted)

    @classmethod
    def of(cls, name: str, value: Any) -> SamplingParams:
        """`value`, or what a mapping of such names means. Raises InvalidArgument naming what is wrong."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise bad(name, value, "SamplingParams, or a mapping with their names")
        elsewhere.known(name, value, [option.name for option in fields(cls)], elsewhere.SAMPLING)
        return cls(**value)

    def for_core(self, seed: int, draft: bool, edited: bool = False) -> dict[str, Any]:
        """What `_core.Engine.add` takes: options of the core by their names, this `seed` in place of None, whether drafts may be verified, and
        whether rows are edited before they are drawn."""
        told = {option.name: getattr(self, option.name) for option in fields(self) if option.metadata["core"]}
        return told | {"seed": seed, "draft": draft, "edited": edited}

    def _integer(self, name: str, low: int, high: int, expected: str | None = None) -> None:
        object.__setattr__(self, name, integer(name, getattr(self, name), low, high, expected=expected))

    def _real(self, name: str, low: float, high: float, expected: str | None = None, above_0: float = 0.0) -> None:
        """Makes the option a float in `[low, high]`, at least `above_0` unless it is 0."""
        given = getattr(self, name)
        value = real(name, given, low, high, expected=expected)
        if 0 < given < above_0:
            raise bad(name, given, expected or f"0 or a number in [{above_0:g}, {high:g}]")
        object.__setattr__(self, name, value)
