"""Whole passes in one call of the extension: against the same sums in torch, and for independence of the company."""

import numpy as np
import pytest
import torch
from models_helpers import HIDDEN, VOCAB, Pages, best, qwen3_target, random_draft
from test_models_draft import VARIANTS

from dflash_rs import _core
from dflash_rs.attention import step_attention
from dflash_rs.engine import costs as step_costs
from dflash_rs.engine.costs import measure, rising
from dflash_rs.errors import InvalidArgument
from dflash_rs.models.drafter import FINAL
from dflash_rs.models.fused import addresses
from dflash_rs.models.lookup import LookUp
from dflash_rs.models.target import TargetModel

LENGTHS = [1, 23, 9]


def filled(variant: str, page_size: int, *, host: bool, threads: int = 1):
    """A drafter with random context, and its pages; `host` or torch only."""
    torch.set_num_threads(threads)
    model = qwen3_target()
    draft = random_draft(**VARIANTS[variant]).bind_target(model.get_input_embeddings(), model.lm_head)
    pages = Pages(3, 48, page_size)
    draft.alloc_kv(pages.num_slots)
    if not host:
        draft.runtime.run = draft.runtime.injector = None
    generator = torch.Generator().manual_seed(5)
    for row, n in enumerate(LENGTHS):
        features = torch.randn(n + 2, 3 * HIDDEN, generator=generator)
        order = torch.randperm(n, generator=generator)
        draft.inject(features, order, torch.from_numpy(pages.slots(row, order.numpy())), order + 1)
    return draft, pages


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if "scaled" not in v])
def test_drafts_and_context_equal_those_of_torch(variant, page_size):
    (ours, pages), (theirs, _) = (filled(variant, page_size, host=host) for host in (True, False))
    assert ours.runtime.run is not None
    for (k, v), (k_torch, v_torch) in zip(ours.runtime.caches, theirs.runtime.caches, strict=True):
        torch.testing.assert_close(k, k_torch, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(v, v_torch, rtol=1e-4, atol=1e-5)
    results = [
        best(d, [4, 50, 96], LENGTHS, pages.table, page_size=page_size, valid_from=[0, 3, 9]) for d in (ours, theirs)
    ]
    (drafts, sure), (drafts_torch, sure_torch) = results
    assert np.array_equal(drafts, drafts_torch)
    np.testing.assert_allclose(sure, sure_torch, rtol=2e-3)
    assert drafts.dtype == np.int64 and sure.dtype == np.float32 and sure.shape == (3, 5)


@pytest.mark.parametrize("part", [False, True])
def test_candidates_beside_a_selectors_path_equal_those_of_torch(part):
    def run(host: bool):
        draft, pages = filled("second", 16, host=True)
        draft.vocabulary = torch.arange(1, VOCAB, 2) if part else None
        draft.alloc_kv(pages.num_slots)
        if not host:
            draft.runtime.run = None
        return draft.candidates([4, 50, 96], LENGTHS, pages.table, page_size=16, valid_from=LENGTHS, k=4)

    (ours, chances), (theirs, chances_torch) = run(True), run(False)
    assert np.array_equal(ours, theirs) and (not part or (ours % 2 == 1).all())
    np.testing.assert_allclose(chances, chances_torch, rtol=2e-3)


def test_what_a_selector_does_not_fit_is_named():
    draft, pages = filled("second", 16, host=True)
    selector, books = draft.runtime.selecting

    def asked(*chosen):
        with pytest.raises(InvalidArgument) as refused:
            draft.runtime.selecting = chosen
            best(draft, [4, 50, 96], LENGTHS, pages.table, page_size=16)
        return str(refused.value)

    assert "codebooks: got one of selector and codebooks, expected both or neither" in asked(selector, ())
    assert "successor: got 7, expected at least the 97 rows of the head" in asked(selector, (books[0], books[1][:7]))


def test_a_drafter_that_scales_or_caps_its_logits_stays_in_torch():
    assert filled("scaled_and_capped", 16, host=True)[0].runtime.run is None


def test_a_request_is_drafted_the_same_bits_alone_and_with_any_number_of_threads():
    draft, pages = filled("full", 16, host=True)
    drafts, sure = best(draft, [4, 50, 96], LENGTHS, pages.table, page_size=16)
    torch.set_num_threads(3)
    try:
        again = best(draft, [50], [23], pages.table, [1], page_size=16)
    finally:
        torch.set_num_threads(1)
    assert np.array_equal(again[0][0], drafts[1]) and np.array_equal(again[1][0], sure[1])


def test_indices_out_of_range_are_refused_before_anything_is_written():
    draft, pages = filled("full", 16, host=True)
    before = [t.clone() for layer in draft.runtime.caches for t in layer]
    features = torch.randn(4, 3 * HIDDEN)
    good, far = torch.tensor([0]), torch.tensor([pages.num_slots])
    with pytest.raises(InvalidArgument, match=f"slots: got {pages.num_slots}"):
        draft.inject(features, good, far, good)
    with pytest.raises(InvalidArgument, match="rows: got 4, expected 0..3"):
        draft.inject(features, good, good, torch.tensor([4]))
    with pytest.raises(InvalidArgument, match="features: got shape"):
        draft.inject(features[:, :-1], good, good, good)
    with pytest.raises(InvalidArgument, match="anchors: got 97"):
        best(draft, [VOCAB], [9], pages.table, [2], page_size=16)
    for was, now in zip(before, (t for layer in draft.runtime.caches for t in layer), strict=True):
        assert torch.equal(was, now)


def test_a_request_passes_with_the_same_bits_alone_and_with_any_number_of_threads():
    target = TargetModel(qwen3_target(layers=3))
    assert target._fused is not None and target._fused.run is not None
    target.set_taps((1, FINAL))
    # So many rows that helpers have a share of what is done row by row.
    lengths, rng = (130, 7, 90), np.random.default_rng(2)
    texts = [rng.integers(0, VOCAB, n).tolist() for n in lengths]
    pages = Pages(3, 200, 16)
    target.alloc_kv(pages.num_slots)

    def run(spans, threads):
        torch.set_num_threads(threads)
        try:
            return target.forward(pages.batch(spans))
        finally:
            torch.set_num_threads(1)

    logits, features = run([(r, 0, text) for r, text in enumerate(texts)], 3)
    caches = [(k.clone(), v.clone()) for k, v in target.caches.values()]
    ends = np.cumsum(lengths)
    for r, text in enumerate(texts):
        for threads in (1, 2):
            alone = run([(r, 0, text[:5])], threads), run([(r, 5, text[5:])], threads)
            rows = slice(ends[r] - lengths[r], ends[r])
            assert torch.equal(torch.cat([part[0] for part in alone]), logits[rows])
            assert torch.equal(torch.cat([part[1] for part in alone]), features[rows])
    for (k, v), (k_alone, v_alone) in zip(caches, target.caches.values(), strict=True):
        assert torch.equal(k, k_alone) and torch.equal(v, v_alone)


def test_a_pass_refuses_what_does_not_fit_before_it_writes():
    target = TargetModel(qwen3_target(layers=3))
    pages = Pages(1, 16, 4)
    target.alloc_kv(pages.num_slots)
    batch, run = pages.batch([(0, 0, [5, 6, 7])]), target._fused.run
    attention = step_attention(batch, num_slots=pages.num_slots, write=True, kernel=True)
    logits, features = np.zeros((3, VOCAB), np.float32), np.zeros((3, 2, HIDDEN), np.float32)

    def forward(tokens=(5, 6, 7), rows=(0, 1, 2), logits=logits, taps=(0, 3), features=features):
        given = [np.array(x, dtype=np.int64) for x in (tokens, (0, 1, 2))]
        places = [(x.ctypes.data, x[0].size, x.shape[-1]) for x in (logits, features)]
        caches = addresses(target.caches.values())
        run._decoder.forward(
            attention.batch, *given, *run._tables(3), caches, np.array(rows, np.int64), places[0], list(taps), places[1]
        )

    for change, message in (
        (dict(taps=(0, 4)), r"taps: got 4, expected 0..3"),
        (dict(rows=(0, 1, 3)), r"logit_rows: got 3, expected 0..2"),
        (dict(rows=(0, -1)), r"logit_rows: got -1, expected 0..2"),
        (dict(tokens=(5, VOCAB, 7)), f"token_ids: got {VOCAB}, expected 0..{VOCAB - 1}"),
        (dict(logits=features.reshape(-1)[: 3 * VOCAB // 2].reshape(1, 1, -1)), "features: .*logits"),
    ):
        with pytest.raises(InvalidArgument, match=f"^{message}"):
            forward(**change)
    assert not logits.any() and not features.any() and not any(x.any() for kv in target.caches.values() for x in kv)
    forward()
    assert logits.any() and features.any() and all(x.any() for kv in target.caches.values() for x in kv)


def test_weights_that_do_not_fit_a_layer_are_named():
    def weight(outputs, inputs):
        return _core.PackedWeight(np.ones((outputs, inputs), np.float32))

    ones = np.ones(8, np.float32)
    good = {
        "attention_norm": ones, "qkv": weight(16, 8), "out": weight(8, 8), "mlp_norm": ones, "gate_up": weight(12, 8),
        "down": weight(8, 6), "heads": 2, "kv_heads": 1, "head_dim": 4, "scale": 0.5, "mask": "causal",
    }  # fmt: skip
    _core.HostDecoder(ones, weight(20, 8), 1e-6).add_layer(**good)
    for change, message in (
        ({"qkv": weight(12, 8)}, r"qkv: got \[12, 8\], expected \[16, 8\]"),
        ({"down": weight(8, 5)}, r"gate_up: got \[12, 8\], expected \[10, 8\]"),
        ({"mlp_norm": ones[:4]}, "mlp_norm: got 4 elements, expected 8"),
        ({"kv_heads": 3}, "heads: got 2, expected a multiple of the 3 key heads"),
        ({"head_dim": 3}, "head_dim: got 3"),
        ({"mask": "diagonal"}, "mask: got diagonal"),
        ({"query_norm": np.ones(4, np.float32)}, "key_norm: got one of"),
    ):
        with pytest.raises(InvalidArgument, match=f"^{message}"):
            _core.HostDecoder(ones, weight(20, 8), 1e-6).add_layer(**(good | change))
    with pytest.raises(InvalidArgument, match=r"^head: got \[20, 7\]"):
        _core.HostDecoder(ones, weight(20, 7), 1e-6)


def test_measured_costs_are_times():
    target = TargetModel(qwen3_target())
    draft = random_draft().bind_target(target.embedding, target.lm_head)
    target.set_taps(draft.config.target_layer_ids)
    target.alloc_kv(64)
    draft.alloc_kv(64)
    costs = measure(target, draft, 6)
    assert [rows for rows, _ in costs.target] == [1, 2, 4, 8, 16, 32, 64]
    assert [rows for rows, _ in costs.draft] == [2, 4, 6, 24, 48]
    for curve in (costs.target, costs.draft):
        times = [time for _, time in curve]
        assert times[0] > 0 and times == sorted(times)
    # What the planner is made of takes them as they are.
    width, block, trees = costs.planner(6).decide(np.zeros(1, dtype=np.float32))
    assert 1 <= width <= block <= 6 and not trees


def test_a_time_that_a_busy_moment_made_long_is_no_longer_than_that_of_more_rows():
    # Not the other way round: one long time of few rows would make blocks of all lengths look dear.
    measured = [(1, 1.0), (2, 5.0), (4, 1.25), (4, 1.5), (8, 3.0), (16, 0.0)]
    assert rising(measured[:-1]) == ((1, 1.0), (2, 1.25), (4, 1.25), (8, 3.0))
    assert rising(measured) == tuple((rows, 1e-9) for rows in (1, 2, 4, 8, 16))


def test_costs_are_measured_over_tokens_that_differ():
    # Equal ones would all go to the same experts: a block would seem to cost what one row does.
    target = TargetModel(qwen3_target())
    draft = random_draft().bind_target(target.embedding, target.lm_head)
    target.set_taps(draft.config.target_layer_ids)
    target.alloc_kv(64)
    draft.alloc_kv(64)
    forward, seen = target.forward, []
    target.forward = lambda batch: (seen.append(batch.token_ids.tolist()), forward(batch))[1]
    measure(target, draft, 6)
    assert all(len(set(tokens)) == len(tokens) for tokens in seen) and max(map(len, seen)) == 64


def test_what_context_costs_is_measured_behind_tokens_that_were_written_unless_that_takes_long(monkeypatch):
    target = TargetModel(qwen3_target())
    target.alloc_kv(300)
    forward, seen, written = target.forward, [], []
    target.forward = lambda batch: (seen.append((batch.positions.tolist(), batch.slots.tolist())), forward(batch))[1]

    def told(times):
        answers = iter(times)

        def fastest(passes):
            if len(passes) == 2:
                written[:] = [slot for _, slots in seen for slot in slots]
                seen.clear()
                for run in passes:
                    run()
            return next(answers)

        return fastest

    rows = [1e-3] * 7
    monkeypatch.setattr(step_costs, "_fastest", told([rows, [2.0, 2.5]]))
    costs = measure(target, LookUp(), 6)
    # One row, and one row behind as many tokens as it may see.
    tokens = min(256, target.max_context - 1)
    assert [positions for positions, _ in seen] == [[0], [tokens]] == [slots for _, slots in seen]
    assert written == list(range(tokens))
    assert costs.context == 0.5 / tokens and costs.planner(6).costs[2] == costs.context
    # A pass over more of them that takes no longer costs nothing; one that would take long is not tried.
    monkeypatch.setattr(step_costs, "_fastest", told([rows, [2.0, 1.5]]))
    assert measure(target, LookUp(), 6).context == 0
    seen.clear()
    monkeypatch.setattr(step_costs, "_fastest", told([[60.0] * 7]))
    assert measure(target, LookUp(), 6).context == 0 and not seen


def test_a_cache_of_a_few_slots_is_measured_as_far_as_it_goes():
    target = TargetModel(qwen3_target())
    draft = random_draft().bind_target(target.embedding, target.lm_head)
    target.alloc_kv(5)
    draft.alloc_kv(5)
    assert [rows for rows, _ in measure(target, draft, 2).target] == [1, 2, 4]


def addressed(array: np.ndarray) -> tuple[int, int, int]:
    return array.ctypes.data, array.strides[0] // array.itemsize, array.shape[1]


def rounded(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).bfloat16().double().numpy()


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize(("rows", "inputs"), [(1, 64), (7, 65), (40, 130)])
def test_a_product_has_the_precision_it_was_packed_with(precision, rows, inputs):
    generator = np.random.default_rng(rows)
    weight, x, residual = (
        generator.standard_normal(shape).astype(np.float32) for shape in ((50, inputs), (rows, inputs), (rows, 50))
    )
    bias = generator.standard_normal(50).astype(np.float32)
    out = np.full((rows, 50), np.nan, np.float32)
    packed = _core.PackedWeight(weight, bias, precision)
    packed.product(addressed(x), rows, addressed(out), addressed(residual))
    exact, coarse = x.astype(np.float64) @ weight.T.astype(np.float64), rounded(x) @ rounded(weight).T
    expected, other = (exact, coarse) if precision == "highest" else (coarse, exact)
    np.testing.assert_allclose(out, expected + bias + residual, rtol=1e-5, atol=1e-4)
    assert np.abs(out - (other + bias + residual)).max() > 1e-3
    assert packed.bytes == 64 * (4 * inputs if precision == "highest" else 2 * (inputs + inputs % 2))


def test_an_unknown_precision_is_refused():
    with pytest.raises(InvalidArgument, match="precision: got low, expected 'highest' or 'medium'"):
        _core.PackedWeight(np.ones((2, 2), np.float32), None, "low")


@pytest.mark.parametrize(("rows", "threads"), [(0, 1), (1, 1), (5, 3), (100, 2)])
def test_swiglu_is_that_of_torch(rows, threads):
    generator = np.random.default_rng(rows)
    gate_up = (6 * generator.standard_normal((rows, 2 * 70))).astype(np.float32)
    out = np.full((rows, 70), np.nan, np.float32)
    _core.swiglu(addressed(gate_up), rows, 70, addressed(out), threads)
    both = torch.from_numpy(gate_up)
    expected = torch.nn.functional.silu(both[:, :70]) * both[:, 70:]
    np.testing.assert_allclose(out, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_swiglu_refuses_memory_that_overlaps():
    gate_up = np.ones((2, 8), np.float32)
    with pytest.raises(InvalidArgument, match="out"):
        _core.swiglu(addressed(gate_up), 2, 4, (gate_up.ctypes.data, 4, 4))


@pytest.mark.parametrize("family", ["target", "drafter"])
def test_medium_precision_changes_digits_and_no_more(family):
    """Against highest: close, not equal; a pass of a row alone gives the bits it has in company."""
    if family == "drafter":
        exact, pages = filled("full", 16, host=True)
        coarse, _ = filled("full", 16, host=True)
        coarse.matmul_precision = "medium"
        coarse.alloc_kv(pages.num_slots)
        features = torch.randn(9, 3 * HIDDEN, generator=torch.Generator().manual_seed(1))
        for draft in (exact, coarse):
            draft.inject(features, torch.arange(9), torch.from_numpy(pages.slots(2, np.arange(9))))
        (k, _), (k_coarse, _) = (draft.runtime.caches[0] for draft in (exact, coarse))
        slots = pages.slots(2, np.arange(9))
        assert not torch.equal(k[slots], k_coarse[slots])
        torch.testing.assert_close(k_coarse[slots], k[slots], rtol=0.1, atol=0.1)
        return
    results = []
    for precision in ("highest", "medium"):
        target = TargetModel(qwen3_target(), matmul_precision=precision)
        assert target.path == "fused"
        pages = Pages(2, 40, 16)
        target.alloc_kv(pages.num_slots)
        tokens = np.random.default_rng(3).integers(2, VOCAB, 12).tolist()
        together = target.forward(pages.batch([(0, 0, tokens), (1, 0, tokens[:5])], logit_rows=[11, 16]))[0]
        alone = target.forward(pages.batch([(1, 0, tokens[:5])], logit_rows=[4]))[0]
        assert torch.equal(together[1], alone[0])
        results.append(together)
    exact, coarse = results
    assert not torch.equal(exact, coarse)
    assert float((exact - coarse).norm() / exact.norm()) < 0.1


def test_medium_precision_is_refused_where_it_does_not_apply():
    with pytest.raises(InvalidArgument, match="matmul_precision: got 'medium'.*turned off"):
        TargetModel(qwen3_target(), fused=False, matmul_precision="medium")
    with pytest.raises(InvalidArgument, match="matmul_precision: got 'medium' with torch.bfloat16"):
        TargetModel(qwen3_target().bfloat16(), matmul_precision="medium")
