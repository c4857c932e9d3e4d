"""Mamba 2 (arXiv 2405.21060), as Bamba, Granite 4, Nemotron-H and Falcon-H1 have it.

One head, state S [P, N], per token:

    S = S * exp(dt * A) + (dt * x) B^T      out = S C + D x      dt = softplus(dt + dt_bias), within limits

x, B and C are SiLU of a depthwise convolution; B and C are shared by the heads of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UnsupportedModel
from .mixer import Mixer


class Mamba2(Mixer):
    """One layer. State: S float32 [H, P, N] and the convolution's last inputs [taps - 1, C], C = H P + 2 G N; a token feeds in [C] and dt [H]."""

    # Float32 until the norm, as the chunks of transformers have it.
    gives_dtype = torch.float32

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.heads, self.dim, self.groups = module.num_heads, module.head_dim, module.n_groups
        self.size = module.ssm_state_size
        if module.activation not in ("silu", "swish"):
            raise UnsupportedModel(f"{type(module).__name__}: activation: got {module.activation!r}, expected 'silu'")
        weight = module.conv1d.weight.detach()
        channels, _, self.taps = weight.shape
        self.weight = weight[:, 0].t().float().contiguous()
        self.bias = None if module.conv1d.bias is None else module.conv1d.bias.detach().float()
        self.rate, self.skip = -module.A_log.detach().float().exp(), module.D.detach()
        self.dt_bias, self.limits = module.dt_bias.detach(), tuple(module.time_step_limit)
        self.pieces = (
            ((self.heads, self.dim, self.size), torch.float32),
            ((self.taps - 1, channels), weight.dtype),
        )
        self.fed = (((channels,), weight.dtype), ((self.heads,), weight.dtype))
        self.gives = (self.heads, self.dim)
        self.inner = self.heads * self.dim

    def feed(self, hidden: Tensor) -> tuple[list[Tensor], Any]:
        module = self.module
        if (before := getattr(module, "ssm_in_multiplier", None)) is not None:
            hidden = hidden * before
        projected = module.in_proj(hidden)
        if (after := getattr(module, "mup_vector", None)) is not None:
            projected = projected * after.view(-1)
        gate, mixed, dt = projected.split([self.inner, self.pieces[1][0][1], self.heads], dim=-1)
        return [mixed.contiguous(), dt.contiguous()], gate

    def advance(self, state: Sequence[Tensor], fed: Sequence[Tensor]) -> Tensor:
        memory, window = state
        mixed, steps = fed
        count, shared = mixed.shape[0], self.groups * self.size
        inputs = torch.cat((window, mixed))
        out = mixed.new_empty(count, self.heads, self.dim, dtype=self.gives_dtype)
        # A token at a time and in operations whose shapes do not hang on how many there are: that is what makes its bits its own.
        for t in range(count):
            taps = inputs[t : t + self.taps].float() * self.weight
            summed = taps[0]
            for j in range(1, self.taps):
                summed = summed + taps[j]
            if self.bias is not None:
                summed = summed + self.bias
            made = F.silu(summed.to(mixed.dtype)).float()
            x = made[: self.inner].view(self.heads, self.dim)
            b, c = (
                part.view(self.groups, self.size).repeat_interleave(self.heads // self.groups, dim=0)
                for part in (made[self.inner : self.inner + shared], made[self.inner + shared :])
            )
            dt = F.softplus(steps[t] + self.dt_bias.to(steps.dtype)).clamp(*self.limits).float()
            memory *= (self.rate * dt).exp()[:, None, None]
            memory += (x * dt[:, None])[:, :, None] * b[:, None, :]
            out[t] = (memory * c[:, None, :]).sum(2) + self.skip[:, None] * x
        window.copy_(inputs[count:])
        return out

    def finish(self, out: Tensor, rest: Any) -> Tensor:
        module, out = self.module, out.reshape(out.shape[0], -1)
        out = module.norm(out, rest) if getattr(module, "mamba_rms_norm", True) else out * F.silu(rest)
        return module.out_proj(out.to(rest.dtype))
