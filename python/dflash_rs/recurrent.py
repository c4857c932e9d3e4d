"""The CUDA kernels of recurrent layers on torch tensors, beside those of `cuda`, whose conventions they share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _core, cuda
from .named import named

# Widths of keys, and most taps of the convolution before them, that `delta_rule` is compiled for.
DELTA_KEY_DIMS, DELTA_MAX_TAPS = (32, 64, 96, 128, 192, 256), 8


class DeltaWeights(NamedTuple):
    """Of a layer with the gated delta rule, all float32: weight [taps, C] of the convolution, decay and dt_bias [Hv]: a token's decay is
    exp(decay * softplus(a + dt_bias)), its beta beta_scale * sigmoid(b)."""

    weight: Tensor
    decay: Tensor
    dt_bias: Tensor
    beta_scale: float


class DeltaStates(NamedTuple):
    """What such a layer remembers of requests, C = 2 Hk dk + Hv dv: memory float32 [slots, Hv, dk, dv], window [slots, taps - 1, C] and
    stands int32 [slots] (tokens that a slot's state has seen); of the last pass, kept [rows, B, C] and kept_gates [rows, B, 2 Hv], rows being
    the first slots."""

    memory: Tensor
    window: Tensor
    kept: Tensor
    kept_gates: Tensor
    stands: Tensor


class DeltaEnds(NamedTuple):
    """States after requests of more than B tokens: places int32 [R] (negative for others), memory float32 [L, Hv, dk, dv], window
    [L, taps - 1, C]."""

    places: Tensor
    memory: Tensor
    window: Tensor


@named
def delta_rule(
    mixed: Tensor,
    gates: Tensor,
    weights: DeltaWeights,
    states: DeltaStates,
    *,
    query_starts: Tensor,
    context_lens: Tensor,
    slots: Tensor,
    longest: int,
    ends: DeltaEnds | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The gated delta rule behind a short convolution (Gated DeltaNet, arXiv 2412.06464) over a pass -> [T, Hv, dv].

    mixed [T, C] and gates [T, 2 Hv] (b, then a) are what the tokens feed in. The state of request r, in slot slots[r] (int64 [R], distinct),
    has seen stands[slot] tokens; context_lens[r] [R] says by how many more of what its last pass kept it has to move first: 0..B. From there
    the new tokens run without moving it, and up to B of them are kept. A request at 0 starts from nothing; one with more than B tokens is
    kept whole or not at all, and the state after it goes to `ends`. `longest` bounds the tokens of a request. Where a context is out of
    reach of its state the outputs are NaN and nothing changes.
    """
    if out is None:
        out = torch.empty((mixed.shape[0], *states.memory.shape[1::2]), dtype=mixed.dtype, device=mixed.device)
    _delta(mixed, gates, weights, states, query_starts, context_lens, slots, longest, ends, None, out)
    return out


@named
def delta_copy(
    weights: DeltaWeights, states: DeltaStates, *, context_lens: Tensor, slots: Tensor, into: Tensor
) -> None:
    """Copies states, moved on to `context_lens` by what their last pass kept, to the slots `into` (int64 [R]). The states stay where
    they are. See `delta_rule` for the rest."""
    like, heads = states.kept, states.memory.shape[1]
    mixed, gates = (like.new_empty(0, width) for width in (like.shape[-1], 2 * heads))
    starts = torch.zeros(slots.shape[0] + 1, dtype=torch.int32, device=like.device)
    out = like.new_empty(0, *states.memory.shape[1::2])
    _delta(mixed, gates, weights, states, starts, context_lens, slots, 0, None, into, out)


def _delta(
    mixed: Tensor, gates: Tensor, weights: DeltaWeights, states: DeltaStates, query_starts: Tensor, context_lens: Tensor, slots: Tensor,
    longest: int, ends: DeltaEnds | None, into: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    _, heads, dk, dv = states.memory.shape
    rows = mixed.shape[0] + slots.shape[0] * states.kept.shape[1]
    # Of key heads there are as many as fill the channels; what does not add up is refused below.
    key_heads = max(mixed.shape[-1] - heads * dv, 0) // (2 * dk)
    made = torch.empty((rows, mixed.shape[-1]), dtype=mixed.dtype, device=mixed.device)
    scales = torch.empty((rows, 2 * (key_heads + heads)), dtype=torch.float32, device=mixed.device)
    pending = torch.empty(slots.shape[0], dtype=torch.int32, device=mixed.device)
    cuda._launch(
        _core.cuda_delta_rule,
        mixed,
        mixed=cuda._view(mixed),
        gates=cuda._view(gates),
        weight=cuda._view(weights.weight),
        decay=cuda._view(weights.decay),
        dt_bias=cuda._view(weights.dt_bias),
        query_starts=cuda._view(query_starts),
        context_lens=cuda._view(context_lens),
        slots=cuda._view(slots),
        memory=cuda._view(states.memory),
        window=cuda._view(states.window),
        kept=cuda._view(states.kept),
        kept_gates=cuda._view(states.kept_gates),
        stands=cuda._view(states.stands),
        out=cuda._view(out),
        made=cuda._view(made),
        scales=cuda._view(scales),
        pending=cuda._view(pending),
        longest=longest,
        beta_scale=weights.beta_scale,
        into=cuda._maybe(into),
        ends=None if ends is None else cuda._view(ends.places),
        end_memory=None if ends is None else cuda._view(ends.memory),
        end_window=None if ends is None else cuda._view(ends.window),
    )
