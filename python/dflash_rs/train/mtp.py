"""Training a multi-token-prediction head for a frozen target: the peer of a DFlash drafter, on the same responses, by the same loop.

    sequence --> target (frozen) --> last hidden states h --> the head's context: (h[q-1], t[q]) at every place
                                 \\-> its next-token law   --> what step k of an unrolling should predict
    random anchors --> the head unrolled `block_size - 1` times from each, fed with its own states

The recipe: tokens are the true ones (teacher forcing), hidden states are the head's own from the second step on, as when it drafts, and what it
attends to is the context made of the target's true states and its own earlier steps. Step k weighs ``exp(-(k-1)/gamma)``. Labels are the target's
own law, as for a drafter (`soft_labels`). It begins as the target's last layer and norm, with `fc` the sum of both halves.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from . import drafter
from .drafter import Batch, Teacher, base_layers
from .losses import slots_loss
from .settings import MtpTraining


def head_config(target, settings: MtpTraining):
    """The head's shape: that of the target's last layer."""
    from ..models.mtp import MtpConfig

    config = target.config.get_text_config()
    attention = base_layers(target)[-1].self_attn
    rope = dict(getattr(config, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 10000.0})
    return MtpConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        num_target_layers=config.num_hidden_layers,
        block_size=settings.block_size,
        rms_norm_eps=config.rms_norm_eps,
        attention_bias=attention.q_proj.bias is not None,
        qk_norm=getattr(attention, "q_norm", None) is not None,
        rope_parameters=rope,
        max_position_embeddings=config.max_position_embeddings,
    )


@torch.no_grad()
def begin(target, settings: MtpTraining, sample: torch.Tensor):
    """A head that begins as the target's last layer. Raises ValueError for a target whose layers are not of a head's form."""
    from ..models.mtp import MtpDraft

    draft = MtpDraft(head_config(target, settings))
    (layer,), source = draft.layers, base_layers(target)[-1].state_dict()
    own = layer.state_dict()
    fits = {name: value for name, value in source.items() if name in own and own[name].shape == value.shape}
    # Some targets have biases in their queries, keys and values alone.
    strange = [name for name in own if name not in fits and name != "self_attn.o_proj.bias"]
    if strange:
        raise ValueError(
            f"target: its last layer has no {strange[0]} that fits a head's, so a head cannot begin from it"
        )
    layer.load_state_dict({name: fits.get(name, torch.zeros_like(value)) for name, value in own.items()})
    draft.norm.weight.copy_(target.base_model.norm.weight)
    width = draft.config.hidden_size
    noise = 0.02 / math.sqrt(width) * torch.randn(width, 2 * width)
    draft.fc.weight.copy_(torch.eye(width).repeat(1, 2) + noise)
    return draft


def head_loss(draft, teacher: Teacher, batch: Batch, settings: MtpTraining) -> tuple[torch.Tensor, float]:
    """Weighted loss of all unrollings of a batch and the mean accepted length they would have had on the true text; see
    `losses.slots_loss`."""
    from ..models.mtp import unrolled_hidden

    _, last = teacher.of(batch)
    hidden = unrolled_hidden(draft, last, batch.tokens, batch.anchors, batch.block - 1, batch.document, batch.position)
    return slots_loss(hidden, last, teacher, batch, settings)


def train(
    settings: MtpTraining,
    target_path: str | Path,
    own_path: Path,
    data: Path | None,
    out: Path,
    device: str = "auto",
    save_every: int = 250,
    autocast: bool | None = None,
    store: Path | None = None,
    shard_target: bool = False,
    minutes: float | None = None,
) -> dict:
    """Trains to the end, resuming from ``out/checkpoint.pt``; writes the head as a checkpoint for ``LLM(draft=out)``; returns the report.

    `store`, `shard_target` and `minutes` as in `drafter.train`.
    """
    places = (target_path, own_path, data, out)
    return drafter.run(settings, begin, head_loss, *places, device, save_every, autocast, store, shard_target, minutes)
