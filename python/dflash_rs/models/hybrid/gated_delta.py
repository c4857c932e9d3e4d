"""The delta rule behind a short causal convolution: Gated DeltaNet (arXiv 2412.06464), as Qwen3-Next, Qwen3.5 and Olmo Hybrid have it, and
Kimi Delta Attention (arXiv 2510.26692), whose gate is one for each row of a state.

One head, state S [dk, dv], per token, q and k of unit length and q divided by sqrt(dk):

    S *= exp(g)    delta = (v - S^T k) * beta    S += k delta^T    out = S^T q
    g = -exp(A_log) * softplus(a + dt_bias)      beta = sigmoid(b)

Query, key and value are SiLU of a depthwise convolution over the last taps of what the layer projects; each key head serves
value heads side by side. A token feeds in that projection and what its gates are made of; query, key and value are made of them anew when it is folded in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import _core, threads
from ...errors import UnsupportedModel
from ...recurrent import DELTA_KEY_DIMS, DELTA_MAX_TAPS, DeltaWeights
from .mixer import Mixer, Room, Span

_NORM_EPS = 1e-6
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class _Delta(Mixer):
    """What they share. State: S float32 [Hv, dk, dv] and the convolution's last inputs [taps - 1, C], C = 2 Hk dk + Hv dv."""

    def __init__(self, module: nn.Module, key_heads: int, value_heads: int, key_dim: int, value_dim: int):
        super().__init__(module)
        self.key_heads, self.value_heads = key_heads, value_heads
        self.key_dim, self.value_dim = key_dim, value_dim
        if module.activation not in ("silu", "swish"):
            raise UnsupportedModel(f"{type(module).__name__}: activation: got {module.activation!r}, expected 'silu'")
        if module.conv1d.bias is not None:
            raise UnsupportedModel(f"{type(module).__name__}: conv1d: got a bias, expected none")
        weight = module.conv1d.weight.detach()
        self.channels, _, self.taps = weight.shape
        self.weight, self.dtype = weight[:, 0].t().float().contiguous(), weight.dtype
        self.pieces = (
            ((value_heads, key_dim, value_dim), torch.float32),
            ((self.taps - 1, self.channels), weight.dtype),
        )
        self.gives = (value_heads, value_dim)

    def rates(self, fed: Sequence[Tensor], t: int) -> tuple[Tensor, Tensor]:
        """Decay [Hv, dk or 1, 1] and beta [Hv, 1] of token t."""
        raise NotImplementedError

    def advance(self, state: Sequence[Tensor], fed: Sequence[Tensor]) -> Tensor:
        memory, window = state
        mixed = fed[0]
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
            decay, beta = self.rates(fed, t)
            memory *= decay
            delta = (value - (memory * key[:, :, None]).sum(1)) * beta
            memory += key[:, :, None] * delta[:, None, :]
            out[t] = (memory * query[:, :, None]).sum(1)
        window.copy_(inputs[count:])
        return out

    def _unit(self, rows: Tensor) -> Tensor:
        rows = rows.view(self.key_heads, self.key_dim)
        return rows * torch.rsqrt((rows * rows).sum(-1, keepdim=True) + _NORM_EPS)


