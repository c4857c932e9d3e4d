"""The shape of a DFlash drafter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ...config import BRANCHES, CANDIDATES

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class DraftConfig:
    """Shape and behaviour of a DFlash drafter, as validated by `loader.read_draft_config`.

    `target_layer_ids[i] = k` taps the output of target layer k. `block_size` counts the anchor. `layer_causal` and
    `layer_window` have one entry per drafter layer; a window of None is unbounded.
    """

    # What a checkpoint of this kind calls itself, and the fields that only it has.
    architecture: ClassVar[str] = "DFlashDraftModel"
    qk_norm: ClassVar[bool] = True
    own_fields: ClassVar[tuple[str, ...]] = ()

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    target_layer_ids: tuple[int, ...]
    mask_token_id: int
    num_target_layers: int
    block_size: int = 16
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    hidden_act: str = "silu"
    rope_parameters: dict = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    max_position_embeddings: int = 32768
    layer_causal: tuple[bool, ...] = ()
    layer_window: tuple[int | None, ...] = ()
    input_embedding_scale: float = 1.0
    output_multiplier: float = 1.0
    final_logit_softcapping: float | None = None

    def __post_init__(self):
        if not self.layer_causal:
            object.__setattr__(self, "layer_causal", (False,) * self.num_hidden_layers)
        if not self.layer_window:
            object.__setattr__(self, "layer_window", (None,) * self.num_hidden_layers)

    @property
    def branches(self) -> int:
        """Candidates per position at most that draft trees are made of."""
        return min(BRANCHES, self.vocab_size - 1)

    @property
    def most_candidates(self) -> int:
        """Candidates per position at most from which a request that samples is drafted."""
        return min(CANDIDATES, self.vocab_size - 1)

    @property
    def feature_size(self) -> int:
        """Width of one token's concatenated taps, K*H."""
        return len(self.target_layer_ids) * self.hidden_size
