"""Training texts of different lengths: how they are stored, and how several of them make a row of a batch.

A document is one text (a chat, a function) as token ids, with a mark at every token that the target wrote itself: only those are to be
predicted. A shard is an `.npz` file of many.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Rows that are being filled at a time: a document goes into the first one that has room for it.
_OPEN_ROWS = 16
# Of every so many documents one is kept apart, by a hash of its beginning.
HELD_OUT_ONE_IN = 40


@dataclass(frozen=True)
class Documents:
    """Texts behind each other.

    tokens ``int32 [total]``; starts ``int64 [n + 1]``; own ``bool [total]``: the target wrote this token; categories: n names.
    """

    tokens: np.ndarray
    starts: np.ndarray
    own: np.ndarray
    categories: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def lengths(self) -> np.ndarray:
        """Tokens of each, ``int64 [n]``."""
        return np.diff(self.starts)

    def tokens_of(self, i: int) -> np.ndarray:
        """The i-th text, ``int32 [length]``."""
        return self.tokens[self.starts[i] : self.starts[i + 1]]

    def own_of(self, i: int) -> np.ndarray:
        """Which of its tokens the target wrote, ``bool [length]``."""
        return self.own[self.starts[i] : self.starts[i + 1]]

    def beginning(self, i: int) -> bytes:
        """What stands before the target's first own token: two documents with the same are answers to the same prompt."""
        own = self.own_of(i)
        first = int(own.argmax()) if own.any() else own.size
        return hashlib.sha256(self.tokens_of(i)[:first].tobytes()).digest()

    def held_out(self, i: int) -> bool:
        """Whether it is kept for measuring: by its beginning alone, so that it stays apart however much is written later."""
        return int.from_bytes(self.beginning(i)[:8], "little") % HELD_OUT_ONE_IN == 0

    @classmethod
    def of(cls, texts: Sequence[tuple[Sequence[int] | np.ndarray, Sequence[bool] | np.ndarray, str]]) -> Documents:
        """From (tokens, own, category) each."""
        lengths = [len(tokens) for tokens, _, _ in texts]
        flat = [np.asarray(tokens, dtype=np.int32) for tokens, _, _ in texts]
        marks = [np.asarray(own, dtype=bool) for _, own, _ in texts]
        return cls(
            np.concatenate([np.zeros(0, dtype=np.int32), *flat]),
            np.cumsum([0, *lengths], dtype=np.int64),
            np.concatenate([np.zeros(0, dtype=bool), *marks]),
            tuple(category for _, _, category in texts),
        )

    def save(self, path: Path) -> None:
        """Writes a shard, whole or not at all."""
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "wb") as file:
            np.savez_compressed(
                file,
                tokens=self.tokens,
                starts=self.starts,
                own=self.own,
                categories=np.array(self.categories, dtype="U"),
            )
        os.replace(temporary, path)

    @classmethod
    def load(cls, folder: Path) -> Documents:
        """All shards of a folder, in order, equal texts once. Raises ValueError where there is none, or one is damaged."""
        shards = sorted(folder.glob("shard-?????.npz"))
        if not shards:
            raise ValueError(f"responses: no shard-*.npz in {folder}; run `dflash-rs train responses` first")
        texts: list[tuple[np.ndarray, np.ndarray, str]] = []
        seen: set[bytes] = set()
        for path in shards:
            part = _read(path)
            for i in range(len(part)):
                text = hashlib.sha256(part.tokens_of(i).tobytes()).digest()
                if text not in seen:
                    seen.add(text)
                    texts.append((part.tokens_of(i), part.own_of(i), part.categories[i]))
        return cls.of(texts)

    def only(self, chosen: Sequence[int]) -> Documents:
        """Those of these numbers."""
        return Documents.of([(self.tokens_of(i), self.own_of(i), self.categories[i]) for i in chosen])

    def split(self) -> tuple[Documents, Documents]:
        """Those to train on, and those kept apart."""
        kept = [self.held_out(i) for i in range(len(self))]
        return self.only([i for i, k in enumerate(kept) if not k]), self.only([i for i, k in enumerate(kept) if k])


