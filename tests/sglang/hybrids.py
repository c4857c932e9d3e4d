"""Tiny random targets with recurrent layers, drafters beside them, and servers of both. The drafts are steered: see sglang_host.steered."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from servers import TARGET, Server

from dflash_rs.models.dflash import DraftConfig
from dflash_rs.models.loader import build_draft, save_draft

VOCAB, HIDDEN, BLOCK = 256, 48, 6
# Every second layer attends; the states of two layers have to be kept apart.
_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "pad_token_id": 0,
}
_DENSE = {"intermediate_size": 64}
_EXPERTS = {
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": HIDDEN,
    "num_position_embeddings": 16,
}
# The configurations of transformers, the model's class, and what is small in it.
KINDS = {
    "dense": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", _DENSE),
    "experts": ("Qwen3_5MoeConfig", "Qwen3_5MoeForConditionalGeneration", _EXPERTS),
    "next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", _EXPERTS | _DENSE),
}


def write_target(kind: str, folder: Path, seed: int = 0) -> Path:
    """A checkpoint with weights large enough that texts depend on the states."""
    import transformers

    config, model, more = KINDS[kind]
    text = _TEXT | more
    if model.endswith("ForConditionalGeneration"):
        text["rope_parameters"] = {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1], "mrope_interleaved": True,
        }  # fmt: skip
        outside = {
            "image_token_id": 250,
            "video_token_id": 251,
            "vision_start_token_id": 252,
            "vision_end_token_id": 253,
        }
        made = getattr(transformers, config)(
            text_config=text, vision_config=_VISION, tie_word_embeddings=False, **outside
        )
    else:
        made = getattr(transformers, config)(**text)
    generator = torch.Generator().manual_seed(seed)
    target = getattr(transformers, model)(made)
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(1 + noise if name.endswith("linear_attn.norm.weight") else noise)
    target.save_pretrained(folder)
    path = folder / "config.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    # SGLang asks for this instead of the list of layers.
    stored.get("text_config", stored)["full_attention_interval"] = 2
    path.write_text(json.dumps(stored), encoding="utf-8")
    if "vision_config" in stored:
        _write_processor(folder)
    return folder


def _write_processor(folder: Path) -> None:
    """What SGLang wants to see of a target that takes images, although none are sent."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(TARGET) / name, folder)
    for name, kind in (("preprocessor", "Qwen2VLImageProcessor"), ("video_preprocessor", "Qwen3VLVideoProcessor")):
        entry = "image_processor_type" if name == "preprocessor" else "video_processor_type"
        stored = {entry: kind, "processor_class": "Qwen3VLProcessor"}
        (folder / f"{name}_config.json").write_text(json.dumps(stored), encoding="utf-8")


def write_draft(folder: Path, seed: int = 1) -> Path:
    """A drafter that fits all of them and knows nothing."""
    config = DraftConfig(
        hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=32, intermediate_size=64,
        vocab_size=VOCAB, target_layer_ids=(0, 2), mask_token_id=1, num_target_layers=4, block_size=BLOCK,
    )  # fmt: skip
    torch.manual_seed(seed)
    save_draft(build_draft(config), folder)
    return folder


def prompts(count: int = 8, longest: int = 40) -> list[list[int]]:
    """Random prompts of different lengths; the same for all kinds."""
    rng = np.random.default_rng(5)
    return [rng.integers(3, 250, 3 + n * (longest - 3) // max(1, count - 1)).tolist() for n in range(count)]


class Steering:
    """The file that a server's drafts are steered by."""

    def __init__(self, path: Path):
        self.path = path
        self.texts: list[list[int]] = []
        self.say()

    def say(self, wrong: str = "some", keep: str = "accepted") -> None:
        """From the next step on; see sglang_host.steered."""
        said = self.path.with_suffix(".new")
        said.write_text(json.dumps({"texts": self.texts, "wrong": wrong, "keep": keep}), encoding="utf-8")
        os.replace(said, self.path)

    def learn(self, bodies: list[dict[str, Any]], answers: list[dict[str, Any]]) -> None:
        """How these prompts go on."""
        self.texts += [body["input_ids"] + answer["output_ids"] for body, answer in zip(bodies, answers, strict=True)]
        self.say()


class Interpreted(Server):
    """Its answers take a while on a busy machine."""

    def open(self, path: str, body: Any = None, timeout: float = 3600) -> Any:
        """An open response."""
        return super().open(path, body, timeout)


# Of a server of such a target: no tokenizer, states in the target's type.
OPTIONS = {
    "skip_tokenizer_init": True,
    "enable_deterministic_inference": True,
    "grammar_backend": "none",
    "max_total_tokens": 4096,
    "max_mamba_cache_size": 48,
}
ENVIRONMENT = {"TRITON_INTERPRET": "1", "SGLANG_MAMBA_CONV_DTYPE": "float32"}


def server(log: Path, target: Path, env: dict[str, str] | None = None, **options: Any) -> Interpreted:
    """A server of such a target."""
    return Interpreted(log, env=ENVIRONMENT | (env or {}), **(OPTIONS | {"model_path": target} | options))
