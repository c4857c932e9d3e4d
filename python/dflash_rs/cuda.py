"""The CUDA kernels on torch tensors: one function per kernel family, launched on torch's current stream.

    prepare_block ──> (drafter) ──> tree_top_k, tree_build ──> (target) ──> sample_rows ──> accept ──> kv_inject, compact_kv
                                     block_attention in both models, recurrent.delta_rule in layers with state

Nothing here synchronises with the host, and nothing is allocated when every output is passed in: a launch can then be
captured in a CUDA graph, after `load()` has loaded the kernels. Sizes, types, strides, devices and overlaps are checked before
a launch; indices that lie in device memory (lengths, slots, page ids) are not, they are the caller's promise.

Integers are int32 unless said otherwise; token ids, positions and slots are int64; keys, values and queries bfloat16.
R requests are packed to T tokens: request r owns tokens `query_starts[r] .. query_starts[r + 1]`, its anchor first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

from . import _core, extras
from .arguments import integer
from .errors import MissingPackage
from .named import named

try:
    import torch
    from torch import Tensor

    from .caches import KvCaches
except ImportError as error:
    raise MissingPackage(f"dflash_rs.cuda needs torch ({error}): {extras.install('torch')}") from error

HEAD_DIMS = (64, 128, 256)
# Keys are cut at multiples of this and partial results joined in order, first those of each so many splits. Both decide the bits of a
# long row, so they are one number each; the second is the kernels' (cuda/params.h).
SPLIT_KEYS = 512
_MERGED_SPLITS = 8

_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.uint64: "uint64",
    torch.uint8: "uint8",
}
_View = tuple[int, str, int, Sequence[int], Sequence[int]]


def available(device: torch.device | str = "cuda") -> bool:
    """Whether this build holds kernels that run on `device`."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available() or not _core.cuda_info()["fatbin_bytes"]:
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    found = _core.cuda_info()["devices"]
    return index < len(found) and bool(found[index]["supported"])


def load(device: torch.device | str = "cuda") -> dict[str, tuple[int, int, int]]:
    """Loads every kernel on `device`, once, before a graph is captured: {kernel: (registers, local bytes, shared bytes)}."""
    with torch.cuda.device(device):
        torch.cuda.init()
        torch.zeros(1, device=device)  # makes torch's context current
        clusters(device)
        return _core.cuda_load()


@cache
def _clusters(index: int) -> bool:
    with torch.cuda.device(index):
        return _core.cuda_clusters(index)


def clusters(device: torch.device | str) -> bool:
    """Whether `block_attention` merges splits of the keys on the chip of `device`, which takes clusters of blocks (compute capability 9.0
    and later): the same results, and a smaller workspace."""
    device = torch.device(device)
    if device.type != "cuda":
        return False
    return _clusters(torch.cuda.current_device() if device.index is None else device.index)


@named
def probe(device: torch.device | str = "cuda") -> int:
    """The architecture of the code that the driver picked for `device`, such as 900."""
    out = torch.zeros(1, dtype=torch.int32, device=device)
    with torch.cuda.device(out.device):
        _core.cuda_probe(_view(out), _stream(out))
    return int(out.item())


def _dtype(tensor: Tensor) -> str:
    return _DTYPES.get(tensor.dtype) or str(tensor.dtype).removeprefix("torch.")


def _view(tensor: Tensor) -> _View:
    device = tensor.get_device()  # -1 for the CPU
    return tensor.data_ptr(), _dtype(tensor), device, tensor.shape, tensor.stride()


def _maybe(tensor: Tensor | None) -> _View | None:
    return None if tensor is None else _view(tensor)


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def _launch(function: Callable[..., None], tensor: Tensor, **arguments) -> None:
    # The kernel runs in the current device's context: that of the tensors, whatever the caller's thread had.
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        with torch.cuda.device(tensor.device):
            function(**arguments, stream=_stream(tensor))
    else:
        function(**arguments, stream=_stream(tensor))


class PageTable(NamedTuple):
    """Where requests keep their KV: slot of key j of request r is
    pages[row_ids[r], j // page_size] * page_size + j % page_size."""

    pages: Tensor
    row_ids: Tensor
    page_size: int


