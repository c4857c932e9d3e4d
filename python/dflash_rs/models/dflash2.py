"""DFlash 2: a DFlash whose blocks look at themselves twice more.

Attention and MLP are wrapped in a convolution over the tokens of the block before (`BlockConv`), and what a position proposes depends on
what was chosen before it (`Selector`):

    likeliest K of every row  -->  left to right:  score(c) = logit[c] + <A[last] * (W h), B[c]>, the best is next

Both are of the block alone: context, caches and injection are a DFlash's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _core
from ..config import BRANCHES, CANDIDATES
from ..errors import InvalidArgument
from .dflash.config import DraftConfig
from .dflash.layers import DraftLayer
from .dflash.model import DFlashDraft
from .dflash.runtime import Runtime
from .fused import FusedLayer
from .linear import PackedLinear
from .proposals import Proposals


@dataclass(frozen=True, kw_only=True)
class DFlash2Config(DraftConfig):
    """The shape of a DFlash 2, beside that of a DFlash: tokens a convolution looks at (its own included), channels that share a dynamic
    kernel, width of the selector's codebooks, candidates per position."""

    architecture: ClassVar[str] = "DFlash2DraftModel"
    own_fields: ClassVar[tuple[str, ...]] = (
        "conv_kernel_size",
        "conv_group_size",
        "selector_rank",
        "selector_top_k",
    )

    conv_kernel_size: int
    conv_group_size: int
    selector_rank: int
    selector_top_k: int

    @property
    def branches(self) -> int:
        """Candidates per position at most that draft trees are made of."""
        return min(BRANCHES, self.selector_top_k)

    @property
    def most_candidates(self) -> int:
        """Candidates per position at most from which a request that samples is drafted."""
        return min(CANDIDATES, self.selector_top_k)


