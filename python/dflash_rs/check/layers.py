"""In which layer a text begins to hang on how it came about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UnsupportedModel

# Tokens at the end of a text that are run anew, and relative errors above those of rounding, by type.
_REPLAYED = 24
_ROUNDING = {torch.float32: 1e-3}


def first_layer(llm: Any, ids: Sequence[int], block_size: int) -> tuple[int, float] | None:
    """The first decoder layer of an `LLM`'s target whose output at the last of `ids` differs between a pass for every token and blocks whose
    wrong ends are taken back, and by how much, relative to the output; the last layer is not looked at. None where all are the same up to
    rounding, or do not show their outputs."""
    target = llm._target

    def run() -> tuple[int, float] | None:
        taps = target.taps
        try:
            target.set_taps(range(target.num_layers - 1))
            plain, blocks = (_outputs(target, list(ids), size) for size in (1, max(2, block_size)))
        except UnsupportedModel:
            return None
        finally:
            target.set_taps(taps)
        errors = ((blocks - plain).norm(dim=-1) / plain.norm(dim=-1).clamp_min(1e-20)).nan_to_num(nan=torch.inf)
        differs = (errors > _ROUNDING.get(target.dtype, 0.1)).nonzero().flatten()
        return None if not len(differs) else (int(differs[0]), float(errors[differs[0]]))

    return llm._turns.take(run, llm._settle)


def _outputs(target: Any, ids: list[int], size: int) -> Tensor:
    """float32 [layers - 1, H] at the last token, the text but its end run at once, the rest in blocks of `size`, of which 1, 2, ... tokens are
    right."""
    from ..models.batch import StepBatch

    slots = len(ids) + size
    start = max(0, len(ids) - _REPLAYED)
    passes = [(0, ids[:start], start)] if start else []
    right = 1
    while start < len(ids):
        kept = min(right, len(ids) - start)
        wrong = [(token + 1) % target.vocab_size for token in (ids[start + kept :] + ids)[: size - kept]]
        passes.append((start, ids[start : start + kept] + wrong, kept))
        start, right = start + kept, right % max(1, size - 1) + 1
    with target.scratch(slots):
        if target.state is not None:
            target.state.alloc(1, 0, size)
        for start, tokens, kept in passes:
            positions = np.arange(start, start + len(tokens))
            batch = StepBatch.from_arrays(
                token_ids=np.array(tokens),
                positions=np.minimum(positions, target.max_context - 1),
                slots=positions,
                query_starts=[0, len(tokens)],
                context_lens=[start],
                page_table=np.zeros((1, 1), dtype=np.int32),
                row_ids=[0],
                logit_rows=[kept - 1],
                page_size=slots,
                device=target.device,
            )
            features = target.forward(batch)[1]
            if target.state is not None:
                target.state.keep(np.zeros(1, dtype=np.int32), np.array([kept], dtype=np.int32))
    return features[kept - 1].float().view(target.num_layers - 1, -1)
