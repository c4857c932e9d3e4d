"""The same question to two servers with OpenAI's `/v1/completions`: one that decodes plainly and one that speculates.

Greedy only, for a server's seeds are its own affair. Each prompt is asked alone and then all of them at once, again and again: what is
computed together is what differs where bookkeeping is wrong. A text that differs is explained by the plain server's own log-probabilities
at the first difference, where it gives them.
"""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from ..errors import DflashError
from .battery import CaseResult, Different

_TOP = 5


class Answer(NamedTuple):
    """Tokens as the server writes them, and for each the likeliest tokens with their log-probabilities; both empty where it names none."""

    text: str
    tokens: list[str]
    top: list[dict[str, float]]


class Server:
    """One server. `model`: its name there; the first one it lists when None. `timeout`: seconds that an answer may take."""

    def __init__(self, url: str, model: str | None = None, timeout: float = 600.0):
        self.url, self._timeout = url.rstrip("/").removesuffix("/v1"), timeout
        self.model = model or self._call("/v1/models")["data"][0]["id"]

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = error.read(400).decode(errors="replace")
            raise DflashError(f"{self.url}{path}: status {error.code}: {said}") from None
        except (OSError, ValueError) as error:
            raise DflashError(f"{self.url}{path}: {type(error).__name__}: {error}") from None

    def complete(self, prompt: str, max_tokens: int) -> Answer:
        """The greedy completion of a prompt."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "logprobs": _TOP}
        found = self._call("/v1/completions", body)
        try:
            choice = found["choices"][0]
            scores = choice.get("logprobs") or {}
            return Answer(choice["text"], scores.get("tokens") or [], scores.get("top_logprobs") or [])
        except (KeyError, IndexError, TypeError):
            raise DflashError(
                f"{self.url}/v1/completions: got {str(found)[:200]}, expected choices with a text"
            ) from None


def compare_servers(
    plain: Server,
    speculative: Server,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    rounds: int,
    tolerance: float,
    say: Callable[[str], None] = lambda line: None,
) -> list[CaseResult]:
    """Cases of both servers against the plain one's answers to each prompt alone. `tolerance`: a lead in log-probability that is rounding."""
    say("plain answers, one at a time")
    expected = [plain.complete(prompt, max_tokens) for prompt in prompts]
    found = []

    def case(name: str, server: Server, at_once: int, times: int) -> None:
        say(name)
        result = CaseResult(name, tau=math.nan)
        with ThreadPoolExecutor(at_once) as pool:
            for _ in range(times):
                answers = list(pool.map(lambda prompt: server.complete(prompt, max_tokens), prompts))
                for i, (one, other) in enumerate(zip(expected, answers, strict=True)):
                    result.texts += 1
                    if one.text != other.text:
                        result.different.append(_difference(name, i, one, other, tolerance))
        found.append(result)

    case("plain, eight at once", plain, 8, 1)
    case("speculative, one at a time", speculative, 1, 1)
    case(f"speculative, eight at once, {rounds} times", speculative, 8, rounds)
    return found


def _difference(name: str, i: int, one: Answer, other: Answer, tolerance: float) -> Different:
    at = next((j for j, (a, b) in enumerate(zip(one.tokens, other.tokens)) if a != b), None)
    if at is None:
        same = next(
            (j for j, (a, b) in enumerate(zip(one.text, other.text)) if a != b), min(len(one.text), len(other.text))
        )
        return Different(name, i, 0.0, same, None, None, None, False)
    # Both servers' tokens, where the plain one names the other's among its likeliest.
    top = one.top[at] if at < len(one.top) else {}
    left, right = top.get(one.tokens[at]), top.get(other.tokens[at])
    lead = None if left is None or right is None else left - right
    explained = lead is not None and abs(lead) <= tolerance
    return Different(name, i, 0.0, at, one.tokens[at], other.tokens[at], lead, explained)
