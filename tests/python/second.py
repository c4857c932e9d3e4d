"""A DFlash 2 made of a DFlash: convolutions that change little, a selector that prefers some tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from dflash_rs.config import assets
from dflash_rs.models.dflash2 import DFlash2Config, DFlash2Draft
from dflash_rs.models.loader import load_draft, save_draft


def second(folder: Path, noise: float) -> Path:
    """Writes the bundled drafter as a DFlash 2 whose new weights are random and of size `noise`; with next to none it drafts what the first does."""
    first = load_draft(assets() / "draft")
    config = DFlash2Config(
        **{field.name: getattr(first.config, field.name) for field in dataclasses.fields(first.config)},
        conv_kernel_size=3,
        conv_group_size=first.config.hidden_size // 8,
        selector_rank=8,
        selector_top_k=6,
    )
    draft = DFlash2Draft(config)
    draft.load_state_dict(first.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if name not in first.state_dict():
                parameter += noise * torch.randn(parameter.shape, generator=generator)
    save_draft(draft, folder)
    return folder
