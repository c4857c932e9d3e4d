"""Prompts for a target to answer: from a file, or written by the target itself as the user of its own chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..config import assets
from ..errors import InvalidArgument

Message = dict[str, str]
# What no template changes and nobody writes: shows where a template puts a message.
_MARK = "QzMessageHereQz"


class Template:
    """A tokenizer's chat template, as tokens."""

    def __init__(self, tokenizer: Any, name: str):
        if not getattr(tokenizer, "chat_template", None):
            raise InvalidArgument(
                f"target: {name} has no chat template, expected one for chats; texts to be continued have the key 'text' in a prompts file"
            )
        self._tokenizer = tokenizer
        rendered = self._render([{"role": "user", "content": _MARK}], False)
        if rendered.count(_MARK) != 1:
            raise InvalidArgument(
                f"target: the chat template of {name} shows a user's message {rendered.count(_MARK)} times, expected once"
            )
        behind = self._ids(rendered.partition(_MARK)[2])
        if not behind:
            raise InvalidArgument(
                f"target: the chat template of {name} puts nothing behind a user's message: its end could not be seen"
            )
        self.turn_end = behind[0]

    def _render(self, messages: Sequence[Message], answer: bool) -> str:
        return self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def to_answer(self, messages: Sequence[Message]) -> list[int]:
        """Tokens up to where the assistant's next message begins."""
        return self._ids(self._render(messages, True))

    def to_ask(self, messages: Sequence[Message], opening: str = "") -> list[int]:
        """Tokens up to where the user's next message begins, and the beginning of it."""
        before, _, _ = self._render([*messages, {"role": "user", "content": _MARK}], False).partition(_MARK)
        return self._ids(before + opening)


@dataclass
class Conversation:
    """A chat on its way, or a text that is continued where there are no messages. `asked` are user's messages still to come."""

    category: str
    messages: list[Message] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)

    def add(self, prompt: list[int], written: list[int], text: str) -> None:
        """The target wrote this behind that. What it wrote before stays marked where the template shows it as it was."""
        before = len(self.tokens)
        marks = self.own if prompt[:before] == self.tokens else [False] * before
        marks = (marks + [False] * len(prompt))[: len(prompt)]
        self.tokens, self.own = prompt + written, marks + [True] * len(written)
        if self.messages:
            self.messages.append({"role": "assistant", "content": text})


def read_openings(path: str) -> list[tuple[str, str]]:
    """(category, beginning of a user's message) from JSON lines; the package's own where no path is given."""
    if not path:
        text = (assets() / "openings.jsonl").read_text(encoding="utf-8")
        return [(line["category"], line["opening"]) for line in map(json.loads, text.splitlines())]
    return [(entry["category"], entry["opening"]) for _, entry in _lines("openings", Path(path), {"opening"})]


def read_prompts(path: Path) -> list[Conversation]:
    """Prompts of a JSON-lines file: each line an object with "prompt" (a user's message), "turns" (user's messages, answered one by one),
    "messages" (a chat with roles) or "text" (continued as it is, without a template); "category" may name its kind.

    Raises InvalidArgument that names the line.
    """
    found = []
    for where, entry in _lines("prompts", path, {"prompt", "turns", "messages", "text"}):
        category = entry["category"]
        if "text" in entry:
            found.append(Conversation(category, asked=[_text(where, "text", entry["text"])]))
        elif "messages" in entry:
            found.append(Conversation(category, messages=_messages(where, entry["messages"])))
        else:
            turns = [entry["prompt"]] if "prompt" in entry else entry["turns"]
            if not isinstance(turns, list) or not turns:
                raise InvalidArgument(f"{where}: turns: got {turns!r:.60}, expected a list of user's messages")
            asked = [
                _text(where, f"turns[{i}]" if "turns" in entry else "prompt", turn) for i, turn in enumerate(turns)
            ]
            found.append(Conversation(category, [{"role": "user", "content": asked[0]}], asked[1:]))
    return found


def _text(where: str, name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidArgument(f"{where}: {name}: got {value!r:.60}, expected a text")
    return value


def _messages(where: str, value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise InvalidArgument(f"{where}: messages: got {value!r:.60}, expected a list of objects with role and content")
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise InvalidArgument(
                f"{where}: messages[{i}]: got {message!r:.60}, expected an object with role and content"
            )
        for key in ("role", "content"):
            _text(where, f"messages[{i}].{key}", message.get(key))
    if value[-1]["role"] == "assistant":
        raise InvalidArgument(f"{where}: messages: the last one is the assistant's, expected one to be answered")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _lines(name: str, path: Path, keys: set[str]) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file, each with its place for messages and with a category."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{name}: {path} cannot be read ({error})") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}: {path}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidArgument(f"{where}: not JSON ({error})") from None
        if not isinstance(entry, dict) or len(keys & entry.keys()) != 1:
            raise InvalidArgument(
                f"{where}: got {line!r:.60}, expected an object with one of {', '.join(sorted(keys))}"
            )
        if len(keys) == 1 and not isinstance(entry[next(iter(keys))], str):
            raise InvalidArgument(f"{where}: {next(iter(keys))}: got {entry[next(iter(keys))]!r:.60}, expected a text")
        entry.setdefault("category", "")
        if not isinstance(entry["category"], str):
            raise InvalidArgument(f"{where}: category: got {entry['category']!r:.60}, expected a text")
        found.append((where, entry))
    if not found:
        raise InvalidArgument(f"{name}: {path} holds nothing, expected JSON lines")
    return found


def pick_openings(openings: Sequence[tuple[str, str]], count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Random ones, every category as often as the others."""
    kinds = sorted({category for category, _ in openings})
    pools = {kind: [opening for category, opening in openings if category == kind] for kind in kinds}
    chosen = [kinds[i % len(kinds)] for i in range(count)]
    return [(kind, pools[kind][int(rng.integers(len(pools[kind])))]) for kind in chosen]
