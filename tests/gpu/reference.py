"""What the kernels should compute, in float64 on the CPU, and ragged paged batches to compute it on. Tested without a GPU, too."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Batch:
    """A ragged batch over a shuffled paged cache; host arrays."""

    query_starts: np.ndarray
    context_lens: np.ndarray
    pages: np.ndarray
    row_ids: np.ndarray
    page_size: int
    num_slots: int

    @property
    def tokens(self) -> int:
        return int(self.query_starts[-1])

    @property
    def max_block_len(self) -> int:
        return int(np.diff(self.query_starts).max(initial=0))

    @property
    def max_keys(self) -> int:
        return int((self.context_lens + np.diff(self.query_starts)).max(initial=0))

    def slot(self, r: int, key: int) -> int:
        page = self.pages[self.row_ids[r], key // self.page_size]
        return int(page) * self.page_size + key % self.page_size

    def slots(self, r: int, first: int, last: int) -> list[int]:
        return [self.slot(r, key) for key in range(first, last)]

    def token_slots(self) -> np.ndarray:
        """Slot of every packed token."""
        found = [
            slot
            for r, context in enumerate(self.context_lens)
            for slot in self.slots(r, context, context + self.query_starts[r + 1] - self.query_starts[r])
        ]
        return np.array(found, dtype=np.int64)


def make_batch(rng: np.random.Generator, lens: list[int], contexts: list[int], page_size: int = 16) -> Batch:
    """Pages in random order, rows of the table in random order, unused entries invalid."""
    r = len(lens)
    needed = [-(-(context + n) // page_size) for n, context in zip(lens, contexts)]
    total = sum(needed) + 3
    order = rng.permutation(total).astype(np.int32)
    rows = rng.permutation(r + 2)[:r].astype(np.int32)
    pages = np.full((r + 2, max(needed, default=0) + 1), -1, dtype=np.int32)
    start = 0
    for row, count in zip(rows, needed):
        pages[row, :count] = order[start : start + count]
        start += count
    starts = np.concatenate(([0], np.cumsum(lens))).astype(np.int32)
    return Batch(starts, np.array(contexts, dtype=np.int32), pages, rows, page_size, total * page_size)


def random_parents(rng: np.random.Generator, n: int) -> np.ndarray:
    """Parents of a random tree of n nodes, each before its children; -1 for the root."""
    return np.array([-1, *(int(rng.integers(0, i)) for i in range(1, n))][:n], dtype=np.int32)


def depths_of(parents: np.ndarray) -> np.ndarray:
    """Distance of every node from its root."""
    depths = np.zeros(len(parents), dtype=np.int32)
    for i, parent in enumerate(parents):
        depths[i] = 0 if parent < 0 else depths[parent] + 1
    return depths


def masks_of(parents: np.ndarray, words: int) -> np.ndarray:
    """Ancestor words of one request's nodes, uint64 [n, words]."""
    masks = np.zeros((len(parents), words), dtype=np.uint64)
    for i, parent in enumerate(parents):
        if parent >= 0:
            masks[i] = masks[parent]
        masks[i, i // 64] |= np.uint64(1) << np.uint64(i % 64)
    return masks


def attention(
    batch: Batch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    scale: float,
    mask: str,
    window: int | None = None,
    valid_from: np.ndarray | None = None,
    parents: list[np.ndarray] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(scale q K^T) V, one query at a time, float64 [T, heads, dim]; `sinks` [heads] are scores of keys without a value."""
    q, k, v, k_cache, v_cache = (x.double().cpu() for x in (q, k, v, k_cache, v_cache))
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for r, context in enumerate(batch.context_lens.tolist()):
        start, end = batch.query_starts[r : r + 2].tolist()
        n = end - start
        first = 0 if valid_from is None else int(valid_from[r])
        slots = batch.slots(r, first, context)
        keys = torch.cat((k_cache[slots], k[start:end]))
        values = torch.cat((v_cache[slots], v[start:end]))
        depth = np.arange(n) if mask != "ancestors" else depths_of(parents[r])
        key_position = np.concatenate((np.arange(first, context), context + depth))
        for i in range(n):
            if mask == "block":
                own = np.ones(n, dtype=bool)
            elif mask == "causal":
                own = np.arange(n) <= i
            else:
                own, node = np.zeros(n, dtype=bool), i
                while node >= 0:
                    own[node] = True
                    node = parents[r][node]
            seen = np.concatenate((np.ones(context - first, dtype=bool), own))
            distance = context + depth[i] - key_position
            if window is not None:
                seen &= distance < window
                if mask == "block":
                    seen &= -distance < window
            chosen = torch.from_numpy(seen)
            for h in range(heads):
                scores = scale * (keys[chosen, h // group] @ q[start + i, h])
                if softcap is not None:
                    scores = softcap * (scores / softcap).tanh()
                if sinks is not None:
                    scores = torch.cat((scores, sinks[h : h + 1].double().cpu()))
                out[start + i, h] = scores.softmax(0)[: int(chosen.sum())] @ values[chosen, h // group]
    return out


def inject(kv: Tensor, k_norm: Tensor, cos_sin: Tensor, positions: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """K (normalised, rotated) and V of every row and layer, float64 [M, layers, heads, dim]."""
    kv, k_norm, cos_sin = kv.double().cpu(), k_norm.double().cpu(), cos_sin.double().cpu()
    k, v = kv[:, :, 0], kv[:, :, 1]
    k = k / (k.square().mean(-1, keepdim=True) + eps).sqrt() * k_norm[:, None]
    half = cos_sin.shape[1] // 2
    rows = cos_sin[positions.cpu()]
    cos, sin = rows[:, None, None, :half], rows[:, None, None, half:]
    a, b = k[..., :half], k[..., half : 2 * half]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, k[..., 2 * half :]), dim=-1), v


def walk(tokens: np.ndarray, parents: np.ndarray, sampled: np.ndarray) -> list[int]:
    """Nodes kept when `sampled[node]` is drawn after each node: the root, then children that carry the drawn token."""
    path, node = [0], 0
    while True:
        children = [i for i in range(len(tokens)) if parents[i] == node and tokens[i] == sampled[node]]
        if not children:
            return path
        node = children[0]
        path.append(node)


def delta(mixed: Tensor, gates: Tensor, weights, key_heads: int, key_dim: int, value_dim: int) -> tuple[Tensor, Tensor]:
    """The gated delta rule over one text from its begin: outputs float64 [n, Hv, dv], and the state [Hv, dk, dv] after it. What the
    convolution makes is rounded to bfloat16 where a layer of transformers rounds it."""
    mixed, gates = mixed.double().cpu(), gates.double().cpu()
    weight, decay, dt_bias = (part.double().cpu() for part in weights[:3])
    heads, taps, keys = decay.shape[0], weight.shape[0], key_heads * key_dim
    group = heads // key_heads
    padded = torch.cat((mixed.new_zeros(taps - 1, mixed.shape[1]), mixed))
    state, out = mixed.new_zeros(heads, key_dim, value_dim), []

    def rounded(x: Tensor) -> Tensor:
        return x.bfloat16().double()

    def unit(rows: Tensor) -> Tensor:
        rows = rows.view(key_heads, key_dim)
        rows = rows / (rows.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        return rows.repeat_interleave(group, dim=0)

    for t in range(mixed.shape[0]):
        made = rounded(torch.nn.functional.silu(rounded((padded[t : t + taps] * weight).sum(0))))
        query, key, value = unit(made[:keys]), unit(made[keys : 2 * keys]), made[2 * keys :].view(heads, value_dim)
        b, a = gates[t].view(2, heads)
        beta = rounded(rounded(b.sigmoid()) * weights.beta_scale)
        state = state * (decay * torch.nn.functional.softplus(a + dt_bias)).exp()[:, None, None]
        change = (value - torch.einsum("hkv,hk->hv", state, key)) * beta[:, None]
        state = state + key[:, :, None] * change[:, None]
        out.append(torch.einsum("hkv,hk->hv", state, query) * key_dim**-0.5)
    return torch.stack(out), state