@named
def prepare_block(
    *,
    query_starts: Tensor,
    context_lens: Tensor,
    anchors: Tensor,
    table: PageTable,
    token_ids: Tensor,
    positions: Tensor,
    slots: Tensor | None = None,
    drafts: Tensor | None = None,
    depths: Tensor | None = None,
    mask_token: int = 0,
) -> None:
    """Writes token_ids, positions and slots (all int64 [P]) of a step.

    query_starts [R+1], context_lens [R], anchors int64 [R]; drafts int64 [R, g] behind the anchors, or `mask_token` everywhere
    when None; depths [P] for trees. Rows from query_starts[R] to P are padding: token 0, position 0, slot -1.
    """
    _launch(
        _core.cuda_prepare_block,
        token_ids,
        query_starts=_view(query_starts),
        context_lens=_view(context_lens),
        anchors=_view(anchors),
        page_table=_view(table.pages),
        row_ids=_view(table.row_ids),
        page_size=table.page_size,
        token_ids=_view(token_ids),
        positions=_view(positions),
        slots=_maybe(slots),
        drafts=_maybe(drafts),
        depths=_maybe(depths),
        mask_token=mask_token,
    )


@named
def kv_inject(
    kv: Tensor,
    k_norm: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    caches: KvCaches,
    *,
    eps: float,
    rows: Tensor | None = None,
) -> None:
    """Normalises and rotates the keys of committed tokens and stores their K and V, for all drafter layers in one launch.

    kv [S, layers, 2, kv_heads, head_dim]: K and V as the projections gave them. k_norm [layers, head_dim]. cos_sin float32
    [positions, rotary_dim]: cosines, then sines. positions and slots int64 [M]; a negative slot is skipped. rows int64 [M]
    picks the row of kv for each (row m when None).
    """
    _launch(
        _core.cuda_kv_inject,
        kv,
        kv=_view(kv),
        k_norm=_view(k_norm),
        cos_sin=_view(cos_sin),
        positions=_view(positions),
        slots=_view(slots),
        k_caches=_view(caches.k_addresses),
        v_caches=_view(caches.v_addresses),
        cache=_view(caches.k[0]),
        eps=eps,
        rows=_maybe(rows),
    )


class AttentionWorkspace(NamedTuple):
    """Partial results of split keys: float32 [parts, T, heads, head_dim] and [parts, T, heads, 2]."""

    out: Tensor
    stats: Tensor


# What partial results of one launch take at most: a call that would need more launches some heads after the others.
WORKSPACE_BYTES = 256 << 20


