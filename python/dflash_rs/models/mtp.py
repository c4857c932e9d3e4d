"""A multi-token-prediction head as a drafter: one layer that goes on from the target's last hidden state, unrolled token by token.

    target's hidden state h[q-1], what its head reads ──> pre_fc_norm_hidden ────┐
    token t[q], a row of the target's embedding ────────> pre_fc_norm_embedding ─┴─> fc (2H -> H) ──> layer ──> norm ──> g[q]

    drafting from anchor t[L]:   g[L] of (t[L], h[L-1])  ──head──>  d1
                                 g[L+1] of (d1, g[L])    ──head──>  d2     ... its own states and tokens from here on

The layer is a full-attention one of the target's shape with KV of its own; embedding and head are the target's. Context keys and values are
made of the target's true states and tokens, once per committed token; those of a block are scratch, so a rejected draft leaves nothing to undo.

The form is that of public checkpoints, read in SGLang's `models/qwen3_5_mtp.py` and `models/deepseek_nextn.py` and vLLM's
`models/qwen3_next_mtp.py`: each half has an RMSNorm, the embedding comes first in the concatenation, the state that goes in is the target's
after its last norm (what those engines' models return and their logits processors hand on), and what comes out after the head's own last norm
is both what the target's head reads and what the next step is fed with. Tensor names are those of Qwen3.5 (`mtp.fc.weight`, `mtp.layers.0...`,
`mtp.norm.weight`, `mtp.pre_fc_norm_embedding.weight`, `mtp.pre_fc_norm_hidden.weight`). Two things differ:
- Norms multiply by their weight, not by one plus it, attention has no output gate, and the MLP is dense.
- Those engines keep the pair (h[q-1], t[q]) at place q-1, where its state was; here it is at place q, where its token is. Rotary angles are relative,
  so it is the same attention, and what lies at a place depends on the text up to there alone: pages can be shared. A text's first token has no
  state before it and is no part of any context.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _core, threads
from ..attention import HostAttention, kernel_serves, step_attention
from ..config import BRANCHES, CANDIDATES
from ..errors import InvalidArgument
from .batch import StepBatch
from .dflash.layers import DraftLayer, RMSNorm, rope_frequencies
from .drafter import FINAL
from .fused import FusedLayer, RotaryTable, addresses, rotate_rows
from .linear import PackedLinear, multiplies
from .proposals import Proposals


@dataclass(frozen=True)
class MtpConfig:
    """Shape of a head, as validated by `loader.read_draft_config`. `block_size` counts the anchor: it is unrolled `block_size - 1` times."""

    architecture: ClassVar[str] = "MtpDraft"
    num_hidden_layers: ClassVar[int] = 1

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    num_target_layers: int
    block_size: int = 8
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    qk_norm: bool = True
    rope_parameters: dict = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    max_position_embeddings: int = 32768

    @property
    def branches(self) -> int:
        """Candidates per position at most that draft trees are made of."""
        return min(BRANCHES, self.vocab_size - 1)

    @property
    def most_candidates(self) -> int:
        """Candidates per position at most from which a request that samples is drafted."""
        return min(CANDIDATES, self.vocab_size - 1)


class MtpDraft(nn.Module):
    """An MTP head bound to a target's embedding and head, a `Drafter`.

    Parameter names are those of a checkpoint without its `mtp.` prefix. What decodes is its `runtime`, which `alloc_kv` makes (None before).
    """

    config_type: ClassVar[type[MtpConfig]] = MtpConfig
    kind: ClassVar[str] = "mtp"
    reads_tokens: ClassVar[bool] = True
    from_text: ClassVar[bool] = False
    taps: ClassVar[tuple[int, ...]] = (FINAL,)

    def __init__(self, config: MtpConfig):
        super().__init__()
        self.config = config
        self.pre_fc_norm_embedding = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_fc_norm_hidden = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([DraftLayer(config)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # Not a buffer: `.to(bfloat16)` would round the frequencies.
        with torch.device("cpu"):
            self._inv_freq, self._rope_factor = rope_frequencies(config)
        self._bound: tuple[nn.Module, nn.Module] | None = None
        # Tokens that it proposes, int64 [N] rising; None for all. See `models/proposals.py`; read by `alloc_kv`.
        self.vocabulary: Tensor | None = None
        self.runtime: Runtime | None = None
        self.matmul_precision = "highest"

    def bind_target(self, embedding: nn.Module, lm_head: nn.Module) -> MtpDraft:
        """Use the target's input embedding (its raw `weight` rows) and its output head."""
        width = embedding.weight.shape[1]
        if width != self.config.hidden_size:
            raise InvalidArgument(
                f"embedding: width {width}, expected the drafter's hidden_size {self.config.hidden_size}"
            )
        self._bound = (embedding, lm_head)  # a tuple, so that nn.Module does not adopt them
        return self

    @property
    def bound(self) -> tuple[nn.Module, nn.Module]:
        """The target's embedding and head. Raises InvalidArgument while there are none."""
        if self._bound is None:
            raise InvalidArgument("drafter is not bound to a target: call bind_target(embedding, lm_head) first")
        return self._bound

    # ---- the sums, for training and as an oracle -----------------------------------------------------------------

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [*positions.shape, 1, head_dim]; computed in float32, then cast as the target library does."""
        with torch.autocast(positions.device.type, enabled=False):
            angle = positions[..., None, None].float() * self._inv_freq.to(positions.device)
            angle = torch.cat((angle, angle), dim=-1)
            return (angle.cos() * self._rope_factor).to(dtype), (angle.sin() * self._rope_factor).to(dtype)

    def join(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """What the layer gets: tokens int64 [...] and the states before them [..., H] -> [..., H]."""
        embedded = self.pre_fc_norm_embedding(F.embedding(tokens, self.bound[0].weight))
        hidden = self.pre_fc_norm_hidden(hidden)
        return self.fc(torch.cat((embedded, hidden.to(embedded.dtype)), dim=-1))

    # ---- generation: see `Drafter` -------------------------------------------------------------------------------

    @property
    def block_size(self) -> int:
        """Tokens of a block, the anchor counted."""
        return self.config.block_size

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
        """Bytes of context one token takes: keys and values of the layer, and the target's state."""
        c = self.config
        return (2 * c.num_key_value_heads * c.head_dim + c.hidden_size) * self.fc.weight.dtype.itemsize

    def alloc_kv(self, num_slots: int) -> None:
        """Allocates context for `num_slots` tokens (the target's slot ids) and lays the weights out for decoding.

        Call it again after changing weights.
        """
        if num_slots < 1:
            raise InvalidArgument(f"num_slots: got {num_slots}, expected at least 1")
        embedding, lm_head = self.bound
        with torch.inference_mode():
            self.runtime = Runtime(self, embedding, lm_head, num_slots)

    def free(self) -> None:
        """Gives the context back."""
        self.runtime = None

    def on_device(self) -> None:
        """Nothing: the head is unrolled by the host."""

    def _allocated(self) -> Runtime:
        if self.runtime is None:
            raise InvalidArgument("drafter has no cache: call alloc_kv(num_slots) first")
        return self.runtime

    def inject(self, features: Tensor, positions, slots, rows=None, *, token_ids=None, before=None) -> None:
        """Writes the context of M committed tokens; see `Drafter`. features [T, H]: the target's states, what its head reads."""
        runtime = self._allocated()
        with torch.inference_mode(), threads.handed_over(runtime.on_host()):
            runtime.inject(features, positions, slots, rows, token_ids, before)

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
        """The k likeliest tokens int64 [n, B-1, k] behind the likeliest path, and their probabilities float32 [n, B-1, k], falling; see
        `Drafter`."""
        runtime = self._allocated()
        size = self.config.block_size if block_size is None else block_size
        if size < 2:
            raise InvalidArgument(f"block_size: got {size}, expected at least 2 (it counts the anchor)")
        with torch.inference_mode(), threads.handed_over(runtime.on_host()):
            k = self.branches if k is None else k
            return runtime.candidates(anchors, lengths, page_table, row_ids, page_size, valid_from, size, k)


