"""A pair of models so small that hundreds of damaged copies of it can be loaded, with the configuration and tokenizer of the bundled one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from models_helpers import randomise

from dflash_rs.config import assets

LAYERS, WIDTH = 3, 32


def make_pair(folder: Path) -> Path:
    """Writes `folder`/target and `folder`/draft; gives `folder` back."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from dflash_rs.models.dflash import DFlashDraft
    from dflash_rs.models.loader import read_draft_config, save_draft

    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    for part in ("target", "draft"):
        shutil.copytree(assets() / part, folder / part, ignore=shutil.ignore_patterns("*.safetensors", "training.json"))
    edit(folder / "target", num_hidden_layers=LAYERS, layer_types=["full_attention"] * LAYERS, **sizes)
    nested = {"mask_token_id": 1, "target_layer_ids": [0, 1]}
    one = {
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "num_target_layers": LAYERS,
        "dflash_config": nested,
    }
    edit(folder / "draft", **one, **sizes)
    model = Qwen3ForCausalLM(Qwen3Config(**read(folder / "target" / "config.json")))
    randomise(model, 0, std=0.2).to(torch.bfloat16).save_pretrained(folder / "saved")
    shutil.move(folder / "saved" / "model.safetensors", folder / "target" / "model.safetensors")
    shutil.rmtree(folder / "saved")
    save_draft(randomise(DFlashDraft(read_draft_config(folder / "draft")), 1), folder / "draft", dtype=torch.bfloat16)
    return folder


def read(file: Path):
    return json.loads(file.read_text(encoding="utf-8"))


def edit(folder: Path, name: str = "config.json", **changes) -> Path:
    """Changes fields of a JSON file in `folder`; a value of ... takes the field away."""
    file = folder / name
    values = (read(file) if file.exists() else {}) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}), encoding="utf-8")
    return folder


def tensors(folder: Path, change) -> Path:
    """Rewrites the weights of `folder` after ``change(tensors)``."""
    from safetensors.torch import load_file, save_file

    values = load_file(folder / "model.safetensors")
    change(values)
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def copy(pair: Path, to: Path) -> Path:
    return shutil.copytree(pair, to)
