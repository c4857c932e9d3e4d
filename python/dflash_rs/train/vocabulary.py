"""Training over a part of a vocabulary: the tokens that a drafter will propose, and a few that stand for all others.

What the head makes of a whole vocabulary is most of the cost of training a small drafter. Where it proposes a part (`models/proposals.py`), a
step's loss is over that part and `sampled_vocab` of the other tokens, drawn anew in every step; each of those counts as many times as there are
others, so that the sums over the vocabulary are right on average, and the weights stay those of a drafter of the whole vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from ..models import proposals
from .documents import Documents


class Columns:
    """The tokens that logits are made of in a step.

    `head` makes logits [..., C] of the tokens `tokens` int64 [C]; the first `proposed` of them may be drafted. The others' logits are higher by the
    logarithm of how many tokens each stands for.
    """

    def __init__(self, lm_head: nn.Linear, proposed: torch.Tensor, others: torch.Tensor, stand_for: int):
        self.tokens = torch.cat((proposed, others))
        self.proposed = len(proposed)
        self.head = proposals.rows_of(lm_head, self.tokens)
        if len(others):
            bias = torch.zeros_like(self.head.weight[:, 0]) if self.head.bias is None else self.head.bias.detach()
            bias[self.proposed :] += math.log(stand_for / len(others))
            self.head.bias = nn.Parameter(bias, requires_grad=False)
        self._column = torch.full((lm_head.out_features,), -1, dtype=torch.int64, device=self.tokens.device)
        self._column[proposed] = torch.arange(len(proposed), device=self.tokens.device)

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., C] in the head's own dtype."""
        return self.head(hidden.to(self.head.weight.dtype))

    def of(self, tokens: torch.Tensor) -> torch.Tensor:
        """The columns of tokens int64, -1 for those that are not proposed."""
        return self._column[tokens]


class Narrowed:
    """Chooses the columns of every step: the `draft_vocab` most frequent tokens of the target's own text, and random others."""

    def __init__(self, target: Any, own: Documents, settings: Any, device: torch.device):
        self._head, self._settings = target.get_output_embeddings(), settings
        if type(self._head) is not nn.Linear:
            raise ValueError(
                f"draft_vocab: the target's head is a {type(self._head).__name__}, expected a Linear to take rows of"
            )
        size = self._head.out_features
        never = [] if settings.mask_token_id is None else [settings.mask_token_id]
        written = own.tokens[own.own]
        chosen = proposals.most_frequent(written, settings.draft_vocab, size, never)
        self._others = np.setdiff1d(np.arange(size), np.append(chosen, never), assume_unique=True)
        if settings.sampled_vocab < 0:
            raise ValueError(f"sampled_vocab: got {settings.sampled_vocab}, expected at least 0")
        self.share = float(np.isin(written, chosen).mean())
        self.tokens = torch.from_numpy(chosen)
        self._device = device

    def at(self, step: int) -> Columns:
        """The columns of a step: they depend on the settings and its number only."""
        count = min(self._settings.sampled_vocab, self._others.size)
        rng = np.random.default_rng((self._settings.seed, 13, step))
        others = np.sort(rng.choice(self._others, count, replace=False))
        proposed, sampled = (x.to(self._device) for x in (self.tokens, torch.from_numpy(others)))
        return Columns(self._head, proposed, sampled, self._others.size)

    def proposed(self) -> Columns:
        """Those alone that may be drafted."""
        return Columns(
            self._head, self.tokens.to(self._device), torch.empty(0, dtype=torch.int64, device=self._device), 0
        )
