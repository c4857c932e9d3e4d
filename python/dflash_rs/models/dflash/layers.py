"""The parts of a DFlash drafter, with the parameter names of its checkpoints."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InvalidArgument


class LayerConfig(Protocol):
    """What a layer has to know of a drafter's configuration, a `DraftConfig` or another."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def attention_bias(self) -> bool: ...
    @property
    def qk_norm(self) -> bool: ...
    @property
    def rope_parameters(self) -> dict: ...
    @property
    def max_position_embeddings(self) -> int: ...


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
    """Projections of one drafter layer; q/k carry a per-head RMSNorm where the configuration has one (`qk_norm`)."""

    def __init__(self, c: LayerConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, self.heads * self.head_dim, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * self.head_dim, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * self.head_dim, bias=c.attention_bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, c.hidden_size, bias=c.attention_bias)
        self.q_norm = RMSNorm(self.head_dim, c.rms_norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, c.rms_norm_eps) if c.qk_norm else None

    def query(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[..., H] -> [..., heads, head_dim], normalised and rotated; cos/sin broadcast over heads."""
        q = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))
        return rotate(q if self.q_norm is None else self.q_norm(q), cos, sin)

    def key_value(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """[..., H] -> keys (normalised, rotated) and values, each [..., kv_heads, head_dim]."""
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        k = rotate(k if self.k_norm is None else self.k_norm(k), cos, sin)
        return k, self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))


class DraftMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, c: LayerConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DraftLayer(nn.Module):
    """One drafter layer; the residual stream belongs to the block, the context enters as keys and values only."""

    def __init__(self, c: LayerConfig):
        super().__init__()
        self.self_attn = DraftAttention(c)
        self.mlp = DraftMLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def open(self, hidden: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
        """What attention gets of hidden [..., T, H], blocks of `size` tokens, and what `close` wants to have kept (None: nothing)."""
        return self.input_layernorm(hidden), None

    def close(self, hidden: Tensor, attended: Tensor, kept: Tensor | None, size: int) -> Tensor:
        """Residual, RMSNorm, SwiGLU, residual. `attended` is [..., heads*head_dim]."""
        hidden = hidden + self.self_attn.o_proj(attended)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split layout: x*cos + [-x2, x1]*sin (RoFormer, arXiv 2104.09864, as used by Qwen3)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def rope_frequencies(config: LayerConfig) -> tuple[Tensor, float]:
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
