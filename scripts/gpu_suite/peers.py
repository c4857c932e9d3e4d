"""SGLang's own Triton kernels on the inputs of a case of shapes.py: what kernels.py times beside ours where SGLang can be imported.

A peer brings the inputs into its layout once, before it is timed, and its output is compared with ours first: what computes
something else is no comparison. SGLang 0.5.17 and 0.5.23 are known; what 0.5.17 does not have yet is no peer there.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from shapes import MASK_TOKEN, Case

# Folders to look for SGLang in, as in PYTHONPATH, which __main__ keeps from the package under test.
PATH_VARIABLE = "GPU_SUITE_PEERS_PATH"
NOT_FOUND = "not found, not compared"
# Of the length of a vector: several times what rounding to bfloat16 leaves, less than one key too many among thousands.
TOLERANCE = 0.01

EXTEND = "sglang.kernels.ops.attention.extend_attention"
SPLIT = "sglang.kernels.ops.attention.verify_splitkv"
DECODE = "sglang.kernels.ops.attention.decode_attention"
METADATA = "sglang.kernels.ops.attention.metadata"
DFLASH = "sglang.kernels.ops.speculative.dflash"
KV = "sglang.kernels.ops.speculative.fused_kv_materialize"
POOL = "sglang.srt.mem_cache.memory_pool"
MOVE = "sglang.kernels.ops.kvcache.cache_move"
ARGMAX = "sglang.kernels.ops.speculative.row_argmax"
TOP_K = "sglang.kernels.ops.speculative.lilicorr"
NEWER = (ARGMAX, TOP_K)  # than 0.5.17; everything else is where it is in both versions


class Peer(NamedTuple):
    """A call to time, and what it gives differently from ours: `differs` runs both and says how, None if they agree."""

    call: Callable[[], object]
    differs: Callable[[], str | None]


class Found(NamedTuple):
    """A peer ready to be timed, or why there is none."""

    kernel: str
    peer: Peer | None
    failed: str | None = None


def sglang() -> tuple[str | None, str]:
    """SGLang's version if it can be imported, and the line that a report has about it."""
    # In front, because what it needs may be there in another version; torch and dflash_rs have been imported already.
    sys.path[:0] = [path for path in os.environ.get(PATH_VARIABLE, "").split(os.pathsep) if path not in ("", *sys.path)]
    importlib.invalidate_caches()
    if importlib.util.find_spec("sglang") is None:
        return None, NOT_FOUND
    try:
        version = importlib.import_module("sglang").__version__
    except (Exception, SystemExit) as error:
        return None, f"cannot be imported, not compared: {reason(error)}"
    return version, version


def reason(error: BaseException) -> str:
    """One line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def peers(case: Case) -> Iterator[Found]:
    """Those of a case, each built when it is asked for; call after `sglang()` has found it."""
    for prefix, module, name, build in BUILDERS:
        if not case.kernel.startswith(prefix):
            continue
        kernel = f"{module.rpartition('.')[2]}.{name}"
        try:
            if module in NEWER and importlib.util.find_spec(module) is None:
                continue
            peer = build(case, getattr(importlib.import_module(module), name))
        except (Exception, SystemExit) as error:
            yield Found(kernel, None, reason(error))
        else:
            if peer is not None:
                yield Found(kernel, peer)


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory whose content shows where nothing has been written."""
    return torch.full(shape, float("nan") if dtype.is_floating_point else -7, dtype=dtype, device=device)


def close(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], tolerance: float | None = None) -> str | None:
    """How vectors (last dimension) differ by more than rounding does, relative to their length."""
    tolerance = TOLERANCE if tolerance is None else tolerance
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        a, b = a.float(), b.float()
        error = (a - b).norm(dim=-1) / a.norm(dim=-1)
        if not bool((error <= tolerance).all()):  # not of NaN either
            return f"output {i}: relative error {error.max().item():.2g}, expected at most {tolerance}"
    return None


