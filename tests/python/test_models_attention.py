"""The host kernel behind the Python dispatch, against the torch reference."""

import dataclasses

import numpy as np
import pytest
import torch
from models_helpers import HIDDEN, VOCAB, Pages, qwen3_target, random_draft

from dflash_rs import _core
from dflash_rs.attention import TorchAttention, step_attention
from dflash_rs.errors import InvalidArgument
from dflash_rs.models.target import TargetModel

needs_kernel = pytest.mark.skipif(
    not hasattr(_core, "paged_attention"), reason="the extension was built without its host attention kernel"
)


def dense(q, keys, values, scale, visible, softcap=None, sinks=None):
    """Attention of one request from its definition. q [n, heads, d], keys and values [m, kv_heads, d], sinks [heads]."""
    group = q.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = torch.einsum("nhd,mhd->hnm", q.double(), keys.double()) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None, None].expand(-1, q.shape[0], 1)), dim=-1)
    weights = scores.softmax(-1)[..., : keys.shape[0]]
    return torch.einsum("hnm,mhd->nhd", weights, values.double())


@pytest.mark.parametrize("host", [pytest.param(True, marks=needs_kernel), False], ids=["host", "torch"])
@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 5), (False, 4)])
@pytest.mark.parametrize("page_size", [1, 8])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("sinks", [None, torch.linspace(-2, 3, 6)], ids=["no sinks", "sinks"])
def test_attention_over_pages_follows_its_definition(page_size, causal, window, write, host, softcap, sinks):
    pages = Pages(3, 24, page_size)
    contexts, counts, first = [13, 0, 7], [4, 3, 1], [2, 0, 0]
    batch = pages.batch([(r, c, [0] * n) for r, (c, n) in enumerate(zip(contexts, counts, strict=True))])
    generator = torch.Generator().manual_seed(1)
    caches = torch.randn(2, pages.num_slots, 2, 8, generator=generator)
    q, k, v = (torch.randn(8, heads, 8, generator=generator) for heads in (6, 2, 2))
    valid_from = np.array(first, dtype=np.int32)
    expected = []
    for r, (context, n) in enumerate(zip(contexts, counts, strict=True)):
        rows = slice(batch.query_starts[r], batch.query_starts[r + 1])
        slots = torch.from_numpy(pages.slots(r, np.arange(context)))
        keys, values = torch.cat((caches[0][slots], k[rows])), torch.cat((caches[1][slots], v[rows]))
        distance = torch.arange(context, context + n)[:, None] - torch.arange(context + n)[None]
        visible = (torch.arange(context + n) >= first[r]).expand_as(distance).clone()
        if causal:
            visible &= distance >= 0
        if window is not None:
            visible &= distance.abs() < window
        expected.append(dense(q[rows], keys, values, 0.3, visible, softcap, sinks))
    before = caches.clone()
    attention = step_attention(batch, num_slots=pages.num_slots, write=write, kernel=host, valid_from=valid_from)
    options = {"causal": causal, "window": window, "softcap": softcap, "sinks": sinks}
    got = attention.attend(q, k, v, caches[0], caches[1], scale=0.3, **options)
    torch.testing.assert_close(got.double(), torch.cat(expected), atol=1e-5, rtol=1e-5)
    if write:
        before[0][batch.slots], before[1][batch.slots] = k, v
    assert torch.equal(caches, before)


