"""Drafts of requests that sample share the target's random numbers: more of them are right, and no text changes."""

import numpy as np
import pytest

from dflash_rs import LLM, SamplingParams, _core, verify
from dflash_rs.config import SHARPER
from dflash_rs.errors import InvalidArgument
from dflash_rs.models.dflash.model import DFlashDraft


def given(rows: int = 2, depth: int = 3, candidates: int = 20, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    tokens = np.stack([rng.permutation(500)[:candidates] for _ in range(rows * depth)]).reshape(rows, depth, candidates)
    chances = -np.sort(-rng.dirichlet(np.ones(candidates), (rows, depth)).astype(np.float32), axis=-1)
    return {
        "tokens": tokens.astype(np.int64),
        "probabilities": chances,
        "seeds": np.array([2**63 + 5, 7][:rows], np.uint64),
        "positions": np.array([40, 2**33][:rows], np.int64),
        "temperatures": np.array([0.8, 1.5][:rows], np.float32),
    }


def test_drafts_are_the_candidates_that_the_targets_numbers_favour():
    call = given()
    tokens, shares = _core.couple(**call, k=4)
    assert tokens.shape == shares.shape == (2, 3, 4) and (tokens.dtype, shares.dtype) == (np.int64, np.float32)
    for row in range(2):
        for place in range(3):
            numbers = verify.gumbel(int(call["seeds"][row]), int(call["positions"][row]) + place, 500)
            candidates = call["tokens"][row, place]
            sums = SHARPER * np.log(call["probabilities"][row, place]) / call["temperatures"][row] + numbers[candidates]
            order = np.argsort(-sums)[:4]
            assert np.array_equal(tokens[row, place], candidates[order])
            expected = np.exp(sums - sums.max()) / np.exp(sums - sums.max()).sum()
            np.testing.assert_allclose(shares[row, place], expected[order], rtol=1e-4)


def test_greedy_rows_keep_their_likeliest_candidates():
    call = given()
    call["temperatures"][0] = 0
    tokens, shares = _core.couple(**call, k=5)
    assert np.array_equal(tokens[0], call["tokens"][0, :, :5])
    assert np.array_equal(shares[0], call["probabilities"][0, :, :5])
    assert not np.array_equal(tokens[1], call["tokens"][1, :, :5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k: got 0, expected 1..20, the candidates of a place"),
        ({"k": 21}, "k: got 21, expected 1..20"),
        ({"seeds": np.zeros(1, np.uint64)}, "seeds: got 1 elements, expected 2"),
        ({"positions": np.zeros(3, np.int64)}, "positions: got 3 elements, expected 2"),
        ({"temperatures": np.zeros(3, np.float32)}, "temperatures: got 3 elements, expected 2"),
        ({"probabilities": given()["probabilities"][:1]}, "probabilities: got 60 elements, expected 120"),
    ],
)
def test_arrays_that_do_not_fit_are_named(change, message):
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        _core.couple(**(given() | {"k": 2} | change))


@pytest.mark.parametrize(("nodes", "gain"), [(0, 1.25), (12, 1.1)], ids=["chains", "trees"])
def test_more_drafts_of_a_hot_request_are_right_and_its_text_is_the_same(monkeypatch, nodes, gain):
    prompts = ["def main(", "import os\n", "class Tree:\n", "    for i in range("]
    params = [SamplingParams(temperature=1.0, seed=seed, max_tokens=48, ignore_eos=True) for seed in range(4)]
    results = []
    with LLM(adaptive=False, lookup=False, tree_nodes=nodes) as llm:
        plain = [output.token_ids for output in llm.generate(prompts, params, draft=False)]
        for most in (64, 1):
            monkeypatch.setattr(DFlashDraft, "most_candidates", most)
            before = llm.stats()
            outputs = llm.generate(prompts, params)
            assert [output.token_ids for output in outputs] == plain
            now = llm.stats()
            results.append((now["accepted"] - before["accepted"]) / (now["committed"] - before["committed"]))
    coupled, likeliest = results
    assert coupled > gain * likeliest
