"""What drafts: weights laid out for decoding beside the paged context cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import _core, cuda, threads
from ...attention import HostAttention, kernel_serves, step_attention
from ...errors import InvalidArgument
from ..batch import StepBatch
from ..fused import FusedLayer, HostRun, RotaryTable, addresses, rotate_rows
from ..linear import PackedLinear, multiplies
from ..proposals import Proposals

if TYPE_CHECKING:
    from .model import DFlashDraft


class Runtime:
    """Weights laid out for decoding, and the paged context cache. Of a drafter on a device it is the `DeviceDrafter`.

    `kernel` tells whether attention runs in kernels of this package, setting it to False selects the torch reference; `run` and `injector`
    are passes in one call of the extension, None where torch runs the drafter.
    """

    # What another kind of DFlash replaces: its layers.
    layer_type: type[FusedLayer] = FusedLayer

    def __init__(self, draft: DFlashDraft, embedding: nn.Module, lm_head: nn.Module, num_slots: int):
        c = self.config = draft.config
        self.num_slots, self.branches, self.mask_token_id = num_slots, draft.branches, c.mask_token_id
        weight = draft.fc.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.kernel = kernel_serves(self.device, self.dtype, c.head_dim, c.head_dim)
        self.embedding = embedding.weight.detach()
        self.eps, self.hidden = c.rms_norm_eps, (c.hidden_size,)
        self.context_norm, self.norm = draft.hidden_norm.weight.detach(), draft.norm.weight.detach()
        precision = draft.matmul_precision
        self.fc = PackedLinear([draft.fc], precision=precision)
        # Every layer reads the same context input, so all K and V come from one product.
        self.context_kv = PackedLinear(
            [proj for layer in draft.layers for proj in (layer.self_attn.k_proj, layer.self_attn.v_proj)],
            share=False,
            precision=precision,
        )
        self.k_norm = torch.stack([layer.self_attn.k_norm.weight.detach() for layer in draft.layers])[
            :, None
        ].contiguous()
        self.layers = [
            self.layer_type(
                layer,
                head_dim=c.head_dim,
                eps=self.eps,
                scale=c.head_dim**-0.5,
                window=window,
                causal=causal,
                precision=precision,
            )
            for layer, window, causal in zip(draft.layers, c.layer_window, c.layer_causal, strict=True)
        ]
        self.proposals = Proposals(lm_head, draft.vocabulary)
        self.head = self.proposals.head
        if type(self.head) is nn.Linear:
            self.head = PackedLinear([self.head], share=False, precision=precision)
        # Among the tokens that a drafter proposes of a part there is no mask.
        self.never = None if draft.vocabulary is not None else c.mask_token_id
        self.rotary = RotaryTable(lambda p: tuple(x.squeeze(-2) for x in draft.cos_sin(p, self.dtype)))
        shape = (num_slots, c.num_key_value_heads, c.head_dim)
        self.caches = [
            tuple(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in "kv")
            for _ in range(c.num_hidden_layers)
        ]
        self.injection = None
        if self.kernel and cuda.available(self.device):
            # A position is below the number of slots: every token of a request has one.
            positions = torch.arange(num_slots, device=self.device)
            cos, sin = (x.squeeze(-2)[:, : c.head_dim // 2] for x in draft.cos_sin(positions, torch.float32))
            keys, values = zip(*self.caches, strict=True)
            self.injection = cuda.KvCaches(keys, values), torch.cat((cos, sin), dim=-1).contiguous()
        plain = c.input_embedding_scale == 1.0 and c.output_multiplier == 1.0 and c.final_logit_softcapping is None
        self.run = self.injector = None
        # What chooses among a block's candidates in the extension, and the codebooks that it reads; nothing of a DFlash.
        self.selecting: tuple = (None, ())
        if plain:
            self.run = HostRun.build(
                self.layers,
                self.norm,
                self.head,
                self.embedding,
                self.rotary,
                host_kernel=self.kernel and self.device.type == "cpu",
            )
        if self.run is not None:
            self.injector = _core.HostInjector(
                fc=self.fc.packed_host,
                norm=self.context_norm.numpy(),
                key_values=self.context_kv.packed_host,
                key_norms=[layer.self_attn.k_norm.weight.detach().numpy() for layer in draft.layers],
                kv_heads=c.num_key_value_heads,
                head_dim=c.head_dim,
                eps=self.eps,
            )

    def on_host(self) -> bool:
        """Whether products and attention are the extension's."""
        return self.kernel and multiplies(self.device, self.dtype)

    def inject(self, features: Tensor, positions, slots, rows) -> None:
        c = self.config
        if features.ndim != 2 or features.shape[1] != c.feature_size:
            raise InvalidArgument(f"features: got shape {list(features.shape)}, expected [T, {c.feature_size}]")
        count = features.shape[0] if rows is None else rows.shape[0]
        if positions.shape != (count,) or slots.shape != (count,):
            raise InvalidArgument(
                f"positions, slots: got shapes {list(positions.shape)}, {list(slots.shape)}, expected [{count}] (features)"
            )
        if count == 0:
            return
        if self.injector is not None and features.dtype == torch.float32 and features.stride(1) == 1:
            rows = np.arange(count) if rows is None else np.asarray(rows)
            self.injector.inject(
                (features.data_ptr(), features.stride(0), c.feature_size), features.shape[0], rows, np.asarray(positions),
                np.asarray(slots), self.rotary.address(int(positions.max()) + 1), addresses(self.caches), self.num_slots,
                threads.of_the_extension(),
            )  # fmt: skip
            return
        positions, slots, rows = (self._tensor(x) for x in (positions, slots, rows))
        kv = self.context(features if rows is None else features[rows])
        if self.injection is not None:
            self.store(kv, positions, slots)
            return
        keys = torch.rms_norm(kv[:, :, 0], (c.head_dim,), None, self.eps).mul_(self.k_norm)
        cos, sin = self.rotary.lookup(positions, int(positions.max()) + 1)
        keys = rotate_rows(keys, cos[:, None], sin[:, None])
        for index, (k_cache, v_cache) in enumerate(self.caches):
            k_cache.index_copy_(0, slots, keys[:, index])
            v_cache.index_copy_(0, slots, kv[:, index, 1])

    def context(self, features: Tensor) -> Tensor:
        """Taps [M, K*H] -> K and V of all layers as the projections give them, [M, layers, 2, kv_heads, head_dim]."""
        c = self.config
        x = torch.rms_norm(self.fc(features.to(self.dtype)), self.hidden, self.context_norm, self.eps)
        return self.context_kv(x).view(-1, c.num_hidden_layers, 2, c.num_key_value_heads, c.head_dim)

    def store(self, kv: Tensor, positions: Tensor, slots: Tensor, rows: Tensor | None = None) -> None:
        """Normalises, rotates and stores what `context` gave, by the CUDA kernel; see `cuda.kv_inject`."""
        assert self.injection is not None
        caches, cos_sin = self.injection
        norms = self.k_norm.view(-1, self.config.head_dim)
        cuda.kv_inject(kv, norms, cos_sin, positions, slots, caches, eps=self.eps, rows=rows)

    def _tensor(self, values) -> Tensor | None:
        if values is None or isinstance(values, Tensor):
            return values
        return torch.from_numpy(np.array(values, dtype=np.int64)).to(self.device)

    def candidates(self, anchors, lengths, page_table, row_ids, page_size: int, valid_from, size: int, k: int):
        c = self.config
        lengths = np.asarray(lengths, dtype=np.int32)
        n = lengths.size
        tokens = np.full((n, size), c.mask_token_id, dtype=np.int64)
        tokens[:, 0] = np.asarray(anchors)
        bad = tokens[:, 0][(tokens[:, 0] < 0) | (tokens[:, 0] >= self.embedding.shape[0])]
        if bad.size:
            raise InvalidArgument(f"anchors: got {int(bad[0])}, expected 0..{self.embedding.shape[0] - 1}")
        if n == 0:
            return np.empty((0, size - 1, k), dtype=np.int64), np.empty((0, size - 1, k), dtype=np.float32)
        positions = (lengths[:, None] + np.arange(size)).astype(np.int64).reshape(-1)
        limit = int(lengths.max()) + size
        starts = np.arange(n + 1, dtype=np.int32) * size
        row_ids = np.arange(n, dtype=np.int32) if row_ids is None else np.asarray(row_ids, dtype=np.int32)
        page_table = np.asarray(page_table, dtype=np.int32)
        valid_from = None if valid_from is None else np.asarray(valid_from, dtype=np.int32)
        if self.run is not None:
            blocks = HostAttention(
                slots=None, num_slots=self.num_slots, threads=threads.of_the_extension(), query_starts=starts, context_lens=lengths,
                page_table=page_table, row_ids=row_ids, page_size=page_size, valid_from=valid_from, ancestors=None,
            )  # fmt: skip
            never = None if self.never is None or self.never >= self.head.outputs else self.never
            picked, chances = self.run.draft(
                positions, tokens.reshape(-1), limit, blocks, self.caches, size, never, k, *self.selecting
            )
            return self.proposals.named_on_host(picked), chances
        batch = StepBatch.from_arrays(
            token_ids=tokens.reshape(-1),
            positions=positions,
            slots=np.zeros(n * size, dtype=np.int64),  # not written: the block's keys and values are scratch
            query_starts=starts,
            context_lens=lengths,
            page_table=page_table,
            row_ids=row_ids,
            logit_rows=np.empty(0, dtype=np.int64),
            page_size=page_size,
            device=self.device,
        )
        attention = step_attention(
            batch, num_slots=self.num_slots, write=False, kernel=self.kernel, valid_from=valid_from
        )
        hidden, logits = self.block(batch.token_ids, batch.positions, limit, attention, size)
        tokens, chances = self.likeliest(hidden, logits, batch.token_ids[::size], k)
        return tokens.cpu().numpy(), chances.cpu().numpy()

    def likeliest(self, hidden: Tensor, logits: Tensor, anchors: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k likeliest tokens int64 [n, size - 1, k] of what `block` gave for `anchors` int64 [n], and their probabilities float32."""
        # The first of equals, which topk does not promise.
        picked = logits.argmax(dim=-1, keepdim=True) if k == 1 else logits.topk(k, dim=-1).indices
        return self.proposals.named(picked), logits.float().softmax(dim=-1).gather(-1, picked)

    def prepare(self, limit: int) -> None:
        """See `DeviceDrafter`, likewise below."""
        self.rotary.rows(limit, self.device)

    def choose(
        self, hidden: Tensor, logits: Tensor, anchors: Tensor, draw: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """The likeliest chains, or those that `draw` makes, int64 [n, size - 1]."""
        if draw is not None:
            return draw(self.proposals.among_all(logits))
        return self.proposals.named(logits.argmax(dim=-1))

    def branch(self, hidden: Tensor, logits: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest tokens int64 [n, size - 1, branches] and their log-probabilities float32, by the CUDA kernel."""
        picked, log_probs = cuda.tree_top_k(logits.reshape(-1, logits.shape[-1]), self.branches)
        shape = (*logits.shape[:2], self.branches)
        return self.proposals.named(picked).view(shape), log_probs.view(shape)

    def block(self, token_ids: Tensor, positions: Tensor, limit: int, attention, size: int) -> tuple[Tensor, Tensor]:
        """Of what follows the anchors of n blocks, normalised hidden states [n, size - 1, H] and logits [n, size - 1, V]; token_ids and
        positions int64 [n * size], below `limit`."""
        c = self.config
        cos, sin = self.rotary.lookup(positions, limit)
        x = F.embedding(token_ids, self.embedding)
        if c.input_embedding_scale != 1.0:
            x = x * c.input_embedding_scale
        for layer, caches in zip(self.layers, self.caches, strict=True):
            x = self.through(layer, x, cos, sin, attention, caches, size)
        rows = x.view(-1, size, x.shape[-1])[:, 1:].reshape(-1, x.shape[-1])
        hidden = torch.rms_norm(rows, self.hidden, self.norm, self.eps)
        logits = self.head(hidden)
        if c.output_multiplier != 1.0:
            logits = logits * c.output_multiplier
        if c.final_logit_softcapping is not None:
            logits = torch.tanh(logits / c.final_logit_softcapping) * c.final_logit_softcapping
        if self.never is not None and self.never < logits.shape[-1]:
            logits[:, self.never].fill_(-math.inf)
        return hidden.view(-1, size - 1, hidden.shape[-1]), logits.view(-1, size - 1, logits.shape[-1])

    def through(self, layer, x: Tensor, cos: Tensor, sin: Tensor, attention, caches, size: int) -> Tensor:
        """x [n * size, H] of blocks of `size` tokens through one layer."""
        return layer(x, cos, sin, attention, *caches)
