"""The CUDA kernels of this package inside SGLang's worker.

    target's logits ───────> Draws ─────> its token at every place      one launch, where no request is seeded
    drafts, drawn tokens ──> Walk ──────> accepted, lengths, bonus      one launch
    path of a tree ────────> PathKv ────> its KV moves to the front     one launch for all layers of the target
    projected features ────> ContextKv ─> pages of all drafter layers   one product and one launch, committed tokens only

SGLang's sampler keeps the seeded draws, because they are to be SGLang's; its attention backends keep both forward passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dflash_rs import cuda

# What SGLang writes where there is no top-k.
TOP_K_ALL = 1 << 30
# Below it logits divided by the temperature may overflow, and the kernel takes none.
_LEAST_TEMPERATURE = 1e-5


class Draws:
    """The target's token at every place of a batch whose draws are not seeded: one launch that reads the logits and changes nothing, where SGLang's sampler
    makes probabilities of them, sorts or renormalises them, and draws.

    The law is that of SGLang's sampler, the draws are others. A request's noise is keyed by a seed that nobody knows and the position, so that a place that is
    drawn again, after a draft before it was rejected, is drawn with the same noise, which nothing depends on that was kept. Drafts may be drawn with
    it, too: see ``coupled``.
    """

    def __init__(self, device: torch.device, joint: bool):
        """`joint`: whether SGLang applies top-k and top-p at once where there is a min-p, too; its FlashInfer backend applies one after the other."""
        self.device, self._joint = device, joint
        # Who is in the batch that was laid out last. The objects are kept, because another one may get the address of one that is gone.
        self._params: list[Any] = []
        self._seeds: list[int] = []
        self._rows: cuda.SamplingRows | None = None
        self._drafting: cuda.SamplingRows | None = None
        self._starts: dict[tuple[int, int], Tensor] = {}

    def serves(self, params: Sequence[Any], dtype: torch.dtype) -> bool:
        """Whether requests with these sampling parameters are drawn by the law of SGLang's sampler, from logits of this type."""
        return dtype in (torch.float32, torch.bfloat16) and all(
            p.temperature >= _LEAST_TEMPERATURE
            and (self._joint or p.min_p == 0 or p.top_p == 1.0 or p.top_k >= TOP_K_ALL)
            for p in params
            if p.top_k > 1
        )

    def __call__(self, logits: Tensor, params: Sequence[Any], block: Tensor, positions: Tensor) -> Tensor:
        """logits float32 or bfloat16 ``[R * B, V]``, masked and adjusted; `params` SGLang's sampling parameters of each request; block int64
        ``[R, B]``, positions int64 ``[R * B]``. Returns int64 ``[R * B]``."""
        self._lay_out(params)
        if self._rows is None:
            asked = [_asked(p, seed) for p, seed in zip(self._params, self._seeds)]
            self._rows = cuda.sampling_rows(asked, self.device)
        return self._drawn(logits, self._rows, block.reshape(-1), positions, block.shape)

    def drafts(self, logits: Tensor, params: Sequence[Any], positions: Tensor, sharper: float) -> Tensor:
        """Draws from a drafter's logits float32 or bfloat16 ``[R * P, V]``, `sharper` than they are, with the noise of the target's draws behind the tokens at
        `positions` i64 ``[R, P]``. Filters are left out: no fewer drafts are accepted without them. Returns int64 ``[R * P]``."""
        self._lay_out(params)
        if self._drafting is None:
            warm = [max(p.temperature / sharper, _LEAST_TEMPERATURE) if p.top_k > 1 else 0.0 for p in self._params]
            asked = [{"seed": seed, "temperature": t} for seed, t in zip(self._seeds, warm)]
            self._drafting = cuda.sampling_rows(asked, self.device)
        flat = positions.reshape(-1)
        # Nothing is asked of the tokens themselves.
        return self._drawn(logits, self._drafting, flat, flat, positions.shape)

    def _drawn(
        self, logits: Tensor, asked: cuda.SamplingRows, tokens: Tensor, positions: Tensor, shape: Sequence[int]
    ) -> Tensor:
        rows, places = shape
        if (rows, places) not in self._starts:
            self._starts[rows, places] = torch.arange(rows + 1, dtype=torch.int32, device=self.device) * places
        drawn = cuda.sample_rows(
            logits.contiguous(),
            asked,
            query_starts=self._starts[rows, places],
            token_ids=tokens,
            positions=positions,
        )
        # A row in which no token is possible has none.
        return drawn.tokens.clamp_(min=0)

    def _lay_out(self, params: Sequence[Any]) -> None:
        """The batch is that of these requests; another one gets other seeds."""
        if len(params) != len(self._params) or any(a is not b for a, b in zip(params, self._params)):
            self._rows = self._drafting = None
            self._seeds, self._params = torch.randint(2**62, (len(params),)).tolist(), list(params)


