"""Models that are no language models: a target with recurrent state and a drafter that looks things up, to show where others fit in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch

VOCAB, WIDTH = 48, 16


class GatedRecurrence:
    """A `TargetState`, one vector a request: h = a[token] * h + b[token]. Vectors move on in `keep` only."""

    bytes_per_slot, bytes_per_token = 8 * WIDTH, 0

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.decay, self.gain = rng.uniform(0.5, 0.95, (VOCAB, WIDTH)), rng.normal(size=(VOCAB, WIDTH))
        self.copied = 0
        self.alloc(1, 0, 1)

    def alloc(self, rows: int, checkpoints: int, block: int) -> None:
        self.rows, self.copies = np.full((rows, WIDTH), np.nan), np.full((checkpoints, WIDTH), np.nan)
        self.passed: dict[int, np.ndarray] = {}

    def free(self) -> None:
        self.alloc(1, 0, 1)

    def run(self, row: int, tokens: np.ndarray, start: int) -> np.ndarray:
        """The state after each of the tokens that a row is fed with from position `start` on, [n, WIDTH]."""
        if start == 0:
            self.rows[row] = 0
        states = [self.rows[row]]
        for token in tokens:
            states.append(self.decay[token] * states[-1] + self.gain[token])
        self.passed[row] = np.stack(states)
        return self.passed[row][1:]

    def pretend(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        pass

    def restore(self, rows: np.ndarray, checkpoints: np.ndarray) -> None:
        self.rows[rows] = self.copies[checkpoints]
        self.copied += len(rows)

    def save(self, rows: np.ndarray, counts: np.ndarray, checkpoints: np.ndarray) -> None:
        for row, count, checkpoint in zip(rows.tolist(), counts.tolist(), checkpoints.tolist(), strict=True):
            self.copies[checkpoint] = self.passed[row][count]

    def keep(self, rows: np.ndarray, counts: np.ndarray) -> None:
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
            self.rows[row] = self.passed.pop(row)[count]

    def on_device(self) -> None:
        return None


class RecurrentTarget:
    """A `Target` that remembers a text in its state alone: the next token depends on all tokens so far."""

    device, vocab_size, hidden_size, max_context = torch.device("cpu"), VOCAB, WIDTH, 200
    dtype = torch.float32
    kv_bytes_per_token, num_slots, eos_token_ids = 0, 0, ()

    def __init__(self, seed: int = 0):
        self.state = GatedRecurrence(seed)
        self.head = np.random.default_rng(seed + 1).normal(size=(WIDTH, VOCAB))

    def set_taps(self, layer_ids: Sequence[int]) -> None:
        assert not layer_ids

    def alloc_kv(self, num_slots: int) -> None:
        self.num_slots = num_slots

    def free(self) -> None:
        self.num_slots = 0

    @contextlib.contextmanager
    def scratch(self, num_slots: int) -> Iterator[None]:
        kept, self.state = self.state, GatedRecurrence()
        self.state.decay, self.state.gain = kept.decay, kept.gain
        try:
            yield
        finally:
            self.state = kept

    def forward(self, batch):
        tokens, starts = batch.token_ids.numpy(), batch.query_starts.tolist()
        parts = [
            self.state.run(row, tokens[begin:end], context)
            for row, context, begin, end in zip(batch.row_ids.tolist(), batch.context_lens.tolist(), starts, starts[1:])
        ]
        hidden = np.concatenate(parts)[batch.logit_rows.numpy()]
        # One row at a time: a product of matrices may round otherwise in company.
        logits = np.array([row @ self.head for row in hidden]).reshape(-1, VOCAB)
        return torch.from_numpy(logits).float(), None

    def move_kv(self, sources, places) -> None:
        raise AssertionError("trees are refused")


class LookUp:
    """A `Drafter` that finds its drafts in texts it was told, and is a token off at one place of three; it reads no features."""

    block_size, taps, branches, most_candidates, kv_bytes_per_token, key_dims = 6, (), 1, 1, 0, ()
    kind, reads_tokens, from_text = "toy", False, False

    def __init__(self):
        self.texts: list[list[int]] = []
        self.injected = 0

    def alloc_kv(self, num_slots: int) -> None: ...

    def free(self) -> None: ...

    def on_device(self) -> None:
        return None

    def inject(self, features, positions, slots, rows=None) -> None:
        assert features is None
        self.injected += len(positions)

    def candidates(
        self, anchors, lengths, page_table, row_ids=None, *, page_size, valid_from=None, block_size=None, k=None
    ):
        size = block_size or self.block_size
        drafts = np.zeros((len(anchors), size - 1, 1), dtype=np.int64)
        for i, (anchor, at) in enumerate(zip(np.asarray(anchors).tolist(), np.asarray(lengths).tolist())):
            text = next((text for text in self.texts if len(text) > at and text[at] == anchor), [])
            for j in range(size - 1):
                place = at + 1 + j
                drafts[i, j, 0] = ((text[place] if place < len(text) else 0) + (place * 7 % 3 == 0)) % VOCAB
        return drafts, np.full(drafts.shape, 0.8, dtype=np.float32)