class GatedDelta(_Delta):
    """Gated DeltaNet of Qwen. A token feeds in [C] and gates [2, Hv], b and then a.

    On a CPU the extension runs whole passes (`host`); setting that to None selects torch, which takes token after token.
    """

    beta_scale = 1.0

    def __init__(self, module: nn.Module):
        super().__init__(module, module.num_k_heads, module.num_v_heads, module.head_k_dim, module.head_v_dim)
        self.decay, self.dt_bias = -module.A_log.detach().float().exp(), module.dt_bias.detach().float()
        self.fed = (((self.channels,), self.dtype), ((2, self.value_heads), self.dtype))
        self.host = None
        if self.weight.device.type == "cpu" and self.dtype in _DTYPES:
            self.host = _core.DeltaRule(
                self.weight.numpy(),
                self.decay.numpy(),
                self.dt_bias.numpy(),
                self.key_heads,
                self.key_dim,
                self.value_dim,
                self.beta_scale,
            )

    def on_device(self) -> DeltaWeights | None:
        """What the CUDA kernel takes of the layer; None where it takes none: a type other than bfloat16, keys of another width, more taps."""
        if self.dtype != torch.bfloat16 or self.key_dim not in DELTA_KEY_DIMS or self.taps > DELTA_MAX_TAPS:
            return None
        return DeltaWeights(self.weight, self.decay, self.dt_bias, self.beta_scale)

    def feed(self, hidden: Tensor) -> tuple[list[Tensor], Any]:
        module = self.module
        if hasattr(module, "in_proj_qkv"):
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
        normed = self.module.norm(out.reshape(-1, self.value_dim), rest.reshape(-1, self.value_dim))
        return self.module.out_proj(normed.reshape(out.shape[0], -1))

    def rates(self, fed: Sequence[Tensor], t: int) -> tuple[Tensor, Tensor]:
        b, a = fed[1][t]
        beta = (b.sigmoid() * self.beta_scale).float()[:, None]
        return (self.decay * F.softplus(a.float() + self.dt_bias)).exp()[:, None, None], beta

    def run(self, room: Room, spans: Sequence[Span], fed: Sequence[Tensor]) -> tuple[Tensor, dict[int, list[Tensor]]]:
        if self.host is None:
            return super().run(room, spans, fed)
        mixed, gates = fed
        out = mixed.new_empty(mixed.shape[0], *self.gives)
        long = [span.row for span in spans if span.end - span.start > room.block]
        ends = [torch.empty(len(long), *shape, dtype=dtype) for shape, dtype in self.pieces]
        memory, window = room.pieces
        kept, kept_gates = room.kept
        self.host.run(
            room.pending.numpy(),
            np.array([span.row for span in spans], dtype=np.int32),
            np.array([0, *(span.end for span in spans)], dtype=np.int32),
            np.array([span.fresh for span in spans], dtype=np.int32),
            memory.shape[0],
            room.block,
            memory=_address(memory),
            window=_address(window),
            kept=_address(kept),
            kept_gates=_address(kept_gates),
            mixed=_address(mixed[:, None]),
            gates=_address(gates[:, None]),
            out=_address(out),
            end_memory=_address(ends[0]),
            end_window=_address(ends[1]),
            dtype=_DTYPES[mixed.dtype],
            threads=threads.of_the_extension(),
        )
        return out, {row: [part[at] for part in ends] for at, row in enumerate(long)}

    def advance(self, state: Sequence[Tensor], fed: Sequence[Tensor]) -> Tensor:
        if self.host is None or not fed[0].shape[0]:
            return super().advance(state, fed)
        # A room of one row that keeps nothing: the state after the tokens comes back as that of a long row.
        nothing = [torch.empty(1, 0, *shape, dtype=dtype) for shape, dtype in self.fed]
        room = Room([piece[None] for piece in state], nothing, torch.zeros(1, dtype=torch.int32))
        out, ends = self.run(room, [Span(0, 0, fed[0].shape[0], False)], fed)
        torch._foreach_copy_(list(state), ends[0])
        return out


class OlmoDelta(GatedDelta):
    """Gated DeltaNet of Olmo Hybrid: projections of their own, and a beta that may reach 2."""

    def __init__(self, module: nn.Module):
        self.beta_scale = 2.0 if module.allow_neg_eigval else 1.0
        super().__init__(module)

    def feed(self, hidden: Tensor) -> tuple[list[Tensor], Any]:
        module = self.module
        mixed = torch.cat([project(hidden) for project in (module.q_proj, module.k_proj, module.v_proj)], dim=-1)
        return [mixed, torch.stack((module.b_proj(hidden), module.a_proj(hidden)), dim=1)], module.g_proj(hidden)

    def finish(self, out: Tensor, rest: Any) -> Tensor:
        normed = self.module.o_norm(out.reshape(-1, self.value_dim), rest.reshape(-1, self.value_dim))
        return self.module.o_proj(normed.reshape(out.shape[0], -1))


class KimiDelta(_Delta):
    """Kimi Delta Attention. A token feeds in [C], b [H] and what the gate is made of, [H, dk]."""

    def __init__(self, module: nn.Module):
        heads, dim = module.num_heads, module.head_dim
        super().__init__(module, heads, heads, dim, dim)
        gate = module.forget_gate
        self.decay = -gate.A_log.detach().float().exp().view(heads, 1)
        self.dt_bias = gate.dt_bias.detach().float().view(heads, dim)
        self.fed = (((self.channels,), self.dtype), ((heads,), self.dtype), ((heads, dim), self.dtype))

    def feed(self, hidden: Tensor) -> tuple[list[Tensor], Any]:
        module, gate = self.module, self.module.forget_gate
        mixed = torch.cat([project(hidden) for project in (module.q_proj, module.k_proj, module.v_proj)], dim=-1)
        forget = gate.f_b_proj(gate.f_a_proj(hidden)).view(-1, self.value_heads, self.key_dim)
        return [mixed, module.b_proj(hidden), forget], module.g_b_proj(module.g_a_proj(hidden))

    def finish(self, out: Tensor, rest: Any) -> Tensor:
        normed = self.module.o_norm(out, rest.view(out.shape))
        return self.module.o_proj(normed.reshape(out.shape[0], -1))

    def rates(self, fed: Sequence[Tensor], t: int) -> tuple[Tensor, Tensor]:
        rate = (self.decay * F.softplus(fed[2][t].float() + self.dt_bias)).exp()
        return rate[:, :, None], fed[1][t].sigmoid().float()[:, None]


def _address(part: Tensor) -> tuple[int, int, int]:
    """Address, row stride and head stride of [rows, heads, ...], contiguous within a head."""
    return part.data_ptr(), part.stride(0), part.stride(1)