def _asked(params: Any, seed: int) -> dict[str, Any]:
    """A request's filters in the words of `dflash_rs.cuda.sampling_rows`; what is left of its options has changed its logits."""
    if params.top_k <= 1:
        return {"seed": seed, "temperature": 0.0}
    return {
        "seed": seed,
        "temperature": params.temperature,
        "top_k": 0 if params.top_k >= TOP_K_ALL else params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p,
    }


class Walk:
    """Follows drafts while they are the tokens that were drawn, for a whole batch in one launch."""

    def __init__(self, device: torch.device):
        self.device = device
        self._shape = (0, 0)
        self._starts = torch.zeros(1, dtype=torch.int32, device=device)
        self._nowhere = torch.zeros((1, 1), dtype=torch.int32, device=device)

    def __call__(
        self, block: Tensor, sampled: Tensor, prefix_lens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """block and sampled int64 [R, B]: anchors with their drafts, and what was drawn after each; prefix_lens [R].

        Returns accepted int32 [R], tokens gained int32 [R], bonus int64 [R], the gained tokens int64 [R, B] (what is behind the
        bonus is never read), and the new lengths [R].
        """
        rows, places = block.shape
        if self._shape != (rows, places):
            self._shape = (rows, places)
            self._starts = torch.arange(rows + 1, dtype=torch.int32, device=self.device) * places
        sampled = sampled.contiguous()
        room = cuda.empty_accepted(rows, rows * places, places, self.device)
        done = cuda.accept(
            query_starts=self._starts,
            context_lens=prefix_lens.to(torch.int32),
            token_ids=block.contiguous().view(-1),
            sampled=sampled.view(-1),
            # No page is looked up without commit_slots.
            table=cuda.PageTable(self._nowhere, self._starts[:rows], 1),
            max_nodes=places,
            out=room._replace(path=None, commit_rows=None, commit_positions=None, commit_slots=None),
        )
        return (
            done.accepted,
            done.out_lens,
            done.next_anchors,
            sampled.clone(),
            prefix_lens + done.out_lens.to(prefix_lens.dtype),
        )


class ContextKv:
    """Draft K and V of committed tokens for all layers of SGLang's drafter, written straight into its pages."""

    def __init__(self, layers: Any, pool: Any):
        attentions = [layer.self_attn for layer in layers]
        first = attentions[0]
        self.layers, self.heads, self.head_dim = len(attentions), int(first.num_kv_heads), int(first.head_dim)
        self.eps = float(first.k_norm.variance_epsilon)
        # Every layer reads the same features, so one product gives all K and V.
        self.weight = torch.cat(
            [a.qkv_proj.weight[a.q_size : a.q_size + 2 * a.kv_size].detach() for a in attentions]
        ).contiguous()
        self.norms = torch.stack([a.k_norm.weight.detach() for a in attentions]).to(torch.bfloat16).contiguous()
        self.cos_sin = first.rotary_emb.cos_sin_cache.detach().to(torch.float32).contiguous()
        ids = [a.attn.layer_id for a in attentions]
        self.caches = cuda.KvCaches([pool.get_key_buffer(i) for i in ids], [pool.get_value_buffer(i) for i in ids])

    @classmethod
    def build(cls, model: Any, pool: Any, positions: int, device: torch.device) -> tuple[ContextKv | None, str]:
        """The object, or None and the reason why SGLang's own code has to do it; `positions` is how many there may be."""
        from sglang.srt.speculative.dflash_utils import can_dflash_use_fused_qkv_proj

        if not cuda.available(device):
            return None, f"this build has no kernels for {device} (dflash-rs doctor tells)"
        if not getattr(model, "supports_fused_context_kv", True):
            return None, f"{type(model).__name__} prepares its context layer by layer"
        expected = None
        for index, layer in enumerate(model.layers):
            attention = layer.self_attn
            usable, reason = can_dflash_use_fused_qkv_proj(attention.qkv_proj)
            rope = attention.rotary_emb
            rope._ensure_cos_sin_cache_length(positions - 1)
            scales = (getattr(attention.attn, name, None) for name in ("k_scale", "v_scale"))
            head_dim, rotary = int(attention.head_dim), int(getattr(rope, "rotary_dim", attention.head_dim))
            same = (attention.num_kv_heads, head_dim, float(attention.k_norm.variance_epsilon))
            expected = same if expected is None else expected
            for wrong, what in (
                (not usable, reason),
                (any(scale is not None and float(scale) != 1.0 for scale in scales), "K or V is scaled"),
                (not getattr(rope, "is_neox_style", True), "rotary halves are interleaved"),
                (type(rope).forward_native is not _plain_rope().forward_native, f"rotation by a {type(rope).__name__}"),
                (rotary % 16, f"{rotary} rotated elements, not a multiple of 16"),
                (rope.cos_sin_cache.shape[0] < positions, f"a rotary table of {rope.cos_sin_cache.shape[0]} positions"),
                (head_dim not in cuda.HEAD_DIMS, f"heads of {head_dim} elements"),
                (attention.qkv_proj.weight.dtype != torch.bfloat16, f"weights are {attention.qkv_proj.weight.dtype}"),
                (same != expected, "layers of different shapes"),
            ):
                if wrong:
                    return None, f"drafter layer {index}: {what}"
        buffer = pool.get_key_buffer(model.layers[0].self_attn.attn.layer_id)
        if buffer.dtype != torch.bfloat16 or buffer.ndim != 3:
            return None, f"a KV cache of {buffer.dtype} in {buffer.ndim} dimensions"
        return cls(model.layers, pool), "in use"

    def __call__(
        self,
        hidden: Tensor,
        positions: Tensor,
        slots: Tensor,
        block_slots: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> None:
        """hidden [M, H] bfloat16, positions and slots int64 [M]; of `block_slots` [R, B] only the first `lengths` [R] are committed."""
        if block_slots is not None and lengths is not None:
            places = torch.arange(block_slots.shape[1], device=block_slots.device)
            slots = torch.where(places < lengths[:, None], block_slots, -1).view(-1)
        kv = torch.nn.functional.linear(hidden, self.weight).view(-1, self.layers, 2, self.heads, self.head_dim)
        cuda.kv_inject(kv, self.norms, self.cos_sin, positions, slots, self.caches, eps=self.eps)


class PathKv:
    """Moves the target's K and V of the accepted paths of trees to where those of chains would be."""

    def __init__(self, pool: Any, table: Tensor):
        """`pool` is SGLang's, of slots ``[slots, heads, elements]`` by layer; `table` int32 ``[rows, length]`` names the slots of its requests."""
        self._pool, self._table = pool, table
        first = pool.k_buffer[0]
        self._caches = None
        # A kernel moves a path in order. Torch reads all of it before it writes any; SGLang's own kernel does not say so.
        if cuda.available(first.device) and first.dtype == torch.bfloat16 and first.shape[-1] % 8 == 0:
            self._caches = cuda.KvCaches(list(pool.k_buffer), list(pool.v_buffer))

    def __call__(self, path: Tensor, accepted: Tensor, slots: Tensor, starts: Tensor, rows: Tensor) -> None:
        """`path` i64 ``[R, depth + 1]``: nodes by depth, of which the anchor and `accepted` ``[R]`` more count; `slots` i64 ``[R, M]`` of all nodes,
        `starts` ``[R]``: the anchors' positions, `rows` ``[R]`` of the table."""
        taken = torch.arange(path.shape[1], device=path.device)[None] <= accepted[:, None]
        if self._caches is not None:
            nodes = torch.where(taken, path, -1).to(torch.int32)
            table = cuda.PageTable(self._table, rows.to(torch.int32), 1)
            cuda.compact_kv(nodes, starts.to(torch.int32), self._caches, table)
            return
        front = slots[:, : path.shape[1]]
        # What is behind the path moves onto itself.
        source = torch.where(taken, slots.gather(1, path), front).reshape(-1)
        for cache in (*self._pool.k_buffer, *self._pool.v_buffer):
            cache[front.reshape(-1)] = cache[source]


def _plain_rope() -> Any:
    from sglang.srt.layers.rotary_embedding import RotaryEmbedding

    return RotaryEmbedding
