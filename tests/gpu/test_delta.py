"""The gated delta rule in passes whose drafts are kept in part, against the rule itself over the text in float64."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch

from dflash_rs import recurrent

BLOCK, TAPS = 5, 4


class Layer:
    """Random weights, and room for requests."""

    def __init__(self, device, key_dim: int, value_dim: int, rows: int = 3, key_heads: int = 2, heads: int = 4):
        self.device, self.key_heads, self.heads, self.key_dim, self.value_dim = (
            device,
            key_heads,
            heads,
            key_dim,
            value_dim,
        )
        self.channels = 2 * key_heads * key_dim + heads * value_dim
        self.weights = recurrent.DeltaWeights(
            torch.randn(TAPS, self.channels, device=device), -torch.rand(heads, device=device) * 2, torch.randn(heads, device=device), 2.0,
        )  # fmt: skip
        # Whatever was there before is nothing to a text that begins.
        self.states = recurrent.DeltaStates(
            torch.full((rows + 1, heads, key_dim, value_dim), 7.0, device=device),
            torch.full((rows + 1, TAPS - 1, self.channels), 7.0, dtype=torch.bfloat16, device=device),
            torch.full((rows, BLOCK, self.channels), 7.0, dtype=torch.bfloat16, device=device),
            torch.full((rows, BLOCK, 2 * heads), 7.0, dtype=torch.bfloat16, device=device),
            torch.full((rows + 1,), 7, dtype=torch.int32, device=device),
        )

    def inputs(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(
            torch.randn(tokens, width, device=self.device).bfloat16() for width in (self.channels, 2 * self.heads)
        )

    def run(self, parts: list[tuple[int, int, torch.Tensor, torch.Tensor]], padding: int = 0) -> list[torch.Tensor]:
        """Outputs of requests (slot, context, mixed, gates), with rows behind them that are nobody's. A request of more than a block is kept."""
        mixed, gates = (
            torch.cat([part[i] for part in parts] + [parts[0][i].new_ones(padding, parts[0][i].shape[1])])
            for i in (2, 3)
        )
        lens, lengths = [part[2].shape[0] for part in parts], [part[1] for part in parts]

        def of(values, dtype):
            return torch.tensor(values, dtype=dtype, device=self.device)

        long = [i for i, n in enumerate(lens) if n > BLOCK]
        ends = recurrent.DeltaEnds(
            of([long.index(i) if i in long else -1 for i in range(len(parts))], torch.int32),
            self.states.memory.new_full((len(long), *self.states.memory.shape[1:]), float("nan")),
            self.states.window.new_full((len(long), *self.states.window.shape[1:]), float("nan")),
        )
        out = mixed.new_full((mixed.shape[0], self.heads, self.value_dim), float("nan"))
        recurrent.delta_rule(
            mixed, gates, self.weights, self.states, query_starts=of([0, *np.cumsum(lens)], torch.int32),
            context_lens=of(lengths, torch.int32), slots=of([part[0] for part in parts], torch.int64), longest=max(lens),
            ends=ends if long else None, out=out,
        )  # fmt: skip
        assert out[sum(lens) :].isnan().all(), "rows that are nobody's were written"
        for place, i in enumerate(long):
            slot = parts[i][0]
            self.states.memory[slot], self.states.window[slot] = ends.memory[place], ends.window[place]
            self.states.stands[slot] = lengths[i] + lens[i]
        return list(out[: sum(lens)].split(lens))


def in_pieces(layer: Layer, rng, mixed, gates, company: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of a text that is cut anyhow, with drafts behind it that are not kept, and a copy of the state after it."""
    at, outs = 0, []
    while at < mixed.shape[0]:
        n = min(int(rng.integers(1, BLOCK + 4)), mixed.shape[0] - at)
        more = 0 if n > BLOCK else int(rng.integers(0, BLOCK + 1 - n))
        wrong = layer.inputs(more)
        own = [torch.cat((text[at : at + n], drafts)) for text, drafts in zip((mixed, gates), wrong)]
        parts = [(2, at, *own)]
        if company:
            parts = [(0, 0, *layer.inputs(int(rng.integers(1, 9)))), *parts, (1, 0, *layer.inputs(1))]
        outs.append(layer.run(parts, int(rng.integers(0, 3)))[int(company)][:n])
        at += n
    slots = torch.tensor([2], device=layer.device)
    recurrent.delta_copy(
        layer.weights, layer.states, context_lens=torch.tensor([at], dtype=torch.int32, device=layer.device), slots=slots, into=slots + 1
    )  # fmt: skip
    return torch.cat(outs), layer.states.memory[3].clone()


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double().cpu() - want).norm() / want.norm())


@pytest.mark.parametrize("key_dim, value_dim", [(32, 48), (128, 128), (64, 64), (96, 192), (192, 32), (256, 256)])
def test_a_text_in_pieces_is_the_rule_over_it(gpu, rng, key_dim, value_dim):
    layer = Layer(gpu, key_dim, value_dim)
    mixed, gates = layer.inputs(21)
    out, state = in_pieces(layer, rng, mixed, gates, company=True)
    want, after = reference.delta(mixed, gates, layer.weights, layer.key_heads, key_dim, value_dim)
    # A convolution that rounds to the other side of a tie is half a percent of one element.
    assert relative(out, want) < 5e-3 and relative(state, after) < 3e-3


@pytest.mark.parametrize("key_dim", [32, 128])
def test_a_tokens_bits_do_not_depend_on_its_block_or_company(gpu, rng, key_dim):
    layer = Layer(gpu, key_dim, 128)
    mixed, gates = layer.inputs(17)
    found = [in_pieces(layer, rng, mixed, gates, company) for company in (False, True, True)]
    for out, state in found[1:]:
        assert torch.equal(out, found[0][0]) and torch.equal(state, found[0][1])


def test_a_context_out_of_reach_says_so(gpu):
    layer = Layer(gpu, 64, 64)
    before = [part.clone() for part in layer.states]
    (out,) = layer.run([(1, 7 + BLOCK + 1, *layer.inputs(3))])
    assert out.isnan().all() and all(torch.equal(a, b) for a, b in zip(before, layer.states))
