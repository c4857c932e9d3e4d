"""Does the drafter belong to this target? Asked once, when the worker is built.

A drafter has neither embedding nor head: beside another target it still produces tokens, they are just never accepted. SGLang's
loader leaves out what it does not find. So what can be compared is compared, and every weight is looked at.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dflash_rs.errors import CheckpointError
from dflash_rs.models import checkpoint
from dflash_rs.weights import check_weights


def check(path: str, draft_config: Any, target_config: Any, model: torch.nn.Module | None = None) -> list[str]:
    """Compares Hugging Face configurations, and looks at the loaded weights.

    Raises CheckpointError naming the field; returns remarks on what works but may not be meant.
    """
    draft, target = (getattr(c, "text_config", None) or c for c in (draft_config, target_config))
    nested = getattr(draft_config, "dflash_config", None) or {}
    file = f"{path}/config.json"
    if not isinstance(nested, dict):
        raise CheckpointError(f"{file}: dflash_config: got {type(nested).__name__}, expected an object")

    def field(name: str) -> Any:
        return nested.get(name, getattr(draft, name, None))

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    ids = field("target_layer_ids")
    wrong = [name for name in ("hidden_size", "num_hidden_layers") if not whole(field(name))]
    wrong += [n for n in ("num_target_layers", "mask_token_id") if field(n) is not None and not whole(field(n))]
    if ids is not None and not (isinstance(ids, list | tuple) and all(whole(layer) for layer in ids)):
        wrong += ["target_layer_ids"]
    for name in wrong:
        expected = "a list of layer numbers" if name == "target_layer_ids" else "an integer"
        raise CheckpointError(f"{file}: {name}: got {checkpoint.short(field(name))}, expected {expected}")
    # A looped target runs its layers several times, and they are counted through.
    layers = int(target.num_hidden_layers) * int(getattr(target, "num_loops", 1) or 1)
    if int(draft.hidden_size) != int(target.hidden_size):
        raise CheckpointError(
            f"{file}: hidden_size: got {draft.hidden_size}, expected the target's {target.hidden_size}"
        )
    trained = field("num_target_layers")
    if trained is not None and int(trained) != layers:
        raise CheckpointError(f"{file}: num_target_layers: got {trained}, expected the target's {layers}")
    for layer in field("target_layer_ids") or ():
        if not 0 <= int(layer) < layers:
            raise CheckpointError(f"{file}: target_layer_ids: got {layer}, expected 0..{layers - 1}")
    mask = field("mask_token_id")
    if mask is not None and not 0 <= int(mask) < int(target.vocab_size):
        raise CheckpointError(f"{file}: mask_token_id: got {mask}, expected 0..{int(target.vocab_size) - 1}")
    if {"DFlashDraftModel", "DFlash2DraftModel"} & set(getattr(draft_config, "architectures", None) or ()):
        if (lost := _not_stored(Path(path), int(draft.num_hidden_layers))) is not None:
            raise CheckpointError(f"{path}: {lost}: missing tensor")
    if model is not None:
        check_weights(path, model.named_parameters())
    remarks = []
    vocab = getattr(draft, "vocab_size", None)
    if vocab is not None and int(vocab) != int(target.vocab_size):
        remarks.append(f"{file}: vocab_size is {vocab}, the target's is {target.vocab_size}")
    return remarks


def _not_stored(path: Path, layers: int) -> str | None:
    """A norm that a local safetensors checkpoint lacks; None when it has all of them, or it cannot be told.

    Norms only: they have the same names in every DFlash checkpoint, quantized or not.
    """
    files, index = sorted(path.glob("*.safetensors")), path / "model.safetensors.index.json"
    if index.is_file():
        names = set(checkpoint.weight_map_of(index))
    elif files:
        names = set(checkpoint.stored_tensors({file: [] for file in files}, "a DFlash checkpoint"))
    else:
        return None
    names = {name.removeprefix("model.") for name in names}
    expected = ["hidden_norm.weight", "norm.weight"]
    expected += [f"layers.{layer}.input_layernorm.weight" for layer in range(layers)]
    return next((name for name in expected if name not in names), None)
