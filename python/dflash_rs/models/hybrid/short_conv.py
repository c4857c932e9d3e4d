"""Short gated convolutions, as LFM2 has them: the state is the last inputs, nothing decays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .mixer import Mixer


class ShortConv(Mixer):
    """One layer: ``out = C * conv(B * x)``. State: the convolution's last inputs [taps - 1, H]; a token feeds in B * x [H]."""

    def __init__(self, module: nn.Module):
        super().__init__(module)
        weight = module.conv.weight.detach()
        channels, _, self.taps = weight.shape
        self.weight = weight[:, 0].t().float().contiguous()
        self.bias = None if module.conv.bias is None else module.conv.bias.detach().float()
        self.pieces = (((self.taps - 1, channels), weight.dtype),)
        self.fed, self.gives = (((channels,), weight.dtype),), (channels,)

    def feed(self, hidden: Tensor) -> tuple[list[Tensor], Any]:
        b, c, x = self.module.in_proj(hidden).chunk(3, dim=-1)
        return [b * x], c

    def advance(self, state: Sequence[Tensor], fed: Sequence[Tensor]) -> Tensor:
        count = fed[0].shape[0]
        inputs = torch.cat((state[0], fed[0]))
        # Products and sums of single elements are the same bits in any shape.
        summed = inputs[:count].float() * self.weight[0]
        for j in range(1, self.taps):
            summed = summed + inputs[j : j + count].float() * self.weight[j]
        if self.bias is not None:
            summed = summed + self.bias
        state[0].copy_(inputs[count:])
        return summed.to(fed[0].dtype)

    def finish(self, out: Tensor, rest: Any) -> Tensor:
        return self.module.out_proj(rest * out)