def _read(path: Path) -> Documents:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = Documents(file["tokens"], file["starts"], file["own"], tuple(file["categories"].tolist()))
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"responses: {path} is damaged ({error}): delete it, and it is written again") from error
    n, total = len(found), found.tokens.size
    if found.starts[0] != 0 or found.starts[-1] != total or found.own.size != total or len(found.categories) != n:
        raise ValueError(f"responses: {path} is damaged (its parts do not fit): delete it, and it is written again")
    return found


class Text(NamedTuple):
    """A document in a row: its tokens ``int32 [n]``, the marks of the target's own ``bool [n]``, and where it begins in `Documents.tokens`
    (-1 for one from elsewhere)."""

    tokens: np.ndarray
    own: np.ndarray
    place: int = -1


@dataclass(frozen=True)
class Rows:
    """Rows of a batch, each with several documents behind each other.

    All ``[b, S]``: tokens int64; document int64, the number of the document within the row, -1 behind the last; position int64, counted
    from each document's first token; own bool; place int64, where the token stands in `Documents.tokens`, -1 for one from elsewhere.
    """

    tokens: np.ndarray
    document: np.ndarray
    position: np.ndarray
    own: np.ndarray
    place: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Sequence[Text]], length: int) -> Rows:
        """From the documents of each row."""
        tokens = np.zeros((len(rows), length), dtype=np.int64)
        document = np.full((len(rows), length), -1, dtype=np.int64)
        position = np.zeros((len(rows), length), dtype=np.int64)
        own = np.zeros((len(rows), length), dtype=bool)
        place = np.full((len(rows), length), -1, dtype=np.int64)
        for r, row in enumerate(rows):
            at = 0
            for d, text in enumerate(row):
                size = len(text.tokens)
                span = slice(at, at + size)
                tokens[r, span], own[r, span] = text.tokens, text.own
                document[r, span], position[r, span] = d, np.arange(size)
                if text.place >= 0:
                    place[r, span] = text.place + np.arange(size)
                at += size
            # What pads a row is a document of its own, in which nothing is to be predicted.
            position[r, at:] = np.arange(length - at)
        return cls(tokens, document, position, own, place)

    def anchors(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Random places ``int64 [b, count]`` with a token of the target behind them in the same document, ascending."""
        last = np.zeros_like(self.own)
        follows = (self.document[:, 1:] == self.document[:, :-1]) & (self.document[:, 1:] >= 0) & self.own[:, 1:]
        last[:, :-1] = follows
        chosen = []
        for row in last:
            places = np.flatnonzero(row)
            if not places.size:
                places = np.zeros(1, dtype=np.int64)
            chosen.append(np.sort(rng.choice(places, count, replace=places.size < count)))
        return np.stack(chosen)


def rows_of(documents: Documents, length: int, seed: int, whole_rows: bool) -> Iterator[list[Text]]:
    """Endless rows of at most `length` tokens, every epoch in another order; longer documents are cut. With `whole_rows` a document has
    its row for itself."""
    if not len(documents):
        raise ValueError("responses: got no document to train on")
    if not any(documents.own_of(i)[:length].any() for i in range(len(documents))):
        raise ValueError(f"responses: got no document with a token of the target among its first {length}")
    epoch = 0
    while True:
        yield from rows_once(
            documents, np.random.default_rng((seed, 11, epoch)).permutation(len(documents)), length, whole_rows
        )
        epoch += 1


def rows_once(
    documents: Documents, order: Sequence[int] | np.ndarray, length: int, whole_rows: bool
) -> Iterator[list[Text]]:
    """Rows with every document of `order` once, but for those in which nothing is to be predicted."""
    open_rows: list[tuple[int, list[Text]]] = []
    for number in order:
        i = int(number)
        text = Text(documents.tokens_of(i)[:length], documents.own_of(i)[:length], int(documents.starts[i]))
        size = len(text.tokens)
        if not text.own.any():
            continue
        if whole_rows:
            yield [text]
            continue
        fits = next((k for k, (used, _) in enumerate(open_rows) if used + size <= length), None)
        if fits is None:
            if len(open_rows) == _OPEN_ROWS:
                fullest = max(range(_OPEN_ROWS), key=lambda k: open_rows[k][0])
                yield open_rows.pop(fullest)[1]
            open_rows.append((size, [text]))
        else:
            used, row = open_rows[fits]
            open_rows[fits] = (used + size, [*row, text])
    for _, row in open_rows:
        yield row