def equal(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> str | None:
    """How tensors differ at all."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if not bool((a == b).all()):
            return f"output {i}: {int((a != b).sum())} of {a.numel()} entries differ"
    return None


def compared(case: Case, call: Callable[[], object], compare: Callable[[], str | None]) -> Peer:
    """A peer whose outputs lie where `compare` looks."""

    def differs() -> str | None:
        case.call()
        call()
        return compare()

    return Peer(call, differs)


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def own_mask(ancestors: torch.Tensor, n: int) -> torch.Tensor:
    """Bit j of every node's words, bool [requests, n, n]."""
    j = torch.arange(n, device=ancestors.device)
    words = ancestors.view(torch.int64)[:, j // 64]
    return ((words >> (j % 64)) & 1).bool().view(-1, n, n)


def extend_attention(case: Case, extend: Callable) -> Peer:
    """What the Triton backend calls to verify a chain or a tree, and for the drafter's block: context by slot, own tokens as given."""
    x, batch = case.inputs, case.inputs.batch
    kv_indices = batch.slots()[:, : batch.context].reshape(-1)
    kv_indptr = torch.arange(batch.requests + 1, dtype=torch.int32, device=batch.device) * batch.context
    mask = mask_indptr = None
    if x.mask == "ancestors":
        # Laid out over all keys, though only the columns of own tokens are read.
        mask = torch.ones(batch.requests, batch.n, batch.context + batch.n, dtype=torch.bool, device=batch.device)
        mask[..., batch.context :] = own_mask(x.ancestors, batch.n)
        mask_indptr = torch.arange(batch.requests + 1, device=batch.device) * mask[0].numel()
        mask = mask.view(-1)
    out = poisoned(*x.q.shape, dtype=x.q.dtype, device=batch.device)
    arguments = (
        x.q, x.k, x.v, out, *x.caches, batch.starts, kv_indptr, kv_indices, mask, x.mask != "block", mask_indptr, batch.n, 1.0, 1.0
    )  # fmt: skip
    return compared(case, lambda: extend(*arguments, sm_scale=x.scale), lambda: close([x.out], [out]))


def split_attention(case: Case, extend: Callable) -> Peer | None:
    """The same for chains with the context split among programs: SGLang calls it on AMD's GPUs only, here it runs as well."""
    if case.inputs.mask != "causal" or case.inputs.batch.n == 1:
        return None

    def call(*arguments: object, **options: object) -> None:
        if not extend(*arguments, **options):
            raise RuntimeError("verify_splitkv_fwd refuses these inputs")

    return extend_attention(case, call)


def decode_attention(case: Case, decode: Callable) -> Peer | None:
    """What the Triton backend calls for one token per request; its own KV lies in the cache already."""
    x, batch = case.inputs, case.inputs.batch
    if batch.n != 1 or x.mask == "ancestors":
        return None
    slots = batch.slots()
    for cache, own in zip(x.caches, (x.k, x.v)):
        cache[slots[:, batch.context]] = own
    keys, heads, dim = batch.context + 1, x.q.shape[1], x.q.shape[2]
    kv_indptr = torch.arange(batch.requests + 1, dtype=torch.int32, device=batch.device) * keys
    max_splits = 8  # the default of --triton-attention-num-kv-splits
    logits = torch.empty(batch.requests, heads, max_splits, dim, device=batch.device)
    lse = torch.empty(batch.requests, heads, max_splits, device=batch.device)
    splits = torch.empty(batch.requests, dtype=torch.int32, device=batch.device)
    importlib.import_module(METADATA).get_num_kv_splits_triton[(1,)](
        splits, batch.lens + 1, batch.requests, 1, heads, x.k.shape[1], max_splits, multiprocessors(batch.device),
        MAX_NUM_SEQ=max(256, 1 << (batch.requests - 1).bit_length()),
    )  # fmt: skip
    out = poisoned(*x.q.shape, dtype=x.q.dtype, device=batch.device)
    arguments = (
        x.q, *x.caches, out, kv_indptr, slots.reshape(-1), logits, lse, splits, max_splits, x.scale, 1.0, 1.0
    )  # fmt: skip
    # From Hopper on its second kernel is launched before the first one has ended.
    early = batch.device.type == "cuda" and torch.cuda.get_device_capability(batch.device)[0] >= 9
    return compared(case, lambda: decode(*arguments, use_pdl=early), lambda: close([x.out], [out]))


def inject(case: Case, norm_rope: Callable) -> Peer:
    """What the DFLASH worker launches after the projection: norm and rotation of all layers into buffers, then a store per layer."""
    x, device = case.inputs, case.inputs.kv.device
    rows, layers, _, heads, dim = x.kv.shape
    block = 8 if rows % 8 == 0 else 1
    locations = x.slots.view(-1, block)
    committed = torch.full((len(locations),), block, dtype=torch.int32, device=device)
    eps = torch.full((layers,), x.eps, device=device)
    k, v = (torch.empty(layers, rows, heads, dim, dtype=x.kv.dtype, device=device) for _ in "kv")
    caches = [
        [poisoned(*cache.shape, dtype=cache.dtype, device=device) for cache in side]
        for side in (x.caches.k, x.caches.v)
    ]
    store = importlib.import_module(POOL)._set_kv_buffer_prefix_valid_impl
    packed = x.kv.view(rows, layers, 2 * heads * dim)

    def call() -> None:
        norm_rope(packed, x.norm, eps, x.cos_sin, x.positions, heads, dim, x.cos_sin.shape[1], k_out=k, v_out=v)
        for layer in range(layers):
            store(k[layer], v[layer], caches[0][layer], caches[1][layer], locations, committed, heads * dim, x.kv.dtype)

    def compare() -> str | None:
        return close(
            [cache[x.slots] for cache in (*x.caches.k, *x.caches.v)],
            [cache[x.slots] for cache in (*caches[0], *caches[1])],
        )

    return compared(case, call, compare)


def accept(case: Case, walk: Callable) -> Peer:
    """The walk of the DFLASH worker. Which rows to commit, and where, it leaves to others; ours writes that, too."""
    x, batch = case.inputs, case.inputs.batch
    r, n = batch.requests, batch.n
    ids, sampled, lens = x.ids.view(r, n), x.sampled.view(r, n), batch.lens.long()
    accepted, committed = (poisoned(r, dtype=torch.int32, device=batch.device) for _ in range(2))
    bonus, new_lens = (poisoned(r, dtype=torch.int64, device=batch.device) for _ in range(2))
    tokens = poisoned(r, n, dtype=torch.int64, device=batch.device)

    def compare() -> str | None:
        beyond = torch.arange(n, device=batch.device) >= committed[:, None]
        return equal(
            [x.out.accepted, x.out.out_lens, x.out.next_anchors, x.out.context_lens, x.out.out_tokens],
            [accepted, committed, bonus, new_lens, tokens.masked_fill(beyond, -1)],
        )

    return compared(case, lambda: walk(ids, sampled, accepted, committed, bonus, tokens, lens, new_lens), compare)


def prepare(case: Case, block: Callable) -> Peer | None:
    """The masked block of the DFLASH worker."""
    x, batch = case.inputs, case.inputs.batch
    if x.drafts is not None:
        return None
    rows = torch.arange(batch.requests, device=batch.device)
    lens, table = batch.lens.long(), batch.slots().int()
    out = [poisoned(batch.requests, batch.n, dtype=torch.int64, device=batch.device) for _ in range(3)]
    return compared(
        case,
        lambda: block(x.anchors, lens, rows, table, *out, MASK_TOKEN),
        lambda: equal([got.view(-1, batch.n) for got in x.out], out),
    )


def move(case: Case, copy: Callable) -> Peer:
    """The move of accepted KV inside SGLang's pool, from slots that it is given; ours finds them. Chunks and tiles are the pool's."""
    x, batch = case.inputs, case.inputs.batch
    caches = (*x.caches.k, *x.caches.v)
    slots, path, last = batch.slots(), x.path.long(), batch.n - 1
    # The first node stays where it is.
    moved = path[:, 1:] >= 0
    source = slots.gather(1, batch.context + path[:, 1:].clamp(0, last))[moved]
    target = slots[:, batch.context + 1 :][moved]
    addresses = torch.tensor([cache.data_ptr() for cache in caches], dtype=torch.uint64, device=batch.device)
    width = caches[0][0].numel() * caches[0].element_size()
    widths = torch.full((len(caches),), width, dtype=torch.int64, device=batch.device)
    tile = 512 if width >= 8192 else 256 if width >= 4096 else 128
    config = {"bytes_per_tile": tile, "byte_tiles": -(-width // tile), "num_warps": 8 if tile == 512 else 4}
    chunks = list(zip(target.split(128 if tile == 512 else 256), source.split(128 if tile == 512 else 256)))

    def call() -> None:
        for to, origin in chunks:
            copy(addresses, widths, to, origin, len(to), 1 << (len(to) - 1).bit_length(), config)

    def differs() -> str | None:
        # A second move starts from what the first has left, so each is held against what lay there before it.
        for name, run in (("ours", case.call), ("theirs", call)):
            before = [cache[source] for cache in caches]
            run()
            found = equal(before, [cache[target] for cache in caches])
            if found is not None:
                return f"{name}: {found}"
        return None

    return Peer(call, differs)


def argmax(case: Case, row_argmax: Callable) -> Peer | None:
    """Greedy draws; it takes float32 only."""
    x = case.inputs
    if x.options.get("temperature") != 0 or x.logits.dtype != torch.float32:
        return None
    last = {}

    def call() -> None:
        last["tokens"] = row_argmax(x.logits)

    return compared(case, call, lambda: equal([x.out.tokens], [last["tokens"]]))


def top_k(case: Case, top_k_lse: Callable) -> Peer:
    """The likeliest tokens and their log-probabilities. Which of equals it names is not compared, what they are worth is."""
    x = case.inputs

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        values, ids, lse = top_k_lse(x.logits, x.k)
        return ids, values - lse[:, None]

    def differs() -> str | None:
        (our_ids, ours), (ids, theirs) = case.call(), call()
        if not bool((ids.sort(-1).values.diff(dim=-1) > 0).all()):
            return "the same token twice"
        return equal([x.logits.gather(1, our_ids)], [x.logits.gather(1, ids)]) or close([ours], [theirs], 1e-4)

    return Peer(call, differs)


# What a case's kernel begins with, and where its peer is.
BUILDERS = (
    ("block_attention", EXTEND, "extend_attention_fwd", extend_attention),
    ("block_attention", SPLIT, "verify_splitkv_fwd", split_attention),
    ("block_attention", DECODE, "decode_attention_fwd", decode_attention),
    ("kv_inject", KV, "_fused_norm_rope_stacked", inject),
    ("accept", DFLASH, "_compute_dflash_accept_bonus_triton_unchecked", accept),
    ("prepare_block", DFLASH, "_prepare_dflash_draft_block_unchecked", prepare),
    ("compact_kv", MOVE, "copy_all_layer_kv_cache_func", move),
    ("sample_rows", ARGMAX, "row_argmax", argmax),
    ("tree_top_k", TOP_K, "lilicorr_topk_lse", top_k),
)
