"""The DFlash drafter: KV injection, block proposal, and the packed training pass.

    target features  h_k[p], k in target_layer_ids        [M, K*H]
         | fc, hidden_norm                                 once per committed token
         v
    x[p] --> per layer: K = RoPE_p(k_norm(Wk x)), V = Wv x   written to the paged cache, never rewritten

    [anchor, MASK x (B-1)] at positions L..L+B-1
         | per layer: RMSNorm, attention over context 0..L-1 and the block itself, SwiGLU
         v
    norm, the target's lm_head on rows 1..B-1: row i predicts position L+i itself

Source: DFlash, arXiv 2602.06036, section 4. Block keys and values are scratch: only committed context is ever
cached, so a rejected draft leaves nothing to undo here.

DFlash 2 adds two things, both of the block alone. Attention and MLP are wrapped in a convolution over the tokens before (`BlockConv`),
and what a position proposes depends on what was chosen before it (`Selector`):

    likeliest K of every row  -->  left to right:  score(c) = logit[c] + <A[last] * (W h), B[c]>, the best is next
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _core, cuda
from ..attention import HostAttention, kernel_serves, step_attention
from ..config import BRANCHES
from ..errors import InvalidArgument
from .batch import StepBatch
from .fused import FusedLayer, HostRun, PackedLinear, RotaryTable, addresses, rotate_rows

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class DraftConfig:
    """Shape and behaviour of a DFlash drafter, as validated by `loader.read_draft_config`.

    `target_layer_ids[i] = k` taps the output of target layer k. `block_size` counts the anchor. `layer_causal` and
    `layer_window` have one entry per drafter layer; a window of None is unbounded. The last four are of DFlash 2, and 0 in a DFlash:
    tokens a convolution looks at (its own included), channels that share a dynamic kernel, width of the selector's codebooks,
    candidates per position.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    target_layer_ids: tuple[int, ...]
    mask_token_id: int
    num_target_layers: int
    block_size: int = 16
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    hidden_act: str = "silu"
    rope_parameters: dict = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    max_position_embeddings: int = 32768
    layer_causal: tuple[bool, ...] = ()
    layer_window: tuple[int | None, ...] = ()
    input_embedding_scale: float = 1.0
    output_multiplier: float = 1.0
    final_logit_softcapping: float | None = None
    conv_kernel_size: int = 0
    conv_group_size: int = 0
    selector_rank: int = 0
    selector_top_k: int = 0

    def __post_init__(self):
        if not self.layer_causal:
            object.__setattr__(self, "layer_causal", (False,) * self.num_hidden_layers)
        if not self.layer_window:
            object.__setattr__(self, "layer_window", (None,) * self.num_hidden_layers)

    @property
    def is_second(self) -> bool:
        """Whether this is a DFlash 2."""
        return self.selector_top_k > 0

    @property
    def feature_size(self) -> int:
        """Width of one token's concatenated taps, K*H."""
        return len(self.target_layer_ids) * self.hidden_size


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps) over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x.float(), (x.shape[-1],), None, self.eps)
        # The statistics stay float32 under autocast; the scale is applied in the wider of the two types.
        return self.weight * (y if x.dtype == torch.float32 else y.to(x.dtype))


