"""A small target with recurrent layers: the text model of Qwen3.5-MoE, gated delta layers but for every fourth, which attends; experts and a
shared one in all.

It may start from parts of a model that is trained already: embeddings and norms as they are, attention from the layer at the same
relative depth, and as many of that layer's hidden MLP units as there is room for, the ones with the largest weights in the shared expert.
Recurrent layers and routers start fresh.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import corpus
from .settings import TargetTraining


def build(settings: TargetTraining):
    """A freshly initialised model."""
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    config = Qwen3_5MoeTextConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads,
        head_dim=settings.head_dim,
        linear_num_key_heads=settings.linear_key_heads,
        linear_num_value_heads=settings.linear_value_heads,
        linear_key_head_dim=settings.linear_head_dim,
        linear_value_head_dim=settings.linear_head_dim,
        num_experts=settings.num_experts,
        num_experts_per_tok=settings.experts_per_token,
        moe_intermediate_size=settings.expert_size,
        shared_expert_intermediate_size=settings.shared_expert_size,
        max_position_embeddings=settings.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=corpus.END_OF_TEXT_ID,
        pad_token_id=corpus.END_OF_TEXT_ID,
        attn_implementation="eager",
    )
    torch.manual_seed(settings.seed)
    model = Qwen3_5MoeForCausalLM(config)
    scale = 1 / math.sqrt(2 * settings.num_layers)
    with torch.no_grad():
        for layer in model.model.layers:
            (layer.self_attn.o_proj if hasattr(layer, "self_attn") else layer.linear_attn.out_proj).weight.mul_(scale)
            layer.mlp.shared_expert.down_proj.weight.mul_(scale)
            layer.mlp.experts.down_proj.mul_(scale)
    return model


def imbalance(router_logits: tuple[Tensor, ...], per_token: int) -> Tensor:
    """How unevenly the experts are used, mean over the layers: 1 where all are used alike (Switch Transformer, arXiv 2101.03961, eq. 4).
    `router_logits`: of each layer, [tokens, experts]."""
    found = []
    for logits in router_logits:
        chances = logits.float().softmax(-1)
        experts = logits.shape[-1]
        chosen = torch.bincount(chances.topk(per_token, dim=-1).indices.flatten(), minlength=experts)
        found.append((chances.mean(0) * chosen).sum() * experts / (len(chances) * per_token))
    return torch.stack(found).mean()


@torch.no_grad()
def start_from(model, source) -> None:
    """Takes over what fits of `source`, a model of the Qwen3 shape with the same widths. Raises ValueError naming what differs."""
    config, other = model.config, source.config
    names = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    for name in names:
        if getattr(config, name) != getattr(other, name, None):
            raise ValueError(
                f"start_from: {name}: got a model with {getattr(other, name, None)}, expected {getattr(config, name)}, as asked for"
            )
    if type(source).__name__ != "Qwen3ForCausalLM":
        raise ValueError(
            f"start_from: got a {type(source).__name__}, expected a Qwen3ForCausalLM, as `--shape qwen3` makes it"
        )
    model.model.embed_tokens.weight.copy_(source.model.embed_tokens.weight)
    _norm(model.model.norm, source.model.norm)
    last, from_last = len(model.model.layers) - 1, len(source.model.layers) - 1
    for i, layer in enumerate(model.model.layers):
        given = source.model.layers[round(i * from_last / max(1, last))]
        for name in ("input_layernorm", "post_attention_layernorm"):
            _norm(getattr(layer, name), getattr(given, name))
        if hasattr(layer, "self_attn"):
            _attention(layer.self_attn, given.self_attn, config.head_dim)
        _experts(layer.mlp, given.mlp, config.num_experts_per_tok)


def _norm(own: nn.Module, given: nn.Module) -> None:
    """These norms scale by one more than their weight."""
    own.weight.copy_(given.weight - 1)


def _attention(own: nn.Module, given: nn.Module, head_dim: int) -> None:
    """A gate of zeros lets one half through, so what comes out counts twice."""
    gated = own.q_proj.weight.view(-1, 2, head_dim, own.q_proj.in_features)
    gated[:, 0] = given.q_proj.weight.view(-1, head_dim, own.q_proj.in_features)
    gated[:, 1] = 0
    own.k_proj.weight.copy_(given.k_proj.weight)
    own.v_proj.weight.copy_(given.v_proj.weight)
    own.o_proj.weight.copy_(2 * given.o_proj.weight)
    _norm(own.q_norm, given.q_norm)
    _norm(own.k_norm, given.k_norm)


def _experts(own: nn.Module, given: nn.Module, per_token: int) -> None:
    """Units in the order of their weights: first the shared expert's, which every token meets, then one expert's after the other."""
    gate, up, down = given.gate_proj.weight, given.up_proj.weight, given.down_proj.weight
    order = (gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)).argsort(descending=True)
    shared = own.shared_expert
    parts = [(shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)]
    for both, out in zip(own.experts.gate_up_proj, own.experts.down_proj, strict=True):
        parts.append((*both.chunk(2), out))
    # The shared expert's gate lets half through at first, and the weights of those that are chosen add up to 1.
    weights, at = [2.0] + [float(per_token)] * (len(parts) - 1), 0
    for (own_gate, own_up, own_down), weight in zip(parts, weights, strict=True):
        units = order[at : at + len(own_gate)]
        at, count = at + len(units), len(units)
        own_gate[:count], own_up[:count], own_down[:, :count] = gate[units], up[units], weight * down[:, units]
