"""Which recurrent layers of transformers are known, by the names of their modules."""

from __future__ import annotations

from torch import nn

from ...errors import UnsupportedModel
from .gated_delta import GatedDelta, KimiDelta, OlmoDelta
from .mamba2 import Mamba2
from .mixer import Mixer
from .short_conv import ShortConv

# By model type: what its configuration calls layers that are known here, beside those that only attend.
_LAYERS = {
    "qwen3_5_text": ("linear_attention",),
    "qwen3_5_moe_text": ("linear_attention",),
    "qwen3_next": ("linear_attention",),
    "olmo_hybrid": ("linear_attention",),
    "kimi_linear": ("linear_attention",),
    "lfm2": ("conv",),
    "lfm2_moe": ("conv",),
    "bamba": ("linear_attention",),
    "granitemoehybrid": ("linear_attention",),
    "nemotron_h": ("linear_attention", "moe", "mlp"),
    "falcon_h1": ("hybrid",),
}
# Layers that attend and mix, and layers that remember nothing.
_BOTH, _NEITHER = ("hybrid",), ("moe", "mlp")
_MIXERS: dict[str, type[Mixer]] = {
    "Qwen3_5GatedDeltaNet": GatedDelta,
    "Qwen3_5MoeGatedDeltaNet": GatedDelta,
    "Qwen3NextGatedDeltaNet": GatedDelta,
    "OlmoHybridGatedDeltaNet": OlmoDelta,
    "KimiLinearDeltaAttention": KimiDelta,
    "Lfm2ShortConv": ShortConv,
    "Lfm2MoeShortConv": ShortConv,
    "BambaMixer": Mamba2,
    "GraniteMoeHybridMambaLayer": Mamba2,
    "NemotronHMamba2Mixer": Mamba2,
    "FalconH1Mixer": Mamba2,
}


def known_layers(model_type: str) -> tuple[str, ...]:
    """Types of layers other than attention, as `layer_types` of a configuration has them, that targets of this model type may have."""
    return _LAYERS.get(model_type, ())


def attending(config) -> list[int]:
    """The layers of a text configuration in which attention has to run."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    known = set(known_layers(getattr(config, "model_type", ""))) - set(_BOTH)
    return [index for index, kind in enumerate(kinds) if kind not in known]


def find_mixers(model: nn.Module, layers: nn.ModuleList, attended: set[int]) -> dict[int, Mixer]:
    """The mixers of a model, by layer; `attended`: layers in which attention ran. Raises UnsupportedModel where a layer that should have
    one has none that is known, or more."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(layers)
    mixers = {}
    for index, (layer, kind) in enumerate(zip(layers, kinds, strict=True)):
        found = [
            module
            for module in layer.modules()
            if type(module).__name__ in _MIXERS and type(module).__module__.startswith("transformers.models.")
        ]
        if not found and (kind in _NEITHER or (index in attended and kind not in _BOTH)):
            continue
        if len(found) != 1:
            raise UnsupportedModel(
                f"{type(model).__name__}: layer {index} has {'neither paged attention nor' if not found else len(found)} recurrent layers that "
                f"are known, expected one ({', '.join(sorted(_MIXERS))})"
            )
        mixers[index] = _MIXERS[type(found[0]).__name__](found[0])
    return mixers
