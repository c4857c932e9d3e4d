"""From token ids to text, one token at a time, without ever showing half a character.

Streaming and stop strings both need the *bytes* of single tokens: a character may be spread over two tokens, and a stop string
may begin in one and end in another.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from typing import Any


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE vocabularies (GPT-2), inverted."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in plain}
    other = 256
    for b in range(256):
        if b not in plain:
            table[chr(other)] = b
            other += 1
    return table


def _byte_level(decoder: list[dict[str, Any]]) -> Callable[[str], bytes] | None:
    """What a byte-level decoder makes of one token, where it is the decoder."""
    if [part["type"] for part in decoder if part["type"] != "Fuse"] != ["ByteLevel"]:
        return None
    alphabet = _byte_level_alphabet()

    def convert(token: str) -> bytes:
        try:
            return bytes(alphabet[c] for c in token)
        except KeyError:  # an added token, in characters of its own
            return token.encode()

    return convert


def _replacing(decoder: list[dict[str, Any]]) -> Callable[[str], bytes] | None:
    """What a decoder makes of one token, where it replaces strings by others and hexadecimal numbers by bytes (SentencePiece).

    It may take a space from the beginning of a text: here that space stays, since what is decoded continues a prompt.
    """
    replaced: list[tuple[str, str]] = []
    fallback = fused = False
    for part in decoder:
        kind = part["type"]
        if kind == "Metaspace" and not fused:
            replaced.append((part.get("replacement") or "\u2581", " "))
        elif kind == "Replace" and not fused and isinstance(part.get("pattern"), dict) and "String" in part["pattern"]:
            replaced.append((part["pattern"]["String"], part["content"]))
        elif kind == "ByteFallback" and not fused:
            fallback = True
        elif kind == "Fuse":
            fused = True
        elif kind != "Strip" or part.get("stop") or not fused:
            return None
    if not replaced and not fallback:
        return None

    def convert(token: str) -> bytes:
        if fallback and re.fullmatch("<0x[0-9a-fA-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        for old, new in replaced:
            token = token.replace(old, new)
        return token.encode()

    return convert


def token_bytes(tokenizer: Any, vocab_size: int) -> list[bytes] | None:
    """The bytes of every id below `vocab_size`: empty for special tokens and unused ids.

    None for a tokenizer whose tokens have no bytes of their own (its decoder joins words by rules): text still works there,
    stop strings are refused.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    decoder = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder] if decoder else []
    convert = _byte_level(decoder) or _replacing(decoder)
    if convert is None:
        return None
    hidden = _special_tokens(tokenizer)
    # By every id there can be: the length of a tokenizer is a count, and ids may have holes.
    tokens = tokenizer.convert_ids_to_tokens(list(range(vocab_size)))
    return [b"" if token is None or token in hidden else convert(token) for token in tokens]


def with_special_tokens(tokenizer: Any, table: list[bytes]) -> list[bytes]:
    """The bytes of every id, special tokens by their names: what a text shows that leaves none of them out."""
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        return table
    hidden = _special_tokens(tokenizer)
    silent = [token for token, word in enumerate(table) if not word]
    shown = list(table)
    for token, name in zip(silent, tokenizer.convert_ids_to_tokens(silent)):
        if name is not None and name in hidden:
            shown[token] = name.encode()
    return shown


def _special_tokens(tokenizer: Any) -> set[str]:
    """Tokens that are no text: those with a role (end of text, padding) and those that only the tokenizer's file calls special."""
    added = tokenizer.added_tokens_decoder.values()
    return {str(token) for token in tokenizer.all_special_tokens} | {token.content for token in added if token.special}


class Detokenizer:
    """Text of a growing output. `push` returns what is certain; `finish` the rest, cut where the engine says."""

    def __init__(self, tokenizer: Any, table: list[bytes] | None, skip_special_tokens: bool = True):
        self._tokenizer, self._table, self._skip = tokenizer, table, skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._bytes = bytearray()
        self._shown_bytes = 0
        self._ids: list[int] = []
        self.text = ""

    def push(self, ids: list[int], certain: int | None, final: bool) -> str:
        """Takes new ids; `certain` bytes of the output are known to be text (None: all). Returns the new text."""
        if self._table is None:
            return self._push_by_tokenizer(ids, final)
        for i in ids:
            self._bytes += self._table[i]
        end = len(self._bytes) if certain is None else min(certain, len(self._bytes))
        new = self._decoder.decode(bytes(self._bytes[self._shown_bytes : end]), final)
        self._shown_bytes = max(self._shown_bytes, end)
        self.text += new
        return new

    def _push_by_tokenizer(self, ids: list[int], final: bool) -> str:
        self._ids += ids
        try:
            whole = self._decode()
        except (ValueError, TypeError, LookupError, OverflowError):
            # Ids that only the model has, since its matrices are padded. Most tokenizers leave them out, some fail on them.
            known = set(self._tokenizer.get_vocab().values())
            self._ids = [i for i in self._ids if i in known]
            whole = self._decode()
        if not final:
            # A trailing replacement character may still become something else, and so may a trailing space.
            whole = whole.rstrip("\ufffd")
        if not whole.startswith(self.text):
            return ""
        new = whole[len(self.text) :]
        self.text = whole
        return new

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)
