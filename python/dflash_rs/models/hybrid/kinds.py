"""Which recurrent layers of transformers are known, by the names of their modules."""

from __future__ import annotations

from torch import nn

from ...errors import UnsupportedModel
from .gated_delta import GatedDelta
from .mixer import Mixer

# By model type: what its configuration calls layers that are known here.
_LAYERS = {
    "qwen3_5_text": ("linear_attention",),
    "qwen3_5_moe_text": ("linear_attention",),
    "qwen3_next": ("linear_attention",),
}
_MIXERS: dict[str, type[Mixer]] = {
    "Qwen3_5GatedDeltaNet": GatedDelta,
    "Qwen3_5MoeGatedDeltaNet": GatedDelta,
    "Qwen3NextGatedDeltaNet": GatedDelta,
}


def known_layers(model_type: str) -> tuple[str, ...]:
    """Types of recurrent layers, as `layer_types` of a configuration has them, that targets of this model type may have."""
    return _LAYERS.get(model_type, ())


def find_mixers(model: nn.Module, layers: nn.ModuleList, attending: set[int]) -> dict[int, Mixer]:
    """The mixers of the layers that do not attend, by layer. Raises UnsupportedModel where a layer has none that is known, or more."""
    mixers = {}
    for index, layer in enumerate(layers):
        if index in attending:
            continue
        found = [
            module
            for module in layer.modules()
            if type(module).__name__ in _MIXERS and type(module).__module__.startswith("transformers.models.")
        ]
        if len(found) != 1:
            raise UnsupportedModel(
                f"{type(model).__name__}: layer {index} has neither paged attention nor a recurrent layer that is known "
                f"({', '.join(sorted(_MIXERS))})"
            )
        mixers[index] = _MIXERS[type(found[0]).__name__](found[0])
    return mixers
