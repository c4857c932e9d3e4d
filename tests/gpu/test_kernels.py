"""Every kernel family on fresh random inputs against float64 or the core, outputs poisoned before each launch."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch

from dflash_rs import DraftTree, _core, cuda
from dflash_rs.engine.device import drafting


def poisoned(*shape, dtype, device):
    """Memory that nobody wrote shows: NaN, or 0xDE in every byte."""
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)
    return torch.from_numpy(np.full(shape, 0xDE, dtype=np.uint8).repeat(dtype.itemsize, -1)).view(dtype).to(device)


def to(device, *arrays):
    return [None if a is None else torch.as_tensor(a).to(device) for a in arrays]


def table_of(batch, device):
    pages, row_ids = to(device, batch.pages, batch.row_ids)
    return cuda.PageTable(pages, row_ids, batch.page_size)


def test_the_code_that_runs_is_the_code_for_this_gpu(gpu):
    major, minor = torch.cuda.get_device_capability(gpu)
    arch = cuda.probe(gpu)
    assert arch // 100 == major and arch <= major * 100 + minor * 10
    usage = cuda.load(gpu)
    assert len(usage) == 31 and all(registers > 0 for registers, _, _ in usage.values())


@pytest.mark.parametrize("shape", ["chain", "mask", "tree", "empty"])
def test_prepare_block(gpu, rng, shape):
    lens = [] if shape == "empty" else [8, 1, 5, 8]
    contexts = [] if shape == "empty" else [30, 0, 16, 100]
    batch = reference.make_batch(rng, lens, contexts)
    padded, r = batch.tokens + 5, len(lens)
    anchors = rng.integers(0, 1000, r)
    drafts = None if shape == "mask" else rng.integers(0, 1000, (r, 7))
    parents = [reference.random_parents(rng, n) for n in lens]
    depths = None
    if shape == "tree":
        depths = np.zeros(padded, dtype=np.int32)
        depths[: batch.tokens] = np.concatenate([reference.depths_of(p) for p in parents])
    ids, positions, slots = (poisoned(padded, dtype=torch.int64, device=gpu) for _ in range(3))
    starts, lens_, anchors_, drafts_, depths_ = to(gpu, batch.query_starts, batch.context_lens, anchors, drafts, depths)
    cuda.prepare_block(
        query_starts=starts, context_lens=lens_, anchors=anchors_, table=table_of(batch, gpu), token_ids=ids, positions=positions,
        slots=slots, drafts=drafts_, depths=depths_, mask_token=999,
    )  # fmt: skip
    want_ids, want_positions = [], []
    for i, n in enumerate(lens):
        rest = [999] * (n - 1) if drafts is None else drafts[i, : n - 1].tolist()
        want_ids += [int(anchors[i]), *rest]
        want_positions += (contexts[i] + (np.arange(n) if depths is None else reference.depths_of(parents[i]))).tolist()
    assert ids.tolist() == want_ids + [0] * 5
    assert positions.tolist() == want_positions + [0] * 5
    assert slots.tolist() == batch.token_slots().tolist() + [-1] * 5


@pytest.mark.parametrize("head_dim", cuda.HEAD_DIMS)
@pytest.mark.parametrize("rotary", ["full", "half"])
@pytest.mark.parametrize("with_rows", [False, True])
def test_kv_inject(gpu, rng, head_dim, rotary, with_rows):
    layers, heads, count, slots_total = 3, 2, 37, 200
    sources = 50 if with_rows else count
    kv = torch.randn(sources, layers, 2, heads, head_dim, device=gpu).bfloat16()
    norm = (torch.rand(layers, head_dim, device=gpu) + 0.5).bfloat16()
    width = head_dim if rotary == "full" else head_dim // 2
    angle = torch.rand(64, width // 2, device=gpu) * 6
    cos_sin = torch.cat((angle.cos(), angle.sin()), -1).contiguous()
    positions, slots = rng.integers(0, 64, count), rng.permutation(slots_total)[:count]
    rows = rng.integers(0, sources, count) if with_rows else None
    slots[5] = -1
    if with_rows:
        rows[7] = -1
    caches = cuda.KvCaches(
        *[
            [poisoned(slots_total, heads, head_dim, dtype=torch.bfloat16, device=gpu) for _ in range(layers)]
            for _ in "kv"
        ]
    )
    positions_, slots_, rows_ = to(gpu, positions, slots, rows)
    cuda.kv_inject(kv, norm, cos_sin, positions_, slots_, caches, eps=1e-6, rows=rows_)
    picked = kv if rows is None else kv[torch.from_numpy(np.maximum(rows, 0)).to(gpu)]
    want_k, want_v = reference.inject(picked, norm, cos_sin, torch.from_numpy(positions), 1e-6)
    written = [m for m in range(count) if slots[m] >= 0 and (rows is None or rows[m] >= 0)]
    for layer in range(layers):
        for cache, want in ((caches.k[layer], want_k), (caches.v[layer], want_v)):
            got = cache.double().cpu()
            assert torch.allclose(got[slots[written]], want[written, layer], rtol=2**-7, atol=2**-7)
            others = np.setdiff1d(np.arange(slots_total), slots[written])
            assert got[others].isnan().all(), "a slot was written that is not among the committed ones"
        assert torch.equal(caches.v[layer][torch.from_numpy(slots[written]).to(gpu)], picked[written, layer, 1])


CASES = {
    "one token, no context": ([1], [0]),
    "a decode batch": ([1, 1, 1, 1], [0, 17, 64, 700]),
    "blocks over long contexts": ([16, 8, 16], [1500, 3, 511]),
    "a chunk of prompt": ([150, 1], [40, 513]),
}


@pytest.mark.parametrize("head_dim", cuda.HEAD_DIMS)
@pytest.mark.parametrize("mask", ["causal", "block", "ancestors"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("window", [None, 100])
def test_block_attention(gpu, rng, head_dim, mask, case, window):
    check_attention(gpu, rng, head_dim, mask, case, window)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sinks", [True, False])
@pytest.mark.parametrize("softcap", [2.0, None])
@pytest.mark.parametrize("head_dim", cuda.HEAD_DIMS)
@pytest.mark.parametrize("mask", ["causal", "block", "ancestors"])
@pytest.mark.parametrize("window", [None, 100])
def test_block_attention_with_a_soft_cap_and_sinks(gpu, rng, head_dim, mask, case, window, softcap, sinks):
    if softcap is not None or sinks:
        check_attention(gpu, rng, head_dim, mask, case, window, softcap, sinks)


def check_attention(gpu, rng, head_dim, mask, case, window, softcap=None, sinks=False):
    lens, contexts = CASES[case]
    heads, kv_heads = (8, 2) if head_dim != 256 else (4, 4)
    batch = reference.make_batch(rng, lens, contexts)
    qkv = torch.randn(batch.tokens, heads + 2 * kv_heads, head_dim, device=gpu).bfloat16()
    q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
    caches = [torch.randn(batch.num_slots, kv_heads, head_dim, device=gpu).bfloat16() for _ in "kv"]
    before = [cache.clone() for cache in caches]
    valid_from = np.array([int(rng.integers(0, c // 3 + 1)) for c in contexts], dtype=np.int32)
    parents = [reference.random_parents(rng, n) for n in lens]
    words = -(-max(lens) // 64)
    ancestors = np.concatenate([reference.masks_of(p, words) for p in parents]) if mask == "ancestors" else None
    slots = batch.token_slots()
    starts, lens_, valid, slots_ = to(gpu, batch.query_starts, batch.context_lens, valid_from, slots)
    out = poisoned(batch.tokens, heads, head_dim, dtype=torch.bfloat16, device=gpu)
    scores = torch.linspace(-3, 4, heads, device=gpu) if sinks else None
    cuda.block_attention(
        q, k, v, *caches, query_starts=starts, context_lens=lens_, table=table_of(batch, gpu), max_block_len=batch.max_block_len,
        max_keys=batch.max_keys, scale=head_dim**-0.5, mask=mask, window=window, valid_from=valid, slots=slots_,
        ancestors=None if ancestors is None else torch.from_numpy(ancestors.view(np.int64)).to(gpu), out=out,
        softcap=softcap, sinks=scores,
    )  # fmt: skip
    want = reference.attention(
        batch, q, k, v, *before, scale=head_dim**-0.5, mask=mask, window=window, valid_from=valid_from, parents=parents,
        softcap=softcap, sinks=scores,
    )  # fmt: skip
    assert torch.allclose(out.double().cpu(), want, rtol=2e-2, atol=8e-3)
    for cache, old, new in zip(caches, before, (k, v)):
        old[slots_] = new
        assert torch.equal(cache, old), "the step's K and V are stored, and nothing else changes"


@pytest.mark.parametrize("head_dim", cuda.HEAD_DIMS)
def test_a_rows_attention_does_not_depend_on_the_batch_around_it(gpu, rng, head_dim):
    lens, contexts = [4, 8, 1], [90, 1400, 600]
    batch = reference.make_batch(rng, lens, contexts)
    q = torch.randn(batch.tokens, 8, head_dim, device=gpu).bfloat16()
    k, v = (torch.randn(batch.tokens, 2, head_dim, device=gpu).bfloat16() for _ in "kv")
    caches = [torch.randn(batch.num_slots, 2, head_dim, device=gpu).bfloat16() for _ in "kv"]

    def run(requests, keys):
        rows = np.concatenate([np.arange(*batch.query_starts[r : r + 2]) for r in requests])
        starts = np.concatenate(([0], np.cumsum([lens[r] for r in requests]))).astype(np.int32)
        rows, starts, context, row_ids = to(gpu, rows, starts, batch.context_lens[requests], batch.row_ids[requests])
        table = table_of(batch, gpu)._replace(row_ids=row_ids)
        return cuda.block_attention(
            q[rows], k[rows], v[rows], *caches, query_starts=starts, context_lens=context, table=table,
            max_block_len=max(lens[r] for r in requests), max_keys=keys, scale=0.1,
        )  # fmt: skip

    together = run([0, 1, 2], batch.max_keys)
    for r in range(3):
        start, end = batch.query_starts[r : r + 2]
        for keys in (contexts[r] + lens[r], 3000):
            assert torch.equal(run([r], keys), together[start:end])


@pytest.mark.parametrize("head_dim", cuda.HEAD_DIMS)
def test_splits_merged_on_the_chip_have_the_bits_of_those_merged_in_memory(gpu, rng, monkeypatch, head_dim):
    if not cuda.clusters(gpu):
        pytest.skip("a device without clusters of blocks")
    # One split, two, one more than a group, three groups.
    lens, contexts = [3, 20, 2, 1], [90, 700, 4095, 8200]
    batch = reference.make_batch(rng, lens, contexts)
    q = torch.randn(batch.tokens, 8, head_dim, device=gpu).bfloat16()
    k, v = (torch.randn(batch.tokens, 2, head_dim, device=gpu).bfloat16() for _ in "kv")
    caches = [torch.randn(batch.num_slots, 2, head_dim, device=gpu).bfloat16() for _ in "kv"]
    starts, context = to(gpu, batch.query_starts, batch.context_lens)

    def run(max_keys):
        out = poisoned(batch.tokens, 8, head_dim, dtype=torch.bfloat16, device=gpu)
        return cuda.block_attention(
            q, k, v, *caches, query_starts=starts, context_lens=context, table=table_of(batch, gpu), max_block_len=max(lens),
            max_keys=max_keys, scale=0.1, out=out,
        )  # fmt: skip

    merged = run(batch.max_keys)
    assert torch.equal(run(16384), merged)
    # Room for so many splits that heads of 128 have wide tiles.
    assert torch.equal(run(102_400), merged)
    monkeypatch.setattr(cuda, "clusters", lambda device: False)
    assert torch.equal(run(batch.max_keys), merged)


@pytest.mark.parametrize("mask", ["causal", "ancestors"])
@pytest.mark.parametrize("bytes_", [1, 40_000, 150_000, 400_000])
def test_heads_one_after_the_other_have_the_bits_of_heads_together(gpu, rng, monkeypatch, bytes_, mask):
    lens, contexts, heads, kv_heads, head_dim = [5, 8, 1], [90, 1400, 600], 12, 3, 64
    batch = reference.make_batch(rng, lens, contexts)
    q = torch.randn(batch.tokens, heads, head_dim, device=gpu).bfloat16()
    k, v = (torch.randn(batch.tokens, kv_heads, head_dim, device=gpu).bfloat16() for _ in "kv")
    before = [torch.randn(batch.num_slots, kv_heads, head_dim, device=gpu).bfloat16() for _ in "kv"]
    starts, context, slots = to(gpu, batch.query_starts, batch.context_lens, batch.token_slots())
    parents = [reference.random_parents(rng, n) for n in lens]
    bits = torch.from_numpy(np.concatenate([reference.masks_of(p, 1) for p in parents]).view(np.int64)).to(gpu)
    made = []
    # Every split has a part in memory, so that few keys take several launches.
    monkeypatch.setattr(cuda, "clusters", lambda device: False)
    room = cuda.attention_workspace
    monkeypatch.setattr(cuda, "attention_workspace", lambda *args: made.append(room(*args)) or made[-1])

    def run():
        caches = [cache.clone() for cache in before]
        out = poisoned(batch.tokens, heads, head_dim, dtype=torch.bfloat16, device=gpu)
        cuda.block_attention(
            q, k, v, *caches, query_starts=starts, context_lens=context, table=table_of(batch, gpu), slots=slots, out=out,
            max_block_len=max(lens), max_keys=batch.max_keys, scale=0.1, mask=mask, window=900, softcap=20.0,
            ancestors=bits if mask == "ancestors" else None, sinks=torch.linspace(-3, 4, heads, device=gpu),
        )  # fmt: skip
        return out, *caches

    together = run()
    assert len(made) == 1
    monkeypatch.setattr(cuda, "WORKSPACE_BYTES", bytes_)
    apart = run()
    assert all(torch.equal(a, b) for a, b in zip(apart, together))
    sizes = [sum(part.nbytes for part in each) for each in made[1:]]
    assert len(sizes) > 1 and sum(sizes) == sum(part.nbytes for part in made[0])
    assert max(sizes) <= bytes_ or max(each.out.shape[2] for each in made[1:]) == 1


SAMPLINGS = {
    "greedy": {"temperature": 0},
    "plain": {},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8, "temperature": 0.7},
    "min_p": {"min_p": 0.05},
    "all filters": {"top_k": 50, "top_p": 0.95, "min_p": 0.01, "temperature": 1.3},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2, "logit_bias": {3: 5.0, 11: -50.0}},
}  # fmt: skip


@pytest.mark.parametrize("vocab", [77, 4096, 50257, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_sampled_tokens_are_the_cores(gpu, rng, vocab, dtype, name):
    options = SAMPLINGS[name]
    lens, contexts = [4, 1, 3], [20, 7, 300]
    batch = reference.make_batch(rng, lens, contexts)
    logits = (torch.randn(batch.tokens, vocab) * 3).to(dtype)
    seeds = [int(x) for x in rng.integers(0, 2**62, 3)]
    ids = rng.integers(0, min(vocab, 40), batch.tokens)
    history = [{int(t): int(rng.integers(0, 4)) for t in rng.permutation(min(vocab, 40))[:12]} for _ in lens]
    sampling = cuda.sampling_rows([options | {"seed": s, "history": h} for s, h in zip(seeds, history)], gpu)
    positions = np.concatenate([c + np.arange(n) for n, c in zip(lens, contexts)])
    starts, ids_, positions_ = to(gpu, batch.query_starts, ids, positions)
    out = cuda.Sampled(
        *(poisoned(batch.tokens, dtype=t, device=gpu) for t in (torch.int64, torch.int32, torch.float32))
    )
    size = _core.cuda_sample_scratch(batch.tokens, vocab)
    cuda.sample_rows(
        logits.to(gpu), sampling, query_starts=starts, token_ids=ids_, positions=positions_, logprobs=True, out=out,
        scratch=poisoned(size, dtype=torch.uint8, device=gpu),
    )  # fmt: skip
    for r, n in enumerate(lens):
        rows = slice(batch.query_starts[r], batch.query_starts[r + 1])
        tokens, logprobs = _core.sample_rows(
            logits[rows].float().numpy(), (positions[rows] + 1).astype(np.uint64), np.full(n, seeds[r], dtype=np.uint64),
            options,
            prompt=[t for t, count in history[r].items() if count == 0],
            output=[t for t, count in history[r].items() for _ in range(count)],
            paths=[ids[rows][1 : i + 1].tolist() for i in range(n)],
        )  # fmt: skip
        assert out.tokens[rows].tolist() == tokens.tolist()
        assert np.allclose(out.logprobs[rows].cpu().numpy(), logprobs, atol=1e-4)
    assert out.status.tolist() == [0] * batch.tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_draw_alone_what_they_draw_among_many(gpu, rng, dtype):
    """Of many rows a block takes several chunks, one after the other."""
    vocab, n, copies = 20_011, len(SAMPLINGS), 110
    history = {"history": {3: 1, 5000: 2, 20_010: 0}}
    seeds = [int(x) for x in rng.integers(0, 2**62, n)]
    sampling = cuda.sampling_rows([o | history | {"seed": s} for o, s in zip(SAMPLINGS.values(), seeds)], gpu)
    logits = (torch.randn(n, vocab) * 3).to(dtype).to(gpu)
    starts, ids, positions = to(
        gpu, np.arange(n + 1, dtype=np.int32), rng.integers(0, vocab, n), rng.integers(0, 300, n)
    )
    batch = {"query_starts": starts, "token_ids": ids, "positions": positions, "logprobs": True}
    alone = cuda.sample_rows(logits, sampling, **batch)
    rows = torch.arange(n, dtype=torch.int32, device=gpu).repeat(copies)
    many = cuda.sample_rows(logits.repeat(copies, 1), sampling, row_tokens=rows, **batch)
    assert alone.status.tolist() == [0] * n
    assert torch.equal(many.tokens, alone.tokens.repeat(copies))
    assert torch.equal(many.logprobs, alone.logprobs.repeat(copies))


class Drawing:
    """A drafter on a device that has chains drawn."""

    def choose(self, hidden, logits, anchors, draw):
        return draw(logits)


@pytest.mark.parametrize("block", [2, 8])
def test_chains_are_drawn_for_the_places_behind_their_tokens(gpu, rng, block):
    vocab, contexts, heats, seeds = 50257, np.array([30, 0, 100]), [0.7, 0.0, 1.2], [3, 4, 2**63 + 5]
    logits = (torch.randn(3, block - 1, vocab) * 3).bfloat16()
    positions = (contexts[:, None] + np.arange(block)).reshape(-1)
    starts, anchors, ids, there = to(
        gpu, np.arange(4, dtype=np.int32) * block, contexts, rng.integers(0, vocab, positions.size), positions
    )
    asked = cuda.sampling_rows([{"temperature": heat, "seed": seed} for heat, seed in zip(heats, seeds)], gpu)
    blocks = drafting.Blocks(starts, anchors, ids, there, logits.to(gpu), logits.to(gpu))
    drafts = drafting.chains(Drawing(), blocks, asked.rows)
    for r in range(3):
        places = (contexts[r] + 1 + np.arange(block - 1)).astype(np.uint64)
        same = np.full(block - 1, seeds[r], dtype=np.uint64)
        tokens, _ = _core.sample_rows(logits[r].float().numpy(), places, same, {"temperature": heats[r]})
        assert drafts[r].tolist() == tokens.tolist()


def test_rows_that_cannot_be_drawn_say_so(gpu):
    logits = torch.zeros(5, 1000, device=gpu)
    logits[1, 999] = float("nan")
    logits[2, 0] = float("inf")
    logits[3] = float("-inf")
    logits[4, 5] = 1e38
    sampling = cuda.sampling_rows([{"temperature": 1e-5}], gpu)
    starts, ids, positions = to(gpu, np.array([0, 5], np.int32), np.zeros(5, np.int64), np.arange(5))
    out = cuda.sample_rows(logits, sampling, query_starts=starts, token_ids=ids, positions=positions)
    assert out.status.tolist() == [0, 1, 1, 2, 3] and (out.tokens[1:] == -1).all() and out.tokens[0] >= 0


@pytest.mark.parametrize("tree", [False, True])
def test_accept(gpu, rng, tree):
    lens = [8, 1, 16, 5, 8, 12]
    contexts = [int(x) for x in rng.integers(0, 200, len(lens))]
    batch = reference.make_batch(rng, lens, contexts)
    ids, sampled = rng.integers(0, 3, batch.tokens), rng.integers(0, 3, batch.tokens)
    chains = [np.arange(-1, n - 1, dtype=np.int32) for n in lens]
    parents = [reference.random_parents(rng, n) for n in lens] if tree else chains
    for r, n in enumerate(lens):  # siblings carry different tokens, as drafters propose them
        for node in range(1, n):
            ids[batch.query_starts[r] + node] = node % 2 if not tree else node
    if tree:
        sampled = rng.integers(1, 5, batch.tokens)
    starts, lens_, ids_, sampled_ = to(gpu, batch.query_starts, batch.context_lens, ids, sampled)
    r, most = len(lens), max(lens)
    out = cuda.Accepted(
        *(
            poisoned(*shape, dtype=dtype, device=gpu)
            for shape, dtype in (
                ((r,), torch.int32), ((r, most), torch.int64), ((r,), torch.int32), ((r,), torch.int32), ((r,), torch.int64),
                ((r, most), torch.int32), ((batch.tokens,), torch.int64), ((batch.tokens,), torch.int64), ((batch.tokens,), torch.int64),
            )
        )
    )  # fmt: skip
    cuda.accept(
        query_starts=starts, context_lens=lens_, token_ids=ids_, sampled=sampled_, table=table_of(batch, gpu), max_nodes=most,
        parents=to(gpu, np.concatenate(parents))[0] if tree else None, out=out,
    )  # fmt: skip
    for i, n in enumerate(lens):
        start = batch.query_starts[i]
        path = reference.walk(ids[start : start + n], parents[i], sampled[start : start + n])
        bonus = int(sampled[start + path[-1]])
        kept = len(path)
        assert out.accepted[i] == kept - 1 and out.out_lens[i] == kept
        want = [int(ids[start + node]) for node in path[1:]] + [bonus]
        assert out.out_tokens[i].tolist() == want + [-1] * (most - kept)
        assert out.context_lens[i] == contexts[i] + kept and out.next_anchors[i] == bonus
        assert out.path[i].tolist() == path + [-1] * (most - kept)
        pad = [-1] * (n - kept)
        assert out.commit_rows[start : start + n].tolist() == [int(start) + node for node in path] + pad
        assert out.commit_positions[start : start + n].tolist() == list(range(contexts[i], contexts[i] + kept)) + pad
        assert out.commit_slots[start : start + n].tolist() == batch.slots(i, contexts[i], contexts[i] + kept) + pad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab, k", [(100, 7), (50264, 16), (151936, 8)])
def test_trees(gpu, rng, dtype, vocab, k):
    r, depth, nodes = 3, 6, 40
    logits = (torch.randn(r * depth, vocab) * 2).to(dtype)
    tokens, log_probs = cuda.tree_top_k(logits.to(gpu), k)
    wide = logits.double().log_softmax(-1)
    for row in range(r * depth):
        order = np.lexsort((np.arange(vocab), -logits[row].double().numpy()))[:k]
        assert tokens[row].tolist() == order.tolist()
        assert np.allclose(log_probs[row].cpu().numpy(), wide[row, order].numpy(), atol=1e-4)
    anchors = rng.integers(0, vocab, r)
    budgets = np.array([nodes, 5, 0], dtype=np.int32)
    anchors_, budgets_ = to(gpu, anchors, budgets)
    trees = cuda.tree_build(anchors_, tokens.view(r, depth, k), log_probs.view(r, depth, k), nodes, budgets=budgets_)
    for i in range(r):
        rows = slice(i * depth, (i + 1) * depth)
        want = DraftTree.build(
            int(anchors[i]), tokens[rows].cpu().numpy(), log_probs[rows].cpu().numpy(), int(budgets[i])
        )
        n = len(want)
        assert trees.counts[i] == n
        assert trees.tokens[i, :n].tolist() == want.tokens.tolist()
        assert trees.parents[i, :n].tolist() == want.parents.tolist()
        assert trees.depths[i, :n].tolist() == want.depths.tolist()
        masks = trees.masks[i].view(torch.int64).cpu().numpy().view(np.uint64)
        assert np.array_equal(masks[:n, : want.masks.shape[1]], want.masks)
        assert trees.tokens[i, n:].tolist() == [int(anchors[i])] * (nodes + 1 - n)
        assert trees.parents[i, n:].tolist() == [0] * (nodes + 1 - n)


def test_compact_kv(gpu, rng):
    lens, contexts = [16, 40, 1, 70], [30, 0, 5, 200]
    batch = reference.make_batch(rng, lens, contexts)
    layers, heads, dim = 3, 2, 128
    caches = cuda.KvCaches(
        *[[torch.randn(batch.num_slots, heads, dim, device=gpu).bfloat16() for _ in range(layers)] for _ in "kv"]
    )
    path = np.full((len(lens), max(lens)), -1, dtype=np.int32)
    for r, n in enumerate(lens):
        kept = np.sort(rng.permutation(np.arange(1, n))[: n // 2])
        path[r, : 1 + len(kept)] = [0, *kept]
    want = [cache.clone() for cache in (*caches.k, *caches.v)]
    for cache in want:
        old = cache.clone()
        for r, context in enumerate(contexts):
            for key, node in enumerate(path[r]):
                if node < 0:
                    break
                cache[batch.slot(r, context + key)] = old[batch.slot(r, context + int(node))]
    path_, lens_ = to(gpu, path, batch.context_lens)
    cuda.compact_kv(path_, lens_, caches, table_of(batch, gpu))
    for got, expected in zip((*caches.k, *caches.v), want):
        assert torch.equal(got, expected)


def test_a_step_can_be_captured_and_replayed(gpu, rng):
    batch = reference.make_batch(rng, [8, 8], [100, 20])
    cuda.load(gpu)
    q = torch.randn(16, 8, 128, device=gpu).bfloat16()
    k, v = (torch.randn(16, 2, 128, device=gpu).bfloat16() for _ in "kv")
    caches = [torch.randn(batch.num_slots, 2, 128, device=gpu).bfloat16() for _ in "kv"]
    starts, lens = to(gpu, batch.query_starts, batch.context_lens)
    out = torch.empty_like(q)
    arguments = dict(
        query_starts=starts, context_lens=lens, table=table_of(batch, gpu), max_block_len=8, max_keys=batch.max_keys, scale=0.1, out=out
    )  # fmt: skip
    want = cuda.block_attention(q, k, v, *caches, **arguments).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.block_attention(q, k, v, *caches, **arguments)
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want)
