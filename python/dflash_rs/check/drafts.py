"""A drafter that knows the plain texts, and says of them what it was told to: so that acceptance is chosen instead of hoped for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# (place in the text, place in the block from 0, tokens of the block without its anchor) -> whether this draft is wrong.
Wrong = Callable[[int, int, int], bool]


def none_wrong(place: int, at: int, size: int) -> bool:
    """Everything is accepted."""
    return False


def all_wrong(place: int, at: int, size: int) -> bool:
    """Everything is rejected, and every draft behind the first would be, too."""
    return True


def first_wrong(place: int, at: int, size: int) -> bool:
    """The first draft is rejected, and what follows it would have been right: none of it may be used."""
    return at == 0


def rest_wrong(place: int, at: int, size: int) -> bool:
    """The first half of a block is accepted."""
    return at >= max(1, size // 2)


def some_wrong(place: int, at: int, size: int) -> bool:
    """One of four, wherever it falls in a block."""
    return (place * 2654435761 >> 8) % 4 == 0


class Scripted:
    """A `models.drafter.Drafter` without weights. `texts`: prompts with their plain continuations."""

    kind, reads_tokens, from_text = "scripted", False, False
    taps: tuple[int, ...] = ()
    branches, most_candidates, kv_bytes_per_token = 1, 1, 0
    key_dims: tuple[int, ...] = ()

    def __init__(self, vocab_size: int, block_size: int, wrong: Wrong):
        self.block_size, self._vocab, self._wrong = block_size, vocab_size, wrong
        self.texts: Sequence[Sequence[int]] = []

    def alloc_kv(self, num_slots: int) -> None:
        pass

    def free(self) -> None:
        pass

    def on_device(self) -> None:
        return None

    def inject(self, features: Any, positions: Any, slots: Any, rows: Any = None, **_: Any) -> None:
        pass

    def candidates(
        self,
        anchors: Any,
        lengths: Any,
        page_table: Any,
        row_ids: Any = None,
        *,
        page_size: int,
        valid_from: Any = None,
        block_size: int | None = None,
        k: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Only the anchor and its place tell which text it is, so texts that share both are told apart by neither: prompts should not."""
        size = (block_size or self.block_size) - 1
        drafts = np.zeros((len(anchors), size, 1), dtype=np.int64)
        for i, (anchor, at) in enumerate(zip(np.asarray(anchors).tolist(), np.asarray(lengths).tolist(), strict=True)):
            text = next((text for text in self.texts if len(text) > at and text[at] == anchor), ())
            for j in range(size):
                place = at + 1 + j
                token = text[place] if place < len(text) else 0
                drafts[i, j, 0] = (token + self._wrong(place, j, size)) % self._vocab
        return drafts, np.full(drafts.shape, 0.9, dtype=np.float32)
