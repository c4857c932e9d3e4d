"""Look-up: a drafter without weights, for any target.

What a request's text said the last time it ended as it does now is drafted again (prompt look-up; Saxena 2023). The core does it, in the
request's own prompt and output (`src/draft/lookup.rs`): no pass, no KV, nothing to train. It drafts well where a text repeats itself or its
prompt: edits of code, summaries with quotations, loops. What does not repeat itself is not drafted at all, and costs nothing.
"""

from __future__ import annotations

from typing import Any, NoReturn

BLOCK = 16
"""Tokens of a block, the anchor counted: a draft that is not there costs nothing, and one that is too unlikely for its row is left out."""


class LookUp:
    """A `Drafter` whose drafts the core finds (`from_text`); it is asked for nothing itself."""

    kind, block_size, taps, branches, most_candidates, kv_bytes_per_token, key_dims = "lookup", BLOCK, (), 1, 1, 0, ()
    reads_tokens, from_text = False, True

    def alloc_kv(self, num_slots: int) -> None:
        """Nothing to be kept."""

    def free(self) -> None:
        """Nothing to be given back: the index of a text goes with its request."""

    def on_device(self) -> None:
        """Nothing runs there."""

    def candidates(self, *args: Any, **options: Any) -> NoReturn:
        """Never asked: see `from_text`."""
        raise NotImplementedError("drafts are looked up by the core")

    inject = candidates
