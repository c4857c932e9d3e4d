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
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InvalidArgument

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class DraftConfig:
    """Shape and behaviour of a DFlash drafter, as validated by `loader.read_draft_config`.

    `target_layer_ids[i] = k` taps the output of target layer k. `block_size` counts the anchor. `layer_causal` and
    `layer_window` have one entry per drafter layer; a window of None is unbounded.
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

    def __post_init__(self):
        if not self.layer_causal:
            object.__setattr__(self, "layer_causal", (False,) * self.num_hidden_layers)
        if not self.layer_window:
            object.__setattr__(self, "layer_window", (None,) * self.num_hidden_layers)

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


class DraftLayer(nn.Module):
    """One drafter layer; the residual stream belongs to the block, the context enters as keys and values only."""

    def __init__(self, c: DraftConfig):
        super().__init__()
        self.self_attn = DraftAttention(c)
        self.mlp = DraftMLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def close(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Residual, RMSNorm, SwiGLU, residual. `attended` is [..., heads*head_dim]."""
        hidden = hidden + self.self_attn.o_proj(attended)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


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
        frequencies, self._rope_factor = rope_frequencies(config)
        self.register_buffer("_inv_freq", frequencies, persistent=False)
        self._bound: tuple[nn.Module, nn.Module] | None = None

    # ---- the target's two modules ----------------------------------------------------------------------------

    def bind_target(self, embedding: nn.Module, lm_head: nn.Module) -> DFlashDraft:
        """Use the target's input embedding (its raw `weight` rows) and its output head."""
        rows, width = embedding.weight.shape
        if width != self.config.hidden_size:
            raise InvalidArgument(f"embedding: width {width}, expected the drafter's hidden_size {self.config.hidden_size}")
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
            angle = positions[..., None, None].float() * self._inv_freq
            angle = torch.cat((angle, angle), dim=-1)
            return (angle.cos() * self._rope_factor).to(dtype), (angle.sin() * self._rope_factor).to(dtype)

    def project_features(self, features: Tensor) -> Tensor:
        """Concatenated taps [..., K*H] -> the context input shared by all layers [..., H]."""
        return self.hidden_norm(self.fc(features))

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
            normed = layer.input_layernorm(hidden)
            q = attention.query(normed, cos_block, sin_block)
            k_block, v_block = attention.key_value(normed, cos_block, sin_block)
            k_context, v_context = attention.key_value(context, cos_context, sin_context)
            attended = self._packed_attention(index, q, k_context, v_context, k_block, v_block, anchor_idx, block_size)
            hidden = layer.close(hidden, attended)
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
