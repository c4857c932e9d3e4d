"""Does the drafter belong to this target? Asked once, when the worker is built.

A drafter has neither embedding nor head: beside another target it still produces tokens, they are just never accepted. SGLang's
loader leaves out what it does not find. So what can be compared is compared, and every weight is looked at.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dflash_rs.errors import CheckpointError


def check(path: str, draft_config: Any, target_config: Any, model: torch.nn.Module | None = None) -> list[str]:
    """Compares Hugging Face configurations, and looks at the loaded weights.

    Raises CheckpointError naming the field; returns remarks on what works but may not be meant.
    """
    draft, target = (getattr(c, "text_config", None) or c for c in (draft_config, target_config))
    nested = getattr(draft_config, "dflash_config", None) or {}
    file = f"{path}/config.json"

    def field(name: str) -> Any:
        return nested.get(name, getattr(draft, name, None))

    layers = int(target.num_hidden_layers)
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
    if (lost := _not_stored(Path(path), model)) is not None:
        raise CheckpointError(f"{path}: {lost}: missing tensor")
    for name, weight in model.named_parameters() if model is not None else ():
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(f"{path}: {name}: has values that are not finite")
        if not bool(weight.any()):
            raise CheckpointError(f"{path}: {name}: is all zeros")
    remarks = []
    vocab = getattr(draft, "vocab_size", None)
    if vocab is not None and int(vocab) != int(target.vocab_size):
        remarks.append(f"{file}: vocab_size is {vocab}, the target's is {target.vocab_size}")
    return remarks


# What every DFlash checkpoint stores, whatever its kind (the rest depends on the architecture).
_STORED = ("fc.weight", "hidden_norm.weight", "norm.weight")


def _not_stored(path: Path, model: torch.nn.Module | None) -> str | None:
    """A tensor of a local safetensors checkpoint that is not there; None when none is missing or it cannot be told."""
    files, index = sorted(path.glob("*.safetensors")), path / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    elif files:
        from safetensors import safe_open

        names = set()
        for file in files:
            with safe_open(file, framework="pt") as opened:
                names |= set(opened.keys())
    else:
        return None
    names = {name.removeprefix("model.") for name in names}
    expected = list(_STORED)
    for layer in range(len(getattr(model, "layers", ()))):
        expected += [
            f"layers.{layer}.{part}.weight" for part in ("input_layernorm", "mlp.down_proj", "self_attn.o_proj")
        ]
    return next((name for name in expected if name not in names), None)
