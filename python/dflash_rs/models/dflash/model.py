"""The DFlash drafter: a module with the parameters of a checkpoint, bound to its target.

    target features  h_k[p], k in target_layer_ids        [M, K*H]
         | fc, hidden_norm                                 once per committed token
         v
    x[p] --> per layer: K = RoPE_p(k_norm(Wk x)), V = Wv x   written to the paged cache, never rewritten

    [anchor, MASK x (B-1)] at positions L..L+B-1
         | per layer: RMSNorm, attention over context 0..L-1 and the block itself, SwiGLU
         v
    norm, the target's lm_head on rows 1..B-1: row i predicts position L+i itself

Source: DFlash, arXiv 2602.06036, section 4. Block keys and values are scratch: only committed context is ever
cached, so a rejected draft leaves nothing to undo here.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import cuda, threads
from ...errors import InvalidArgument
from .config import DraftConfig
from .layers import DraftLayer, RMSNorm, rope_frequencies
from .runtime import Runtime


class DFlashDraft(nn.Module):
    """A DFlash drafter bound to a target's embedding and head.

    Parameter names are those of a DFlash checkpoint, so `state_dict()` is the file. The embedding and the head are the
    target's modules, held without being registered: they are neither trained nor saved here. What decodes is its `runtime`, which
    `alloc_kv` makes (None before).
    """

    # What another kind of DFlash replaces.
    config_type: ClassVar[type[DraftConfig]] = DraftConfig
    layer_type: ClassVar[type[DraftLayer]] = DraftLayer
    runtime_type: ClassVar[type[Runtime]] = Runtime
    # See `Drafter`.
    kind: ClassVar[str] = "dflash"
    reads_tokens: ClassVar[bool] = False
    from_text: ClassVar[bool] = False

    def __init__(self, config: DraftConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(self.layer_type(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.fc = nn.Linear(config.feature_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # Not a buffer: `.to(bfloat16)` would round the frequencies.
        with torch.device("cpu"):
            self._inv_freq, self._rope_factor = rope_frequencies(config)
        self._bound: tuple[nn.Module, nn.Module] | None = None
        # Tokens that it proposes, int64 [N] rising; None for all but the mask token. See `models/proposals.py`; read by `alloc_kv`.
        self.vocabulary: Tensor | None = None
        self.runtime: Runtime | None = None
        # Of the products of `draft` and `inject`, see `TargetModel`; read by `alloc_kv`.
        self.matmul_precision = "highest"

    # ---- the target's two modules ----------------------------------------------------------------------------

    def bind_target(self, embedding: nn.Module, lm_head: nn.Module) -> DFlashDraft:
        """Use the target's input embedding (its raw `weight` rows) and its output head."""
        rows, width = embedding.weight.shape
        if width != self.config.hidden_size:
            raise InvalidArgument(
                f"embedding: width {width}, expected the drafter's hidden_size {self.config.hidden_size}"
            )
        if not 0 <= self.config.mask_token_id < rows:
            raise InvalidArgument(f"mask_token_id: got {self.config.mask_token_id}, expected 0..{rows - 1}")
        self._bound = (embedding, lm_head)  # a tuple, so that nn.Module does not adopt them
        return self

    @property
    def bound(self) -> tuple[nn.Module, nn.Module]:
        """The target's embedding and head. Raises InvalidArgument while there are none."""
        if self._bound is None:
            raise InvalidArgument("drafter is not bound to a target: call bind_target(embedding, lm_head) first")
        return self._bound

    def embed(self, tokens: Tensor) -> Tensor:
        """Rows [*tokens.shape, H] of the target's embedding, scaled as the drafter wants them."""
        # Raw rows: some targets scale inside the module's forward, and the drafter was trained without that.
        rows = F.embedding(tokens, self.bound[0].weight)
        return rows if self.config.input_embedding_scale == 1.0 else rows * self.config.input_embedding_scale

    # ---- shared pieces ---------------------------------------------------------------------------------------

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [*positions.shape, 1, head_dim]; computed in float32, then cast as the target library does."""
        with torch.autocast(positions.device.type, enabled=False):
            angle = positions[..., None, None].float() * self._inv_freq.to(positions.device)
            angle = torch.cat((angle, angle), dim=-1)
            return (angle.cos() * self._rope_factor).to(dtype), (angle.sin() * self._rope_factor).to(dtype)

    def project_features(self, features: Tensor) -> Tensor:
        """Concatenated taps [..., K*H] -> the context input shared by all layers [..., H]."""
        return self.hidden_norm(self.fc(features))

    # ---- generation: see `Drafter` ---------------------------------------------------------------------------

    @property
    def block_size(self) -> int:
        """Tokens of a block, the anchor counted."""
        return self.config.block_size

    @property
    def taps(self) -> tuple[int, ...]:
        """Target layers whose outputs `inject` takes, in order."""
        return self.config.target_layer_ids

    @property
    def branches(self) -> int:
        """Candidates per position at most that draft trees are made of."""
        known = self.config.branches
        return known if self.vocabulary is None else min(known, len(self.vocabulary))

    @property
    def most_candidates(self) -> int:
        """Candidates per position at most from which a request that samples is drafted."""
        known = self.config.most_candidates
        return known if self.vocabulary is None else min(known, len(self.vocabulary))

    @property
    def key_dims(self) -> tuple[int, ...]:
        """Widths of key heads."""
        return (self.config.head_dim,)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of context KV one token takes over all drafter layers."""
        c = self.config
        return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * self.fc.weight.dtype.itemsize

    def alloc_kv(self, num_slots: int) -> None:
        """Allocates zeroed context KV for `num_slots` tokens (the target's slot ids) and lays the weights out for decoding.

        Call it again after changing weights.
        """
        if num_slots < 1:
            raise InvalidArgument(f"num_slots: got {num_slots}, expected at least 1")
        embedding, lm_head = self.bound
        with torch.inference_mode():
            self.runtime = self.runtime_type(self, embedding, lm_head, num_slots)

    def free(self) -> None:
        """Gives the context KV back."""
        self.runtime = None

    def on_device(self) -> Runtime | None:
        """What runs inside a step on a device, a `DeviceDrafter`; None without kernels for the drafter's device, type and heads."""
        runtime = self._allocated()
        return runtime if runtime.kernel and cuda.available(runtime.device) else None

    def _allocated(self) -> Runtime:
        if self.runtime is None:
            raise InvalidArgument("drafter has no cache: call alloc_kv(num_slots) first")
        return self.runtime

    def inject(self, features: Tensor, positions, slots, rows=None, *, token_ids=None, before=None) -> None:
        """Writes the context K and V of M committed tokens; what they are does not matter (`reads_tokens`).

        features [T, K*H] in `target_layer_ids` order; rows int64 [M]: whose features they are (0..T-1 when None); positions
        and slots int64 [M]; host arrays or tensors. Each token once, in any order; a slot may be written again when its page
        changed hands.
        """
        runtime = self._allocated()
        with torch.inference_mode(), threads.handed_over(runtime.on_host()):
            runtime.inject(features, positions, slots, rows)

    def candidates(
        self,
        anchors,
        lengths,
        page_table,
        row_ids=None,
        *,
        page_size: int,
        valid_from=None,
        block_size: int | None = None,
        k: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k likeliest tokens int64 [n, B-1, k] of every position and their probabilities float32 [n, B-1, k], falling (`k` of None: as
        many as draft trees take). Row i of request r is proposed for position lengths[r] + 1 + i.

        anchors int64 [n] (their KV does not exist yet), lengths int32 [n]: committed tokens, whose context K/V have been
        injected; page_table int32 [rows, pages] and row_ids int32 [n] (0..n-1 when None): each request's pages
        of `page_size` slots; valid_from int32 [n]: context before that position is not there and not seen. All host arrays. `block_size`
        counts the anchor and defaults to the checkpoint's. The mask token is never proposed. Greedy, and so independent of
        every random draw.
        """
        runtime = self._allocated()
        size = self.config.block_size if block_size is None else block_size
        if size < 2:
            raise InvalidArgument(f"block_size: got {size}, expected at least 2 (it counts the anchor)")
        with torch.inference_mode(), threads.handed_over(runtime.on_host()):
            k = self.branches if k is None else k
            return runtime.candidates(anchors, lengths, page_table, row_ids, page_size, valid_from, size, k)
