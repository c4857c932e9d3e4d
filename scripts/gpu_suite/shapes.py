"""One call of every kernel family at a given size: what the sanitizer runs and the benchmark times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from dflash_rs import cuda, recurrent

MASK_TOKEN = 7


@dataclass
class Case:
    """A call to time, what it has to move at least, and torch's way to the same result."""

    kernel: str
    shape: str
    call: Callable[[], object]
    bytes: int | None = None  # None: a matter of launch latency
    torch_call: Callable[[], object] | None = None
    # What the call reads and writes, by name, for those who compute the same in another way (peers.py).
    inputs: SimpleNamespace = field(default_factory=SimpleNamespace)


class Batch:
    """R requests of n tokens over contexts of one length, pages shuffled."""

    def __init__(self, device: torch.device, requests: int, tokens: int, context: int, page_size: int = 16):
        rng = np.random.default_rng()
        width = -(-(context + tokens) // page_size)
        pages = rng.permutation(requests * width).astype(np.int32).reshape(requests, width)
        self.device, self.requests, self.n, self.context = device, requests, tokens, context
        self.num_slots = requests * width * page_size
        self.starts = torch.arange(requests + 1, dtype=torch.int32, device=device) * tokens
        self.lens = torch.full((requests,), context, dtype=torch.int32, device=device)
        rows = torch.arange(requests, dtype=torch.int32, device=device)
        self.table = cuda.PageTable(torch.from_numpy(pages).to(device), rows, page_size)

    @property
    def tokens(self) -> int:
        return self.requests * self.n

    def slots(self) -> torch.Tensor:
        """Slot of every key of every request, int64 [requests, context + n]."""
        keys = torch.arange(self.context + self.n, device=self.device)
        pages = self.table.pages[self.table.row_ids.long()][:, keys // self.table.page_size].long()
        return pages * self.table.page_size + keys % self.table.page_size

    def ids(self, high: int = 1000) -> torch.Tensor:
        return torch.randint(0, high, (self.tokens,), device=self.device)


def normal(*shape: int, device: torch.device) -> torch.Tensor:
    """bfloat16 noise: zeros run faster than real data."""
    return torch.randn(shape, device=device, dtype=torch.float32).bfloat16()


def prepare_case(batch: Batch, drafted: bool = True) -> Case:
    """What the target verifies (`drafted`), or the masked block that the drafter fills."""
    anchors = batch.ids()[: batch.requests]
    drafts = batch.ids().view(batch.requests, -1)[:, 1:].contiguous() if drafted else None
    ids, positions, slots = (torch.empty(batch.tokens, dtype=torch.int64, device=batch.device) for _ in range(3))

    def call():
        cuda.prepare_block(
            query_starts=batch.starts, context_lens=batch.lens, anchors=anchors, table=batch.table, token_ids=ids,
            positions=positions, slots=slots, drafts=drafts, mask_token=MASK_TOKEN,
        )  # fmt: skip

    return Case(
        f"prepare_block {'drafts' if drafted else 'masks'}", f"R={batch.requests} n={batch.n}", call,
        inputs=SimpleNamespace(batch=batch, anchors=anchors, drafts=drafts, out=(ids, positions, slots)),
    )  # fmt: skip


def inject_case(device, rows: int, layers: int, heads: int, dim: int) -> Case:
    kv, norm = normal(rows, layers, 2, heads, dim, device=device), normal(layers, dim, device=device)
    angle = torch.rand(4096, dim // 2, device=device)
    cos_sin = torch.cat((angle.cos(), angle.sin()), -1).contiguous()
    positions, slots = torch.randint(0, 4096, (rows,), device=device), torch.randperm(rows, device=device)
    caches = cuda.KvCaches(*[[normal(rows, heads, dim, device=device) for _ in range(layers)] for _ in "kv"])
    both = torch.cat((angle, angle), -1)
    cos, sin = both.cos().bfloat16(), both.sin().bfloat16()

    def torch_call():
        keys = torch.rms_norm(kv[:, :, 0], (dim,), None, 1e-6) * norm[:, None]
        c, s = cos[positions][:, None, None], sin[positions][:, None, None]
        swapped = torch.cat((-keys[..., dim // 2 :], keys[..., : dim // 2]), -1)
        keys = keys * c + swapped * s
        for layer in range(layers):
            caches.k[layer].index_copy_(0, slots, keys[:, layer])
            caches.v[layer].index_copy_(0, slots, kv[:, layer, 1])

    return Case(
        f"kv_inject_{dim}", f"M={rows} layers={layers} heads={heads}",
        lambda: cuda.kv_inject(kv, norm, cos_sin, positions, slots, caches, eps=1e-6), 2 * kv.numel() * 2, torch_call,
        SimpleNamespace(kv=kv, norm=norm, cos_sin=cos_sin, positions=positions, slots=slots, caches=caches, eps=1e-6),
    )  # fmt: skip


def attention_case(batch: Batch, heads: int, kv_heads: int, dim: int, mask: str) -> Case:
    device = batch.device
    q = normal(batch.tokens, heads, dim, device=device)
    k, v = (normal(batch.tokens, kv_heads, dim, device=device) for _ in "kv")
    caches = [normal(batch.num_slots, kv_heads, dim, device=device) for _ in "kv"]
    keys = batch.context + batch.n
    out, workspace = torch.empty_like(q), cuda.attention_workspace(batch.tokens, heads, dim, keys, device)
    ancestors = None
    if mask == "ancestors":
        bits = (2 ** (torch.arange(batch.n) + 1) - 1).repeat(batch.requests)
        ancestors = bits.view(-1, 1).to(device)

    def call():
        return cuda.block_attention(
            q, k, v, *caches, query_starts=batch.starts, context_lens=batch.lens, table=batch.table, max_block_len=batch.n,
            max_keys=keys, scale=dim**-0.5, mask=mask, ancestors=ancestors, out=out, workspace=workspace,
        )  # fmt: skip

    dense_q = normal(batch.requests, heads, batch.n, dim, device=device)
    dense = [normal(batch.requests, kv_heads, keys, dim, device=device) for _ in "kv"]
    moved = 2 * batch.requests * keys * kv_heads * dim * 2
    return Case(
        f"block_attention_{dim} {mask}", f"R={batch.requests} n={batch.n} keys={keys} {heads}/{kv_heads}", call, moved,
        # No mask: the fastest that torch can do over as many keys.
        lambda: F.scaled_dot_product_attention(dense_q, *dense, enable_gqa=True),
        SimpleNamespace(batch=batch, q=q, k=k, v=v, caches=caches, scale=dim**-0.5, mask=mask, ancestors=ancestors, out=out),
    )  # fmt: skip


def sample_case(
    device, requests: int, rows: int, vocab: int, name: str, options: dict, dtype: torch.dtype = torch.bfloat16
) -> Case:
    batch = Batch(device, requests, rows // requests, 100)
    logits = (torch.randn(rows, vocab, device=device) * 3).to(dtype)
    sampling = cuda.sampling_rows([options | {"seed": r} for r in range(requests)], device)
    ids, positions = batch.ids(), torch.arange(rows, device=device)
    out = cuda.Sampled(
        torch.empty(rows, dtype=torch.int64, device=device), torch.empty(rows, dtype=torch.int32, device=device), None
    )
    scratch = torch.empty(cuda._core.cuda_sample_scratch(rows, vocab), dtype=torch.uint8, device=device)

    def torch_call():
        if options.get("temperature") == 0:
            return logits.argmax(-1)
        x = logits.float() / options.get("temperature", 1.0)
        if "top_p" in options:
            x, order = x.sort(-1, descending=True)
            p = x.softmax(-1)
            p[p.cumsum(-1) - p >= options["top_p"]] = 0
            return order.gather(-1, torch.multinomial(p, 1))
        p = x.softmax(-1)
        if "min_p" in options:
            p[p < options["min_p"] * p.amax(-1, keepdim=True)] = 0
        return torch.multinomial(p, 1)

    def call():
        cuda.sample_rows(
            logits, sampling, query_starts=batch.starts, token_ids=ids, positions=positions, out=out, scratch=scratch
        )

    bits = logits.element_size() * 8
    return Case(
        f"sample_rows {name}", f"rows={rows} V={vocab} {'bf' if bits == 16 else 'f'}{bits}", call, logits.nbytes, torch_call,
        SimpleNamespace(logits=logits, options=options, out=out),
    )  # fmt: skip


def accept_case(batch: Batch) -> Case:
    ids, sampled = batch.ids(2), batch.ids(2)
    arguments = dict(
        query_starts=batch.starts, context_lens=batch.lens, token_ids=ids, sampled=sampled, table=batch.table, max_nodes=batch.n
    )  # fmt: skip
    out = cuda.empty_accepted(batch.requests, batch.tokens, batch.n, batch.device)
    return Case(
        "accept", f"R={batch.requests} n={batch.n}", lambda: cuda.accept(**arguments, out=out),
        inputs=SimpleNamespace(batch=batch, ids=ids, sampled=sampled, out=out),
    )  # fmt: skip


def top_k_case(device, rows: int, vocab: int, k: int) -> Case:
    logits = normal(rows, vocab, device=device)
    return Case(
        "tree_top_k", f"rows={rows} V={vocab} k={k} bf16", lambda: cuda.tree_top_k(logits, k), logits.numel() * 2,
        lambda: logits.float().log_softmax(-1).topk(k, -1), SimpleNamespace(logits=logits, k=k),
    )  # fmt: skip


def tree_case(device, requests: int, depth: int, k: int, nodes: int) -> Case:
    scores = -torch.rand(requests, depth, k, device=device).cumsum(-1)
    tokens = torch.randint(0, 1000, (requests, depth, k), device=device)
    anchors = torch.zeros(requests, dtype=torch.int64, device=device)
    call = lambda: cuda.tree_build(anchors, tokens, scores, nodes)  # noqa: E731
    return Case("tree_build", f"R={requests} depth={depth} k={k} nodes={nodes}", call)


def compact_case(batch: Batch, layers: int, heads: int, dim: int) -> Case:
    caches = cuda.KvCaches(
        *[[normal(batch.num_slots, heads, dim, device=batch.device) for _ in range(layers)] for _ in "kv"]
    )
    half = batch.n // 2
    path = torch.full((batch.requests, batch.n), -1, dtype=torch.int32, device=batch.device)
    path[:, :half] = torch.arange(half, device=batch.device, dtype=torch.int32) * 2
    moved = 2 * batch.requests * (half - 1) * layers * 2 * heads * dim * 2
    return Case(
        "compact_kv", f"R={batch.requests} moved={half - 1} layers={layers} heads={heads}",
        lambda: cuda.compact_kv(path, batch.lens, caches, batch.table), moved,
        inputs=SimpleNamespace(batch=batch, path=path, caches=caches),
    )  # fmt: skip


def delta_case(
    device: torch.device, requests: int, tokens: int, key_heads: int, heads: int, dim: int, taps: int = 4
) -> Case:
    """A layer of a pass of blocks of which the last one was kept by half."""
    channels, kept = 2 * key_heads * dim + heads * dim, tokens // 2
    weights = recurrent.DeltaWeights(
        torch.randn(taps, channels, device=device) / taps,
        -torch.rand(heads, device=device),
        torch.randn(heads, device=device),
        1.0,
    )
    states = recurrent.DeltaStates(
        torch.randn(requests, heads, dim, dim, device=device), normal(requests, taps - 1, channels, device=device),
        normal(requests, tokens, channels, device=device), normal(requests, tokens, 2 * heads, device=device),
        torch.full((requests,), 7, dtype=torch.int32, device=device),
    )  # fmt: skip
    mixed, gates = (normal(requests * tokens, width, device=device) for width in (channels, 2 * heads))
    starts = torch.arange(requests + 1, dtype=torch.int32, device=device) * tokens
    lens = torch.full((requests,), 7 + kept, dtype=torch.int32, device=device)
    slots, out = torch.arange(requests, device=device), mixed.new_empty(requests * tokens, heads, dim)

    def call():
        states.stands.fill_(7)  # or there would be nothing to fold in a second time
        recurrent.delta_rule(
            mixed, gates, weights, states, query_starts=starts, context_lens=lens, slots=slots, longest=tokens, out=out
        )

    moved = requests * (2 * heads * dim * dim * 4 + (2 * tokens + kept) * channels * 2 + tokens * heads * dim * 2)
    return Case("delta_rule", f"R={requests} n={tokens} folded={kept} heads={heads}/{key_heads} dim={dim}", call, moved)
