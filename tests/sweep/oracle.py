"""A drafter that knows how texts go on, and is wrong now and then: a random one has nothing accepted, and so tests nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np


class Oracle:
    """A `Drafter` for an `LLM`: drafts from a table of texts; one draft of four is a token off, by its position."""

    kind, reads_tokens, from_text = "oracle", False, False

    def __init__(self, target, block_size: int = 6):
        self.block_size, self.taps, self.branches, self.most_candidates = block_size, (0,), 1, 1
        self.kv_bytes_per_token, self.key_dims = 0, ()
        self.hidden_size = target.hidden_size
        self.texts: list[Sequence[int]] = []
        self.vocab = target.vocab_size
        self.injected = 0

    def alloc_kv(self, num_slots: int) -> None:
        pass

    def free(self) -> None:
        pass

    def on_device(self) -> None:
        return None

    def inject(self, features, positions, slots, rows=None) -> None:
        rows = np.arange(len(positions)) if rows is None else rows
        taken = features[rows]
        if taken.shape != (len(positions), self.hidden_size) or not bool(taken.isfinite().all()):
            raise AssertionError(f"features: got {tuple(taken.shape)} or values that are not finite")
        self.injected += len(positions)

    def candidates(
        self, anchors, lengths, page_table, row_ids=None, *, page_size, valid_from=None, block_size=None, k=None
    ):
        size = block_size or self.block_size
        drafts = np.zeros((len(anchors), size - 1, 1), dtype=np.int64)
        for i, (anchor, at) in enumerate(zip(np.asarray(anchors).tolist(), np.asarray(lengths).tolist())):
            known = next((t for t in self.texts if len(t) > at and t[at] == anchor), ())
            for j in range(size - 1):
                place = at + 1 + j
                token = known[place] if place < len(known) else 0
                wrong = (place * 2654435761 >> 8) % 4 == 0
                drafts[i, j, 0] = (token + wrong) % self.vocab
        return drafts, np.full(drafts.shape, 0.75, dtype=np.float32)


@contextlib.contextmanager
def drafting() -> Iterator[None]:
    """Within it, `LLM(..., draft="oracle")` gets an `Oracle`."""
    from dflash_rs.engine import build

    real = build.describe_draft, build.load_draft
    build.describe_draft = lambda path, target: None
    build.load_draft = lambda path, target, **_: Oracle(target)
    try:
        yield
    finally:
        build.describe_draft, build.load_draft = real
