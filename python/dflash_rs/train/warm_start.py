"""A drafter that begins as its target's last layers, whatever they are made of.

A drafter's layer is attention and one SwiGLU MLP. Where a target's layers are more than that, what they do on a sample of text decides what is
taken over of them:

| of the target's layer | becomes |
|---|---|
| recurrent, in any part | nothing: the last layers that attend are taken |
| attention with an output gate | the same attention, outputs scaled by the gate's mean |
| experts and a shared one | one MLP of the units that weigh most, each scaled by how much of it a token gets on average |
| a norm that scales by one more than its weight | a norm that scales by its weight |
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Attention whose query projection holds a gate behind each head's query.
_GATED = ("Qwen3_5Attention", "Qwen3_5MoeAttention", "Qwen3NextAttention")


def base_layers(target) -> nn.ModuleList:
    """The decoder layers of a transformers model. Raises ValueError where they are not where they usually are."""
    base = target.base_model
    layers = getattr(base, "layers", None)
    if layers is None or not hasattr(base, "norm"):
        raise ValueError(f"target: {type(target).__name__} has no model.layers and model.norm, which training looks at")
    return layers


def sources(target, count: int) -> list[int]:
    """Which layers a drafter of `count` layers begins from: the last that attend, the first of them several times where there are too few.
    Raises ValueError where none does."""
    attending = [i for i, layer in enumerate(base_layers(target)) if hasattr(layer, "self_attn")]
    if not attending:
        raise ValueError("target: none of its layers has a self_attn, so a drafter cannot begin from them")
    return [attending[0]] * (count - len(attending)) + attending[-count:]


@torch.no_grad()
def warm_start(draft, target, sample: Tensor) -> None:
    """Starts the drafter from the target's last layers that attend and its norm, with `fc` the mean of the taps.

    A cold drafter under a tied head predicts MASK itself and spends its first thousand steps unlearning that. A drafter normalises queries
    and keys; where the target does not, the norms' weights give them the size they have in the target on `sample`, int64 [b, S].
    """
    layers = base_layers(target)
    chosen = sources(target, len(draft.layers))
    if chosen != list(range(len(layers) - len(chosen), len(layers))):
        print(
            f"the drafter begins from layers {', '.join(map(str, chosen))} of the target, the last that attend",
            file=sys.stderr,
        )
    with _watched([layers[i] for i in dict.fromkeys(chosen)]) as seen:
        if seen:
            target.base_model(input_ids=sample, use_cache=False)
    for layer, index in zip(draft.layers, chosen, strict=True):
        _attention(layer.self_attn, layers[index].self_attn, draft.config.head_dim, seen)
        _mlp(layer.mlp, layers[index].mlp, seen)
        for name in ("input_layernorm", "post_attention_layernorm"):
            if not hasattr(layers[index], name):
                raise _strange(name)
            _take(getattr(layer, name).weight, scale_of(getattr(layers[index], name)), name)
    draft.norm.weight.copy_(scale_of(target.base_model.norm))
    width = draft.config.hidden_size
    taps = len(draft.config.target_layer_ids)
    draft.fc.weight.copy_(
        torch.eye(width).repeat(1, taps) / taps + 0.02 / math.sqrt(width) * torch.randn(width, width * taps)
    )
    draft.hidden_norm.weight.copy_(scale_of(layers[-1].input_layernorm))
    if (selector := getattr(draft, "candidate_selector", None)) is not None:
        _selector(selector, target.get_input_embeddings().weight)


def _selector(selector, embedding: Tensor) -> None:
    """Tells a DFlash 2's selector tokens apart by where the target's embedding puts them, along the directions in which it has most to say; it begins
    by preferring none."""
    rows = embedding.detach().float()
    rank = selector.predecessor_codebook.shape[1]
    _, directions = torch.linalg.eigh(rows.T @ rows)
    along = rows @ directions[:, -rank:]
    size = along.square().mean(0).sqrt().clamp(min=1e-12)
    selector.predecessor_codebook[: len(rows), : along.shape[1]] = (along / size)[: len(selector.predecessor_codebook)]


def scale_of(norm: nn.Module) -> Tensor:
    """What a norm multiplies normalised values by, float32: its weight in most, one more than that in some."""
    size = norm.weight.numel()
    # As good as normalised, whether a mean is taken off or not.
    probe = torch.ones(size, dtype=norm.weight.dtype, device=norm.weight.device)
    probe[1::2] = -1
    return (norm(probe) * probe).float()


def _strange(name: str) -> ValueError:
    return ValueError(f"target: its layers have no {name} that fits a drafter's, so a drafter cannot begin from them")


def _take(own: Tensor, given: Tensor, name: str) -> None:
    if own.shape != given.shape:
        raise _strange(name)
    own.copy_(given)


@contextmanager
def _watched(layers: list[nn.Module]) -> Iterator[dict[nn.Module, list[Any]]]:
    """What modules put out while it is entered, for those of which more than weights has to be known."""
    seen: dict[nn.Module, list[Any]] = {}
    hooks = []
    for layer in layers:
        attention, mlp = layer.self_attn, getattr(layer, "mlp", None)
        wanted = [getattr(mlp, name, None) for name in ("gate", "shared_expert_gate")]
        for name in ("q", "k"):
            if not hasattr(attention, f"{name}_norm"):
                wanted.append(getattr(attention, f"{name}_proj", None))
        if type(attention).__name__ in _GATED:
            wanted.append(attention.q_proj)
        for module in wanted:
            if isinstance(module, nn.Module):
                seen[module] = []
                hooks.append(module.register_forward_hook(lambda m, _, output: seen[m].append(output)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _attention(own: nn.Module, given: nn.Module, head_dim: int, seen: dict[nn.Module, list[Any]]) -> None:
    weights: dict[str, Tensor] = {}
    for name in "qkvo":
        weight = getattr(getattr(given, f"{name}_proj", None), "weight", None)
        if weight is None:
            raise _strange(f"self_attn.{name}_proj.weight")
        weights[name] = weight
    if type(given).__name__ in _GATED:
        weights["q"] = weights["q"].unflatten(0, (-1, 2, head_dim))[:, 0].flatten(0, 1)
        gate = torch.cat(
            [out.float().unflatten(-1, (-1, 2, head_dim))[..., 1, :].flatten(0, -3) for out in seen[given.q_proj]]
        )
        weights["o"] = weights["o"] * gate.sigmoid().mean(0).flatten().to(weights["o"].dtype)
    for name, weight in weights.items():
        projection = getattr(own, f"{name}_proj")
        _take(projection.weight, weight, f"self_attn.{name}_proj.weight")
        bias = getattr(getattr(given, f"{name}_proj"), "bias", None)
        # One that a drafter has no place for is left out.
        if projection.bias is not None and bias is not None and bias.shape == projection.bias.shape:
            projection.bias.copy_(bias)
    for name in ("q", "k"):
        norm = getattr(own, f"{name}_norm")
        if hasattr(given, f"{name}_norm"):
            scale = scale_of(getattr(given, f"{name}_norm"))
            # One over all heads together is none of a head's.
            if scale.shape == norm.weight.shape:
                norm.weight.copy_(scale)
        elif found := seen.get(getattr(given, f"{name}_proj")):
            sizes = [float(out.float().unflatten(-1, (-1, head_dim)).square().mean(-1).sqrt().mean()) for out in found]
            norm.weight.fill_(sum(sizes) / len(sizes))


def _mlp(own: nn.Module, given: nn.Module, seen: dict[nn.Module, list[Any]]) -> None:
    """The heaviest units of all that a target's MLP is made of. Where there are fewer than a drafter has, the rest begins as nothing."""
    parts = [tuple(part.float() for part in unit) for unit in _units(given, seen)]
    gate, up = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    down = torch.cat([part[2] for part in parts], dim=1)
    size, width = own.gate_proj.weight.shape
    if gate.shape[1] != width or down.shape[0] != width:
        raise _strange("mlp.gate_proj.weight")
    if len(gate) == size and len(parts) == 1:
        order = torch.arange(size)
    else:
        order = (gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)).argsort(descending=True)[:size]
    count = len(order)
    own.gate_proj.weight[:count] = gate[order].to(own.gate_proj.weight.dtype)
    own.up_proj.weight[:count] = up[order].to(own.up_proj.weight.dtype)
    own.down_proj.weight.zero_()
    own.down_proj.weight[:, :count] = down[:, order].to(own.down_proj.weight.dtype)


