"""The references of the kernel tests against what else computes the same, on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch

from dflash_rs import DraftTree, _core
from dflash_rs.attention import HostAttention
from dflash_rs.models.dflash.layers import rotate


@pytest.mark.parametrize("mask", ["causal", "block"])
@pytest.mark.parametrize("window", [None, 5])
def test_attention_agrees_with_the_host_kernel(rng, mask, window):
    batch = reference.make_batch(rng, [3, 1, 4], [17, 0, 33])
    q, k, v = torch.randn(8, 4, 64), torch.randn(8, 2, 64), torch.randn(8, 2, 64)
    caches = [torch.randn(batch.num_slots, 2, 64) for _ in "kv"]
    valid_from = np.array([2, 0, 30], dtype=np.int32)
    host = HostAttention(
        query_starts=batch.query_starts, context_lens=batch.context_lens, page_table=batch.pages, row_ids=batch.row_ids,
        page_size=16, num_slots=batch.num_slots, slots=None, valid_from=valid_from, threads=1,
    )  # fmt: skip
    got = host.attend(q, k, v, *caches, scale=0.125, causal=mask == "causal", window=window)
    want = reference.attention(batch, q, k, v, *caches, scale=0.125, mask=mask, window=window, valid_from=valid_from)
    assert torch.allclose(got.double(), want, atol=1e-5)


def test_attention_over_a_chain_written_as_a_tree_is_causal(rng):
    batch = reference.make_batch(rng, [5], [20])
    q, k, v = torch.randn(5, 2, 64), torch.randn(5, 2, 64), torch.randn(5, 2, 64)
    caches = [torch.randn(batch.num_slots, 2, 64) for _ in "kv"]
    chain = [np.arange(-1, 4, dtype=np.int32)]
    tree = reference.attention(batch, q, k, v, *caches, scale=0.1, mask="ancestors", window=9, parents=chain)
    assert torch.equal(tree, reference.attention(batch, q, k, v, *caches, scale=0.1, mask="causal", window=9))


def test_injection_is_the_drafters_own_norm_and_rotation():
    kv, norm = torch.randn(3, 2, 2, 2, 64, dtype=torch.float64), torch.rand(2, 64, dtype=torch.float64) + 0.5
    angle = torch.rand(50, 32, dtype=torch.float64)
    cos_sin, positions = torch.cat((angle.cos(), angle.sin()), -1), torch.tensor([4, 0, 49])
    k, v = reference.inject(kv, norm, cos_sin, positions, 1e-6)
    normed = torch.nn.functional.rms_norm(kv[:, :, 0], (64,), None, 1e-6) * norm[:, None]
    both = torch.cat((angle, angle), -1)[positions][:, None, None]
    assert torch.allclose(k, rotate(normed, both.cos(), both.sin())) and torch.equal(v, kv[:, :, 1])


def test_the_walk_is_the_cores(rng):
    tree = DraftTree.build(5, np.array([[1, 2, 3]] * 4), np.log(np.array([[0.5, 0.3, 0.2]] * 4, dtype=np.float32)), 12)
    tokens, parents = np.asarray(tree.tokens), np.asarray(tree.parents)
    for _ in range(20):
        sampled = rng.integers(1, 4, len(tokens))
        path, bonus = tree.walk(sampled)
        want = reference.walk(tokens, parents, sampled)
        assert [0, *path.tolist()] == want and bonus == sampled[want[-1]]


def test_masks_are_the_cores():
    tree = DraftTree.build(5, np.array([[1, 2, 3]] * 4), np.log(np.array([[0.5, 0.3, 0.2]] * 4, dtype=np.float32)), 70)
    got = reference.masks_of(np.asarray(tree.parents), np.asarray(tree.masks).shape[1])
    assert np.array_equal(got, np.asarray(tree.masks))
    assert hasattr(_core, "cuda_info")
