"""Block attention over a paged KV cache, for packed ragged batches.

    request r:  context keys  slot(j) = page_row[j / page_size] * page_size + j % page_size,  j < context_lens[r]
                own keys      the step's tokens of r, at positions context_lens[r] ..

A token sees the context of its request and its request's own tokens: the earlier ones and itself (causal, the target; in a tree
the earlier ones are those of its path) or all of them (the drafter's block). One object is built per step, and every layer attends
through it.

`TorchAttention` is the reference: plain torch, any device. `step_attention` picks the extension's kernel for the device (host or
CUDA) where one applies and the reference elsewhere; all have the same `attend`.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import _core, cuda, threads
from .errors import InvalidArgument

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class TorchAttention:
    """Reference attention of one step.

    query_starts int32 [R+1], context_lens int32 [R], row_ids int32 [R] into page_table int32 [rows, pages]; slots int64
    [T] where own K and V are written, or None when they are scratch and only serve this step; valid_from int32 [R]:
    context keys before that position are not seen (0 when None); ancestors uint64 [T, words]: see `StepBatch`. All host arrays, except
    slots (a tensor).
    """

    def __init__(
        self,
        *,
        query_starts: np.ndarray,
        context_lens: np.ndarray,
        page_table: np.ndarray,
        row_ids: np.ndarray,
        page_size: int,
        slots: Tensor | None = None,
        valid_from: np.ndarray | None = None,
        ancestors: np.ndarray | None = None,
        device: torch.device | str = "cpu",
    ):
        self._seen = None if ancestors is None else np.unpackbits(ancestors.view(np.uint8), axis=1, bitorder="little")
        self.slots = slots
        self.device = torch.device(device)
        self.requests: list[tuple[int, int, int, int, Tensor | slice]] = []
        offsets = np.arange(page_size, dtype=np.int64)
        for r, context in enumerate(context_lens.tolist()):
            first = 0 if valid_from is None else int(valid_from[r])
            if not 0 <= first <= context:
                raise InvalidArgument(f"valid_from[{r}]: got {first}, expected 0..{context} (context_lens)")
            needed = -(-context // page_size)
            if needed > page_table.shape[1]:
                raise InvalidArgument(
                    f"context_lens[{r}]: got {context}, expected at most {page_table.shape[1] * page_size}, "
                    f"{page_table.shape[1]} pages of {page_size} slots"
                )
            pages = page_table[row_ids[r], :needed].astype(np.int64)
            keys = (pages[:, None] * page_size + offsets).reshape(-1)[first:context]
            self.requests.append((int(query_starts[r]), int(query_starts[r + 1]), context, first, self._index(keys)))
        self._masks: dict[tuple[int, bool, int | None, int], Tensor | None] = {}

    def _index(self, keys: np.ndarray) -> Tensor | slice:
        # Consecutive slots are read in place; only scattered pages are gathered.
        if keys.size == 0:
            return slice(0, 0)
        if keys[-1] - keys[0] == keys.size - 1 and (keys.size < 2 or bool((np.diff(keys) == 1).all())):
            return slice(int(keys[0]), int(keys[-1]) + 1)
        return torch.from_numpy(keys).to(self.device)

    def _mask(self, r: int, causal: bool, window: int | None, group: int) -> Tensor | None:
        """bool [group * n, keys], True where seen; None when everything is."""
        key = (r, causal, window, group)
        if key in self._masks:
            return self._masks[key]
        start, end, context, first, _ = self.requests[r]
        n = end - start
        position = torch.arange(context, context + n, device=self.device)
        own = None
        if causal and self._seen is not None:
            own = torch.from_numpy(self._seen[start:end, :n].astype(bool)).to(self.device)
            position = context + own.sum(dim=1) - 1
        key_position = torch.cat((torch.arange(first, context, device=self.device), position))
        distance = position[:, None] - key_position[None, :]
        mask = None
        if causal and n > 1:
            mask = distance >= 0
            if own is not None:
                mask[:, context - first :] = own
        if window is not None and context + n - first > window:
            near = distance < window
            if not causal:
                near &= -distance < window
            mask = near if mask is None else mask & near
        if mask is not None:
            mask = mask.repeat(group, 1)
        self._masks[key] = mask
        return mask

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        scale: float,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """q [T, heads, d], k and v [T, kv_heads, d] of this step; caches [num_slots, kv_heads, d] -> [T, heads, d].

        Writes k and v to the cache first, unless they are scratch. Head h reads key head h // (heads / kv_heads).
        A window w lets a query see keys at a distance below w. With a softcap c a score s becomes c * tanh(s / c). `sinks` [heads]: scores
        of one more key per head, seen by every query, whose value is zero.
        """
        heads, kv_heads = q.shape[1], k.shape[1]
        group = heads // kv_heads
        if self.slots is not None:
            k_cache.index_copy_(0, self.slots, k.to(k_cache.dtype))
            v_cache.index_copy_(0, self.slots, v.to(v_cache.dtype))
        out = None
        for r, (start, end, _, _, index) in enumerate(self.requests):
            n = end - start
            if n == 0:
                continue
            keys = torch.cat((k_cache[index].to(q.dtype), k[start:end])).transpose(0, 1)
            values = torch.cat((v_cache[index].to(q.dtype), v[start:end])).transpose(0, 1)
            # The query heads that share a key head become extra rows, so keys are never repeated.
            rows = q[start:end].unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3).reshape(kv_heads, group * n, -1)
            mask = self._mask(r, causal, window, group)
            if softcap is None and sinks is None:
                one = F.scaled_dot_product_attention(rows[None], keys[None], values[None], attn_mask=mask, scale=scale)
            else:
                one = _spelled_out(rows, keys, values, mask, scale, softcap, sinks)
            one = one.view(kv_heads, group, n, -1).permute(2, 0, 1, 3).reshape(n, heads, -1)
            if n == q.shape[0]:
                return one
            if out is None:
                out = q.new_empty(q.shape[0], heads, v.shape[-1])
            out[start:end] = one
        return q.new_empty(0, heads, v.shape[-1]) if out is None else out


def _spelled_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of one request with what torch's has no argument for, in float32: q [kv_heads, group * n, d], k and v [kv_heads, keys, d]."""
    scores = q.float() @ k.float().transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        group = sinks.numel() // k.shape[0]
        rows = sinks.float().view(-1, group, 1).expand(-1, group, q.shape[1] // group)
        scores = torch.cat((scores, rows.reshape(k.shape[0], -1, 1)), dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[1]]
    return (weights @ v.float()).to(q.dtype)


class HostAttention:
    """The extension's host kernel: reads and writes pages in place, and gives the same bits whatever else is in the batch.

    Arguments as for `TorchAttention`, with `slots` as a host array. CPU tensors, float32 or bfloat16, keys as wide as
    values.
    """

    def __init__(self, *, slots: np.ndarray | None, num_slots: int, threads: int, **arrays):
        self.batch = _core.AttentionBatch(num_slots=num_slots, slots=slots, **arrays)
        self._threads = threads

    def attend(
        self,
        q,
        k,
        v,
        k_cache,
        v_cache,
        *,
        scale: float,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """As `TorchAttention.attend`."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        _core.paged_attention(
            self.batch, _address(q), _address(k), _address(v), _address(k_cache), _address(v_cache), _address(out),
            _DTYPES[q.dtype], q.shape[1], k.shape[1], q.shape[2], scale, "causal" if causal else "block", window, self._threads,
            softcap, None if sinks is None else sinks.detach().float().contiguous().numpy(),
        )  # fmt: skip
        return out


class CudaAttention:
    """The CUDA kernel: reads and writes pages in place; a row's bits do not depend on what else is in the batch. bfloat16.

    query_starts [R+1], context_lens [R], valid_from [R] and the table: int32 tensors on the device; slots int64 [T]; ancestors int64 or
    uint64 [T, words]. The bounds `max_block_len` and `max_keys` (context and own tokens) hold for every request.
    """

    def __init__(
        self,
        *,
        query_starts: Tensor,
        context_lens: Tensor,
        table: cuda.PageTable,
        max_block_len: int,
        max_keys: int,
        slots: Tensor | None = None,
        valid_from: Tensor | None = None,
        ancestors: Tensor | None = None,
    ):
        self.query_starts, self._context_lens, self._table = query_starts, context_lens, table
        self._max_block_len, self._max_keys = max_block_len, max_keys
        self._slots, self._valid_from, self._ancestors = slots, valid_from, ancestors

    @classmethod
    def upload(
        cls, *, slots: np.ndarray | None, slots_device: Tensor | None, num_slots: int, device: torch.device, **arrays
    ) -> CudaAttention:
        """From host arrays as `HostAttention` takes them, checked as there and uploaded in one copy."""
        _core.AttentionBatch(num_slots=num_slots, slots=slots, **arrays)
        starts, context_lens, page_size = arrays["query_starts"], arrays["context_lens"], arrays["page_size"]
        valid_from = arrays["valid_from"]
        lens = np.diff(starts)
        max_keys = int((context_lens + lens).max(initial=0))
        # The rows in use, as far as they are: the whole table may be large.
        width = -(-max_keys // page_size)
        pages = arrays["page_table"][arrays["row_ids"], :width]
        r = context_lens.size
        parts = [starts, context_lens, np.arange(r, dtype=np.int32), pages.reshape(-1)]
        if valid_from is not None:
            parts.append(valid_from)
        packed = torch.from_numpy(np.concatenate(parts)).to(device, non_blocking=True)
        ends = np.cumsum([part.size for part in parts])
        views = [packed[end - part.size : end] for part, end in zip(parts, ends, strict=True)]
        ancestors = arrays.get("ancestors")
        if ancestors is not None:
            ancestors = torch.from_numpy(ancestors.view(np.int64)).to(device, non_blocking=True)
        return cls(
            query_starts=views[0],
            context_lens=views[1],
            table=cuda.PageTable(views[3].view(r, pages.shape[1]), views[2], page_size),
            max_block_len=int(lens.max(initial=0)),
            max_keys=max_keys,
            slots=slots_device if slots is not None else None,
            valid_from=views[4] if valid_from is not None else None,
            ancestors=ancestors,
        )

    def attend(
        self,
        q,
        k,
        v,
        k_cache,
        v_cache,
        *,
        scale: float,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """As `TorchAttention.attend`."""
        ancestors = self._ancestors if causal else None
        return cuda.block_attention(
            q, k, v, k_cache, v_cache, query_starts=self.query_starts, context_lens=self._context_lens, table=self._table,
            max_block_len=self._max_block_len, max_keys=self._max_keys, scale=scale,
            mask="ancestors" if ancestors is not None else "causal" if causal else "block",
            window=window, valid_from=self._valid_from, slots=self._slots, ancestors=ancestors, softcap=softcap,
            sinks=None if sinks is None else sinks.float().contiguous(),
        )  # fmt: skip


def _address(rows: Tensor) -> tuple[int, int, int]:
    """Address and the row and head strides in elements of [rows, heads, dim]; the elements of a head must be adjacent."""
    row, head, element = rows.stride()
    if element != 1:
        raise InvalidArgument(f"attention: got a tensor of strides {rows.stride()}, expected the last one to be 1")
    return rows.data_ptr(), row, head


def kernel_serves(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> bool:
    """Whether a kernel of the extension attends with such keys and values; the reference does otherwise. On a CPU the narrower ones have to be
    widened, see `widened`."""
    if cuda.available(device):
        return dtype == torch.bfloat16 and key_dim == value_dim and key_dim in cuda.HEAD_DIMS
    return device.type == "cpu" and dtype in _DTYPES and max(key_dim, value_dim) <= 512


def widened(x: Tensor, dim: int) -> Tensor:
    """[..., d] with zeros behind, up to `dim`: they add nothing to a score, and what attention gives ends with as many more of them."""
    return x if x.shape[-1] == dim else F.pad(x, (0, dim - x.shape[-1]))


def step_attention(
    batch, *, num_slots: int, write: bool, kernel: bool, valid_from: np.ndarray | None = None
) -> CudaAttention | HostAttention | TorchAttention:
    """The attention of one `StepBatch`: what every layer of a forward pass calls.

    `write` stores the step's keys and values at `batch.slots` in caches of `num_slots`; without it they are scratch.
    `kernel` picks the extension's kernel for the batch's device (see `kernel_serves`), else the torch reference, its oracle.
    """
    arrays = {
        "query_starts": batch.query_starts,
        "context_lens": batch.context_lens,
        "page_table": batch.page_table,
        "row_ids": batch.row_ids,
        "page_size": batch.page_size,
        "valid_from": valid_from,
        "ancestors": batch.ancestors,
    }
    device = batch.token_ids.device
    if kernel:
        slots = batch.slots_host if write else None
        if cuda.available(device):
            return CudaAttention.upload(
                slots=slots, slots_device=batch.slots, num_slots=num_slots, device=device, **arrays
            )
        return HostAttention(slots=slots, num_slots=num_slots, threads=threads.of_the_extension(), **arrays)
    return TorchAttention(slots=batch.slots if write else None, device=device, **arrays)