def _units(given: nn.Module, seen: dict[nn.Module, list[Any]]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(gate, up, down) of each part of an MLP: [units, H], [units, H], [H, units], what comes out of it scaled as it is on average."""
    if all(hasattr(given, f"{name}_proj") for name in ("gate", "up", "down")):
        yield given.gate_proj.weight, given.up_proj.weight, given.down_proj.weight
        return
    experts, router = getattr(given, "experts", None), getattr(given, "gate", None)
    both, out = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    routed = seen.get(router) if isinstance(router, nn.Module) else None
    # What a router of transformers gives: logits, the weights of the chosen experts, and which they are.
    if both is None or out is None or not routed or not isinstance(routed[0], tuple) or len(routed[0]) != 3:
        raise _strange("mlp.gate_proj.weight")
    share = torch.zeros(len(both))
    tokens = 0
    for _, weights, chosen in routed:
        share.index_add_(0, chosen.flatten().cpu(), weights.flatten().float().cpu())
        tokens += chosen.numel() // chosen.shape[-1]
    if (shared := getattr(given, "shared_expert", None)) is not None:
        gates = seen.get(given.shared_expert_gate) if hasattr(given, "shared_expert_gate") else None
        opened = torch.cat([gate.float().flatten() for gate in gates]).sigmoid().mean() if gates else 1.0
        yield shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight * opened
    for expert, down, part in zip(both, out, share / max(1, tokens), strict=True):
        yield *expert.chunk(2), down * float(part)