class DraftAttention(nn.Module):
    """Projections of one drafter layer; q/k carry a per-head RMSNorm."""

    def __init__(self, c: DraftConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, self.heads * self.head_dim, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * self.head_dim, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * self.head_dim, bias=c.attention_bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, c.hidden_size, bias=c.attention_bias)
        self.q_norm = RMSNorm(self.head_dim, c.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, c.rms_norm_eps)

    def query(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[..., H] -> [..., heads, head_dim], normalised and rotated; cos/sin broadcast over heads."""
        return rotate(self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))), cos, sin)

    def key_value(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """[..., H] -> keys (normalised, rotated) and values, each [..., kv_heads, head_dim]."""
        k = rotate(self.k_norm(self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))), cos, sin)
        return k, self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))


class DraftMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, c: DraftConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class BlockConv(nn.Module):
    """A sublayer's two convolutions in DFlash 2, of what goes in and of what comes out, over the tokens of a block.

    ``y[n] = sum over t of (base[side, t] + delta[n, side, t]) * x[n - t]``, nothing before the block; every channel has a `base` of its own,
    groups of channels share a `delta`, which is a projection of what goes in.
    """

    def __init__(self, c: DraftConfig):
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
    """What a position of a DFlash 2 proposes, given what was chosen for the one before it."""

    def __init__(self, c: DraftConfig):
        super().__init__()
        self.top_k = c.selector_top_k
        self.predecessor_codebook = nn.Parameter(torch.zeros(c.vocab_size, c.selector_rank))
        self.successor_codebook = nn.Parameter(torch.zeros(c.vocab_size, c.selector_rank))
        self.hidden_projection = nn.Linear(c.hidden_size, c.selector_rank, bias=False)

    def forward(self, hidden: Tensor, logits: Tensor, anchors: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Walks blocks greedily: hidden [n, B-1, H] and logits [n, B-1, V] of the drafted rows, anchors int64 [n]. Gives the k best
        candidates of every position, the chosen one first, int64 [n, B-1, k], and their log-probabilities float32, given the tokens
        chosen before; what is no candidate counts with its logit."""
        unary, tokens = logits.topk(self.top_k, dim=-1)
        everyone, top = logits.float().logsumexp(dim=-1), unary.float().logsumexp(dim=-1)
        others = everyone + torch.log1p(-(top - everyone).exp().clamp(max=1 - 1e-6))
        state, last = self.hidden_projection(hidden), anchors
        picked, scored = [], []
        for position in range(hidden.shape[1]):
            key = self.predecessor_codebook[last] * state[:, position]
            among = self.successor_codebook[tokens[:, position]]
            scores = (unary[:, position] + (among @ key[..., None])[..., 0]).float()
            best = scores.topk(k, dim=-1)
            chosen = tokens[:, position].gather(-1, best.indices)
            last = chosen[:, 0]
            picked.append(chosen)
            scored.append(best.values - torch.logaddexp(scores.logsumexp(dim=-1), others[:, position])[:, None])
        return torch.stack(picked, dim=1), torch.stack(scored, dim=1)


class DraftLayer(nn.Module):
    """One drafter layer; the residual stream belongs to the block, the context enters as keys and values only."""

    def __init__(self, c: DraftConfig):
        super().__init__()
        self.self_attn = DraftAttention(c)
        self.mlp = DraftMLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.attention_conv = BlockConv(c) if c.is_second else None
        self.mlp_conv = BlockConv(c) if c.is_second else None

    def open(self, hidden: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
        """What attention gets, and what `close` wants to have: hidden [..., T, H] of blocks of `size` tokens."""
        normed = self.input_layernorm(hidden)
        return (normed, None) if self.attention_conv is None else self.attention_conv.enter(normed, size)

    def close(self, hidden: Tensor, attended: Tensor, deltas: Tensor | None, size: int) -> Tensor:
        """Residual, RMSNorm, SwiGLU, residual. `attended` is [..., heads*head_dim]."""
        out = self.self_attn.o_proj(attended)
        hidden = hidden + (out if deltas is None else self.attention_conv.leave(out, deltas, size))
        inner = self.post_attention_layernorm(hidden)
        if self.mlp_conv is None:
            return hidden + self.mlp(inner)
        inner, deltas = self.mlp_conv.enter(inner, size)
        return hidden + self.mlp_conv.leave(self.mlp(inner), deltas, size)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split layout: x*cos + [-x2, x1]*sin (RoFormer, arXiv 2104.09864, as used by Qwen3)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def rope_frequencies(config: DraftConfig) -> tuple[Tensor, float]:
    """Inverse frequencies [head_dim/2] in float32, and the factor that multiplies cos and sin."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return 1.0 / (float(rope["rope_theta"]) ** exponent), 1.0
    # The scaled variants are the target library's: one definition serves target and drafter.
    from transformers import Qwen3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if kind not in ("linear", "llama3", "yarn"):
        raise InvalidArgument(f"rope_parameters.rope_type: got {kind!r}, expected default, linear, llama3 or yarn")
    stand_in = Qwen3Config(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=dict(rope),
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](stand_in, "cpu")
    return frequencies.float(), float(factor)


class DFlashDraft(nn.Module):
    """A DFlash drafter bound to a target's embedding and head.

    Parameter names are those of a DFlash checkpoint, so `state_dict()` is the file. The embedding and the head are the
    target's modules, held without being registered: they are neither trained nor saved here.
    """

    def __init__(self, config: DraftConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(DraftLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.fc = nn.Linear(config.feature_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.candidate_selector = Selector(config) if config.is_second else None
        # Not a buffer: `.to(bfloat16)` would round the frequencies.
        with torch.device("cpu"):
            self._inv_freq, self._rope_factor = rope_frequencies(config)
        self._bound: tuple[nn.Module, nn.Module] | None = None
        self._engine: _DraftEngine | None = None
        # Of the products of `draft` and `inject`, see `TargetModel`; read by `alloc_kv`.
        self.matmul_precision = "highest"

    # ---- the target's two modules ----------------------------------------------------------------------------

    def bind_target(self, embedding: nn.Module, lm_head: nn.Module) -> DFlashDraft:
        """Use the target's input embedding (its raw `weight` rows) and its output head."""
        rows, width = embedding.weight.shape
        if width != self.config.hidden_size:
            raise InvalidArgument(
                f"embedding: width {width}, expected the drafter's hidden_size {self.config.hidden_size}"
            )
        if not 0 <= self.config.mask_token_id < rows:
            raise InvalidArgument(f"mask_token_id: got {self.config.mask_token_id}, expected 0..{rows - 1}")
        self._bound = (embedding, lm_head)  # a tuple, so that nn.Module does not adopt them
        return self

    def _embed(self, tokens: Tensor) -> Tensor:
        if self._bound is None:
            raise InvalidArgument("drafter is not bound to a target: call bind_target(embedding, lm_head) first")
        # Raw rows: some targets scale inside the module's forward, and the drafter was trained without that.
        rows = F.embedding(tokens, self._bound[0].weight)
        return rows if self.config.input_embedding_scale == 1.0 else rows * self.config.input_embedding_scale

    # ---- shared pieces ---------------------------------------------------------------------------------------

    def _cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [*positions.shape, 1, head_dim]; computed in float32, then cast as the target library does."""
        with torch.autocast(positions.device.type, enabled=False):
            angle = positions[..., None, None].float() * self._inv_freq.to(positions.device)
            angle = torch.cat((angle, angle), dim=-1)
            return (angle.cos() * self._rope_factor).to(dtype), (angle.sin() * self._rope_factor).to(dtype)

    def project_features(self, features: Tensor) -> Tensor:
        """Concatenated taps [..., K*H] -> the context input shared by all layers [..., H]."""
        return self.hidden_norm(self.fc(features))

    # ---- generation ------------------------------------------------------------------------------------------

    def alloc_kv(self, num_slots: int) -> None:
        """Allocates zeroed context KV for `num_slots` tokens (the target's slot ids) and lays the weights out for decoding.

        Call it again after changing weights.
        """
        if num_slots < 1:
            raise InvalidArgument(f"num_slots: got {num_slots}, expected at least 1")
        if self._bound is None:
            raise InvalidArgument("drafter is not bound to a target: call bind_target(embedding, lm_head) first")
        with torch.inference_mode():
            self._engine = _DraftEngine(self, num_slots)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of context KV one token takes over all drafter layers."""
        c = self.config
        return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * self.fc.weight.dtype.itemsize

    def inject(self, features: Tensor, positions, slots, rows=None) -> None:
        """Writes the context K and V of M committed tokens.

        features [T, K*H] in `target_layer_ids` order; rows int64 [M]: whose features they are (0..T-1 when None); positions
        and slots int64 [M]; host arrays or tensors. Each token once, in any order; a slot may be written again when its page
        changed hands.
        """
        if self._engine is None:
            raise InvalidArgument("drafter has no cache: call alloc_kv(num_slots) first")
        with torch.inference_mode():
            self._engine.inject(features, positions, slots, rows)

    def propose(
        self,
        anchors,
        lengths,
        page_table,
        row_ids=None,
        *,
        page_size: int,
        valid_from=None,
        block_size: int | None = None,
    ) -> np.ndarray:
        """Drafts int64 [n, B-1]; see `draft`."""
        return self.draft(
            anchors, lengths, page_table, row_ids, page_size=page_size, valid_from=valid_from, block_size=block_size
        )[0]

    def draft(
        self,
        anchors,
        lengths,
        page_table,
        row_ids=None,
        *,
        page_size: int,
        valid_from=None,
        block_size: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Drafts int64 [n, B-1] and the drafter's own probability of each, float32 [n, B-1].

        Row i of request r is the token proposed for position lengths[r] + 1 + i.

        anchors int64 [n] (their KV does not exist yet), lengths int32 [n]: committed tokens, whose context K/V have been
        injected; page_table int32 [rows, pages] and row_ids int32 [n] (0..n-1 when None): each request's pages
        of `page_size` slots; valid_from int32 [n]: context before that position is not there and not seen. All host arrays. `block_size` counts
        the anchor and defaults to the checkpoint's. The mask token is never proposed. Greedy, and so independent of
        every random draw.
        """
        tokens, sure = self.candidates(
            anchors,
            lengths,
            page_table,
            row_ids,
            page_size=page_size,
            valid_from=valid_from,
            block_size=block_size,
            k=1,
        )
        return tokens[:, :, 0], sure[:, :, 0]

    def candidates(
        self,
        anchors,
        lengths,
        page_table,
        row_ids=None,
        *,
        page_size: int,
        valid_from=None,
        block_size: int | None = None,
        k: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k likeliest tokens int64 [n, B-1, k] of every position and their probabilities float32 [n, B-1, k], falling: what draft
        trees are made of (`k` of None: as many as they take). Of a DFlash 2 they are those that follow the likeliest path. The rest is as
        for `draft`."""
        if self._engine is None:
            raise InvalidArgument("drafter has no cache: call alloc_kv(num_slots) first")
        size = self.config.block_size if block_size is None else block_size
        if size < 2:
            raise InvalidArgument(f"block_size: got {size}, expected at least 2 (it counts the anchor)")
        with torch.inference_mode():
            k = self._engine.branches if k is None else k
            return self._engine.draft(anchors, lengths, page_table, row_ids, page_size, valid_from, size, k)

    # ---- training --------------------------------------------------------------------------------------------

    def training_hidden(self, feats: Tensor, tokens: Tensor, anchor_idx: Tensor, block_size: int) -> Tensor:
        """Hidden states of many blocks per sequence in one differentiable pass.

        feats [b, S, K*H] float: target features of every position. tokens [b, S] int64. anchor_idx [b, A] int64 in
        0..S-1: the index (= position) of each block's real anchor; any order, repeats allowed. Returns
        [b, A, B, H], normalised and ready for lm_head; row i of a block predicts the token at anchor + i.

        A query of block a sees the context strictly before anchor a and its own block, nothing else; the block part is
        bidirectional unless the layer is causal (section 4.2 of the paper). Blocks may reach past S: positions continue.
        Runs under autocast with float32 weights; softmax and norms stay float32.
        """
        batch, length, _ = feats.shape
        anchors = anchor_idx.shape[1]
        c = self.config
        device = feats.device
        offsets = torch.arange(block_size, device=device)
        block_positions = anchor_idx[..., None] + offsets  # [b, A, B]

        block_tokens = torch.full((batch, anchors, block_size), c.mask_token_id, dtype=torch.int64, device=device)
        block_tokens[..., 0] = tokens.gather(1, anchor_idx)
        hidden = self._embed(block_tokens).view(batch, anchors * block_size, c.hidden_size)
        context = self.project_features(feats)

        dtype = torch.promote_types(hidden.dtype, torch.float32)
        cos_block, sin_block = self._cos_sin(block_positions.view(batch, -1), dtype)
        cos_context, sin_context = self._cos_sin(torch.arange(length, device=device), dtype)

        for index, layer in enumerate(self.layers):
            attention = layer.self_attn
            normed, deltas = layer.open(hidden, block_size)
            q = attention.query(normed, cos_block, sin_block)
            k_block, v_block = attention.key_value(normed, cos_block, sin_block)
            k_context, v_context = attention.key_value(context, cos_context, sin_context)
            attended = self._packed_attention(index, q, k_context, v_context, k_block, v_block, anchor_idx, block_size)
            hidden = layer.close(hidden, attended, deltas, block_size)
        return self.norm(hidden).view(batch, anchors, block_size, c.hidden_size)

    def _packed_attention(self, index, q, k_context, v_context, k_block, v_block, anchor_idx, block_size) -> Tensor:
        """Attention of [b, A*B] queries over their context prefix and own block -> [b, A*B, heads*head_dim].

        Keys of other blocks are never scored: the context part is one [A*B, S] product and the block part A small
        [B, B] products, joined under one softmax. That is S + B columns per query instead of S + A*B.
        """
        c = self.config
        batch, length = k_context.shape[:2]
        anchors = anchor_idx.shape[1]
        kv, dim = c.num_key_value_heads, c.head_dim
        group = c.num_attention_heads // kv
        scale = dim**-0.5

        # [b, kv, A, B, g, d]: the query heads that share a key head become extra rows of the same product.
        q = (q * scale).view(batch, anchors, block_size, kv, group, dim).permute(0, 3, 1, 2, 4, 5)
        rows = anchors * block_size * group
        scores_context = q.reshape(batch, kv, rows, dim) @ k_context.permute(0, 2, 3, 1)
        blocks = (batch, anchors, block_size, kv, dim)
        k_own = k_block.view(blocks).permute(0, 3, 1, 4, 2)  # [b, kv, A, d, B]
        v_own = v_block.view(blocks).permute(0, 3, 1, 2, 4)  # [b, kv, A, B, d]
        scores_own = q.reshape(batch, kv, anchors, block_size * group, dim) @ k_own

        causal, window = c.layer_causal[index], c.layer_window[index]
        column = torch.arange(length, device=q.device)
        if window is None:
            hidden_context = (column >= anchor_idx[..., None]).view(batch, 1, anchors, 1, length)
        else:
            position = anchor_idx[..., None] + torch.arange(block_size, device=q.device)  # [b, A, B]
            hidden_context = (column >= anchor_idx[..., None, None]) | (position[..., None] - column >= window)
            hidden_context = hidden_context.repeat_interleave(group, dim=2).view(batch, 1, anchors, -1, length)
        scores_context = scores_context.view(batch, kv, anchors, block_size * group, length)
        scores_context = scores_context.masked_fill(hidden_context, -math.inf)
        visible_own = block_mask(block_size, causal, window, q.device)
        if visible_own is not None:
            scores_own = scores_own.masked_fill(~visible_own.repeat_interleave(group, dim=0), -math.inf)

        weights = torch.cat((scores_context, scores_own), dim=-1).softmax(dim=-1, dtype=torch.float32)
        w_context, w_own = weights.to(v_context.dtype).split((length, block_size), dim=-1)
        own = w_own @ v_own  # [b, kv, A, B*g, d]
        out = w_context.reshape(batch, kv, rows, length) @ v_context.permute(0, 2, 1, 3)
        out = out.view(own.shape) + own
        out = out.view(batch, kv, anchors, block_size, group, dim).permute(0, 2, 3, 1, 4, 5)
        return out.reshape(batch, anchors * block_size, kv * group * dim)


class _ConvLayer(FusedLayer):
    """A layer of a DFlash 2: the same with its two convolutions, over blocks of `size` tokens."""

    def __init__(self, layer: DraftLayer, **options):
        super().__init__(layer, **options)
        self._attention_conv, self._mlp_conv = layer.attention_conv, layer.mlp_conv

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, attention, k_cache: Tensor, v_cache: Tensor, size: int):
        normed, deltas = self._attention_conv.enter(torch.rms_norm(x, self.hidden, self.norm1, self.eps), size)
        attended = self.attend(normed, cos, sin, attention, k_cache, v_cache)
        x = x + self._attention_conv.leave(self.out(attended), deltas, size)
        inner, deltas = self._mlp_conv.enter(torch.rms_norm(x, self.hidden, self.norm2, self.eps), size)
        return x + self._mlp_conv.leave(self.down(self.swiglu(self.gate_up(inner))), deltas, size)


class _DraftEngine:
    """Weights laid out for decoding, and the paged context cache."""

    def __init__(self, draft: DFlashDraft, num_slots: int):
        c = self.config = draft.config
        self.num_slots = num_slots
        embedding, lm_head = draft._bound
        weight = draft.fc.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.kernel = kernel_serves(self.device, self.dtype, c.head_dim, c.head_dim)
        self.embedding = embedding.weight.detach()
        self.eps, self.hidden = c.rms_norm_eps, (c.hidden_size,)
        self.context_norm, self.norm = draft.hidden_norm.weight.detach(), draft.norm.weight.detach()
        precision = draft.matmul_precision
        self.fc = PackedLinear([draft.fc], precision=precision)
        # Every layer reads the same context input, so all K and V come from one product.
        self.context_kv = PackedLinear(
            [proj for layer in draft.layers for proj in (layer.self_attn.k_proj, layer.self_attn.v_proj)],
            share=False,
            precision=precision,
        )
        self.k_norm = torch.stack([layer.self_attn.k_norm.weight.detach() for layer in draft.layers])[
            :, None
        ].contiguous()
        self.selector = draft.candidate_selector
        # Candidates per position that trees are made of.
        self.branches = min(BRANCHES, c.selector_top_k or c.vocab_size - 1)
        self.layers = [
            (_ConvLayer if c.is_second else FusedLayer)(
                layer,
                head_dim=c.head_dim,
                eps=self.eps,
                scale=c.head_dim**-0.5,
                window=window,
                causal=causal,
                precision=precision,
            )
            for layer, window, causal in zip(draft.layers, c.layer_window, c.layer_causal, strict=True)
        ]
        self.head = lm_head
        if type(lm_head) is nn.Linear:
            self.head = PackedLinear([lm_head], share=False, precision=precision)
        self.rotary = RotaryTable(lambda p: tuple(x.squeeze(-2) for x in draft._cos_sin(p, self.dtype)))
        shape = (num_slots, c.num_key_value_heads, c.head_dim)
        self.caches = [
            tuple(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in "kv")
            for _ in range(c.num_hidden_layers)
        ]
        self.injection = None
        if self.kernel and cuda.available(self.device):
            # A position is below the number of slots: every token of a request has one.
            positions = torch.arange(num_slots, device=self.device)
            cos, sin = (x.squeeze(-2)[:, : c.head_dim // 2] for x in draft._cos_sin(positions, torch.float32))
            keys, values = zip(*self.caches, strict=True)
            self.injection = cuda.KvCaches(keys, values), torch.cat((cos, sin), dim=-1).contiguous()
        plain = c.input_embedding_scale == 1.0 and c.output_multiplier == 1.0 and c.final_logit_softcapping is None
        plain = plain and not c.is_second
        self.run = self.injector = None
        if plain:
            self.run = HostRun.build(
                self.layers,
                self.norm,
                self.head,
                self.embedding,
                self.rotary,
                host_kernel=self.kernel and self.device.type == "cpu",
            )
        if self.run is not None:
            self.injector = _core.HostInjector(
                fc=self.fc.host,
                norm=self.context_norm.numpy(),
                key_values=self.context_kv.host,
                key_norms=[layer.self_attn.k_norm.weight.detach().numpy() for layer in draft.layers],
                kv_heads=c.num_key_value_heads,
                head_dim=c.head_dim,
                eps=self.eps,
            )

    def inject(self, features: Tensor, positions, slots, rows) -> None:
        c = self.config
        if features.ndim != 2 or features.shape[1] != c.feature_size:
            raise InvalidArgument(f"features: got shape {list(features.shape)}, expected [T, {c.feature_size}]")
        count = features.shape[0] if rows is None else rows.shape[0]
        if positions.shape != (count,) or slots.shape != (count,):
            raise InvalidArgument(
                f"positions, slots: got shapes {list(positions.shape)}, {list(slots.shape)}, expected [{count}] (features)"
            )
        if count == 0:
            return
        if self.injector is not None and features.dtype == torch.float32 and features.stride(1) == 1:
            rows = np.arange(count) if rows is None else np.asarray(rows)
            self.injector.inject(
                (features.data_ptr(), features.stride(0), c.feature_size), features.shape[0], rows, np.asarray(positions),
                np.asarray(slots), self.rotary.address(int(positions.max()) + 1), addresses(self.caches), self.num_slots,
                torch.get_num_threads(),
            )  # fmt: skip
            return
        positions, slots, rows = (self._tensor(x) for x in (positions, slots, rows))
        kv = self.context(features if rows is None else features[rows])
        if self.injection is not None:
            self.store(kv, positions, slots)
            return
        keys = torch.rms_norm(kv[:, :, 0], (c.head_dim,), None, self.eps).mul_(self.k_norm)
        cos, sin = self.rotary.lookup(positions, int(positions.max()) + 1)
        keys = rotate_rows(keys, cos[:, None], sin[:, None])
        for index, (k_cache, v_cache) in enumerate(self.caches):
            k_cache.index_copy_(0, slots, keys[:, index])
            v_cache.index_copy_(0, slots, kv[:, index, 1])

    def context(self, features: Tensor) -> Tensor:
        """Taps [M, K*H] -> K and V of all layers as the projections give them, [M, layers, 2, kv_heads, head_dim]."""
        c = self.config
        x = torch.rms_norm(self.fc(features.to(self.dtype)), self.hidden, self.context_norm, self.eps)
        return self.context_kv(x).view(-1, c.num_hidden_layers, 2, c.num_key_value_heads, c.head_dim)

    def store(self, kv: Tensor, positions: Tensor, slots: Tensor, rows: Tensor | None = None) -> None:
        """Normalises, rotates and stores what `context` gave, by the CUDA kernel; see `cuda.kv_inject`."""
        caches, cos_sin = self.injection
        norms = self.k_norm.view(-1, self.config.head_dim)
        cuda.kv_inject(kv, norms, cos_sin, positions, slots, caches, eps=self.eps, rows=rows)

    def _tensor(self, values) -> Tensor | None:
        if values is None or isinstance(values, Tensor):
            return values
        return torch.from_numpy(np.array(values, dtype=np.int64)).to(self.device)

    def draft(self, anchors, lengths, page_table, row_ids, page_size: int, valid_from, size: int, k: int):
        c = self.config
        lengths = np.asarray(lengths, dtype=np.int32)
        n = lengths.size
        tokens = np.full((n, size), c.mask_token_id, dtype=np.int64)
        tokens[:, 0] = np.asarray(anchors)
        bad = tokens[:, 0][(tokens[:, 0] < 0) | (tokens[:, 0] >= self.embedding.shape[0])]
        if bad.size:
            raise InvalidArgument(f"anchors: got {int(bad[0])}, expected 0..{self.embedding.shape[0] - 1}")
        if n == 0:
            return np.empty((0, size - 1, k), dtype=np.int64), np.empty((0, size - 1, k), dtype=np.float32)
        positions = (lengths[:, None] + np.arange(size)).astype(np.int64).reshape(-1)
        limit = int(lengths.max()) + size
        starts = np.arange(n + 1, dtype=np.int32) * size
        row_ids = np.arange(n, dtype=np.int32) if row_ids is None else np.asarray(row_ids, dtype=np.int32)
        page_table = np.asarray(page_table, dtype=np.int32)
        valid_from = None if valid_from is None else np.asarray(valid_from, dtype=np.int32)
        if self.run is not None:
            attention = HostAttention(
                slots=None, num_slots=self.num_slots, threads=torch.get_num_threads(), query_starts=starts, context_lens=lengths,
                page_table=page_table, row_ids=row_ids, page_size=page_size, valid_from=valid_from, ancestors=None,
            )  # fmt: skip
            never = c.mask_token_id if c.mask_token_id < self.head.outputs else None
            return self.run.draft(positions, tokens.reshape(-1), limit, attention, self.caches, size, never, k)
        batch = StepBatch.from_arrays(
            token_ids=tokens.reshape(-1),
            positions=positions,
            slots=np.zeros(n * size, dtype=np.int64),  # not written: the block's keys and values are scratch
            query_starts=starts,
            context_lens=lengths,
            page_table=page_table,
            row_ids=row_ids,
            logit_rows=np.empty(0, dtype=np.int64),
            page_size=page_size,
            device=self.device,
        )
        attention = step_attention(
            batch, num_slots=self.num_slots, write=False, kernel=self.kernel, valid_from=valid_from
        )
        hidden, logits = self.block(batch.token_ids, batch.positions, limit, attention, size)
        if self.selector is not None:
            likely, sure = self.select(hidden, logits, batch.token_ids[::size], k)
            return likely.cpu().numpy(), sure.exp().cpu().numpy()
        # The first of equals, which topk does not promise.
        likely = logits.argmax(dim=-1, keepdim=True) if k == 1 else logits.topk(k, dim=-1).indices
        sure = logits.float().softmax(dim=-1).gather(-1, likely)
        return likely.cpu().numpy(), sure.cpu().numpy()

    def select(self, hidden: Tensor, logits: Tensor, anchors: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Of a DFlash 2, what `Selector` picks: tokens int64 and log-probabilities float32 [n, size - 1, k]."""
        if k > self.selector.top_k:
            raise InvalidArgument(f"k: got {k}, expected at most {self.selector.top_k}, the drafter's selector_top_k")
        return self.selector(hidden, logits, anchors, k)

    def block(self, token_ids: Tensor, positions: Tensor, limit: int, attention, size: int) -> tuple[Tensor, Tensor]:
        """Of what follows the anchors of n blocks, normalised hidden states [n, size - 1, H] and logits [n, size - 1, V]; token_ids and
        positions int64 [n * size], below `limit`."""
        c = self.config
        cos, sin = self.rotary.lookup(positions, limit)
        x = F.embedding(token_ids, self.embedding)
        if c.input_embedding_scale != 1.0:
            x = x * c.input_embedding_scale
        for layer, caches in zip(self.layers, self.caches, strict=True):
            x = layer(x, cos, sin, attention, *caches, *((size,) if c.is_second else ()))
        rows = x.view(-1, size, x.shape[-1])[:, 1:].reshape(-1, x.shape[-1])
        hidden = torch.rms_norm(rows, self.hidden, self.norm, self.eps)
        logits = self.head(hidden)
        if c.output_multiplier != 1.0:
            logits = logits * c.output_multiplier
        if c.final_logit_softcapping is not None:
            logits = torch.tanh(logits / c.final_logit_softcapping) * c.final_logit_softcapping
        if c.mask_token_id < logits.shape[-1]:
            logits[:, c.mask_token_id].fill_(-math.inf)
        return hidden.view(-1, size - 1, hidden.shape[-1]), logits.view(-1, size - 1, logits.shape[-1])


def block_mask(block_size: int, causal: bool, window: int | None, device) -> Tensor | None:
    """Which block keys a block query sees, bool [B, B]; None when it sees all of them.

    A causal layer looks back only; a window covers positions with distance < window, on both sides when the layer is
    not causal.
    """
    if not causal and window is None:
        return None
    distance = torch.arange(block_size, device=device)[:, None] - torch.arange(block_size, device=device)[None, :]
    visible = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        visible &= distance >= 0
    if window is not None:
        visible &= distance < window
        if not causal:
            visible &= -distance < window
    return visible