def comb(nodes: int) -> tuple[list[int], np.ndarray]:
    """Parents of a tree with two children per node of its spine, and its ancestor masks uint64 [nodes, words]."""
    parents = [-1] + [(i - 1) // 2 * 2 for i in range(1, nodes)]
    seen = np.zeros((nodes, nodes), dtype=bool)
    for node, parent in enumerate(parents):
        seen[node] = seen[parent] if node else False
        seen[node, node] = True
    words = -(-nodes // 64)
    bits = np.zeros((nodes, words * 64), dtype=bool)
    bits[:, :nodes] = seen
    return parents, np.packbits(bits, axis=1, bitorder="little").view(np.uint64)


@pytest.mark.parametrize("host", [pytest.param(True, marks=needs_kernel), False], ids=["host", "torch"])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("nodes", [7, 70])
def test_a_token_of_a_tree_attends_as_if_its_path_were_a_chain(nodes, window, host):
    pages = Pages(2, 128, 8)
    parents, masks = comb(nodes)
    ancestors = np.zeros((nodes + 3, masks.shape[1]), dtype=np.uint64)
    ancestors[:nodes], ancestors[nodes:, 0] = masks, [0b1, 0b11, 0b111]
    batch = pages.batch([(0, 9, [0] * nodes), (1, 4, [0] * 3)])
    batch = dataclasses.replace(batch, ancestors=ancestors)
    generator = torch.Generator().manual_seed(4)
    caches = torch.randn(2, pages.num_slots, 2, 8, generator=generator)
    q, k, v = (torch.randn(nodes + 3, heads, 8, generator=generator) for heads in (4, 2, 2))
    attention = step_attention(batch, num_slots=pages.num_slots, write=True, kernel=host)
    got = attention.attend(q, k, v, *caches.clone(), scale=0.4, causal=True, window=window)
    for node in (0, 1, 2, 5, nodes - 1):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        rows = torch.tensor(path)
        chain = step_attention(
            pages.batch([(0, 9, [0] * len(path))]), num_slots=pages.num_slots, write=False, kernel=host
        ).attend(q[rows], k[rows], v[rows], *caches, scale=0.4, causal=True, window=window)
        torch.testing.assert_close(got[node], chain[-1], rtol=0 if host else 1e-5, atol=0 if host else 1e-6)
    chain = step_attention(pages.batch([(1, 4, [0] * 3)]), num_slots=pages.num_slots, write=False, kernel=host)
    alone = chain.attend(q[nodes:], k[nodes:], v[nodes:], *caches, scale=0.4, causal=True, window=window)
    torch.testing.assert_close(got[nodes:], alone, rtol=0 if host else 1e-5, atol=0 if host else 1e-6)


@needs_kernel
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"softcap": 0.0}, "softcap: got 0, expected a positive number"),
        ({"softcap": float("nan")}, "softcap: got NaN"),
        ({"sinks": torch.zeros(3)}, "sinks: got 3"),
    ],
)
def test_a_soft_cap_or_sinks_that_do_not_fit_are_refused(options, expected):
    pages = Pages(1, 8, 4)
    q, k, v = (torch.zeros(2, heads, 8) for heads in (4, 2, 2))
    attention = step_attention(pages.batch([(0, 0, [1, 2])]), num_slots=pages.num_slots, write=True, kernel=True)
    with pytest.raises(InvalidArgument, match=expected):
        attention.attend(q, k, v, *torch.zeros(2, pages.num_slots, 2, 8), scale=1.0, **options)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
def test_a_target_gives_the_same_logits_with_either_attention(fused, dtype):
    tokens = np.random.default_rng(3).integers(0, VOCAB, 30).tolist()
    results = []
    for host in (True, False):
        target = TargetModel(qwen3_target().to(dtype), fused=fused)
        assert target.kernel
        target.kernel = host
        pages = Pages(2, 32, 4)
        target.alloc_kv(pages.num_slots)
        target.forward(pages.batch([(1, 0, tokens[:21]), (0, 0, tokens[:3])]))
        results.append(target.forward(pages.batch([(0, 3, [5]), (1, 21, tokens[21:])]))[0].float())
    tolerance = 1e-3 if dtype == torch.float32 else 0.2
    assert float((results[0] - results[1]).norm() / results[1].norm()) < tolerance


@needs_kernel
def test_a_drafter_gives_the_same_drafts_with_either_attention():
    model = qwen3_target()
    draft = random_draft(layer_causal=(True, False), layer_window=(7, None))
    draft.bind_target(model.get_input_embeddings(), model.lm_head)
    pages = Pages(1, 32, 4)
    drafts = []
    for host in (True, False):
        draft.alloc_kv(pages.num_slots)
        draft.runtime.kernel = host
        positions = np.arange(19)
        features = torch.randn(19, 3 * HIDDEN, generator=torch.Generator().manual_seed(2))
        draft.inject(features, torch.from_numpy(positions), torch.from_numpy(pages.slots(0, positions)))
        drafts.append(draft.candidates([9], [19], pages.table, page_size=4, k=1)[0])
    assert np.array_equal(*drafts)


def test_a_context_that_outgrows_its_pages_is_an_error():
    arrays = {
        "query_starts": np.array([0, 1], dtype=np.int32),
        "page_table": np.zeros((1, 2), dtype=np.int32),
        "row_ids": np.zeros(1, dtype=np.int32),
        "page_size": 4,
    }
    with pytest.raises(InvalidArgument, match=r"context_lens\[0\]: got 9, expected at most 8"):
        TorchAttention(context_lens=np.array([9], dtype=np.int32), **arrays)
    with pytest.raises(InvalidArgument, match=r"valid_from\[0\]: got 5, expected 0..3"):
        TorchAttention(
            context_lens=np.array([3], dtype=np.int32), valid_from=np.array([5], dtype=np.int32), **arrays
        )  # fmt: skip
