"""Tiny random models and a plain engine loop for the tests of `dflash_rs.models`."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from dflash_rs.models.batch import StepBatch
from dflash_rs.models.dflash import DFlashDraft, DraftConfig
from dflash_rs.models.dflash2 import DFlash2Config
from dflash_rs.models.loader import build_draft
from dflash_rs.models.target import TargetModel

torch.set_num_threads(1)
VOCAB, HIDDEN, MASK = 97, 48, 1


def randomise(model: nn.Module, seed: int, std: float = 0.3) -> nn.Module:
    """Weights large enough that argmax choices differ from token to token."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return model


def qwen3_target(seed: int = 0, layers: int = 6, **options):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        **options,
    )
    return randomise(Qwen3ForCausalLM(config), seed).eval()


def draft_config(**options) -> DraftConfig:
    values = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 80,
        "vocab_size": VOCAB,
        "target_layer_ids": (1, 2, 4),
        "mask_token_id": MASK,
        "num_target_layers": 6,
        "block_size": 6,
    }
    return (DFlash2Config if "selector_top_k" in options else DraftConfig)(**(values | options))


def random_draft(seed: int = 1, **options) -> DFlashDraft:
    return randomise(build_draft(draft_config(**options)), seed).eval()


def best(draft, *args, **options) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest chains int64 [n, B-1] and how likely a drafter takes them to be, float32 [n, B-1]; see `Drafter.candidates`."""
    tokens, chances = draft.candidates(*args, **options, k=1)
    return tokens[:, :, 0], chances[:, :, 0]


class Pages:
    """Hands every request its own shuffled pages."""

    def __init__(self, requests: int, tokens: int, page_size: int, seed: int = 0):
        self.page_size = page_size
        per_row = -(-tokens // page_size)
        order = np.random.default_rng(seed).permutation(requests * per_row).astype(np.int32)
        self.table = order.reshape(requests, per_row)
        self.num_slots = requests * per_row * page_size

    def slots(self, row: int, positions) -> np.ndarray:
        positions = np.asarray(positions, dtype=np.int64)
        return (
            self.table[row, positions // self.page_size].astype(np.int64) * self.page_size + positions % self.page_size
        )

    def batch(self, spans: list[tuple[int, int, list[int]]], logit_rows=None) -> StepBatch:
        """spans: (row, first position, token ids), packed in order."""
        starts = np.cumsum([0] + [len(tokens) for _, _, tokens in spans])
        positions = [np.arange(start, start + len(tokens)) for _, start, tokens in spans]
        return StepBatch.from_arrays(
            token_ids=np.concatenate([np.asarray(tokens, dtype=np.int64) for _, _, tokens in spans]),
            positions=np.concatenate(positions),
            slots=np.concatenate([self.slots(row, p) for (row, _, _), p in zip(spans, positions, strict=True)]),
            query_starts=starts,
            context_lens=[start for _, start, _ in spans],
            page_table=self.table,
            row_ids=[row for row, _, _ in spans],
            logit_rows=np.arange(starts[-1]) if logit_rows is None else logit_rows,
            page_size=self.page_size,
        )


def greedy_loop(
    target: TargetModel, draft: DFlashDraft | None, prompt: list[int], count: int, page_size: int, block: int
):
    """Greedy generation of `count` tokens for one request: token ids, and the drafts of every step."""
    pages = Pages(1, len(prompt) + count + block + 1, page_size)
    target.alloc_kv(pages.num_slots)
    if draft is not None:
        target.set_taps(draft.taps)
        draft.alloc_kv(pages.num_slots)
    tokens, committed, all_drafts = list(prompt), 0, []
    step = pages.batch([(0, 0, prompt)], logit_rows=[len(prompt) - 1])
    logits, features = target.forward(step)
    keep, accepted = len(prompt), []
    while True:
        if draft is not None:
            draft.inject(features[:keep], step.positions[:keep], step.slots[:keep])
        committed += keep
        tokens += accepted + [int(logits[len(accepted) if committed > len(prompt) else 0].argmax())]
        if len(tokens) >= len(prompt) + count:
            return tokens[: len(prompt) + count], all_drafts
        drafts = []
        if draft is not None:
            drafts = best(draft, [tokens[-1]], [committed], pages.table, page_size=page_size, block_size=block)
            drafts = drafts[0][0].tolist()
            all_drafts.append(drafts)
        step = pages.batch([(0, committed, [tokens[-1], *drafts])])
        logits, features = target.forward(step)
        chosen = logits.argmax(-1).tolist()
        matches = 0
        while matches < len(drafts) and drafts[matches] == chosen[matches]:
            matches += 1
        accepted, keep = drafts[:matches], matches + 1
