"""What `generate` shows: coloured text in the order of its prompts, progress, a summary."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TextIO


class Painter:
    """Text with a style when colour is on: accepted drafts, the model's own tokens, the prompt, a refusal."""

    STYLES = {"draft": "32", "own": "1;33", "prompt": "2", "bad": "1;31"}

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    @classmethod
    def choose(cls, wish: str, stream: TextIO) -> Painter:
        """`auto` follows the terminal and the NO_COLOR convention (set and not empty: no colour)."""
        if wish != "auto":
            return cls(wish == "always")
        dumb = os.environ.get("TERM") == "dumb"
        return cls(stream.isatty() and not os.environ.get("NO_COLOR") and not dumb)

    def __call__(self, style: str, text: str) -> str:
        if not self.enabled or not text:
            return text
        return f"\x1b[{self.STYLES[style]}m{text}\x1b[0m"

    def legend(self) -> str:
        """One line that explains the colours; empty without colour."""
        if not self.enabled:
            return ""
        return f"{self('draft', 'accepted drafts')}  {self('own', 'the model itself')}  {self('prompt', 'prompt')}\n"


def split_delta(event: Any, decode: Callable[[list[int]], str]) -> tuple[str, str]:
    """An event's text as (accepted drafts, the model's own token); the two joined are exactly the event's text.

    The event carries one text for all its tokens. Its own last token is found at the end of that text; where it is
    not there (a character spread over two tokens, a stop string cut off) the whole text goes to the larger share.
    """
    own = event.token_ids[event.accepted :]
    if not own:
        return event.text, ""
    if event.accepted == 0:
        return "", event.text
    tail = decode(list(own))
    if tail and event.text.endswith(tail):
        return event.text[: len(event.text) - len(tail)], tail
    return event.text, ""


class Ordered:
    """Writes several interleaved streams in the order of their prompts: the first one live, the rest when it ends."""

    def __init__(self, count: int, write: Callable[[str], None]) -> None:
        self._write = write
        self._waiting: list[list[str]] = [[] for _ in range(count)]
        self._done = [False] * count
        self._turn = 0

    def add(self, index: int, text: str, done: bool = False) -> None:
        """Takes one piece of stream `index`; `done` ends it."""
        if index == self._turn:
            self._write(text)
        else:
            self._waiting[index].append(text)
        self._done[index] = self._done[index] or done
        while self._turn < len(self._done) and self._done[self._turn]:
            self._turn += 1
            if self._turn < len(self._done):
                self._write("".join(self._waiting[self._turn]))


class Progress:
    """One line on a terminal that says how many prompts are done. It is taken away before anything else is written, and left
    out where it would share the terminal with streamed text."""

    EVERY = 0.1  # seconds

    def __init__(self, total: int, stream: TextIO | None) -> None:
        self.total, self._stream = total, stream
        self._begin = time.monotonic()
        self._last = -self.EVERY
        self._shown = False

    @classmethod
    def choose(cls, args: argparse.Namespace, total: int) -> Progress:
        """On standard error, if that is a terminal and there are several prompts to wait for."""
        fits = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and (args.json or not sys.stdout.isatty())
        return cls(total, sys.stderr if fits and total > 1 and not args.quiet else None)

    def show(self, done: int, tokens: int) -> None:
        """So many prompts are done, so many tokens were written."""
        now = time.monotonic()
        if self._stream is None or now - self._last < self.EVERY:
            return
        self._last = now
        rate = tokens / max(now - self._begin, 1e-9)
        line = f"{done} of {self.total} prompts, {tokens} tokens, {rate:.0f} tokens/s"
        room = shutil.get_terminal_size().columns - 1
        self._stream.write(f"\r\x1b[K{line[:room]}")
        self._stream.flush()
        self._shown = True

    def clear(self) -> None:
        """Takes the line away."""
        if self._stream is not None and self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._shown = False


def output_json(output: Any, prompt: Any) -> dict[str, Any]:
    """An output as `generate --json` prints it."""
    return {
        "prompt": prompt.text,
        "answer": output.answer,
        "text": output.text,
        "token_ids": list(output.token_ids),
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
        "logprobs": _scores(output.logprobs),
        "prompt_logprobs": _scores(output.prompt_logprobs),
        "metrics": output.metrics,
        "error": output.error,
    }


def _scores(scores: Any) -> Any:
    return None if scores is None else [None if one is None else asdict(one) for one in scores]


def summary(output: Any, params: Any) -> str:
    """One line about a finished output of these SamplingParams."""
    m = output.metrics
    parts = [f"{m['output_tokens']} tokens in {m['total_s']:.2f} s", f"{m['tokens_per_s']:.1f} tokens/s"]
    if m["steps"]:
        parts.append(f"tau {m['tau']:.2f} over {m['steps']} passes")
    parts.append(f"first token after {1000 * m['ttft_s']:.0f} ms")
    if m.get("seed") is not None and params.temperature > 0:  # greedy texts draw nothing
        parts.append(f"seed {m['seed']}")
    return f"[{', '.join(parts)}; ended by {output.finish_reason}]"
