"""Calls every kernel family once with made-up tensors; run by test_cuda_launch.py on top of its fake driver.

Tensors are torch's meta tensors: shapes and strides without memory. Each gets an address of its own; the map from names to
addresses is printed, so that the test can look for them in what reached the driver.
"""

from __future__ import annotations

import itertools
import json

import numpy as np
import torch

from dflash_rs import cuda, recurrent
from dflash_rs.attention import CudaAttention

ADDRESSES: dict[int, int] = {}
KEEP: list[torch.Tensor] = []
NEXT = itertools.count(0x7F00_0000_0000, 1 << 28)


def view(tensor):
    if id(tensor) not in ADDRESSES:
        ADDRESSES[id(tensor)] = next(NEXT)
        KEEP.append(tensor)  # ids are reused once a tensor is gone
    return ADDRESSES[id(tensor)], cuda._dtype(tensor), 0, tuple(tensor.shape), tensor.stride()


def i32(*shape):
    return torch.empty(shape, dtype=torch.int32, device="meta")


def i64(*shape):
    return torch.empty(shape, dtype=torch.int64, device="meta")


def f32(*shape):
    return torch.empty(shape, dtype=torch.float32, device="meta")


def bf16(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def caches(layers, heads, dim):
    made = cuda.KvCaches.__new__(cuda.KvCaches)
    made.k = tuple(bf16(640, heads, dim) for _ in range(layers))
    made.v = tuple(bf16(640, heads, dim) for _ in range(layers))
    made.k_addresses, made.v_addresses = i64(layers), i64(layers)
    return made


def main() -> None:
    cuda._view = view
    cuda._stream = lambda tensor: 77
    r, g, tokens = 3, 7, 24
    table = cuda.PageTable(i32(8, 40), i32(r), 16)
    starts, lens = i32(r + 1), i32(r)
    named = {}

    def note(**tensors):
        named.update({name: view(tensor)[0] for name, tensor in tensors.items()})

    anchors, drafts, ids, positions, slots = i64(r), i64(r, g), i64(tokens + 8), i64(tokens + 8), i64(tokens + 8)
    cuda.prepare_block(
        query_starts=starts, context_lens=lens, anchors=anchors, table=table, token_ids=ids, positions=positions,
        slots=slots, drafts=drafts, mask_token=5,
    )  # fmt: skip
    note(starts=starts, lens=lens, anchors=anchors, drafts=drafts, pages=table.pages, row_ids=table.row_ids, ids=ids)

    kv, cache = bf16(20, 5, 2, 4, 128), caches(5, 4, 128)
    norm, cos_sin, rows = bf16(5, 128), f32(4096, 64), i64(12)
    cuda.kv_inject(kv, norm, cos_sin, i64(12), i64(12), cache, eps=1e-6, rows=rows)
    note(kv=kv, k_addresses=cache.k_addresses, rows=rows)

    qkv = bf16(tokens, 16 + 4 + 4, 128)
    q, k, v = qkv[:, :16], qkv[:, 16:20], qkv[:, 20:]
    sinks = f32(16)
    for mask, keys, extra in (
        ("block", 500, {"window": 9, "softcap": 30.0, "sinks": sinks}),
        ("causal", 1200, {"slots": i64(tokens), "valid_from": i32(r)}),
        ("ancestors", 64, {"ancestors": i64(tokens, 1)}),
    ):
        cuda.block_attention(
            q, k, v, cache.k[0], cache.v[0], query_starts=starts, context_lens=lens, table=table, max_block_len=8, max_keys=keys,
            scale=0.125, mask=mask, **extra,
        )  # fmt: skip
    note(q=q, k=k, v=v, k_cache=cache.k[0], sinks=sinks)
    # Two, three and nine splits where the device runs clusters.
    without, cuda.clusters = cuda.clusters, lambda device: True
    for keys in (600, 1200, 4097):
        cuda.block_attention(
            q, k, v, cache.k[0], cache.v[0], query_starts=starts, context_lens=lens, table=table, max_block_len=8, max_keys=keys,
            scale=0.125,
        )  # fmt: skip
    cuda.clusters = without

    ids, positions = i64(tokens), i64(tokens)
    sampling = cuda.SamplingRows(
        torch.empty((r, cuda.SAMPLING_ROW_BYTES), dtype=torch.uint8, device="meta"),
        i32(9),
        i32(9),
        i32(0),
        f32(0),
        True,
    )
    logits = bf16(tokens, 151936)
    sampled = cuda.sample_rows(logits, sampling, query_starts=starts, token_ids=ids, positions=positions, logprobs=True)
    greedy = f32(tokens, 248064)
    cuda.sample_rows(
        greedy,
        sampling._replace(filters=False),
        query_starts=starts,
        token_ids=ids,
        positions=positions,
        row_tokens=i32(tokens),
    )
    note(logits=logits, sampled=sampled.tokens)
    done = cuda.accept(
        query_starts=starts, context_lens=lens, token_ids=ids, sampled=sampled.tokens, table=table, max_nodes=8,
        parents=i32(tokens),
    )  # fmt: skip
    # Lengths advance in place.
    cuda.accept(
        query_starts=starts, context_lens=lens, token_ids=ids, sampled=sampled.tokens, table=table, max_nodes=8,
        out=done._replace(context_lens=lens),
    )  # fmt: skip
    top, scores = cuda.tree_top_k(bf16(r * 7, 151936), 8)
    cuda.tree_build(anchors, torch.empty_like(top).view(r, 7, 8), torch.empty_like(scores).view(r, 7, 8), 63)
    cuda.compact_kv(done.path, lens, cache, table)
    # Nothing to do is success, and launches nothing.
    cuda.compact_kv(i32(0, 8), i32(0), cache, cuda.PageTable(table.pages, i32(0), 16))
    engine_step(note)
    recurrent_layer(note)
    print(json.dumps(named))


def recurrent_layer(note):
    """A pass of a layer with 2 key and 6 value heads over three requests, one of them longer than a block; then two copies of states."""
    channels = 2 * 2 * 128 + 6 * 64
    weights = recurrent.DeltaWeights(f32(4, channels), f32(6), f32(6), 2.0)
    states = recurrent.DeltaStates(
        f32(9, 6, 128, 64), bf16(9, 3, channels), bf16(7, 5, channels), bf16(7, 5, 12), i32(9)
    )
    ends = recurrent.DeltaEnds(i32(3), f32(1, 6, 128, 64), bf16(1, 3, channels))
    mixed, into = bf16(24, channels), i64(2)
    out = recurrent.delta_rule(
        mixed,
        bf16(24, 12),
        weights,
        states,
        query_starts=i32(4),
        context_lens=i32(3),
        slots=i64(3),
        longest=20,
        ends=ends,
    )
    assert out.shape == (24, 6, 64)
    recurrent.delta_copy(weights, states, context_lens=i32(2), slots=i64(2), into=into)
    note(delta_memory=states.memory, delta_mixed=mixed, delta_out=out, delta_ends=ends.memory, delta_into=into)


def engine_step(note):
    """An engine's attention, its arrays on the host and uploaded by it."""
    slots = torch.arange(48, 57)
    step = CudaAttention.upload(
        query_starts=np.array([0, 1, 9], dtype=np.int32), context_lens=np.array([0, 590], dtype=np.int32), page_size=16,
        page_table=np.arange(160, dtype=np.int32).reshape(4, 40), row_ids=np.array([3, 1], dtype=np.int32), num_slots=2560,
        valid_from=np.array([0, 7], dtype=np.int32), slots=slots.numpy(), slots_device=slots, device=torch.device("cpu"),
    )  # fmt: skip
    assert step._table.pages.tolist() == [
        list(range(120, 158)),
        list(range(40, 78)),
    ] and step._table.row_ids.tolist() == [0, 1]
    assert step.query_starts.tolist() == [0, 1, 9] and step._valid_from.tolist() == [0, 7]
    cache = bf16(2560, 2, 64)
    out = step.attend(
        bf16(9, 4, 64), bf16(9, 2, 64), bf16(9, 2, 64), cache, torch.empty_like(cache), scale=1.0, causal=False
    )
    note(engine_slots=slots, engine_out=out)


main()
