"""The forward of a hybrid, layer by layer, without what transformers puts around its layers.

What stands around them makes masks and looks at positions, and asks the device for values on the way: a CUDA graph can hold none of it. The
layers' own code runs as it is. Where that asks for values, too, as experts that are gathered do, the model stays with its own forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ... import cuda
from ..drafter import FINAL
from .probe import STEP, Step

if TYPE_CHECKING:
    from .adapter import TargetModel

# Classes of decoder layers that were looked at, and of the part in them that comes after attention or recurrence.
_LAYERS = {"Qwen3_5DecoderLayer": "Qwen3_5MLP", "Qwen3NextDecoderLayer": "Qwen3NextMLP"}


class LayerwiseModel:
    """That forward of one model."""

    @classmethod
    def build(cls, target: TargetModel) -> tuple[LayerwiseModel | None, str]:
        """The path, or None and the reason why it does not apply."""
        if target.state is None or target.state.on_device() is None or not cuda.available(target.device):
            return None, "its layers are not all served by kernels of this device"
        for layer in target.decoder_layers:
            name = type(layer).__name__
            if name not in _LAYERS or not type(layer).__module__.startswith("transformers.models."):
                return None, f"a layer is a {name}"
            if type(layer.mlp).__name__ != _LAYERS[name]:
                return None, f"a layer has a {type(layer.mlp).__name__}, which asks the device for values"
        base = next(
            (m for m in target.model.modules() if getattr(m, "layers", None) is target.decoder_layers), target.model
        )
        if not all(isinstance(getattr(base, part, None), nn.Module) for part in ("norm", "rotary_emb")):
            return None, f"a {type(base).__name__} has no norm or rotary_emb"
        return cls(target, base), "layer by layer"

    def __init__(self, target: TargetModel, base: nn.Module):
        self._target, self._base = target, base

    def prepare(self, limit: int) -> None:
        """Nothing: rotations are made of positions in each pass."""

    def forward(
        self, token_ids: Tensor, positions: Tensor, limit: int, attention, caches, taps, logit_rows: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """See `TargetModel.run`."""
        target, base = self._target, self._base
        x = target.embedding(token_ids[None])
        step = {STEP: Step(attention, caches, target._windows)}
        rotations = base.rotary_emb(x, positions[None])
        tapped = {}
        for index, layer in enumerate(target.decoder_layers):
            x = layer(
                x, position_embeddings=rotations, attention_mask=None, position_ids=positions[None], **step
            )  # fmt: skip
            x = x[0] if isinstance(x, tuple) else x
            if index in taps:
                tapped[index] = x[0]
        # What the model's own forward would hand over, the layers have just put there, too.
        target._tapped.clear()
        if FINAL in taps or logit_rows is None:
            x = base.norm(x)
            tapped[FINAL] = x[0]
            rows = x[0] if logit_rows is None else x[0].index_select(0, logit_rows)
        else:
            rows = base.norm(x[0].index_select(0, logit_rows))
        features = torch.cat([tapped[k] for k in taps], dim=-1) if taps else None
        return target.lm_head(rows), features