class BlockConv(nn.Module):
    """A sublayer's two convolutions, of what goes in and of what comes out, over the tokens of a block.

    ``y[n] = sum over t of (base[side, t] + delta[n, side, t]) * x[n - t]``, nothing before the block; every channel has a `base` of its own,
    groups of channels share a `delta`, which is a projection of what goes in.
    """

    def __init__(self, c: DFlash2Config):
        super().__init__()
        self.taps, self.groups = c.conv_kernel_size, c.hidden_size // c.conv_group_size
        self.base_kernel = nn.Parameter(torch.zeros(2, self.taps, c.hidden_size))
        self.kernel_projection = nn.Linear(c.hidden_size, 2 * self.taps * self.groups, bias=False)
        with torch.no_grad():
            # A convolution that does nothing, until it is trained or loaded.
            self.base_kernel[:, 0] = 1.0
            self.kernel_projection.weight.zero_()

    def enter(self, x: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """x [..., T, H], T a multiple of the block's `size`; gives what the sublayer gets, and what `leave` wants to have."""
        deltas = self.kernel_projection(x).unflatten(-1, (2, self.taps, self.groups))
        return self._over(x, deltas[..., 0, :, :], 0, size), deltas[..., 1, :, :]

    def leave(self, y: Tensor, deltas: Tensor, size: int) -> Tensor:
        """y [..., T, H]: what the sublayer gave."""
        return self._over(y, deltas, 1, size)

    def _over(self, x: Tensor, deltas: Tensor, side: int, size: int) -> Tensor:
        blocks = x.unflatten(-2, (-1, size)).unflatten(-1, (self.groups, -1))
        deltas = deltas.unflatten(-3, (-1, size))
        base = self.base_kernel[side].to(x.dtype).unflatten(-1, (self.groups, -1))
        out = (base[0] + deltas[..., 0, :, None]) * blocks
        for tap in range(1, min(self.taps, size)):
            before = F.pad(blocks[..., :-tap, :, :], (0, 0, 0, 0, tap, 0))
            out = out + (base[tap] + deltas[..., tap, :, None]) * before
        return out.flatten(-2).flatten(-3, -2)


class Selector(nn.Module):
    """What a position proposes, given what was chosen for the one before it."""

    def __init__(self, c: DFlash2Config):
        super().__init__()
        self.top_k = c.selector_top_k
        self.predecessor_codebook = nn.Parameter(torch.zeros(c.vocab_size, c.selector_rank))
        self.successor_codebook = nn.Parameter(torch.zeros(c.vocab_size, c.selector_rank))
        self.hidden_projection = nn.Linear(c.hidden_size, c.selector_rank, bias=False)

    def scores(self, state: Tensor, last: Tensor, tokens: Tensor, unary: Tensor) -> Tensor:
        """Of candidates `tokens` int64 [n, K] with logits `unary` [n, K] behind the tokens `last` int64 [n], float32 [n, K]; state [n, R]: what
        `hidden_projection` made of their rows."""
        key = F.embedding(last, self.predecessor_codebook) * state
        return (unary + (F.embedding(tokens, self.successor_codebook) @ key[..., None])[..., 0]).float()

    def forward(
        self, hidden: Tensor, logits: Tensor, anchors: Tensor, k: int, proposals: Proposals | None = None
    ) -> tuple[Tensor, Tensor]:
        """Walks blocks greedily: hidden [n, B-1, H] and logits [n, B-1, V] of the drafted rows, of `proposals` or of all tokens; anchors int64
        [n]. Gives the k best candidates of every position, the chosen one first, int64 [n, B-1, k], and their log-probabilities float32, given
        the tokens chosen before; what is no candidate counts with its logit."""
        unary, picked = logits.topk(self.top_k, dim=-1)
        tokens = picked if proposals is None else proposals.named(picked)
        everyone, top = logits.float().logsumexp(dim=-1), unary.float().logsumexp(dim=-1)
        others = everyone + torch.log1p(-(top - everyone).exp().clamp(max=1 - 1e-6))
        state, last = self.hidden_projection(hidden), anchors
        found, scored = [], []
        for position in range(hidden.shape[1]):
            scores = self.scores(state[:, position], last, tokens[:, position], unary[:, position])
            best = scores.topk(k, dim=-1)
            chosen = tokens[:, position].gather(-1, best.indices)
            last = chosen[:, 0]
            found.append(chosen)
            scored.append(best.values - torch.logaddexp(scores.logsumexp(dim=-1), others[:, position])[:, None])
        return torch.stack(found, dim=1), torch.stack(scored, dim=1)


class DFlash2Layer(DraftLayer):
    """A drafter layer between convolutions."""

    def __init__(self, c: DFlash2Config):
        super().__init__(c)
        self.attention_conv = BlockConv(c)
        self.mlp_conv = BlockConv(c)

    def open(self, hidden: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
        """What attention gets, and the deltas that `close` wants to have."""
        return self.attention_conv.enter(self.input_layernorm(hidden), size)

    def close(self, hidden: Tensor, attended: Tensor, kept: Tensor | None, size: int) -> Tensor:
        """Convolution, residual, RMSNorm, SwiGLU between convolutions, residual."""
        hidden = hidden + self.attention_conv.leave(self.self_attn.o_proj(attended), kept, size)
        inner, deltas = self.mlp_conv.enter(self.post_attention_layernorm(hidden), size)
        return hidden + self.mlp_conv.leave(self.mlp(inner), deltas, size)


class ConvLayer(FusedLayer):
    """A layer of a DFlash 2: the same with its two convolutions, over blocks of `size` tokens."""

    def __init__(self, layer: DFlash2Layer, **options):
        super().__init__(layer, **options)
        self._attention_conv, self._mlp_conv = layer.attention_conv, layer.mlp_conv
        self._deltas = [PackedLinear([conv.kernel_projection], share=False) for conv in self._convs()]

    def _convs(self) -> tuple[BlockConv, BlockConv]:
        return self._attention_conv, self._mlp_conv

    def products(self) -> list[PackedLinear]:
        """All of this layer's weights that are multiplied by."""
        return [*super().products(), *self._deltas]

    def convolutions(self) -> tuple[_core.HostConv, _core.HostConv] | None:
        """For the extension."""
        attention, mlp = (
            _core.HostConv(conv.base_kernel.detach().flatten().numpy(), deltas.packed_host, conv.taps)
            for conv, deltas in zip(self._convs(), self._deltas, strict=True)
        )
        return attention, mlp

    # Only the drafter of its own kind calls it, which knows the size.
    def __call__(  # type: ignore[override]
        self, x: Tensor, cos: Tensor, sin: Tensor, attention, k_cache: Tensor, v_cache: Tensor, size: int
    ):
        normed, deltas = self._attention_conv.enter(torch.rms_norm(x, self.hidden, self.norm1, self.eps), size)
        attended = self.attend(normed, cos, sin, attention, k_cache, v_cache)
        x = x + self._attention_conv.leave(self.out(attended), deltas, size)
        inner, deltas = self._mlp_conv.enter(torch.rms_norm(x, self.hidden, self.norm2, self.eps), size)
        return x + self._mlp_conv.leave(self.down(self.swiglu(self.gate_up(inner))), deltas, size)


class DFlash2Runtime(Runtime):
    """A DFlash's runtime with convolutions in its layers and a selector behind its head."""

    layer_type = ConvLayer

    def __init__(self, draft: DFlash2Draft, embedding: nn.Module, lm_head: nn.Module, num_slots: int):
        super().__init__(draft, embedding, lm_head, num_slots)
        self.selector = draft.candidate_selector
        if self.run is not None:
            self.selecting = self._on_host()

    def _on_host(self) -> tuple[_core.HostSelector, tuple[Tensor, Tensor]]:
        """What chooses in the extension, and the codebooks that it reads."""
        own = self.selector
        projection = PackedLinear([own.hidden_projection], share=False).packed_host
        names = None if self.proposals.tokens is None else self.proposals.tokens.numpy()
        books = own.predecessor_codebook.detach(), own.successor_codebook.detach()
        return _core.HostSelector(projection, own.top_k, names), books

    def through(self, layer, x: Tensor, cos: Tensor, sin: Tensor, attention, caches, size: int) -> Tensor:
        """x [n * size, H] of blocks of `size` tokens through one layer."""
        return layer(x, cos, sin, attention, *caches, size)

    def likeliest(self, hidden: Tensor, logits: Tensor, anchors: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Those that follow the likeliest path, with their probabilities; see `Runtime.likeliest`."""
        tokens, log_probs = self.select(hidden, logits, anchors, k)
        return tokens, log_probs.exp()

    def choose(
        self, hidden: Tensor, logits: Tensor, anchors: Tensor, draw: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """The likeliest path, or what `draw` makes of the candidates beside it, int64 [n, size - 1]."""
        if draw is None:
            return self.select(hidden, logits, anchors, 1)[0][:, :, 0]
        tokens, log_probs = self.select(hidden, logits, anchors, self.config.most_candidates)
        width = self.proposals.size or logits.shape[-1]
        return draw(log_probs.new_full((*logits.shape[:-1], width), -math.inf).scatter_(-1, tokens, log_probs))

    def branch(self, hidden: Tensor, logits: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates beside the likeliest path, with their log-probabilities."""
        return self.select(hidden, logits, anchors, self.branches)

    def select(self, hidden: Tensor, logits: Tensor, anchors: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """What `Selector` picks: tokens int64 and log-probabilities float32 [n, size - 1, k]."""
        if k > self.selector.top_k:
            raise InvalidArgument(f"k: got {k}, expected at most {self.selector.top_k}, the drafter's selector_top_k")
        return self.selector(hidden, logits, anchors, k, self.proposals)


class DFlash2Draft(DFlashDraft):
    """A DFlash 2 drafter; see `DFlashDraft`."""

    config_type = DFlash2Config
    layer_type = DFlash2Layer
    runtime_type = DFlash2Runtime

    def __init__(self, config: DFlash2Config):
        super().__init__(config)
        self.candidate_selector = Selector(config)
