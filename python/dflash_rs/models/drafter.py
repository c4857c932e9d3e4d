"""What the engine needs of a drafter: whatever proposes tokens is one of these, and nobody looks behind it.

    on a host                                    inside a step on a device
    candidates(anchors, contexts) ──> tokens     block ──> choose | branch ──> drafts
            ... the target's pass ...                     ... the target's pass ...
    inject(features, places, tokens)             context ──> store

A drafter proposes what follows an *anchor*, the last token of a text, whose own KV does not exist yet. It may keep KV of its own at the
target's slots, and may read the target's hidden states (`taps`). It need not be right: what it proposes is verified. It has to be
repeatable, and the same for a request whoever drafts beside it, or a text would depend on its neighbours' speed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from torch import Tensor

FINAL = 2**31 - 1
"""Among `taps`: what the target's head reads, its hidden states after the last norm. No layer has this number."""


class DeviceDrafter(Protocol):
    """The half of a drafter that runs inside a step on a device. Its tensors stay where they are between calls, and nothing here waits for
    the device or reads its values: a step may be captured in a CUDA graph.

    `mask_token_id` fills the places behind an anchor; `branches`: candidates per place that trees are made of.
    """

    mask_token_id: int
    branches: int

    def prepare(self, limit: int) -> None:
        """Makes what passes over positions below `limit` look up, as a captured graph must not."""

    def block(
        self, token_ids: Tensor, positions: Tensor, limit: int, attention: Any, size: int
    ) -> tuple[Tensor, Tensor]:
        """The pass over n blocks of `size` tokens, anchors first: token_ids and positions int64 [n * size], below `limit`; `attention` is the
        step's, which knows the context. Gives hidden states [n, size - 1, H] and logits [n, size - 1, V] of the places behind the anchors."""

    def choose(
        self, hidden: Tensor, logits: Tensor, anchors: Tensor, draw: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Chains int64 [n, size - 1] of what `block` gave for `anchors` int64 [n]: the likeliest, or what `draw` makes of logits [n, size - 1, V] of
        all of the target's vocabulary, -inf where a token is not proposed."""

    def branch(self, hidden: Tensor, logits: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """The `branches` likeliest tokens int64 [n, size - 1, k] of every place, falling, and their log-probabilities float32: what trees are
        made of."""

    def context(self, features: Tensor) -> Tensor:
        """Features [T, len(taps) * H] of a step's tokens -> what `store` keeps of them, [T, ...]."""

    def store(self, kv: Tensor, positions: Tensor, slots: Tensor, rows: Tensor | None = None) -> None:
        """Writes rows `rows` int32 [M] (all when None) of what `context` gave, for tokens at `positions` int64 [M], to `slots` int64 [M]; a
        slot of -1 is nobody's and is left out."""


class Drafter(Protocol):
    """A drafter as the engine knows it.

    - `kind`: what tables call it, a word.
    - `block_size`: tokens of the block it was made for, the anchor counted; shorter ones it takes as well.
    - `taps`: target layers whose outputs `inject` gets, in this order, FINAL for what the head reads; empty when it reads none.
    - `branches`: candidates per place at most that draft trees are made of.
    - `most_candidates`: candidates per place at most that it can be asked for; a request that samples is drafted from up to `config.CANDIDATES`.
    - `kv_bytes_per_token`: bytes of its own KV per token of context, 0 without.
    - `key_dims`: widths of its attention's key heads, for saying why a device cannot serve it; empty without attention.
    - `reads_tokens`: `inject` is told of tokens and their predecessors, too.
    - `from_text`: its drafts are looked up in the requests' texts by the core, chains only. It is asked neither for `candidates` nor to `inject`.
    """

    kind: str
    block_size: int
    taps: tuple[int, ...]
    branches: int
    most_candidates: int
    kv_bytes_per_token: int
    key_dims: tuple[int, ...]
    reads_tokens: bool
    from_text: bool

    def alloc_kv(self, num_slots: int) -> None:
        """Makes room for the context of `num_slots` tokens (the target's slot ids), empty, and gets ready to draft."""

    def free(self) -> None:
        """Gives that room back. The drafter can be allocated again."""

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
        """The k likeliest tokens int64 [n, B-1, k] of every place behind n anchors, and their probabilities float32 [n, B-1, k], falling; row i
        of a request is proposed for position lengths + 1 + i.

        anchors int64 [n], lengths int32 [n]: committed tokens, whose context was injected; page_table int32 [rows, pages] and row_ids
        int32 [n] (0..n-1 when None): each request's pages of `page_size` slots; valid_from int32 [n]: context before that position was
        not injected and is not to be looked at. All host arrays. `block_size` of None is the drafter's own, `k` of None is `branches`.
        """

    def inject(
        self,
        features: Tensor | None,
        positions: Any,
        slots: Any,
        rows: Any = None,
        *,
        token_ids: Any = None,
        before: Any = None,
    ) -> None:
        """Tells the drafter of M committed tokens. features [T, len(taps) * H] of a step (None without taps); rows int64 [M]: whose features
        they are (0..T-1 when None); positions and slots int64 [M]; host arrays or tensors. Each token once; a slot may be
        written again when its page changed hands. Who `reads_tokens` also gets, as host arrays, token_ids int64 [M], and before int64 [M]: the
        slot of the token before each, -1 where that was never injected. Tokens of a request come in the order of their positions."""

    def on_device(self) -> DeviceDrafter | None:
        """The half that runs inside a step on a device, after `alloc_kv`; None when the drafter cannot (no kernels, a type or heads that they
        do not take, nothing to run there)."""
