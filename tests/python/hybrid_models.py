"""Tiny random targets with recurrent layers, and drafters that know how their texts go on."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from models_helpers import HIDDEN, VOCAB, randomise

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sweep.oracle import Oracle  # noqa: E402

CONTEXT = 512
_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
}
_DELTA = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
}
_EXPERTS = {
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


_MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 12, "mamba_n_groups": 2, "mamba_expand": 2}
_FOUR = ["linear_attention"] * 3 + ["full_attention"]
# Classes of transformers without their endings, and what is small in them; the first layers are recurrent, the last attends.
_MADE = {
    "dense": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", _DELTA | {"intermediate_size": 80}),
    "experts": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", _DELTA | _EXPERTS),
    "next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", _DELTA | _EXPERTS | {"intermediate_size": 80}),
    "olmo": (
        "OlmoHybridConfig",
        "OlmoHybridForCausalLM",
        _DELTA | {"intermediate_size": 80, "layer_types": _FOUR, "linear_allow_neg_eigval": True, "eos_token_id": None},
    ),
    "kimi": (
        "KimiLinearConfig",
        "KimiLinearForCausalLM",
        {
            "intermediate_size": 80, "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "layer_types": _FOUR,
            "linear_head_dim": 8, "linear_num_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
            "num_key_value_heads": 4, "first_k_dense_replace": 1, "eos_token_id": None, "bos_token_id": None,
        },
    ),
    "lfm2": (
        "Lfm2Config",
        "Lfm2ForCausalLM",
        {"intermediate_size": 80, "layer_types": ["conv"] * 3 + ["full_attention"], "conv_bias": True},
    ),
    "bamba": ("BambaConfig", "BambaForCausalLM", _MAMBA | {"intermediate_size": 80, "attn_layer_indices": [3]}),
    "falcon": ("FalconH1Config", "FalconH1ForCausalLM", _MAMBA | {"intermediate_size": 80, "mamba_d_ssm": 96}),
}  # fmt: skip
# Those of the mission, and one of each other rule.
KINDS, OTHERS = ("dense", "experts", "next"), ("olmo", "kimi", "lfm2", "bamba", "falcon")


def build(kind: str, seed: int = 0, **options):
    """A tiny model of transformers with random weights; `options` of its configuration."""
    import transformers

    config, model, more = _MADE[kind]
    made = getattr(transformers, model)(getattr(transformers, config)(**_TEXT | more | options))
    return randomise(made, seed).eval()


def keep_wrongly(state, keep, rows, counts, wrong) -> None:
    """`keep` of a `MixerState` for `wrong` tokens in place of `counts`, without its noticing where the states do not stand."""
    lengths = state._lengths[rows] + counts
    keep(rows, wrong.astype(np.int32))
    state.pretend(rows, lengths)


class Knowing(Oracle):
    """Drafts from texts that it was told; of four drafts one is wrong, or every one (`wrong="all"`), or the last of a block (`wrong="last"`),
    or none."""

    def __init__(self, target, block_size: int = 6, wrong: str = "some"):
        super().__init__(target, block_size)
        self.wrong = wrong

    def candidates(self, anchors, lengths, page_table, row_ids=None, **options):
        drafts, chances = super().candidates(anchors, lengths, page_table, row_ids, **options)
        if self.wrong == "some":
            return drafts, chances
        size = drafts.shape[1]
        for i, (anchor, at) in enumerate(zip(np.asarray(anchors).tolist(), np.asarray(lengths).tolist(), strict=True)):
            known = next((t for t in self.texts if len(t) > at and t[at] == anchor), ())
            for j in range(size):
                token = known[at + 1 + j] if at + 1 + j < len(known) else 0
                wrong = self.wrong == "all" or (self.wrong == "last" and j == size - 1)
                drafts[i, j, 0] = (token + wrong) % self.vocab
        return drafts, chances
