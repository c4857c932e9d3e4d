"""Two yardsticks that need no model: how repetitive a text is, and what a look-up drafter would have done on it.

Speculative decoding looks brilliant on text that repeats itself, because then anything predicts it. Every tau this
package reports therefore stands beside the share of repeated 4-grams in the same outputs and beside the tau of
prompt look-up, the cheapest drafter there is. A trained drafter that does not beat the look-up shows nothing.

Functions of lists of token ids, with the look-up of ``LLM(draft="lookup")`` itself; nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dflash_rs._core import Lookup


def repeated_ngram_share(token_ids: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams of `token_ids` that occurred earlier in the same list.

    A list of fewer than `n` tokens has no n-gram and gives 0.0.
    """
    if n < 1:
        raise ValueError(f"n: got {n}, expected at least 1")
    total = len(token_ids) - n + 1
    if total <= 0:
        return 0.0
    seen: set[tuple[int, ...]] = set()
    repeated = 0
    for start in range(total):
        gram = tuple(token_ids[start : start + n])
        if gram in seen:
            repeated += 1
        else:
            seen.add(gram)
    return repeated / total


@dataclass(frozen=True)
class LookupRun:
    """What a look-up drafter does on one finished output: `tokens` committed in `steps` target passes."""

    tokens: int
    steps: int

    @property
    def tau(self) -> float:
        """Tokens committed per target pass, the model's own token counted; 0.0 when there was no decode pass."""
        return self.tokens / self.steps if self.steps else 0.0


def simulate_lookup(prompt: Sequence[int], output: Sequence[int], block_size: int) -> LookupRun:
    """Replays `output` as if ``LLM(draft="lookup", adaptive=False)`` with blocks of `block_size` had written it.

    Accounting is the engine's: the first output token comes from the prefill and belongs to no decode pass; a pass
    verifies at most `block_size - 1` drafts and commits the matching prefix and one token of the model's own.
    """
    if block_size < 2:
        raise ValueError(f"block_size: got {block_size}, expected at least 2 (one anchor and one draft)")
    index = Lookup()
    index.extend([*prompt, *output[:1]])
    position, steps = 1, 0
    while position < len(output):
        # The last token of an output is always the model's own, so at most `remaining - 1` drafts can be kept.
        room = min(block_size - 1, len(output) - position - 1)
        drafts = index.propose(room).tolist() if room > 0 else []
        accepted = 0
        while accepted < len(drafts) and drafts[accepted] == output[position + accepted]:
            accepted += 1
        index.extend(list(output[position : position + accepted + 1]))
        position += accepted + 1
        steps += 1
    return LookupRun(tokens=max(len(output) - 1, 0), steps=steps)


def lookup_tau(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], block_size: int) -> float:
    """Tau of prompt look-up over (prompt, output) pairs: all tokens over all passes, 0.0 without any pass."""
    runs = [simulate_lookup(prompt, output, block_size) for prompt, output in pairs]
    steps = sum(run.steps for run in runs)
    return sum(run.tokens for run in runs) / steps if steps else 0.0
