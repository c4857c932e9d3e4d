"""Which tokens a drafter proposes: all of its target's vocabulary, or a part of it.

A drafter's head is its target's. Of a small model with a large vocabulary it is the largest matrix of all, and a drafter goes through it once for
every place of a block, while most of what any text is made of are a few thousand frequent tokens. A drafter's folder may hold
``draft_vocab.json``, a JSON list of token ids, rising: then its head is those rows of the target's alone, and nothing else is ever proposed (FR-Spec,
arXiv 2502.14856). What the target says is the same in any case; a token outside is a draft that is missed. The weights are those of a drafter of
the whole vocabulary, so an engine that does not know the file drafts with all of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import CheckpointError, InvalidArgument
from . import checkpoint

FILE = "draft_vocab.json"


class Proposals:
    """The tokens that are proposed, and the head that tells how likely each is.

    `tokens`: int64 [N] on the head's device, rising; None where they are all of the vocabulary. `head`: module that makes logits [..., N].
    """

    def __init__(self, lm_head: nn.Module, tokens: Tensor | None):
        self.head, self.tokens = lm_head, tokens
        self._on_host: np.ndarray | None = None
        self._all = 0
        if tokens is None:
            return
        if type(lm_head) is not nn.Linear:
            raise InvalidArgument(
                f"draft_vocab: the target's head is a {type(lm_head).__name__}, expected a Linear to take rows of"
            )
        self.tokens = tokens.to(lm_head.weight.device)
        self._on_host, self._all = tokens.cpu().numpy(), lm_head.out_features
        self.head = rows_of(lm_head, self.tokens)

    def named(self, picked: Tensor) -> Tensor:
        """Tokens int64 of what a choice among the logits gave, of any shape."""
        return picked if self.tokens is None else self.tokens.take(picked)

    def among_all(self, logits: Tensor) -> Tensor:
        """Logits [..., N] of the head among those of all of the vocabulary, -inf for a token that is not proposed."""
        if self.tokens is None:
            return logits
        return logits.new_full((*logits.shape[:-1], self._all), -math.inf).index_copy_(-1, self.tokens, logits)

    @property
    def size(self) -> int | None:
        """Tokens of the vocabulary that these are a part of; None where they are all of it."""
        return None if self.tokens is None else self._all

    def named_on_host(self, picked: np.ndarray) -> np.ndarray:
        """The same of a host array."""
        return picked if self._on_host is None else self._on_host[picked]


def rows_of(lm_head: nn.Linear, tokens: Tensor) -> nn.Linear:
    """A head of some rows of another, int64 [N]; a copy that learns nothing."""
    with torch.device("meta"):
        part = nn.Linear(lm_head.in_features, len(tokens), bias=lm_head.bias is not None)
    part.weight = nn.Parameter(lm_head.weight.detach()[tokens], requires_grad=False)
    if lm_head.bias is not None:
        part.bias = nn.Parameter(lm_head.bias.detach()[tokens], requires_grad=False)
    return part


def read(folder: Path, vocab_size: int, mask_token_id: int | None) -> Tensor | None:
    """The tokens that the drafter in `folder` proposes, int64 [N]; None for all. Raises CheckpointError that names the file."""
    file = folder / FILE
    if not file.exists():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: damaged ({error})") from None
    if not isinstance(values, list) or len(values) < 2:
        raise CheckpointError(f"{file}: got {checkpoint.short(values)}, expected a list of at least two token ids")
    before = -1
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not before < value < vocab_size:
            raise CheckpointError(
                f"{file}: got {checkpoint.short(value)} behind {before}, expected token ids that rise, below {vocab_size} (vocab_size)"
            )
        if value == mask_token_id:
            raise CheckpointError(f"{file}: got {value}, the mask token, which is never proposed")
        before = value
    return torch.tensor(values, dtype=torch.int64)


def write(folder: Path, tokens: Tensor | None) -> None:
    """Keeps them beside a checkpoint; None takes the file away."""
    file = folder / FILE
    if tokens is None:
        file.unlink(missing_ok=True)
        return
    file.write_text(json.dumps(tokens.tolist()) + "\n", encoding="utf-8")


def most_frequent(tokens: np.ndarray, count: int, vocab_size: int, never: Sequence[int]) -> np.ndarray:
    """The `count` tokens that come most often among `tokens` (of equals the smaller ids first), without those of `never`, int64 [count] rising.

    Raises ValueError where a vocabulary has no room for so many.
    """
    if not 2 <= count <= vocab_size - len(never):
        raise ValueError(f"draft_vocab: got {count}, expected 0 for all, or 2..{vocab_size - len(never)}")
    often = np.bincount(tokens, minlength=vocab_size)
    often[list(never)] = -1
    return np.sort(np.argsort(-often, kind="stable")[:count]).astype(np.int64)
