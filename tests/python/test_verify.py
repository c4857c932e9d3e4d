"""Verification alone, on NumPy arrays: against plain NumPy references, and what it refuses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dflash_rs
from dflash_rs import DraftTree, InvalidArgument, PagePool, Planner, serving, verify

F32 = np.float32


# --- the generator, once more in NumPy: float32 operations one by one, as a device would do them ----------------------


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    x = counter.astype(np.uint64)
    low = np.uint64(0xFFFFFFFF)
    k0, k1 = key
    for _ in range(10):
        a, b = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        x = np.stack(
            [
                (b >> np.uint64(32)) ^ x[1] ^ np.uint64(k0),
                b & low,
                (a >> np.uint64(32)) ^ x[3] ^ np.uint64(k1),
                a & low,
            ]
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return x.astype(np.uint32)


def words(seed: int, position: int, columns: int, domain: int) -> np.ndarray:
    blocks = np.arange(-(-columns // 4))
    ones = np.ones_like(blocks)
    counter = np.stack([blocks, ones * (position & 0xFFFFFFFF), ones * (position >> 32), ones * domain])
    return philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).T.reshape(-1)[:columns]


LOG1P = [
    F32(c)
    for c in (-0.5, 0.3333321, -0.24999507, 0.20010792, -0.1668955, 0.14000371, -0.12077453, 0.14008936, -0.1331497)
]
LN2 = F32(np.log(2))


def log1p(r: np.ndarray) -> np.ndarray:
    p = np.full_like(r, LOG1P[8])
    for c in LOG1P[7::-1]:
        p = p * r + c
    return r + (r * r) * p


def ln(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32)
    e = (bits - np.uint32(0x3F2AAAAB)).view(np.int32) >> 23
    f = (bits - (e << 23).view(np.uint32)).view(F32)
    return e.astype(F32) * LN2 + log1p(f - F32(1))


def gumbel(word: np.ndarray) -> np.ndarray:
    k = (word >> np.uint32(1)) | np.uint32(1)
    high, low = (k >> np.uint32(16)).astype(F32), (k & np.uint32(0xFFFF)).astype(F32)
    e = ((high * F32(65536) + low).view(np.uint32) - np.uint32(0x3F2AAAAB)).view(np.int32) >> 23
    s = ((np.int32(127) - e) << 23).view(F32)
    r = (high * (F32(65536) * s) - F32(1)) + low * s
    exponential = F32(0) - ((e - np.int32(31)).astype(F32) * LN2 + log1p(r))
    return F32(0) - ln(exponential)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**64 - 1), columns=st.integers(1, 700))
def test_gumbel_numbers_are_the_documented_arithmetic_bit_for_bit(seed, position, columns):
    for number, domain in enumerate(("draw", "accept", "residual", "draft")):
        got = verify.gumbel(seed, position, columns, domain)
        expected = gumbel(words(seed, position, columns, number))
        assert got.dtype == F32
        np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), vocab=st.integers(2, 900), temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]))
def test_rows_are_drawn_by_gumbel_max_over_the_tempered_logits(seed, vocab, temperature):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((5, vocab)) * 4).astype(F32)
    logits[rng.random((5, vocab)) < 0.1] = -np.inf
    logits[:, vocab // 2] = 1.0
    positions = rng.integers(0, 1000, 5)
    tokens, logprobs = verify.sample_rows(logits, positions, seed, temperature=temperature)
    for row, token, logprob, position in zip(logits, tokens, logprobs, positions, strict=True):
        if temperature == 0.0:
            scores = row
        else:
            scores = row * (F32(1) / F32(temperature)) + gumbel(words(seed, int(position), vocab, 0))
        assert token == np.argmax(scores)
        exact = row.astype(np.float64) - row.max()
        exact -= np.log(np.exp(exact).sum())
        assert logprob == pytest.approx(exact[token], rel=1e-5, abs=1e-5)


def test_penalties_count_prompt_output_and_path_as_documented():
    logits = np.zeros((3, 8), F32)
    logits[:, :4] = [4.0, 3.9, 3.8, 3.7]
    paths = [[], [0], [0, 1]]
    greedy = dict(temperature=0.0, paths=paths)
    tokens, _ = verify.sample_rows(logits, [0, 1, 2], presence_penalty=1.0, **greedy)
    assert tokens.tolist() == [0, 1, 2]
    # The prompt has no say in presence, but does in repetition.
    tokens, _ = verify.sample_rows(logits, [0, 1, 2], presence_penalty=1.0, prompt=[0, 1], **greedy)
    assert tokens.tolist() == [0, 1, 2]
    tokens, _ = verify.sample_rows(logits, [0, 1, 2], repetition_penalty=2.0, prompt=[0, 1], **greedy)
    assert tokens.tolist() == [2, 2, 2]
    tokens, _ = verify.sample_rows(logits, [0, 1, 2], frequency_penalty=0.06, output=[0, 0], **greedy)
    assert tokens.tolist() == [1, 1, 1]
    tokens, _ = verify.sample_rows(logits, [0, 1, 2], logit_bias={5: 10.0, 0: -np.inf}, **greedy)
    assert tokens.tolist() == [5, 5, 5]


def test_top_k_and_top_p_are_joint_and_min_p_is_relative():
    p = np.array([0.35, 0.25, 0.20, 0.05, 0.03, 0.03, 0.03, 0.03, 0.03])
    logits = np.repeat(np.log(p)[None].astype(F32), 4000, axis=0)
    seen = lambda **options: set(verify.sample_rows(logits, np.arange(4000), 7, **options)[0].tolist())  # noqa: E731
    assert seen(top_k=4, top_p=0.82) == {0, 1, 2, 3}
    assert seen(top_k=3, top_p=0.82) == {0, 1, 2}
    assert seen(top_p=0.5) == {0, 1}
    assert seen(min_p=0.5) == {0, 1, 2}


def test_top_logprobs_are_sorted_and_normalised():
    logits = np.array([1.0, 3.0, 3.0, -2.0], F32)
    tokens, scores = verify.top_logprobs(logits, 3)
    assert tokens.tolist() == [1, 2, 0]
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    np.testing.assert_allclose(scores, exact[tokens], rtol=1e-6)


# --- walks ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.integers(0, 6), g=st.integers(0, 6))
def test_the_walk_accepts_the_longest_matching_prefix(data, rows, g):
    tokens = st.integers(0, 1)
    drafts = np.array(data.draw(st.lists(tokens, min_size=rows * g, max_size=rows * g)), np.int64).reshape(rows, g)
    size = rows * (g + 1)
    sampled = np.array(data.draw(st.lists(tokens, min_size=size, max_size=size)), np.int64).reshape(rows, g + 1)
    lengths = np.array(data.draw(st.lists(st.integers(0, g), min_size=rows, max_size=rows)), np.int64)
    accepted, bonus = verify.walk(drafts, sampled, lengths)
    assert (accepted.dtype, bonus.dtype) == (np.int32, np.int64)
    for r in range(rows):
        n = 0
        while n < lengths[r] and drafts[r, n] == sampled[r, n]:
            n += 1
        assert (accepted[r], bonus[r]) == (n, sampled[r, n])


def test_a_tree_is_walked_through_the_child_that_carries_the_token():
    #        0 ─┬─ 5 ─┬─ 6
    #           └─ 7  └─ 8
    tree = DraftTree.from_parents(np.array([9, 5, 7, 6, 8]), np.array([-1, 0, 0, 1, 1], np.int32))
    path, bonus = verify.walk(tree, np.array([5, 8, 0, 0, 3]))
    assert (path.tolist(), bonus) == ([1, 4], 3)
    path, bonus = tree.walk(np.array([4, 8, 0, 0, 3]))
    assert (path.tolist(), bonus) == ([], 4)


# --- trees ------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), nodes=st.integers(0, 70))
def test_the_tree_holds_the_most_probable_prefixes_and_its_mask_their_ancestors(seed, nodes):
    rng = np.random.default_rng(seed)
    depth, vocab = 3, 4
    rows = rng.standard_normal((depth, vocab))
    rows = (rows - np.log(np.exp(rows).sum(1, keepdims=True))).astype(F32)
    tree = DraftTree.from_log_probs(9, rows, nodes)
    every = []
    for d in range(1, depth + 1):
        for path in itertools.product(range(vocab), repeat=d):
            score = F32(0)
            for level, token in enumerate(path):
                score = score + rows[level, token]
            every.append((score, path))
    best = sorted((float(s) for s, _ in every), reverse=True)[:nodes]
    assert sorted(map(float, tree.scores[1:]), reverse=True) == pytest.approx(best)
    assert len(tree) == len(best) + 1 and tree.tokens[0] == 9 and tree.parents[0] == -1
    mask = tree.attention_mask()
    for node in range(len(tree)):
        ancestors, at = {node}, node
        while at:
            at = int(tree.parents[at])
            ancestors.add(at)
        assert set(np.flatnonzero(mask[node]).tolist()) == ancestors
        assert len(ancestors) == tree.depths[node] + 1
        words_of = tree.masks[node]
        assert sum(int(w).bit_count() for w in words_of) == len(ancestors)
        assert tree.path_tokens(node).tolist() == [int(tree.tokens[a]) for a in sorted(ancestors) if a]
    order = np.argsort(-rows, axis=1, kind="stable").astype(np.int64)
    same = DraftTree.build(9, order, np.take_along_axis(rows, order, 1), nodes)
    assert same == tree and same != DraftTree.from_log_probs(8, rows, nodes)


def test_a_chain_is_a_tree_with_one_child_each():
    log_probs = np.array([-0.1, -0.2, -0.3], F32)
    chain = DraftTree.chain(1, np.array([4, 5, 6]), log_probs)
    assert chain == DraftTree.build(1, np.array([[4], [5], [6]]), log_probs[:, None], 3)
    assert chain.first_child.tolist() == [1, 2, 3, -1] and chain.next_sibling.tolist() == [-1] * 4
    np.testing.assert_array_equal(chain.attention_mask(), np.tri(4, dtype=bool))


# --- ratio verifiers --------------------------------------------------------------------------------------------------


def distributions(rng, *shape):
    weights = rng.exponential(size=shape) * (rng.random(shape) < 0.8)
    weights[..., 0] += 0.05
    return weights / weights.sum(-1, keepdims=True)


def reference_token(p, q, drafts, coins, last):
    for i, x in enumerate(drafts):
        if not (q[i, x] > 0 and coins[i] * q[i, x] < p[i, x]):
            rest = np.maximum(p[i] - q[i], 0)
            return i, pick(rest if rest.sum() > 0 else p[i], last)
    return len(drafts), pick(p[len(drafts)], last)


def reference_block(p, q, drafts, coins, last):
    g = len(drafts)
    reach = [1.0]
    for i, x in enumerate(drafts):
        reach.append(min(1.0, reach[-1] * p[i, x] / q[i, x]) if q[i, x] > 0 else 0.0)
    tau = 0
    for i in range(1, g + 1):
        z = np.maximum(reach[i] * p[i] - q[i], 0).sum() if i < g else 0.0
        h = reach[g] if i == g else 1.0 if reach[i] == 1.0 else z / (z + 1 - reach[i])
        if coins[i - 1] < h:
            tau = i
    rest = p[g] if tau == g else np.maximum(reach[tau] * p[tau] - q[tau], 0)
    return tau, pick(rest if rest.sum() > 0 else p[tau], last)


def pick(weights, u):
    return int(np.searchsorted(np.cumsum(weights), u * weights.sum(), side="right"))


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 4), g=st.integers(0, 5), vocab=st.integers(2, 12))
def test_given_coins_lead_to_the_verdict_of_the_formulae(seed, rows, g, vocab):
    rng = np.random.default_rng(seed)
    p, q = distributions(rng, rows, g + 1, vocab), distributions(rng, rows, g, vocab)
    drafts = np.array([[rng.choice(vocab, p=q[r, i]) for i in range(g)] for r in range(rows)], np.int64).reshape(
        rows, g
    )
    coins, last = rng.random((rows, g)), rng.random(rows)
    for function, reference in ((verify.token, reference_token), (verify.block, reference_block)):
        accepted, token = function(p, q, drafts, accept_coins=coins, last_coins=last)
        for r in range(rows):
            assert (accepted[r], token[r]) == reference(p[r], q[r], drafts[r], coins[r], last[r])
        single = function(p[0], q[0], drafts[0], accept_coins=coins[0], last_coins=last[0])
        assert single == (accepted[0], token[0])


def test_keyed_rounds_of_sampled_drafts_have_the_target_law():
    rng = np.random.default_rng(5)
    n, g = 40_000, 3
    p = np.tile([0.5, 0.5], (n, g + 1, 1))
    q = np.tile([0.85, 0.15], (n, g, 1))
    drafts = (rng.random((n, g)) >= 0.85).astype(np.int64)
    for function in (verify.token, verify.block):
        accepted, last = function(p, q, drafts, seeds=np.arange(n), round_starts=np.full(n, 11))
        first = np.where(accepted > 0, drafts[:, 0], last)
        # Standard error 0.0025.
        assert abs(first.mean() - 0.5) < 0.01
        assert 0 < accepted.mean() < g
        again = function(p, q, drafts, seeds=np.arange(n), round_starts=np.full(n, 11))
        np.testing.assert_array_equal(again[0], accepted)
        other = function(p, q, drafts, seeds=np.arange(n), round_starts=np.full(n, 12))
        assert (other[0] != accepted).any()


def test_float32_rows_are_taken_as_they_are():
    rng = np.random.default_rng(8)
    p, q = distributions(rng, 1, 3, 6).astype(F32), distributions(rng, 1, 2, 6).astype(F32)
    drafts = np.array([[0, 0]])
    keys = dict(seeds=[3], round_starts=[1])
    f32 = verify.block(p, q, drafts, **keys)
    f64 = verify.block(p.astype(np.float64), q.astype(np.float64), drafts, **keys)
    np.testing.assert_array_equal(f32, f64)


# --- refusals ---------------------------------------------------------------------------------------------------------


def good_ratio():
    p, q = np.full((1, 3, 4), 0.25), np.full((1, 2, 4), 0.25)
    return dict(p=p, q=q, drafts=np.zeros((1, 2), np.int64), seeds=[1], round_starts=[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(p=[1]), "p: got a list"),
        (dict(p=np.zeros((1, 3, 4), np.float16)), "p: got a float16 array"),
        (dict(p=np.full((1, 2, 4), 0.25)), r"p: got shape \[1, 2, 4\], expected shape \[1, 3, 4\]"),
        (dict(p=np.full((1, 3, 8), 0.25)[:, :, ::2]), "not C-contiguous"),
        (dict(q=np.full((1, 2, 4), 0.25, F32)), "q: got a float32 array"),
        (dict(q=np.full((1, 2, 4), 0.5)), "^request 0, row 0: q: got a sum of 2"),
        (dict(drafts=np.zeros((1, 2), np.int32)), "drafts: got a int32 array"),
        (dict(drafts=np.full((1, 2), 4)), "token 4, expected tokens in 0..3"),
        (dict(drafts=np.full((1, 2), -1)), "token -1"),
        (dict(seeds=None), "coins: got round_starts"),
        (dict(seeds=None, round_starts=None), "coins: got none of them"),
        (dict(accept_coins=np.zeros((1, 2))), "coins: got seeds, round_starts, accept_coins"),
        (dict(seeds=[1, 2]), r"seeds: got shape \[2\], expected shape \[1\]"),
        (dict(seeds=[-1]), "seeds: got"),
        (dict(seeds=[0.5]), "seeds: got"),
        (
            dict(seeds=None, round_starts=None, accept_coins=np.ones((1, 2)), last_coins=[0.5]),
            r"expected numbers in \[0, 1\)",
        ),
    ],
)
def test_ratio_verifiers_name_what_does_not_fit(change, message):
    arguments = good_ratio()
    verify.token(**arguments)
    arguments.update(change)
    for function in (verify.token, verify.block):
        with pytest.raises(InvalidArgument, match=message):
            function(**arguments)


def test_walks_rows_and_trees_name_what_does_not_fit():
    drafts, sampled = np.zeros((2, 3), np.int64), np.zeros((2, 4), np.int64)
    with pytest.raises(InvalidArgument, match=r"sampled: got shape \[2, 3\], expected shape \[2, 4\]"):
        verify.walk(drafts, drafts)
    with pytest.raises(InvalidArgument, match="lengths: got 4, expected 0..3"):
        verify.walk(drafts, sampled, np.array([0, 4]))
    with pytest.raises(InvalidArgument, match="drafts: got a float64 array"):
        verify.walk(drafts.astype(float), sampled)
    logits = np.zeros((2, 5), F32)
    logits[1, 3] = np.nan
    with pytest.raises(InvalidArgument, match="row 1: logits: got NaN at column 3"):
        verify.sample_rows(logits, [0, 1])
    with pytest.raises(InvalidArgument, match="row 0: logits: got 5 columns that are all -inf"):
        verify.sample_rows(np.full((1, 5), -np.inf, F32), [0])
    with pytest.raises(InvalidArgument, match="logits: got a float64 array"):
        verify.sample_rows(np.zeros((1, 5)), [0])
    with pytest.raises(InvalidArgument, match="top_p: got 1.5"):
        verify.sample_rows(np.zeros((1, 5), F32), [0], top_p=1.5)
    with pytest.raises(InvalidArgument, match="paths: got 1 elements, expected 2"):
        verify.sample_rows(np.zeros((2, 5), F32), [0, 1], paths=[[]])
    with pytest.raises(InvalidArgument, match="domain: got dice"):
        verify.gumbel(0, 0, 4, "dice")
    tokens = np.array([[1, 2]])
    with pytest.raises(InvalidArgument, match="falling log-probability"):
        DraftTree.build(0, tokens, np.array([[-2, -1]], F32), 3)
    with pytest.raises(InvalidArgument, match="at most 0"):
        DraftTree.from_log_probs(0, np.array([[0.5, -1]], F32), 3)
    with pytest.raises(InvalidArgument, match="parents: got 1 at node 1"):
        DraftTree.from_parents(np.array([1, 2]), np.array([-1, 1], np.int32))
    with pytest.raises(InvalidArgument, match="node: got 7"):
        DraftTree.from_parents(np.array([1]), np.array([-1], np.int32)).path_tokens(7)


NAN = float("nan")
WRONG = {
    "count": [None, "1", b"1", 1.5, NAN, -1, True, np.True_, 2**64, 10**30, [1], {}, np.zeros(3)],
    "id": [None, "1", b"1", 1.5, NAN, -1, True, 2**64, 10**30, [1], {}, np.zeros(3)],
    "number": [None, "1", NAN, True, [1.0], {}, np.zeros(3), 1j],
    "array": [None, "a", 1, [1], [[1.0]], {}, np.zeros((2, 2, 2, 2)), np.zeros(3, np.float16), np.zeros((1, 2), complex)],
    "ids": [None, "12", b"12", 5, [None], ["a"], [1.5], [-1], [10**30], {}, {1}, np.zeros((2, 2))],
    "paths": ["ab", 5, [None, None], [1, 2], [["a"], []], [[-1], []], [[10**30], []], {}],
    "bias": [5, "a", [1], [(1, 2.0)], {"a": 1.0}, {1: "a"}, {1: None}, {-1: 1.0}, {10**30: 1.0}, {1: NAN}],
    "points": [5, "ab", [], [1], [(1,)], [(1, None)], [("a", 1)], [(1, NAN)], [(-1, 1)], np.zeros(3)],
    "keys": ["a", 0.5, [0.5], [None], [True], [[1], [1, 2]], -1, [-1], [2**64], {}, NAN, np.zeros((2, 2), int), object()],
    "coins": ["a", [None], [True], [[0.5], [0.5, 0.5]], {}, np.zeros((2, 2)), object()],
    "domain": [None, 5, b"draw", "dice", ["draw"]],
}  # fmt: skip


def calls():
    """Every function with good arguments, and what kind each argument is."""
    p, q = np.full((1, 3, 4), 0.25), np.full((1, 2, 4), 0.25)
    drafts, sampled = np.zeros((2, 3), np.int64), np.zeros((2, 4), np.int64)
    tree, pool, planner = DraftTree.from_parents(np.array([1]), np.array([-1], np.int32)), PagePool(4), Planner(4)
    yield verify.walk, dict(drafts=drafts, sampled=sampled), dict(drafts="array", sampled="array")
    yield verify.walk, dict(drafts=tree, sampled=np.zeros(1, np.int64)), dict(sampled="array")
    for function in (verify.token, verify.block):
        keyed = dict(p=p, q=q, drafts=np.zeros((1, 2), np.int64), seeds=[1], round_starts=[2])
        arrays = dict(p="array", q="array", drafts="array")
        yield function, keyed, arrays | dict(seeds="keys", round_starts="keys")
        single = {name: value[0] for name, value in keyed.items()}
        yield function, single, arrays | dict(seeds="keys", round_starts="keys")
        given = dict(p=p, q=q, drafts=np.zeros((1, 2), np.int64), accept_coins=np.zeros((1, 2)), last_coins=[0.5])
        yield function, given, dict(last_coins="coins")
    numbers = "temperature top_p min_p repetition_penalty presence_penalty frequency_penalty".split()
    kinds = dict(logits="array", positions="keys", seeds="keys", top_k="count", logit_bias="bias", paths="paths")
    kinds |= dict.fromkeys(numbers, "number") | dict.fromkeys(("prompt", "output"), "ids")
    yield verify.sample_rows, dict(logits=np.zeros((2, 5), F32), positions=[0, 1]), kinds
    yield verify.top_logprobs, dict(logits=np.zeros(5, F32), n=2), dict(logits="array", n="count")
    kinds = dict(seed="count", position="count", columns="count", domain="domain")
    yield verify.gumbel, dict(seed=0, position=0, columns=3), kinds
    tokens, log_probs = np.zeros((2, 3), np.int64), np.full((2, 3), -1, F32)
    kinds = dict(anchor="id", log_probs="array", nodes="count")
    yield DraftTree.build, dict(anchor=1, tokens=tokens, log_probs=log_probs, nodes=3), kinds | dict(tokens="array")
    yield DraftTree.from_log_probs, dict(anchor=1, log_probs=log_probs, nodes=3), kinds
    kinds = dict(anchor="id", drafts="array", log_probs="array")
    yield DraftTree.chain, dict(anchor=1, drafts=tokens[0], log_probs=log_probs[0]), kinds
    kinds = dict(tokens="array", parents="array")
    yield DraftTree.from_parents, dict(tokens=tokens[0, :1], parents=np.array([-1], np.int32)), kinds
    yield tree.path_tokens, dict(node=0), dict(node="count")
    yield tree.walk, dict(sampled=np.zeros(1, np.int64)), dict(sampled="array")
    yield PagePool, dict(num_pages=4), dict(num_pages="count")
    yield pool.alloc, dict(count=0), dict(count="count")
    yield pool.owners, dict(page=0), dict(page="count")
    yield pool.retain, dict(pages=[]), dict(pages="ids")
    yield pool.release, dict(pages=[]), dict(pages="ids")
    yield Planner, dict(block_size=4), dict(block_size="count", target="points", draft="points")
    temperatures, most = np.ones(2, F32), np.full(2, 4, np.int32)
    kinds = dict(temperatures="array", others="count", room="count")
    yield planner.decide, dict(temperatures=temperatures, others=1), kinds
    good = dict(probabilities=np.ones((2, 3), F32), temperatures=temperatures, most=most)
    yield planner.admit, good, dict(probabilities="array", temperatures="array", most="array", others="count")
    kinds = dict(target_rows="count", target_time="number", draft_rows="count", draft_time="number")
    yield planner.observe, dict(target_rows=1, target_time=1.0), kinds
    yield planner.record, dict(drafted=2, accepted=1), dict(drafted="count", accepted="count")
    kinds = dict(ahead="count", page_size="count", committed="array", allocated="array", next="array")
    rooms = dict(committed=np.zeros(0, np.int64), allocated=np.zeros(0, np.int32), next=np.zeros(0, np.int32))
    yield serving.plan_decode, dict(requests=[], ahead=1, page_size=1, **rooms), kinds


@pytest.mark.parametrize("call", list(calls()), ids=lambda call: call[0].__name__)
def test_what_an_argument_cannot_be_is_refused_by_its_name(call):
    function, good, kinds = call
    function(**good)
    for name, kind in kinds.items():
        for wrong in WRONG[kind]:
            with pytest.raises(InvalidArgument, match=rf"\b{name}: got .*, expected "):
                function(**(good | {name: wrong}))
                pytest.fail(f"{name}={wrong!r} was taken")


def test_whole_numbers_of_numpy_and_keys_of_64_bits_are_taken():
    assert len(PagePool(np.int64(3)).alloc(np.uint8(2))) == 2
    assert Planner(np.int32(4)).decide(np.ones(2, F32), np.int64(2)) == (4, 4, False)
    np.testing.assert_array_equal(verify.gumbel(np.int64(7), np.uint64(1), np.int8(5)), verify.gumbel(7, 1, 5))
    logits = np.zeros((2, 50), F32)
    # NumPy makes floats of a list like this one, and floats have 53 bits.
    tokens, _ = verify.sample_rows(logits, [0, 0], [2**63 + 1, 3], top_k=np.int64(0))
    for row, seed in enumerate((2**63 + 1, 3)):
        assert tokens[row] == verify.gumbel(seed, 0, 50).argmax()


def test_the_package_offers_verification_by_name():
    assert dflash_rs.verify is verify and dflash_rs.DraftTree is DraftTree
