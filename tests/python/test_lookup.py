"""Drafts that are looked up in the text itself: the same text as plain, for any target, whatever comes in between."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from interruptions import finish_interrupted  # noqa: E402
from models_helpers import qwen3_target  # noqa: E402
from test_llm import LENGTH, PROMPTS, SAMPLING, idle, params, rounding_explains  # noqa: E402
from toy_models import VOCAB as TOY_VOCAB  # noqa: E402
from toy_models import RecurrentTarget  # noqa: E402

from dflash_rs import LLM, SamplingParams, StepCosts, _core  # noqa: E402
from dflash_rs.bench.ngram import lookup_tau, simulate_lookup  # noqa: E402
from dflash_rs.errors import CheckpointError, DflashError, InvalidArgument  # noqa: E402
from dflash_rs.models.lookup import LookUp  # noqa: E402
from dflash_rs.models.target import TargetModel  # noqa: E402

GREEDY = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)


def ids(outputs) -> list[list[int]]:
    return [output.token_ids for output in outputs]


@pytest.fixture(scope="module")
def llm():
    torch.set_num_threads(1)
    # Whatever is found is verified, likely or not.
    with LLM(draft="lookup", device="cpu", adaptive=False, num_pages=512) as engine:
        yield engine


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("name", SAMPLING)
def test_the_text_is_the_same_with_and_without_looking_up(llm, name, batch):
    prompts = [llm.encode(p) for p in PROMPTS[: max(batch, 2)]]
    options = [params(name, seed=i) for i in range(len(prompts))]
    if batch == 1:
        fast = [llm.generate([p], o)[0] for p, o in zip(prompts, options, strict=True)]
    else:
        fast = llm.generate(prompts, options)
    plain = llm.generate(prompts, options, draft=False)
    for prompt, a, b, o in zip(prompts, plain, fast, options, strict=True):
        assert a.token_ids == b.token_ids or rounding_explains(llm, prompt, a.token_ids, b.token_ids, o)
    assert sum(o.metrics["steps"] for o in fast) < sum(o.metrics["steps"] for o in plain)
    assert idle(llm)


def test_stop_strings_and_logprobs_are_those_of_plain_decoding(llm):
    prompts = PROMPTS[:8]
    options = SamplingParams(temperature=0.0, max_tokens=60, stop=["\n\n", "return"], logprobs=2)
    plain, fast = llm.generate(prompts, options, draft=False), llm.generate(prompts, options)
    assert [(o.text, o.token_ids, o.finish_reason) for o in plain] == [
        (o.text, o.token_ids, o.finish_reason) for o in fast
    ]
    scores = [np.array([entry.logprob for o in arm for entry in o.logprobs]) for arm in (plain, fast)]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"num_pages": 30, "max_running": 8},
        {"max_batch_tokens": 9, "max_running": 4},
        {"prefix_cache": False, "page_size": 1},
        {"adaptive": True},
        {"adaptive": True, "costs": StepCosts(((1, 1.0), (64, 4.0)))},
        {"block_size": 2},
    ],
    ids=["few pages", "chunks", "no reuse", "adaptive", "costs", "one draft"],
)
def test_retraction_chunks_reuse_and_what_pays_change_nothing(options):
    prompts = [p for p in PROMPTS[:6]] + [PROMPTS[0] + PROMPTS[1]]
    with LLM(draft="lookup", device="cpu", **({"max_context": 256} | options)) as engine:
        plain = ids(engine.generate(prompts, GREEDY, draft=False))
        for _ in range(2):
            assert ids(engine.generate(prompts, GREEDY)) == plain
        stats = engine.stats()
        assert stats["tau"] > 1 and idle(engine)
        assert (stats["retractions"] > 0) == ("num_pages" in options)


def test_a_stream_that_is_left_an_abort_and_an_interruption_harm_nobody(monkeypatch):
    with LLM(draft="lookup", device="cpu", adaptive=False) as engine:
        plain = ids(engine.generate(PROMPTS[:4], GREEDY, draft=False))
        with engine.stream(PROMPTS[:2], GREEDY) as left:
            next(left)
        texts, calls = finish_interrupted(engine, engine.stream(PROMPTS[:5], GREEDY), monkeypatch, leaves=4)
        assert calls > 10 and [texts[i] for i in range(4)] == plain and idle(engine)


def test_a_loop_is_drafted_whole_and_a_text_without_repetition_not_at_all():
    target = TargetModel(qwen3_target())
    table = [bytes([32 + token]) for token in range(target.vocab_size)]
    with LLM.from_parts(target, LookUp(), tokenizer=None, token_bytes=table, page_size=4, adaptive=False) as engine:
        distinct = list(range(10, 40))
        first = engine.generate([distinct], SamplingParams(temperature=0.0, max_tokens=2))[0]
        assert first.metrics["drafted_steps"] <= 1, "one token of output may be one of the prompt"
        bias = {11: 100.0}
        loop = engine.generate([[11]], SamplingParams(temperature=0.0, max_tokens=50, logit_bias=bias))[0]
        assert loop.token_ids == [11] * 50
        # The first token comes of the prompt, the next four passes write 15 drafts and one token each, at most.
        assert loop.metrics["steps"] <= 5
        alone = engine.generate([[11]], SamplingParams(temperature=0.0, max_tokens=50, logit_bias=bias), draft=False)[0]
        assert alone.token_ids == loop.token_ids and alone.metrics["steps"] == 49


def test_a_target_with_state_is_drafted_for_too():
    table = [bytes([65 + token]) for token in range(TOY_VOCAB)]
    prompts = [[2, 4] * 20, [5 * i % TOY_VOCAB for i in range(30)], [7, 7, 7]]
    sampling = SamplingParams(temperature=0.6, seed=3, max_tokens=30)
    with LLM.from_parts(
        RecurrentTarget(), LookUp(), tokenizer=None, token_bytes=table, page_size=4, adaptive=False
    ) as engine:
        plain = ids(engine.generate(prompts, sampling, draft=False))
        assert ids(engine.generate(prompts, sampling)) == plain
        assert engine.stats()["drafted"] > 0


def test_a_cached_prefix_of_a_plain_request_is_reused_by_one_that_looks_up():
    prompt = PROMPTS[0] + PROMPTS[1]
    with LLM(draft="lookup", device="cpu") as engine:
        engine.generate([prompt], GREEDY, draft=False)
        again = engine.generate([prompt], GREEDY)[0]
        assert again.metrics["cached_prompt_tokens"] > 16


def test_what_is_looked_up_is_verified_only_where_it_pays():
    # A row more costs as much as a pass: only what is nearly certain is worth one.
    dear = StepCosts(((1, 1.0), (2, 2.0), (64, 64.0)))
    prompts = PROMPTS[:8]
    options = [SamplingParams(temperature=1.0, seed=i, max_tokens=48, ignore_eos=True) for i in range(8)]
    verified = []
    for costs in (dear, StepCosts(((1, 1.0), (64, 1.0)))):
        with LLM(draft="lookup", device="cpu", costs=costs) as engine:
            engine.generate(prompts, options)
            verified.append(engine.stats()["verified"])
    assert verified[0] < verified[1] / 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tree_nodes": 4}, "tree_nodes: got 4, expected 0 with a look-up"),
        ({"overlap": True}, "overlap: got True, expected None or False: what is looked up"),
        ({"block_size": 17}, r"block_size: got 17, expected 2\.\.16"),
        ({"block_size": 1}, "block_size: got 1"),
    ],
)
def test_what_a_look_up_cannot_do_is_refused_by_name(options, message):
    with pytest.raises(InvalidArgument, match=message):
        LLM(draft="lookup", device="cpu", **options)


def test_a_folder_of_that_name_is_a_path_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "lookup").mkdir()
    (tmp_path / "lookup" / "config.json").write_text(json.dumps({"architectures": ["Nothing"]}))
    monkeypatch.chdir(tmp_path)
    with LLM(draft="lookup", device="cpu") as engine:
        assert engine.draft_dir == "lookup" and engine.block_size == 16
    for folder in (Path("lookup"), "./lookup"):
        with pytest.raises(CheckpointError, match=r"lookup/config\.json: architectures"):
            LLM(draft=folder, device="cpu")


def test_a_step_whose_predecessor_is_unresolved_cannot_be_looked_up():
    engine = _core.Engine(num_pages=8, vocab_size=50, page_size=4, block_size=4, max_context=24, depth=1)
    engine.add([1, 2, 1, 2], {"max_tokens": 12})
    plan = engine.plan()
    accepted = engine.accept_sampled(plan, np.array([1], dtype=np.int64))
    engine.commit(plan, accepted)
    now = engine.plan()
    tokens, chances, found = engine.look_up(now, 4)
    assert tokens.tolist() == [[2, 1, 2]] and found.tolist() == [3]
    assert (np.diff(chances[0]) > 0).all() and 0 < chances[0, 0] < 1
    for wrong in (0, 5):
        with pytest.raises(InvalidArgument, match=f"block_size: got {wrong}, expected 1..4"):
            engine.look_up(now, wrong)
    now.set_drafts(tokens)
    ahead = engine.plan_ahead()
    with pytest.raises(DflashError, match="comes first"):
        engine.look_up(ahead, 4)


def test_what_became_of_drafts_is_learnt():
    engine = _core.Engine(num_pages=64, vocab_size=50, page_size=4, block_size=4, max_context=250)
    engine.add([1, 2, 1, 2], {"max_tokens": 200, "ignore_eos": True})
    accepted = engine.accept_sampled(plan := engine.plan(), np.array([1], dtype=np.int64))
    engine.commit(plan, accepted)
    chances = []
    for _ in range(20):
        tokens, chance, _found = engine.look_up(plan := engine.plan(), 4)
        plan.set_drafts(tokens)
        chances.append(float(chance[0, 0]))
        # The target writes what was drafted.
        drawn = np.append(tokens[0], 3 - tokens[0, -1])[: plan.block_len[0]]
        engine.commit(plan, engine.accept_sampled(plan, drawn))
    assert chances[-1] > chances[0] and chances[-1] > 0.9


def test_the_benchs_estimate_is_what_the_engine_does(llm):
    prompts = [llm.encode(p) for p in PROMPTS[:6]]
    outputs = llm.generate(prompts, GREEDY)
    steps = [output.metrics["steps"] for output in outputs]
    runs = [simulate_lookup(p, o.token_ids, llm.block_size) for p, o in zip(prompts, outputs, strict=True)]
    assert [run.steps for run in runs] == steps
    pairs = [(p, o.token_ids) for p, o in zip(prompts, outputs, strict=True)]
    assert lookup_tau(pairs, llm.block_size) == pytest.approx(6 * (LENGTH - 1) / sum(steps))


def test_the_index_alone_takes_tokens_and_gives_arrays():
    index = _core.Lookup()
    assert len(index) == 0 and index.propose(3).size == 0
    index.extend([5, 6, 7, 5])
    index.extend(np.array([6], dtype=np.int64))
    assert len(index) == 5 and index.matched == 2
    assert index.propose(4).tolist() == [7, 5, 6, 7] and index.propose(0).size == 0
    with pytest.raises(InvalidArgument, match="count: got 5000"):
        index.propose(5000)
    with pytest.raises(InvalidArgument, match="tokens"):
        index.extend([-1])
