"""Texts that follow a JSON schema, a regular expression, a grammar or a list of choices: what callers write, and the way of a text through it.

The grammar itself is the library llguidance's (the extra ``structured``), imported when the first request asks for it. It is told the bytes of
the engine's own tokens, so what it allows is what the output's text will be.
"""

from __future__ import annotations

import json as json_
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from . import extras
from .arguments import bad, flag, is_list, shown
from .errors import InvalidArgument, MissingPackage

_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_ONE = f"one of {', '.join(_KINDS)}"
# Grammars that an engine keeps ready.
_KEPT = 64


@dataclass(frozen=True)
class StructuredOutputsParams:
    """What an output has to be; one of these, the others None:

    - `json`: a JSON schema, as a mapping or as its text. `json_object`: True for any JSON object.
    - `regex`: a regular expression of the whole output, as Rust's `regex` writes them (no look-around, no back references).
    - `choice`: one of these strings.
    - `grammar`: a context-free grammar in EBNF (GBNF, ``root ::= ...``) or in Lark's form (``start: ...``).

    `disable_any_whitespace`: JSON without spaces and new lines between its parts.

    The output follows it from its first token to its last; where it is complete nothing but an end-of-text token or one of `stop_token_ids` can
    come. An output that ends for another reason (`max_tokens`, `stop`) is the beginning of one that follows it.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if _is_given(getattr(self, name))]
        if len(given) != 1:
            raise InvalidArgument(f"structured_outputs: got {' and '.join(given) or 'nothing'}, expected {_ONE}")
        name, value = f"structured_outputs.{given[0]}", getattr(self, given[0])
        flag("structured_outputs.disable_any_whitespace", self.disable_any_whitespace)
        if given[0] == "json":
            object.__setattr__(self, "json", _schema(name, value))
        elif given[0] == "choice":
            if not is_list(value) or not value:
                raise bad(name, value, "a list of at least one non-empty string")
            for i, one in enumerate(value):
                if not isinstance(one, str) or not one:
                    raise bad(f"{name}[{i}]", one, "a non-empty string")
            object.__setattr__(self, "choice", tuple(value))
        elif given[0] == "json_object":
            flag(name, value)
        elif not isinstance(value, str) or not value:
            raise bad(name, value, "a non-empty string")

    @classmethod
    def of(cls, name: str, value: Any) -> StructuredOutputsParams:
        """`value`, or what a mapping of such names means."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise bad(name, value, "StructuredOutputsParams, or a mapping with their names")
        known = [field.name for field in fields(cls)]
        unknown = next((key for key in value if key not in known), None)
        if unknown is not None:
            raise InvalidArgument(f"{name}: got {shown(unknown)}, expected some of {', '.join(known)}")
        return cls(**value)


def _is_given(value: Any) -> bool:
    return value is not None and value is not False