def _parts(max_keys: int, device: torch.device | str) -> int:
    """Partial results of a row in memory: of groups of splits where those are merged on the chip."""
    return -(-max_keys // (SPLIT_KEYS * _MERGED_SPLITS if clusters(device) else SPLIT_KEYS))


def _heads_at_a_time(
    tokens: int, heads: int, kv_heads: int, head_dim: int, max_keys: int, device: torch.device | str
) -> list[tuple[slice, slice]]:
    """Query heads and key heads of each launch, whose workspace takes no more than `WORKSPACE_BYTES`, or holds one head."""
    parts, group = _parts(max_keys, device), heads // kv_heads
    most = heads if parts <= 1 else max(1, WORKSPACE_BYTES // (max(1, parts * tokens) * (head_dim + 2) * 4))
    step = most if most < group else most // group * group
    unit = max(step, group)
    pieces = [(h, min(h + step, u + unit, heads)) for u in range(0, heads, unit) for h in range(u, u + unit, step)]
    return [(slice(h, end), slice(h // group, -(-end // group))) for h, end in pieces]


@named
def attention_workspace(
    tokens: int, heads: int, head_dim: int, max_keys: int, device: torch.device | str
) -> AttentionWorkspace | None:
    """What `block_attention` needs for requests of up to `max_keys` keys; None when one partial result covers them."""
    parts = _parts(max_keys, device)
    if parts <= 1:
        return None
    shape = (parts, tokens, heads)
    return AttentionWorkspace(
        torch.empty((*shape, head_dim), dtype=torch.float32, device=device),
        torch.empty((*shape, 2), dtype=torch.float32, device=device),
    )


@named
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    query_starts: Tensor,
    context_lens: Tensor,
    table: PageTable,
    max_block_len: int,
    max_keys: int,
    scale: float,
    mask: str = "causal",
    window: int | None = None,
    valid_from: Tensor | None = None,
    slots: Tensor | None = None,
    ancestors: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    workspace: AttentionWorkspace | None = None,
) -> Tensor:
    """softmax(scale q K^T) V over the paged context and the step's own tokens -> [T, heads, head_dim].

    q [T, heads, head_dim], k and v [T, kv_heads, head_dim], caches [num_slots, kv_heads, head_dim]. With `slots` (int64 [T];
    negative: not stored) k and v are written to the caches as well. `mask`: "causal", "block" (all own tokens) or "ancestors"
    with `ancestors` uint64 or int64 [T, words]. `max_block_len` and `max_keys` (context and own tokens) bound every request. With a
    `softcap` c a score s becomes c * tanh(s / c); `sinks` float32 [heads] are scores of one more key per head, whose value is zero.

    Without a `workspace` none of more than `WORKSPACE_BYTES` is taken where one head does with less: some heads are launched after others.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    keyed, heads = (k, v, k_cache, v_cache), q.shape[1] if q.ndim == 3 else 0
    # What is not as it should be is the launch's to refuse.
    fits = heads and all(t.ndim == 3 and 0 < t.shape[1] == k.shape[1] and heads % t.shape[1] == 0 for t in keyed)
    if fits and workspace is None and out.shape == q.shape and (sinks is None or sinks.shape == (heads,)):
        pieces = _heads_at_a_time(q.shape[0], heads, k.shape[1], q.shape[2], max_keys, q.device)
        for mine, keys in pieces if len(pieces) > 1 else ():
            block_attention(
                q[:, mine], *(t[:, keys] for t in keyed), query_starts=query_starts, context_lens=context_lens, table=table,
                max_block_len=max_block_len, max_keys=max_keys, scale=scale, mask=mask, window=window, valid_from=valid_from,
                # Keys that several launches read are stored by the first of them.
                slots=slots if mine.start % (heads // k.shape[1]) == 0 else None, ancestors=ancestors, softcap=softcap,
                sinks=None if sinks is None else sinks[mine], out=out[:, mine],
                workspace=attention_workspace(q.shape[0], mine.stop - mine.start, q.shape[2], max_keys, q.device),
            )  # fmt: skip
        if len(pieces) > 1:
            return out
    if workspace is None and q.ndim == 3:
        workspace = attention_workspace(q.shape[0], q.shape[1], q.shape[2], max_keys, q.device)
    _launch(
        _core.cuda_block_attention,
        q,
        q=_view(q),
        k=_view(k),
        v=_view(v),
        k_cache=_view(k_cache),
        v_cache=_view(v_cache),
        out=_view(out),
        query_starts=_view(query_starts),
        context_lens=_view(context_lens),
        page_table=_view(table.pages),
        row_ids=_view(table.row_ids),
        page_size=table.page_size,
        max_block_len=max_block_len,
        max_keys=max_keys,
        scale=scale,
        mask=mask,
        window=window,
        valid_from=_maybe(valid_from),
        slots=_maybe(slots),
        ancestors=_maybe(ancestors),
        softcap=softcap,
        sinks=_maybe(sinks),
        partial_out=None if workspace is None else _view(workspace.out),
        partial_stats=None if workspace is None else _view(workspace.stats),
        num_splits=max(1, -(-max_keys // SPLIT_KEYS)),
        split_keys=SPLIT_KEYS,
        clusters=clusters(q.device),
    )
    return out


# Bytes of one request's sampling, as the kernels read it (SamplingRow of cuda/params.h). Only the core knows what is where.
SAMPLING_ROW_BYTES = _core.DeviceSampling.ROW_BYTES


class SamplingRows(NamedTuple):
    """What R requests ask of their target distribution, on the device.

    rows uint8 [R, SAMPLING_ROW_BYTES]; history_tokens and history_counts: per request the distinct tokens of prompt and output,
    ascending, with their occurrences in the output; bias_tokens, bias_values (float32): per request, ascending, and behind them the
    tokens that are masked, ascending. `filters`: whether any request has top_k, top_p or min_p.
    """

    rows: Tensor
    history_tokens: Tensor
    history_counts: Tensor
    bias_tokens: Tensor
    bias_values: Tensor
    filters: bool


@named
def sampling_rows(requests: Sequence[dict], device: torch.device | str = "cuda") -> SamplingRows:
    """Lays out the sampling of requests, one dict each: options as `SamplingParams` names them (`seed`, `temperature`, filters,
    penalties, `logit_bias` {token: number}), for penalties `history` {token: occurrences in the output}, tokens of the prompt
    included, and `masked` tokens that cannot be drawn for positions below `masked_before`. What is left out is off (temperature 1)."""
    return upload_sampling(_core.pack_sampling(list(requests)), device)


def upload_sampling(packed: _core.DeviceSampling, device: torch.device | str) -> SamplingRows:
    """What the core packed, for a kernel that is called by itself."""
    rows, edits = packed.rows.reshape(-1, SAMPLING_ROW_BYTES), (packed.history_tokens, packed.history_counts)
    # Copies: the core's buffers are lent. Pinned ones: a pageable copy would have the host wait for all that the device was told before.
    parts = [torch.from_numpy(part.copy()) for part in (rows, *edits, packed.bias_tokens, packed.bias_values)]
    parts = [part.pin_memory() for part in parts] if torch.device(device).type == "cuda" else parts
    return SamplingRows._make([*(part.to(device, non_blocking=True) for part in parts), packed.filters])


class Sampled(NamedTuple):
    """tokens int64 [N] (-1 where a row failed), status [N] (0 fine, 1 NaN or +inf, 2 nothing but -inf, 3 overflow of
    logit / temperature), logprobs float32 [N] of the raw logits in nats, or None."""

    tokens: Tensor
    status: Tensor
    logprobs: Tensor | None


@named
def sample_rows(
    logits: Tensor,
    sampling: SamplingRows,
    *,
    query_starts: Tensor,
    token_ids: Tensor,
    positions: Tensor,
    row_tokens: Tensor | None = None,
    parents: Tensor | None = None,
    logprobs: bool = False,
    out: Sampled | None = None,
    scratch: Tensor | None = None,
) -> Sampled:
    """Draws the target's own token of every row of `logits` (float32 or bfloat16 [N, V]): the tokens of `Engine.accept`.

    Row n belongs to packed token row_tokens[n] (n when None) and draws the token after it; token_ids and positions int64 [T].
    parents [T] for trees: each token's parent as an index within its request.
    """
    n = logits.shape[0]
    if out is None:
        empty = {"device": logits.device}
        out = Sampled(
            torch.empty(n, dtype=torch.int64, **empty),
            torch.empty(n, dtype=torch.int32, **empty),
            torch.empty(n, dtype=torch.float32, **empty) if logprobs else None,
        )
    if scratch is None:
        scratch = torch.empty(_core.cuda_sample_scratch(n, logits.shape[-1]), dtype=torch.uint8, device=logits.device)
    _launch(
        _core.cuda_sample_rows,
        logits,
        logits=_view(logits),
        sampling=_view(sampling.rows),
        query_starts=_view(query_starts),
        token_ids=_view(token_ids),
        positions=_view(positions),
        history_tokens=_view(sampling.history_tokens),
        history_counts=_view(sampling.history_counts),
        bias_tokens=_view(sampling.bias_tokens),
        bias_values=_view(sampling.bias_values),
        tokens=_view(out.tokens),
        status=_view(out.status),
        scratch=_view(scratch),
        row_tokens=_maybe(row_tokens),
        parents=_maybe(parents),
        logprobs=_maybe(out.logprobs),
        filters=sampling.filters,
    )
    return out


class Accepted(NamedTuple):
    """What a step committed: accepted drafts [R], out_tokens int64 [R, n] (accepted drafts, bonus, then -1), out_lens [R],
    context_lens [R] after the step, next_anchors int64 [R], path [R, n] (kept nodes, then -1), and per kept token, from
    query_starts[r] on, then -1: commit_rows, commit_positions, commit_slots int64 [T]. The last four may be None: not wanted."""

    accepted: Tensor
    out_tokens: Tensor
    out_lens: Tensor
    context_lens: Tensor
    next_anchors: Tensor
    path: Tensor | None
    commit_rows: Tensor | None
    commit_positions: Tensor | None
    commit_slots: Tensor | None


@named
def empty_accepted(requests: int, tokens: int, max_nodes: int, device: torch.device) -> Accepted:
    """Room for what `accept` writes about `requests` requests of `tokens` tokens together."""
    max_nodes = integer("max_nodes", max_nodes, 1, 1024)

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return Accepted(
        empty(requests, dtype=torch.int32),
        empty(requests, max_nodes),
        empty(requests, dtype=torch.int32),
        empty(requests, dtype=torch.int32),
        empty(requests),
        empty(requests, max_nodes, dtype=torch.int32),
        empty(tokens),
        empty(tokens),
        empty(tokens),
    )


@named
def accept(
    *,
    query_starts: Tensor,
    context_lens: Tensor,
    token_ids: Tensor,
    sampled: Tensor,
    table: PageTable,
    max_nodes: int,
    logit_starts: Tensor | None = None,
    node_counts: Tensor | None = None,
    parents: Tensor | None = None,
    out: Accepted | None = None,
) -> Accepted:
    """Walks every request's chain, or tree if `parents` [T] is given, as far as the drawn tokens follow the drafts.

    `sampled` int64: drawn tokens by logit row; logit_starts [R+1] says which rows are whose (one per packed token when None),
    and they belong to a request's last tokens. node_counts [R]: nodes that take part (all when None). `max_nodes` bounds
    them: of a request with more only the first so many take part.
    """
    if out is None:
        out = empty_accepted(context_lens.shape[0], token_ids.shape[0], max_nodes, token_ids.device)
    _launch(
        _core.cuda_accept,
        token_ids,
        query_starts=_view(query_starts),
        context_lens=_view(context_lens),
        token_ids=_view(token_ids),
        sampled=_view(sampled),
        page_table=_view(table.pages),
        row_ids=_view(table.row_ids),
        page_size=table.page_size,
        accepted=_view(out.accepted),
        out_tokens=_view(out.out_tokens),
        out_lens=_view(out.out_lens),
        new_context_lens=_view(out.context_lens),
        next_anchors=_view(out.next_anchors),
        max_nodes=max_nodes,
        logit_starts=_maybe(logit_starts),
        node_counts=_maybe(node_counts),
        parents=_maybe(parents),
        path=_maybe(out.path),
        commit_rows=_maybe(out.commit_rows),
        commit_positions=_maybe(out.commit_positions),
        commit_slots=_maybe(out.commit_slots),
    )
    return out


@named
def tree_top_k(values: Tensor, k: int, *, normalise: bool = True) -> tuple[Tensor, Tensor]:
    """The k best columns of each row of `values` (float32 or bfloat16 [N, V]), falling, lowest id first among equals:
    tokens int64 [N, k] and log-probabilities float32 [N, k]. Without `normalise` values are log-probabilities already."""
    n, k = values.shape[0], integer("k", k, 1, 256)
    tokens = torch.empty((n, k), dtype=torch.int64, device=values.device)
    log_probs = torch.empty((n, k), dtype=torch.float32, device=values.device)
    _launch(
        _core.cuda_tree_top_k,
        values,
        values=_view(values),
        tokens=_view(tokens),
        log_probs=_view(log_probs),
        normalise=normalise,
    )
    return tokens, log_probs


class Trees(NamedTuple):
    """Draft trees [R, n]: tokens int64, parents (-1 for the anchor), depths, masks uint64 [R, n, words] with bit j of node i
    set for its ancestors and itself, counts [R] of nodes, the anchor included."""

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    masks: Tensor
    counts: Tensor


@named
def tree_build(
    anchors: Tensor, top_tokens: Tensor, top_log_probs: Tensor, max_nodes: int, *, budgets: Tensor | None = None
) -> Trees:
    """`DraftTree.build` for every request: anchors int64 [R], top_tokens int64 and top_log_probs float32 [R, depth, k]; at
    most `max_nodes` nodes besides the anchor, or `budgets` [R] of them."""
    r, n = anchors.shape[0], integer("max_nodes", max_nodes, 1, 1023) + 1

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=anchors.device)

    out = Trees(
        empty(r, n, dtype=torch.int64),
        empty(r, n, dtype=torch.int32),
        empty(r, n, dtype=torch.int32),
        empty(r, n, -(-n // 64), dtype=torch.uint64),
        empty(r, dtype=torch.int32),
    )
    _launch(
        _core.cuda_tree_build,
        anchors,
        anchors=_view(anchors),
        top_tokens=_view(top_tokens),
        top_log_probs=_view(top_log_probs),
        tokens=_view(out.tokens),
        parents=_view(out.parents),
        depths=_view(out.depths),
        masks=_view(out.masks),
        counts=_view(out.counts),
        budgets=_maybe(budgets),
    )
    return out


@named
def compact_kv(path: Tensor, context_lens: Tensor, caches: KvCaches, table: PageTable) -> None:
    """Moves the KV of every request's accepted path (`Accepted.path`) behind its context, for all layers in one launch.

    context_lens [R]: lengths before the step.
    """
    _launch(
        _core.cuda_compact_kv,
        path,
        path=_view(path),
        context_lens=_view(context_lens),
        k_caches=_view(caches.k_addresses),
        v_caches=_view(caches.v_addresses),
        cache=_view(caches.k[0]),
        page_table=_view(table.pages),
        row_ids=_view(table.row_ids),
        page_size=table.page_size,
    )
