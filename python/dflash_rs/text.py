"""From token ids to text, one token at a time, without ever showing half a character.

Streaming and stop strings both need the *bytes* of single tokens: a character may be spread over two tokens, and a stop string
may begin in one and end in another.
"""

from __future__ import annotations

import codecs
import json
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


def token_bytes(tokenizer: Any, vocab_size: int) -> list[bytes] | None:
    """The bytes of every id below `vocab_size`: empty for special tokens and unused ids.

    None for a tokenizer whose tokens have no bytes of their own (its decoder joins words by rules): text still works there,
    stop strings are refused.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    decoder = json.dumps(json.loads(backend.to_str()).get("decoder") or {})
    special = set(tokenizer.all_special_ids)
    added = tokenizer.added_tokens_decoder
    if "ByteLevel" in decoder:
        alphabet = _byte_level_alphabet()

        def convert(token: str) -> bytes:
            return bytes(alphabet[c] for c in token)
    elif "ByteFallback" in decoder or "Metaspace" in decoder:

        def convert(token: str) -> bytes:
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes([int(token[3:5], 16)])
            return token.replace("\u2581", " ").encode()
    else:
        return None
    table = []
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(min(vocab_size, len(tokenizer)))))):
        if token is None or i in special:
            table.append(b"")
        elif i in added:
            table.append(added[i].content.encode())
        else:
            try:
                table.append(convert(token))
            except (KeyError, ValueError):
                return None
    return table + [b""] * (vocab_size - len(table))


class Detokenizer:
    """Text of a growing output. `push` returns what is certain; `finish` the rest, cut where the engine says."""

    def __init__(self, tokenizer: Any, table: list[bytes] | None):
        self._tokenizer, self._table = tokenizer, table
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
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if not final:
            # A trailing replacement character may still become something else, and so may a trailing space.
            whole = whole.rstrip("\ufffd")
        if not whole.startswith(self.text):
            return ""
        new = whole[len(self.text) :]
        self.text = whole
        return new