def _schema(name: str, value: Any) -> str:
    """A JSON schema's text."""
    expected = "a JSON schema, as a mapping or as text"
    if isinstance(value, Mapping):
        try:
            return json_.dumps(value, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidArgument(
                f"{name}: got a mapping that is no JSON ({_line(error)}), expected {expected}"
            ) from None
    if not isinstance(value, str):
        raise bad(name, value, expected)
    try:
        if not isinstance(json_.loads(value), dict):
            raise bad(name, value, expected)
    except (ValueError, RecursionError) as error:
        if isinstance(error, InvalidArgument):
            raise
        raise InvalidArgument(f"{name}: got {shown(value)} ({_line(error)}), expected {expected}") from None
    return value


def _line(error: object, most: int = 160) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= most else f"{text[:most]}..."


class NoToken(Exception):
    """No token may come next, and why."""


class Grammars:
    """The grammars of an engine whose tokens have these bytes, and whose tokenizer cuts a text by `encode`. Threads may share it."""

    def __init__(self, token_bytes: Sequence[bytes], encode: Callable[[str], list[int]]):
        self._bytes, self._encode = token_bytes, encode
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._ready: dict[StructuredOutputsParams, Any] = {}

    def begin(self, wanted: StructuredOutputsParams, ends: Iterable[int]) -> Grammar:
        """A text that follows `wanted` and ends with one of `ends`. Raises InvalidArgument for what cannot be followed, MissingPackage without
        llguidance."""
        library = _library()
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = _tokenizer(library, self._bytes, self._encode)
            matcher = self._ready.get(wanted)
            if matcher is None:
                matcher = _compile(library, self._tokenizer, wanted)
                while len(self._ready) >= _KEPT:
                    del self._ready[next(iter(self._ready))]
                self._ready[wanted] = matcher
            return Grammar(matcher, len(self._bytes), ends)


class Grammar:
    """The way of a text through a grammar, token by token, forth and back."""

    def __init__(self, beginning: Any, vocab_size: int, ends: Iterable[int]):
        self._beginning, self._vocab, self._ends = beginning, vocab_size, list(ends)
        self.reset()

    def reset(self) -> None:
        """Goes back to the beginning."""
        self._matcher: Any = self._beginning.deep_copy()
        self._tokens: list[int] = []

    def allowed(self, may_end: bool) -> np.ndarray:
        """bool [vocab_size]: which tokens may come next; those that end the text among them if the grammar is complete and it `may_end`.
        Raises NoToken."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._fail()
        bits = np.unpackbits(mask, bitorder="little")
        # The tokenizer's own end, which is no token of ours, is allowed where the grammar is complete.
        allowed, complete = bits[: self._vocab].astype(bool), bool(bits[self._vocab])
        if complete and may_end:
            allowed[self._ends] = True
        if not allowed.any():
            raise NoToken(
                "structured_outputs: got a text that is complete, and is not to end yet (min_tokens)"
                if complete
                else "structured_outputs: got a text that no token of this vocabulary continues"
            )
        return allowed

    def push(self, token: int) -> None:
        """Goes on by a token that is allowed. Raises NoToken for another one."""
        if not self._matcher.try_consume_tokens([token]):
            self._fail()
            raise NoToken(f"structured_outputs: got token {token}, which the grammar does not allow there")
        self._tokens.append(token)

    def pop(self) -> None:
        """Goes back by a token."""
        self._tokens.pop()
        # One that met a limit of the library's does not go back.
        if not self._matcher.rollback(1):
            self._matcher = self._beginning.deep_copy()
            self._matcher.consume_tokens(self._tokens)

    def _fail(self) -> None:
        if self._matcher.is_error():
            raise NoToken(f"structured_outputs: {_line(self._matcher.get_error())}")


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise MissingPackage(
            f"structured_outputs needs llguidance ({error}): {extras.install('structured')}"
        ) from error
    return llguidance


class _Words:
    """The library's view of the vocabulary: one token more than there are, behind them, ends a text. Where the grammar leaves one text only, the
    library allows that text's own tokens alone, so it is told how the tokenizer cuts texts."""

    bos_token_id = None

    def __init__(self, token_bytes: Sequence[bytes], encode: Callable[[str], list[int]]):
        self.tokens = [*token_bytes, b"<end>"]
        self.eos_token_id = len(self.tokens) - 1
        self.special_token_ids = (self.eos_token_id,)
        self._encode = encode
        self._ids: dict[bytes, int] = {}
        for token, word in enumerate(token_bytes):
            if word:
                self._ids.setdefault(word, token)
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes) -> list[int]:
        try:
            ids = self._encode(text.decode())
        except UnicodeDecodeError:
            ids = []
        # Some tokenizers put a space in front; others write characters in another form.
        known = all(token < self.eos_token_id for token in ids)
        if known and b"".join(self.tokens[token] for token in ids) == text:
            return ids
        ids, at = [], 0
        while at < len(text):
            ends = range(min(len(text), at + self._longest), at, -1)
            end = next((end for end in ends if text[at:end] in self._ids), None)
            if end is None:
                break
            ids.append(self._ids[text[at:end]])
            at = end
        return ids


def _tokenizer(library: Any, token_bytes: Sequence[bytes], encode: Callable[[str], list[int]]) -> Any:
    words = _Words(token_bytes, encode)
    return library.LLTokenizer(library.TokenizerWrapper(words), n_vocab=len(words.tokens), eos_token=words.eos_token_id)


def _compile(library: Any, tokenizer: Any, wanted: StructuredOutputsParams) -> Any:
    kind = next(name for name in _KINDS if _is_given(getattr(wanted, name)))
    value, make = getattr(wanted, kind), library.LLMatcher
    try:
        if kind in ("json", "json_object"):
            spaces = {"whitespace_flexible": False} if wanted.disable_any_whitespace else None
            grammar = make.grammar_from_json_schema(
                '{"type": "object"}' if kind == "json_object" else value, overrides=spaces
            )
        elif kind == "choice":
            grammar = make.grammar_from_lark(
                "start: " + " | ".join(json_.dumps(one, ensure_ascii=False) for one in value)
            )
        elif kind == "regex":
            grammar = make.grammar_from_regex(value)
        else:
            grammar = library.grammar_from("grammar", value)
        failed, said = make.validate_grammar_with_warnings(grammar, tokenizer)
    except ValueError as error:
        failed, said = True, [str(error)]
    if failed:
        raise InvalidArgument(
            f"structured_outputs.{kind}: got {shown(value)}, expected one that can be followed: {_line(said[0])}"
        )
    return make(tokenizer, grammar, log_level=0)
