"""Drafts that share the target's random numbers, as ``src/draft/coupled.rs`` has it: a request that samples is drafted what the numbers of its coming
draw favour by the drafter's probabilities, instead of what is likeliest. The text stays the target's own draw at every place.

    who draws                                  numbers                                        drafts
    SGLang, with a seed                        its hash of seed, position and token           Seeded: the drafter's candidates, by their sums
    the same, with top-k or top-p              of ranks among the target's tokens             the likeliest: the drafter's ranks are too often others
    this package's kernel, without seeds       its own, of a seed that nobody knows           Drawn: the same kernel draws from the drafter's logits
    SGLang, without seeds                      made when it draws                             the likeliest

A draft for place ``i`` of a block looks at the numbers of place ``i`` alone, or at those before it, too. So whether a place is reached at all says nothing of the
numbers that its token is drawn with, and the law of the text is the target's even where a place that was not reached is drawn with others later. A tree would
not have that: what it holds of one place hangs on how good the candidates of the next ones are. Trees are coupled only where numbers are those of a seed, and
those along a lattice are not, which gained nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dflash_rs.config import CANDIDATES, SHARPER
from dflash_rs.sglang import compat
from dflash_rs.sglang.trees import best_of, head_logits, likelihoods

if TYPE_CHECKING:
    from dflash_rs.sglang.kernels import Draws

# Rows whose numbers are there for the whole vocabulary at a time.
_ROWS = 256


def knows_columns(params: Any) -> bool:
    """Whether SGLang's seeded draws of a request number tokens: it filters nothing, or they number ranks among what is left, of which a drafter knows too little."""
    from sglang.srt.sampling.sampling_params import TOP_K_ALL

    return params.top_p == 1.0 and params.top_k == TOP_K_ALL


class Seeded:
    """The numbers of SGLang's seeded draws for the requests of a batch. Requests that are greedy, or filter, are drafted the likeliest."""

    candidates = CANDIDATES

    def __init__(self, info: Any, params: Sequence[Any], vocab: int):
        """`info` is SGLang's sampling info of requests with the sampling parameters `params`; nothing is copied to the device."""
        from sglang.srt.sampling.sampling_params import TOP_K_ALL

        self._seeds = info.sampling_seed.view(-1, 1)
        self._weights = SHARPER / info.temperatures.to(torch.float32).view(-1, 1, 1)
        self._columns = torch.arange(vocab, device=self._seeds.device)
        self._mine = None
        if not all(knows_columns(p) for p in params):
            self._mine = ((info.top_ks == TOP_K_ALL) & (info.top_ps == 1.0)).view(-1, 1, 1)

    def draft(self, hidden: Tensor, lm_head: Any, group: Any, positions: Tensor) -> Tensor:
        """Drafts i64 ``[R * P]`` by the drafter's `hidden` ``[R * P, H]``; `positions` i64 ``[R, P]``: those of the tokens before them."""
        tokens, values = best_of(hidden, lm_head, group, CANDIDATES)
        shape = (*positions.shape, -1)
        sums = self.sums(tokens.view(shape), values.view(shape), positions)
        return tokens.gather(1, sums.argmax(-1).view(-1, 1)).view(-1)

    def reordered(self, tokens: Tensor, log_probs: Tensor, positions: Tensor, best: int) -> tuple[Tensor, Tensor]:
        """Of candidates ``[R * P, k]``, the likeliest first, the `best` by their sums, and the logarithms of their shares (softmax), both
        ``[R * P, best]``."""
        shape = (*positions.shape, -1)
        shares = likelihoods(self.sums(tokens.view(shape), log_probs.view(shape), positions)).view(log_probs.shape)
        shares, order = shares.topk(min(best, shares.shape[-1]), dim=-1)
        return tokens.gather(1, order), shares

    def sums(self, tokens: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """What candidates i64 ``[R, P, k]`` come to with the target's numbers, f32; `values` f32 are their logits."""
        sums = torch.addcmul(self._numbers(tokens, positions), values, self._weights)
        return sums if self._mine is None else torch.where(self._mine, sums, values)

    def along(self, tokens: Tensor, scores: Tensor, positions: Tensor) -> Tensor:
        """The same of a lattice: candidates i64 ``[R, P, k]`` and their `scores` behind each other ``[R, P, k, k]``."""
        scores = scores.to(torch.float32)
        numbers = self._numbers(tokens, positions)[:, :, None]
        sums = torch.addcmul(numbers, scores, self._weights[..., None])
        return sums if self._mine is None else torch.where(self._mine[..., None], sums, scores)

    def _numbers(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """f32 ``[R, P, k]``, of the draws of the tokens after `positions` ``[R, P]``."""
        seeds = self._seeds.expand_as(positions).reshape(-1).to(torch.uint64)
        parts = zip(*(rows.split(_ROWS) for rows in (seeds, positions.reshape(-1), tokens.flatten(0, 1))))
        # Torch gathers no unsigned numbers.
        words = [
            compat.installed().hashed(seed, place, self._columns).view(torch.int32).gather(1, some)
            for seed, place, some in parts
        ]
        word = (words[0] if len(words) == 1 else torch.cat(words)).to(torch.int64).bitwise_and_(0xFFFFFFFF)
        # As SGLang computes them, with its bounds for the first and the last word.
        numbers = word.to(torch.float64).div_(0xFFFFFFFF).log_().clamp_(torch.finfo(torch.float64).min, -(2.0**-32))
        return numbers.neg_().log_().neg_().to(torch.float32).view(tokens.shape)


class Drawn:
    """The numbers of this package's kernel for the requests of a batch, which draws from the drafter's logits what it would draw from the target's."""

    def __init__(self, draws: Draws, params: Sequence[Any]):
        self._draws, self._params = draws, params

    def draft(self, hidden: Tensor, lm_head: Any, group: Any, positions: Tensor) -> Tensor:
        """See ``Seeded.draft``; of a head that is whole on this rank."""
        logits, _ = head_logits(hidden, lm_head)
        # The kernel knows no other half-precision.
        logits = logits.to(torch.float32) if logits.dtype == torch.float16 else logits
        return self._draws.drafts(logits, self._params, positions, SHARPER)


class Couplings:
    """Of the batches of a worker. `vocab`: columns of SGLang's seeded draws, None where it draws in a way that is not known here; `draws`: what draws without
    seeds, None where that is SGLang's sampler; `dtype`: of the target's logits."""

    def __init__(self, vocab: int | None, draws: Draws | None, dtype: torch.dtype):
        self._vocab, self._draws, self._dtype = vocab, draws, dtype
        # The objects are kept, because another one may get the address of one that is gone.
        self._params: list[Any] = []
        self._seeded: Seeded | None = None

    def of(self, info: Any, reqs: Sequence[Any], chains_of_logits: bool) -> Seeded | Drawn | None:
        """Of a batch with SGLang's sampling info `info`; None where no number is known before it is drawn with. `chains_of_logits`: whether chains are drafted,
        each draft by logits of its own, with all of the vocabulary on this rank."""
        if info.is_all_greedy:
            return None
        params = [req.sampling_params for req in reqs]
        if info.sampling_seed is None:
            if self._draws is None or not chains_of_logits or not self._draws.serves(params, self._dtype):
                return None
            return Drawn(self._draws, params)
        if len(params) != len(self._params) or any(a is not b for a, b in zip(params, self._params)):
            self._seeded, self._params = None, params
            if self._vocab is not None and any(knows_columns(p) for p in params):
                self._seeded = Seeded(info, params, self._vocab)
        return self._seeded