class Runtime:
    """Weights laid out for decoding, and the context: keys and values of the layer at every slot, and the target's state there.

    `kernel` tells whether attention runs in kernels of this package; setting it to False selects the torch reference.
    """

    def __init__(self, draft: MtpDraft, embedding: nn.Module, lm_head: nn.Module, num_slots: int):
        c = self.config = draft.config
        self.num_slots = num_slots
        weight = draft.fc.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.kernel = kernel_serves(self.device, self.dtype, c.head_dim, c.head_dim)
        self.embedding = embedding.weight.detach()
        self.eps, self.width = c.rms_norm_eps, (c.hidden_size,)
        self.norm_embedding = draft.pre_fc_norm_embedding.weight.detach()
        self.norm_hidden, self.norm = draft.pre_fc_norm_hidden.weight.detach(), draft.norm.weight.detach()
        precision, (layer,) = draft.matmul_precision, draft.layers
        self.fc = PackedLinear([draft.fc], precision=precision)
        self.layer = FusedLayer(
            layer,
            head_dim=c.head_dim,
            eps=self.eps,
            scale=c.head_dim**-0.5,
            window=None,
            causal=True,
            precision=precision,
        )
        attention = layer.self_attn
        self.context_kv = PackedLinear([attention.k_proj, attention.v_proj], share=False, precision=precision)
        self.proposals = Proposals(lm_head, draft.vocabulary)
        self.head = self.proposals.head
        if type(self.head) is nn.Linear:
            self.head = PackedLinear([self.head], share=False, precision=precision)
        self.rotary = RotaryTable(lambda p: tuple(x.squeeze(-2) for x in draft.cos_sin(p, self.dtype)))
        shape = (num_slots, c.num_key_value_heads, c.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in "kv")
        self.states = torch.zeros(num_slots, c.hidden_size, dtype=self.dtype, device=self.device)
        self.injector = None
        if self.on_host() and self.fc.host is not None and self.context_kv.host is not None:
            # A drafter's injector with other features: what `fc` gets, in one call from there on.
            self.injector = _core.HostInjector(
                fc=self.fc.host,
                norm=self.layer.norm1.numpy(),
                key_values=self.context_kv.host,
                key_norms=[None if self.layer.k_norm is None else self.layer.k_norm.numpy()],
                kv_heads=c.num_key_value_heads,
                head_dim=c.head_dim,
                eps=self.eps,
            )

    def on_host(self) -> bool:
        """Whether products and attention are the extension's."""
        return self.kernel and multiplies(self.device, self.dtype)

    def both(self, tokens: Tensor, states: Tensor) -> Tensor:
        """What `fc` gets, [M, 2 H]: tokens int64 [M], states [M, H]."""
        embedded = torch.rms_norm(F.embedding(tokens, self.embedding), self.width, self.norm_embedding, self.eps)
        states = torch.rms_norm(states, self.width, self.norm_hidden, self.eps)
        return torch.cat((embedded, states), dim=-1)

    def inject(self, features: Tensor, positions, slots, rows, token_ids, before) -> None:
        c = self.config
        if features.ndim != 2 or features.shape[1] != c.hidden_size:
            raise InvalidArgument(f"features: got shape {list(features.shape)}, expected [T, {c.hidden_size}]")
        count = features.shape[0] if rows is None else rows.shape[0]
        for name, values in (("positions", positions), ("slots", slots), ("token_ids", token_ids), ("before", before)):
            if values is None or values.shape != (count,):
                got = "nothing" if values is None else f"shape {list(values.shape)}"
                raise InvalidArgument(f"{name}: got {got}, expected [{count}] (features)")
        if count == 0:
            return
        given = positions, slots
        positions, slots, rows, tokens, before = map(self._tensor, (positions, slots, rows, token_ids, before))
        states = (features if rows is None else features[rows]).to(self.dtype)
        # First all, then those before: most of a step's tokens follow another one of it.
        self.states.index_copy_(0, slots, states)
        both, limit = self.both(tokens, self._states_at(before)), int(positions.max()) + 1
        if self.injector is not None and self.kernel:
            places, where = (np.ascontiguousarray(values, dtype=np.int64) for values in given)
            self.injector.inject(
                (both.data_ptr(), both.stride(0), both.shape[1]), count, np.arange(count), places, where,
                self.rotary.address(limit), addresses([(self.keys, self.values)]), self.num_slots, threads.of_the_extension(),
            )  # fmt: skip
            return
        kv = self.context_kv(torch.rms_norm(self.fc(both), self.width, self.layer.norm1, self.eps))
        kv = kv.view(-1, 2, c.num_key_value_heads, c.head_dim)
        keys = kv[:, 0]
        if self.layer.k_norm is not None:
            keys = torch.rms_norm(keys, (c.head_dim,), self.layer.k_norm, self.eps)
        cos, sin = self.rotary.lookup(positions, limit)
        self.keys.index_copy_(0, slots, rotate_rows(keys.contiguous(), cos, sin))
        self.values.index_copy_(0, slots, kv[:, 1])

    def _states_at(self, slots: Tensor) -> Tensor:
        """The target's states [M, H] at slots int64 [M], zeros for -1."""
        states = self.states.index_select(0, slots.clamp(min=0))
        return states.masked_fill_((slots < 0)[:, None], 0.0)

    def _tensor(self, values) -> Tensor | None:
        if values is None or isinstance(values, Tensor):
            return values
        return torch.from_numpy(np.array(values, dtype=np.int64)).to(self.device)

    def candidates(self, anchors, lengths, page_table, row_ids, page_size: int, valid_from, size: int, k: int):
        c = self.config
        anchors, lengths = np.asarray(anchors, dtype=np.int64), np.asarray(lengths, dtype=np.int32)
        n = lengths.size
        bad = anchors[(anchors < 0) | (anchors >= self.embedding.shape[0])]
        if bad.size:
            raise InvalidArgument(f"anchors: got {int(bad[0])}, expected 0..{self.embedding.shape[0] - 1}")
        if n == 0:
            return np.empty((0, size - 1, k), dtype=np.int64), np.empty((0, size - 1, k), dtype=np.float32)
        row_ids = np.arange(n, dtype=np.int32) if row_ids is None else np.asarray(row_ids, dtype=np.int32)
        page_table = np.asarray(page_table, dtype=np.int32)
        first = np.zeros(n, dtype=np.int32) if valid_from is None else np.asarray(valid_from, dtype=np.int32)
        pages, within = np.divmod(np.maximum(lengths - 1, 0), page_size)
        slots = page_table[row_ids, pages].astype(np.int64) * page_size + within
        states = self._states_at(self._tensor(np.where(first < lengths, slots, -1)))
        # The first token of a context has no state before it: its keys and values are of nothing.
        seen_from = np.minimum(first + 1, lengths).astype(np.int32)

        tokens, steps = self._tensor(anchors), size - 1
        places = self._tensor((lengths[:, None] + np.arange(steps)).T.reshape(-1))
        angles = [part.view(steps, n, 1, -1) for part in self.rotary.lookup(places, int(lengths.max()) + size)]
        shapes = ((self.layer.heads, c.head_dim), (self.layer.kv_heads, c.head_dim), (self.layer.kv_heads, c.head_dim))
        block = [torch.empty(n, steps, *shape, dtype=self.dtype, device=self.device) for shape in shapes]
        picked, chances = [], []
        for step in range(steps):
            x = self.fc(self.both(tokens, states))
            normed = torch.rms_norm(x, self.width, self.layer.norm1, self.eps)
            for rows, new in zip(block, self._heads(normed, *(part[step] for part in angles))):
                rows[:, step] = new
            # Earlier rows of the block attend again, for the sake of one kernel; their products are not repeated.
            q, keys, values = (rows[:, : step + 1].flatten(0, 1) for rows in block)
            attention = self._attention(n, step + 1, lengths, page_table, row_ids, page_size, seen_from)
            attended = attention.attend(
                q, keys, values, self.keys, self.values, scale=self.layer.scale, causal=True, window=None
            )
            attended = attended.reshape(n, step + 1, -1)[:, -1].contiguous()
            x = self.layer.out.plus(attended, x)
            inner = torch.rms_norm(x, self.width, self.layer.norm2, self.eps)
            x = self.layer.down.plus(self.layer.swiglu(self.layer.gate_up(inner)), x)
            states = torch.rms_norm(x, self.width, self.norm, self.eps)
            logits = self.head(states)
            # The first of equals, which topk does not promise.
            best = logits.argmax(dim=-1, keepdim=True) if k == 1 else logits.topk(k, dim=-1).indices
            picked.append(self.proposals.named(best))
            chances.append(logits.float().softmax(dim=-1).gather(-1, best))
            tokens = picked[-1][:, 0]
        return torch.stack(picked, dim=1).cpu().numpy(), torch.stack(chances, dim=1).cpu().numpy()

    def _heads(self, normed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, rotated, and values [n, heads, head_dim] of what the layer attends with."""
        layer = self.layer
        qkv = layer.qkv(normed).view(normed.shape[0], -1, layer.head_dim)
        qk, values = qkv[:, : layer.heads + layer.kv_heads], qkv[:, layer.heads + layer.kv_heads :]
        if layer.head_norm is not None:
            qk = torch.rms_norm(qk, (layer.head_dim,), None, self.eps).mul_(layer.head_norm)
        qk = rotate_rows(qk, cos, sin)
        return qk[:, : layer.heads], qk[:, layer.heads :], values

    def _attention(self, n: int, rows: int, lengths, page_table, row_ids, page_size: int, seen_from):
        """Attention of blocks of `rows` tokens over their contexts."""
        if self.kernel and self.device.type == "cpu":
            return HostAttention(
                slots=None, num_slots=self.num_slots, threads=threads.of_the_extension(),
                query_starts=np.arange(n + 1, dtype=np.int32) * rows, context_lens=lengths, page_table=page_table, row_ids=row_ids,
                page_size=page_size, valid_from=seen_from, ancestors=None,
            )  # fmt: skip
        batch = StepBatch.from_arrays(
            token_ids=np.zeros(n * rows, dtype=np.int64),
            positions=np.zeros(n * rows, dtype=np.int64),
            slots=np.zeros(n * rows, dtype=np.int64),  # not written: the block's keys and values are scratch
            query_starts=np.arange(n + 1, dtype=np.int32) * rows,
            context_lens=lengths,
            page_table=page_table,
            row_ids=row_ids,
            logit_rows=np.empty(0, dtype=np.int64),
            page_size=page_size,
            device=self.device,
        )
        return step_attention(batch, num_slots=self.num_slots, write=False, kernel=self.kernel, valid_from=seen_from)


def unrolled_hidden(
    draft: MtpDraft,
    hidden: Tensor,
    tokens: Tensor,
    anchors: Tensor,
    steps: int,
    document: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    """The head unrolled from many anchors of a sequence in one differentiable pass, fed with the true tokens and its own states.

    hidden [b, S, H]: the target's states at every position; tokens int64 [b, S]; anchors int64 [b, A] in 0..S-1: positions of the
    anchors. Gives [b, A, steps, H], ready for the head; row j predicts the token at anchor + 1 + j. Rows may reach past S; what they give is
    of no use.

    Where a row holds several documents behind each other, `document` [b, S] int64 numbers them and `position` [b, S] int64 counts from the
    beginning of each: an unrolling then sees its own document only.

    A row sees the context strictly before its anchor, without the first token, and the rows of its own unrolling up to itself: what it will
    see when it drafts and all drafts so far are right.
    """
    c, layer = draft.config, draft.layers[0]
    attention, device = layer.self_attn, tokens.device
    batch, length = tokens.shape
    count = anchors.shape[1]
    kv, dim = c.num_key_value_heads, c.head_dim
    group = c.num_attention_heads // kv

    column = torch.arange(length, device=device)
    if position is None:
        position = column.expand(batch, length)
    if document is None:
        document = torch.zeros_like(position)
    # The context: at every place the state before it and its token. A first token has no state before it, and nobody sees it.
    begins = position == 0
    before = F.pad(hidden[:, :-1], (0, 0, 1, 0)).masked_fill(begins[..., None], 0.0).to(draft.fc.weight.dtype)
    context = layer.input_layernorm(draft.join(tokens, before))
    dtype = torch.promote_types(context.dtype, torch.float32)
    keys, values = attention.key_value(context, *draft.cos_sin(position, dtype))
    keys, values = keys.permute(0, 2, 3, 1), values.permute(0, 2, 1, 3)  # [b, kv, d, S], [b, kv, S, d]
    strange = document[:, None, :] != document.gather(1, anchors)[..., None]
    unseen = (strange | begins[:, None, :] | (column >= anchors[..., None])).view(batch, 1, count, 1, length)
    first = position.gather(1, anchors)

    own_keys: list[Tensor] = []
    own_values: list[Tensor] = []
    outputs = []
    state = before.gather(1, anchors[..., None].expand(-1, -1, before.shape[-1]))
    for step in range(steps):
        x = draft.join(tokens.gather(1, (anchors + step).clamp(max=length - 1)), state)
        normed = layer.input_layernorm(x)
        cos, sin = draft.cos_sin(first + step, dtype)
        q = attention.query(normed, cos, sin) * dim**-0.5
        key, value = attention.key_value(normed, cos, sin)
        own_keys.append(key)
        own_values.append(value)
        # [b, kv, A, g, d]: the query heads that share a key head become extra rows of the same product.
        q = q.view(batch, count, kv, group, dim).permute(0, 2, 1, 3, 4)
        scores = (q.reshape(batch, kv, count * group, dim) @ keys.to(q.dtype)).view(batch, kv, count, group, length)
        mine = torch.stack(own_keys, dim=-2).permute(0, 2, 1, 4, 3)  # [b, kv, A, d, step + 1]
        scores = torch.cat((scores.masked_fill(unseen, -math.inf), q @ mine.to(q.dtype)), dim=-1)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype)
        far, near = weights.split((length, step + 1), dim=-1)
        attended = (far.reshape(batch, kv, count * group, length) @ values).view(batch, kv, count, group, dim)
        attended = attended + near @ torch.stack(own_values, dim=-2).permute(0, 2, 1, 3, 4).to(near.dtype)
        attended = attended.permute(0, 2, 1, 3, 4).reshape(batch, count, kv * group * dim)
        state = draft.norm(layer.close(x, attended, None, 1))
        outputs.append(state)
    return torch.stack(outputs, dim=2)
