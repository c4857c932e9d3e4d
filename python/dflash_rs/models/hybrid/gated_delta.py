"""The gated delta rule behind a short causal convolution: Gated DeltaNet (arXiv 2412.06464), as Qwen3-Next and Qwen3.5 have it.

One head, state S [dk, dv], per token, q and k of unit length and q divided by sqrt(dk):

    S *= exp(g)    delta = (v - S^T k) * beta    S += k delta^T    out = S^T q
    g = -exp(A_log) * softplus(a + dt_bias)      beta = sigmoid(b)

Query, key and value are SiLU of a depthwise convolution over the last taps of what the layer projects; each key head serves
value heads side by side. A token feeds in that projection, a and b; query, key and value are made of them anew when it is folded in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UnsupportedModel
from .mixer import Mixer

_NORM_EPS = 1e-6


class GatedDelta(Mixer):
    """One layer. State: S float32 [Hv, dk, dv] and the convolution's last inputs [taps - 1, C]; a token feeds in [C] and gates [2, Hv], b and
    then a; C = 2 Hk dk + Hv dv."""

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.key_heads, self.value_heads = module.num_k_heads, module.num_v_heads
        self.key_dim, self.value_dim = module.head_k_dim, module.head_v_dim
        if module.activation not in ("silu", "swish"):
            raise UnsupportedModel(f"{type(module).__name__}: activation: got {module.activation!r}, expected 'silu'")
        if module.conv1d.bias is not None:
            raise UnsupportedModel(f"{type(module).__name__}: conv1d: got a bias, expected none")
        weight = module.conv1d.weight.detach()
        self.channels, _, self.taps = weight.shape
        self.weight = weight[:, 0].t().float().contiguous()
        self.decay, self.dt_bias = -module.A_log.detach().float().exp(), module.dt_bias.detach().float()
        self.pieces = (
            ((self.value_heads, self.key_dim, self.value_dim), torch.float32),
            ((self.taps - 1, self.channels), weight.dtype),
        )
        self.fed = (((self.channels,), weight.dtype), ((2, self.value_heads), weight.dtype))
        self.gives = (self.value_heads, self.value_dim)
        self._split = hasattr(module, "in_proj_qkv")

    def feed(self, hidden: Tensor) -> tuple[list[Tensor], Any]:
        module = self.module
        if self._split:
            mixed, z = module.in_proj_qkv(hidden), module.in_proj_z(hidden)
            b, a = module.in_proj_b(hidden), module.in_proj_a(hidden)
        else:
            parts = module.fix_query_key_value_ordering(
                module.in_proj_qkvz(hidden)[None], module.in_proj_ba(hidden)[None]
            )
            query, key, value, z, b, a = (part[0] for part in parts)
            mixed = torch.cat([part.flatten(1) for part in (query, key, value)], dim=-1)
        return [mixed.contiguous(), torch.stack((b, a), dim=1)], z

    def finish(self, out: Tensor, rest: Any) -> Tensor:
        tokens = out.shape[0]
        normed = self.module.norm(out.reshape(-1, self.value_dim), rest.reshape(-1, self.value_dim))
        return self.module.out_proj(normed.reshape(tokens, -1))

    def advance(self, state: Sequence[Tensor], fed: Sequence[Tensor]) -> Tensor:
        memory, window = state
        mixed, gates = fed
        count, heads, group = mixed.shape[0], self.value_heads, self.value_heads // self.key_heads
        inputs = torch.cat((window, mixed))
        out = mixed.new_empty(count, heads, self.value_dim)
        width = self.key_heads * self.key_dim
        # A token at a time and in operations whose shapes do not hang on how many there are: that is what makes its bits its own.
        for t in range(count):
            taps = inputs[t : t + self.taps].float() * self.weight
            summed = taps[0]
            for j in range(1, self.taps):
                summed = summed + taps[j]
            made = F.silu(summed.to(mixed.dtype)).float()
            query = self._unit(made[:width]) * self.key_dim**-0.5
            key = self._unit(made[width : 2 * width])
            if group > 1:
                query, key = query.repeat_interleave(group, dim=0), key.repeat_interleave(group, dim=0)
            value = made[2 * width :].view(heads, self.value_dim)
            beta = gates[t, 0].sigmoid().float()[:, None]
            decay = (self.decay * F.softplus(gates[t, 1].float() + self.dt_bias)).exp()
            memory *= decay[:, None, None]
            delta = (value - (memory * key[:, :, None]).sum(1)) * beta
            memory += key[:, :, None] * delta[:, None, :]
            out[t] = (memory * query[:, :, None]).sum(1)
        window.copy_(inputs[count:])
        return out

    def _unit(self, rows: Tensor) -> Tensor:
        rows = rows.view(self.key_heads, self.key_dim)
        return rows * torch.rsqrt((rows * rows).sum(-1, keepdim=True) + _NORM_EPS)
