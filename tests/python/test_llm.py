"""The embedded engine on the bundled pair: what a user of `LLM` is promised."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from second import second  # noqa: E402

import dflash_rs  # noqa: E402
from dflash_rs import LLM, InvalidArgument, OutOfPages, SamplingParams, StepCosts  # noqa: E402
from dflash_rs.config import assets  # noqa: E402
from dflash_rs.engine import build  # noqa: E402
from dflash_rs.models.dflash.model import DFlashDraft  # noqa: E402
from dflash_rs.options import pick_dtype  # noqa: E402

PROMPTS = [p["prompt"] for p in json.loads((assets() / "prompts.json").read_text())]
LENGTH = 40

SAMPLING = {
    "greedy": {},
    "seeded": {"temperature": 0.8},
    "hot": {"temperature": 1.3},
    "top_k": {"temperature": 0.8, "top_k": 20},
    "top_p": {"temperature": 0.8, "top_p": 0.9},
    "min_p": {"temperature": 0.8, "min_p": 0.05},
    "all_filters": {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
    "greedy_penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    "seeded_penalties": {
        "temperature": 0.8,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.2,
    },
    "bias": {"temperature": 0.8, "logit_bias": {17: 2.0, 300: -4.0, 5: 1.5}},
    "min_tokens": {"temperature": 0.8, "min_tokens": LENGTH, "stop_token_ids": [*range(200, 420, 3)]},
}


@pytest.fixture(
    scope="module",
    params=[(1, "highest"), (16, "highest"), (16, "medium")],
    ids=lambda p: f"page{p[0]}" + ("" if p[1] == "highest" else f"-{p[1]}"),
)
def llm(request):
    torch.set_num_threads(1)
    # Whole blocks, so that every draft position is put to the test, whatever pays on this machine.
    page_size, precision = request.param
    pages = 16 * 256 // page_size * 2
    with LLM(page_size=page_size, device="cpu", num_pages=pages, adaptive=False, matmul_precision=precision) as engine:
        yield engine


@pytest.fixture(scope="module")
def one():
    torch.set_num_threads(1)
    with LLM(device="cpu") as engine:
        yield engine


def params(name: str, seed: int, **more) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=LENGTH, ignore_eos=True, **(SAMPLING[name] | more))


def idle(engine: LLM) -> bool:
    """Whether every page is free or cached and nobody waits."""
    stats = engine.stats()
    return (
        stats["running"] == 0
        and stats["waiting"] == 0
        and stats["free_pages"] + stats["cached_pages"] == stats["total_pages"]
    )


def rounding_explains(
    engine: LLM,
    prompt: list[int],
    plain: list[int],
    other: list[int],
    sampling: SamplingParams,
    error: float = 1e-4,
) -> bool:
    """Whether the first difference is one that an error of this size in the logits would make."""
    at = next(i for i, (a, b) in enumerate(itertools.zip_longest(plain, other)) if a != b)
    logits = engine.next_token_logits(prompt + plain[:at])
    rng = np.random.default_rng(0)
    drawn = set()
    stops = [*engine.eos_token_ids, *sampling.stop_token_ids] if at < sampling.min_tokens else []
    for _ in range(64):
        noisy = (logits + rng.normal(scale=error, size=logits.shape)).astype(np.float32)
        token, _ = dflash_rs.verify.sample_rows(
            noisy[None],
            [len(prompt) + at],
            [sampling.seed],
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias={**sampling.logit_bias, **dict.fromkeys(stops, -math.inf)},
            prompt=prompt,
            output=plain[:at],
        )
        drawn.add(int(token[0]))
    return {plain[at], other[at]} <= drawn


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("name", SAMPLING)
def test_the_text_is_the_same_with_and_without_drafting(llm, name, batch):
    prompts = [llm.encode(p) for p in (PROMPTS * 2)[: max(batch, 3)]]
    options = [params(name, seed=i) for i in range(len(prompts))]
    if batch == 1:
        fast = [llm.generate([p], o)[0] for p, o in zip(prompts, options, strict=True)]
        plain = [llm.generate([p], o, draft=False)[0] for p, o in zip(prompts, options, strict=True)]
    else:
        fast = llm.generate(prompts, options)
        plain = llm.generate(prompts, options, draft=False)
    assert all(len(o.token_ids) == LENGTH for o in plain)
    for prompt, a, b, o in zip(prompts, plain, fast, options, strict=True):
        assert a.token_ids == b.token_ids or rounding_explains(llm, prompt, a.token_ids, b.token_ids, o)
    assert sum(o.metrics["steps"] for o in fast) < sum(o.metrics["steps"] for o in plain), (
        "drafting saved no pass at all"
    )
    assert all(o.metrics["tau"] == 1.0 for o in plain)
    assert idle(llm)


# Half a unit in the last place of a logit of 16.
LOW = {"bfloat16": 16 * 2**-8, "float16": 16 * 2**-11}


@pytest.fixture(scope="module", params=LOW)
def low(request):
    torch.set_num_threads(1)
    with LLM(device="cpu", dtype=request.param, adaptive=False) as engine:
        yield engine


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}], ids=["greedy", "seeded"])
def test_in_half_precision_the_text_is_the_same_up_to_rounding(low, sampling, batch):
    error = LOW[str(low.dtype).removeprefix("torch.")]
    prompts = [low.encode(p) for p in PROMPTS[:8]]
    options = [SamplingParams(seed=i, max_tokens=24, ignore_eos=True, **sampling) for i in range(len(prompts))]
    equal = 0
    for i in range(0, len(prompts), batch):
        some, theirs = prompts[i : i + batch], options[i : i + batch]
        for prompt, o, a, b in zip(
            some, theirs, low.generate(some, theirs, draft=False), low.generate(some, theirs), strict=True
        ):
            assert a.metrics["tau"] == 1.0
            equal += a.token_ids == b.token_ids
            assert a.token_ids == b.token_ids or rounding_explains(low, prompt, a.token_ids, b.token_ids, o, error)
    assert equal >= 6, "more than rounding makes"
    assert low.stats()["accepted"] > 0 and idle(low)


@pytest.mark.parametrize("name", ["greedy", "seeded_penalties"])
def test_a_request_says_the_same_alone_and_in_company(one, name):
    prompts = [one.encode(p) for p in PROMPTS[:6]]
    options = [params(name, seed=i) for i in range(6)]
    together = one.generate(prompts, options)
    for prompt, o, expected in zip(prompts, options, together, strict=True):
        alone = one.generate([prompt], o)[0]
        assert alone.token_ids == expected.token_ids or rounding_explains(
            one, prompt, expected.token_ids, alone.token_ids, o
        )


@pytest.mark.parametrize("block_size", [2, 4, 8])
def test_the_block_size_does_not_change_the_text(one, block_size):
    prompts = [one.encode(p) for p in PROMPTS[:4]]
    options = [params("seeded", seed=i) for i in range(4)]
    with LLM(device="cpu", block_size=block_size) as other:
        for prompt, o, a, b in zip(
            prompts, options, one.generate(prompts, options), other.generate(prompts, options), strict=True
        ):
            assert a.token_ids == b.token_ids or rounding_explains(one, prompt, a.token_ids, b.token_ids, o)


# A machine on which rows are free, one on which the least likely are not worth it, one on which drafting never pays.
COSTS = {
    "free": StepCosts.lines(1.0, 0.0, 0.1, 0.0),
    "dear": StepCosts.lines(1.0, 0.03, 0.1, 0.01),
    "forbidding": StepCosts.lines(0.01, 1.0, 5.0, 1.0),
}


@pytest.mark.parametrize("name", ["greedy", "seeded_penalties"])
@pytest.mark.parametrize("kind", COSTS)
def test_what_pays_does_not_change_the_text(one, kind, name):
    prompts = [one.encode(p) for p in PROMPTS[:6]]
    options = [params(name, seed=i) for i in range(6)]
    plain = one.generate(prompts, options, draft=False)
    with LLM(device="cpu", costs=COSTS[kind], lookup=False) as other:
        assert other.costs == COSTS[kind]
        fast = other.generate(prompts, options)
        stats = other.stats()
        again = other.generate(prompts, options)
    for prompt, o, a, b in zip(prompts, options, plain, fast, strict=True):
        assert a.token_ids == b.token_ids or rounding_explains(one, prompt, a.token_ids, b.token_ids, o)
    assert [o.token_ids for o in again] == [o.token_ids for o in fast]
    if kind == "free":
        assert stats["tau"] > 1.3
    elif kind == "dear":
        assert 1.0 < stats["tau"] and stats["drafted"] < 5 * stats["passes"]
    else:
        # Every 32nd step looks whether drafting has become worth it.
        assert stats["drafted"] < 7 * (stats["passes"] / 32 + 6)


TREES = {
    "few": {"tree_nodes": 3, "adaptive": False},
    "whole": {"tree_nodes": 21, "adaptive": False},
    "wider than a word": {"tree_nodes": 90, "adaptive": False, "page_size": 1, "num_pages": 2000, "max_context": 256},
    "dear": {"tree_nodes": 16, "costs": COSTS["dear"]},
    "forbidding": {"tree_nodes": 16, "costs": COSTS["forbidding"]},
}


@pytest.mark.parametrize("kind", TREES)
def test_trees_do_not_change_the_text(one, kind):
    prompts = [one.encode(p) for p in PROMPTS[: len(SAMPLING)]]
    options = [params(name, seed=i, logprobs=1) for i, name in enumerate(SAMPLING)]
    plain = one.generate(prompts, options, draft=False)
    with LLM(device="cpu", **TREES[kind]) as other:
        # Alone, together, and with some whose prompts come later, beside the blocks of the others.
        fast = [other.generate([p], o)[0] for p, o in zip(prompts, options, strict=True)]
        before = other.stats()
        together = other.generate(prompts, options)
        assert idle(other)
    for prompt, o, a, b, c in zip(prompts, options, plain, fast, together, strict=True):
        for d in (b, c):
            assert a.token_ids == d.token_ids or rounding_explains(one, prompt, a.token_ids, d.token_ids, o)
            if a.token_ids == d.token_ids:
                scores = [[e.logprob for e in x.logprobs] for x in (a, d)]
                assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    if kind == "forbidding":
        assert before["verified"] < before["passes"]
    elif kind == "dear":
        assert before["tau"] > 1.0 and before["verified"] < 8 * before["passes"]
    else:
        assert before["verified"] > before["drafted"] > before["accepted"] > 0
        assert before["tau"] > 1.3
        assert before["verified"] <= TREES[kind]["tree_nodes"] * before["passes"]


def test_more_drafts_per_pass_are_accepted_by_trees():
    prompts = PROMPTS[:8]
    taus = []
    for nodes in (0, 7, 31):
        with LLM(device="cpu", tree_nodes=nodes, adaptive=False) as engine:
            engine.generate(prompts, SamplingParams(temperature=0.7, seed=5, max_tokens=LENGTH, ignore_eos=True))
            taus.append(engine.stats()["tau"])
    assert taus[0] < taus[1] < taus[2]


@pytest.mark.parametrize("nodes", [0, 12])
def test_a_dflash_2_drafts_and_changes_nothing(one, nodes, tmp_path, monkeypatch):
    # A selector names fewer candidates than a first drafter can.
    monkeypatch.setattr(DFlashDraft, "most_candidates", 4)
    prompts = [one.encode(p) for p in PROMPTS[:6]]
    options = [
        params(name, seed=i)
        for i, name in enumerate(("greedy", "seeded", "top_p", "min_p", "bias", "seeded_penalties"))
    ]
    plain = one.generate(prompts, options, draft=False)
    model = assets() / "target"
    taus = {}
    for name, draft in (
        ("first", assets() / "draft"), ("same", second(tmp_path / "same", 1e-9)), ("other", second(tmp_path / "other", 0.03)),
    ):  # fmt: skip
        with LLM(model, draft, device="cpu", adaptive=False, tree_nodes=nodes) as engine:
            fast = engine.generate(prompts, options)
            taus[name] = engine.stats()["tau"]
        for prompt, o, a, b in zip(prompts, options, plain, fast, strict=True):
            assert a.token_ids == b.token_ids or rounding_explains(one, prompt, a.token_ids, b.token_ids, o)
    assert taus["other"] > 1.1 and taus["other"] != taus["first"]
    # Trees of the two may differ in the last bits of a chance.
    assert taus["same"] == pytest.approx(taus["first"], rel=0.02)


def test_greedy_is_what_transformers_says(one):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(assets() / "target", dtype=torch.float32)
    ids = one.encode(PROMPTS[0])
    ours = one.generate([ids], params("greedy", 0))[0].token_ids
    with torch.inference_mode():
        theirs = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=LENGTH, eos_token_id=None)
    theirs = theirs[0, len(ids) :].tolist()
    assert ours == theirs or rounding_explains(one, ids, theirs, ours, params("greedy", 0))


def test_min_tokens_are_what_transformers_writes(one):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(assets() / "target", dtype=torch.float32)
    for prompt in PROMPTS[:3]:
        ids = one.encode(prompt)
        free = one.generate([ids], SamplingParams(max_tokens=LENGTH, ignore_eos=True))[0].token_ids
        # Two tokens that the text would say early, one of them at once.
        stops = sorted({free[0], free[5]})
        sampling = SamplingParams(max_tokens=LENGTH, min_tokens=14, stop_token_ids=stops)
        ours = one.generate([ids], sampling)[0].token_ids
        ends = [*stops, *one.eos_token_ids]
        with torch.inference_mode():
            theirs = model.generate(
                torch.tensor([ids]), do_sample=False, max_new_tokens=LENGTH, min_new_tokens=14, eos_token_id=ends
            )
        theirs = theirs[0, len(ids) :].tolist()
        assert len(ours) >= 14 and not set(ours[:14]) & set(ends)
        assert ours == theirs or rounding_explains(one, ids, theirs, ours, sampling)


@pytest.mark.parametrize("nodes", [0, 9])
def test_min_tokens_hold_with_drafts_stop_strings_and_retractions(nodes):
    prompts = PROMPTS[:6]
    options = [
        SamplingParams(
            temperature=0.8, seed=i, max_tokens=LENGTH, min_tokens=(0, 10, 25)[i % 3], stop=["(", "e"], stop_token_ids=range(200, 420, 5)
        )
        for i in range(6)
    ]  # fmt: skip
    with (
        LLM(
            device="cpu", page_size=4, num_pages=60, max_running=6, max_context=160, adaptive=False, tree_nodes=nodes
        ) as small,
        LLM(device="cpu") as roomy,
    ):
        tight, free = small.generate(prompts, options), roomy.generate(prompts, options, draft=False)
        assert idle(small) and small.stats()["accepted"] > 0
    early = 0
    for o, a, b in zip(options, free, tight, strict=True):
        assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
        assert len(a.token_ids) > o.min_tokens and a.finish_reason == "stop"
        early += any(stop in a.text for stop in o.stop)
    assert early, "no stop string was text"


def test_a_shared_prefix_is_reused_and_changes_nothing(one):
    prompt = one.encode(PROMPTS[1] + PROMPTS[2])
    first = one.generate([prompt], params("seeded", 3))[0]
    again = one.generate([prompt], params("seeded", 3))[0]
    assert again.metrics["cached_prompt_tokens"] >= 16
    assert again.token_ids == first.token_ids


def test_tiny_pool_retracts_and_still_says_the_same():
    prompts = PROMPTS[:6]
    options = [params("seeded", seed=i) for i in range(6)]
    with (
        LLM(device="cpu", page_size=4, num_pages=60, max_running=6, max_context=160, adaptive=False) as small,
        LLM(device="cpu") as roomy,
    ):
        tight, free = small.generate(prompts, options), roomy.generate(prompts, options)
        assert small.stats()["retractions"] > 0, "the pool was not tight enough to test anything"
        for prompt, o, a, b in zip(prompts, options, free, tight, strict=True):
            assert a.token_ids == b.token_ids or rounding_explains(
                roomy, roomy.encode(prompt), a.token_ids, b.token_ids, o
            )
        assert idle(small)


def test_the_stream_adds_up_to_the_output(one):
    texts, tokens, final = {}, {}, {}
    for event in one.stream(PROMPTS[:3], params("seeded", 5)):
        texts[event.index] = texts.get(event.index, "") + event.text
        tokens.setdefault(event.index, []).extend(event.token_ids)
        assert 0 <= event.accepted <= len(event.token_ids)
        if event.output is not None:
            final[event.index] = event.output
    assert sorted(final) == [0, 1, 2]
    for i, output in final.items():
        assert texts[i] == output.text == one.decode(tokens[i])
        assert tokens[i] == output.token_ids


def test_leaving_a_stream_early_returns_its_pages_and_harms_nobody(one):
    expected = one.generate(PROMPTS[1], params("greedy", 0))[0].token_ids
    other = one.stream(PROMPTS[1], params("greedy", 0))
    got = list(next(other).token_ids)
    stream = one.stream(PROMPTS[:4], params("greedy", 0))
    next(stream)
    stream.close()
    for event in other:
        got += event.token_ids
    assert got == expected
    assert idle(one)


def test_abort_in_mid_generation_ends_that_request_only(one):
    expected = one.generate(PROMPTS[:2], params("greedy", 0))
    ended = {}
    seen = 0
    for event in one.stream(PROMPTS[:2], params("greedy", 0)):
        seen += 1
        if event.index == 0 and seen > 4 and 0 not in ended:
            assert one.abort(event.request_id) or event.output is not None
        if event.output is not None:
            ended[event.index] = event.output
    assert ended[0].finish_reason == "abort"
    assert ended[0].token_ids == expected[0].token_ids[: len(ended[0].token_ids)]
    assert ended[1].token_ids == expected[1].token_ids
    assert not one.abort(ended[1].request_id)
    assert idle(one)


def test_an_interrupt_in_the_middle_of_a_step_loses_nothing(one, monkeypatch):
    expected = one.generate(PROMPTS[0], params("seeded", 2))[0].token_ids
    forward, calls = one._target.forward, itertools.count()

    def interrupted(batch):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return forward(batch)

    monkeypatch.setattr(one._target, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        one.generate(PROMPTS[0], params("seeded", 2))
    assert idle(one)
    assert one.generate(PROMPTS[0], params("seeded", 2))[0].token_ids == expected


def test_nan_logits_end_their_request_and_spare_the_others(one, monkeypatch):
    expected = one.generate(PROMPTS[:3], params("greedy", 0))
    forward, calls = one._target.forward, itertools.count()

    def poisoned(batch):
        logits, features = forward(batch)
        if next(calls) == 2:
            logits = logits.clone()
            logits[0, 7] = math.nan
        return logits, features

    monkeypatch.setattr(one._target, "forward", poisoned)
    outputs = one.generate(PROMPTS[:3], params("greedy", 0))
    failed = [o for o in outputs if o.finish_reason == "error"]
    assert len(failed) == 1 and "NaN" in failed[0].error
    for output, good in zip(outputs, expected, strict=True):
        if output.finish_reason != "error":
            assert output.token_ids == good.token_ids
    assert idle(one)


def test_a_stop_string_ends_the_text_before_itself(one):
    whole = one.generate(PROMPTS[0], params("greedy", 0))[0].text
    stop = whole[len(whole) // 2 :][:3]
    for draft in (True, False):
        output = one.generate(PROMPTS[0], params("greedy", 0, stop=stop), draft=draft)[0]
        assert output.finish_reason == "stop"
        assert output.text == whole[: whole.index(stop)]


def test_a_stop_token_ends_the_output_and_nothing_follows(one):
    whole = one.generate(PROMPTS[0], params("greedy", 0))[0].token_ids
    stop = whole[LENGTH // 2]
    for draft in (True, False):
        output = one.generate(PROMPTS[0], params("greedy", 0, stop_token_ids=[stop]), draft=draft)[0]
        assert output.token_ids == whole[: whole.index(stop) + 1]
        assert output.finish_reason == "stop"


@pytest.mark.parametrize("length", [1, 2, 5, 9])
def test_exactly_max_tokens_are_produced(one, length):
    for output in one.generate(PROMPTS[:4], SamplingParams(max_tokens=length, ignore_eos=True)):
        assert len(output.token_ids) == length
        assert output.finish_reason == "length"


def test_logprobs_are_those_of_the_models_own_softmax(one):
    ids = one.encode(PROMPTS[0])
    o = SamplingParams(temperature=0.8, top_k=20, seed=1, max_tokens=12, logprobs=3, ignore_eos=True)
    fast, plain = one.generate([ids], o)[0], one.generate([ids], o, draft=False)[0]
    assert [x.token_id for x in fast.logprobs] == fast.token_ids == plain.token_ids
    for i, entry in enumerate(fast.logprobs):
        logits = one.next_token_logits(ids + fast.token_ids[:i]).astype(np.float64)
        logs = logits - np.logaddexp.reduce(logits)
        assert entry.logprob == pytest.approx(logs[entry.token_id], abs=1e-3)
        assert [t for t, _ in entry.top] == np.argsort(-logs, kind="stable")[:3].tolist()
        assert entry.logprob == pytest.approx(plain.logprobs[i].logprob, abs=1e-3)


def test_metrics_count_what_happened(one):
    output = one.generate(PROMPTS[0], params("greedy", 0))[0]
    m = output.metrics
    assert m["output_tokens"] == LENGTH and m["prompt_tokens"] == len(one.encode(PROMPTS[0]))
    assert sum(m["accept_histogram"]) == m["steps"]
    assert m["tau"] == pytest.approx((LENGTH - 1) / m["steps"])
    assert all(0 <= share <= 1 for share in m["accepted_per_position"])


def test_an_unseeded_request_reports_a_seed_that_reproduces_it(one):
    first = one.generate(PROMPTS[0], SamplingParams(temperature=1.0, max_tokens=16))[0]
    again = one.generate(PROMPTS[0], SamplingParams(temperature=1.0, max_tokens=16, seed=first.metrics["seed"]))[0]
    other = one.generate(PROMPTS[0], SamplingParams(temperature=1.0, max_tokens=16))[0]
    assert again.token_ids == first.token_ids
    assert other.metrics["seed"] != first.metrics["seed"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty prompt"),
        ([], "empty prompt"),
        ([4096], "token id 4096"),
        ([-1], "token id -1"),
        ([1, "a"], "expected a string"),
    ],
)
def test_a_bad_prompt_is_named_and_leaves_nothing_behind(one, prompt, message):
    with pytest.raises(InvalidArgument, match=message):
        one.generate([PROMPTS[0], prompt], params("greedy", 0))
    assert idle(one)


def test_a_prompt_that_can_never_fit_is_refused_with_numbers():
    with LLM(device="cpu", num_pages=4, page_size=4, max_running=1) as small:
        with pytest.raises(OutOfPages, match=r"\d+ pages"):
            small.generate([list(range(5, 60))], SamplingParams(max_tokens=8))
        assert idle(small)
        assert len(small.generate([[5, 6, 7]], SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0}, {"temperature": math.nan}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -2}, {"min_p": 2.0},
        {"seed": -1}, {"max_tokens": 0}, {"min_tokens": -1}, {"min_tokens": 129}, {"min_tokens": 1.5}, {"stop": ""}, {"stop": [""]}, {"repetition_penalty": 0.0}, {"presence_penalty": 3.0},
        {"temperature": 1e-9}, {"temperature": 1e39}, {"top_p": 1e-50}, {"repetition_penalty": 1e39}, {"repetition_penalty": 1e-46},
        {"logit_bias": {1: 1e39}}, {"logit_bias": {-1: 0.0}}, {"logit_bias": {1: math.inf}}, {"logprobs": 1000}, {"ignore_eos": 1}, {"stop_token_ids": 3},
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_sampling_option_is_an_error_that_names_it(options):
    with pytest.raises(InvalidArgument, match=next(iter(options))):
        SamplingParams(**options)


def test_every_sampling_option_that_is_taken_also_runs(one):
    extremes = [
        {"temperature": 1e-5}, {"temperature": 3.4e38}, {"top_p": 1.2e-38, "temperature": 1.0}, {"repetition_penalty": 3.4e38},
        {"logit_bias": {7: 3.4e38}}, {"min_p": 1e-60, "temperature": 1.0},
    ]  # fmt: skip
    for options in extremes:
        output = one.generate("def f", SamplingParams(max_tokens=3, ignore_eos=True, **options))[0]
        assert (output.finish_reason, output.error) == ("length", None), options
    # Divided by next to nothing a logit is infinite: that request ends and says so.
    output = one.generate("def f", SamplingParams(max_tokens=3, repetition_penalty=1.2e-38))[0]
    assert output.finish_reason == "error" and "got +inf" in output.error


def test_a_device_and_a_dtype_may_be_torchs_own():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert pick_dtype(torch, dtype, torch.device("cpu")) is dtype
    with LLM(device=torch.device("cpu"), dtype=torch.float32, draft=None) as engine:
        assert (engine.device, engine.dtype) == (torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": None}, "device: got None"),
        ({"threads": True}, "threads: got True"),
        ({"page_size": 2**40}, "num_pages, page_size: got 1 pages of"),
        ({"num_pages": 2**60}, "num_pages, page_size: got"),
        ({"prefix_cache": "x"}, "prefix_cache: got 'x'"),
        ({"adaptive": "no"}, "adaptive: got 'no'"),
        ({"draft": 5}, "draft: got 5"),
        ({"model": 5}, "model: got 5, expected a model's folder, GGUF file or hub name"),
        ({"model": ""}, "model: got ''"),
        ({"model": [assets()]}, "model: got \\["),
        ({"threads": 32767}, "threads: got 32767, expected an integer in 1.."),
        ({"max_running": 10**7}, "max_running: got 10000000, expected at most"),
        ({"max_running": 2**64}, "max_running: got"),
        ({"max_batch_tokens": 2**64}, "max_batch_tokens: got"),
        ({"threads": 2**31}, "threads: got 2147483648, expected an integer in 1.."),
        ({"dtype": []}, "dtype: got"),
        ({"dtype": torch.float64}, "dtype: got torch.float64, expected 'auto' or one of"),
        ({"device": "gpu"}, "device: got 'gpu', expected 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ({"device": torch.device("meta")}, "device: got device.*meta.*, expected 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ({"tree_nodes": -1}, "tree_nodes: got -1, expected an integer in 0..1023"),
        ({"tree_nodes": 5, "draft": None}, "tree_nodes: got 5, expected 0 without a drafter"),
    ],
    ids=str,
)
def test_an_engine_option_of_the_wrong_kind_or_size_is_named(options, message):
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        LLM(**({"device": "cpu"} | options))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.generate("a", 5), "params: got 5"),
        (lambda llm: llm.generate("a", {"temperatur": 1.0}), "params: got 'temperatur', expected some of temperature"),
        (lambda llm: llm.decode([99999]), "ids: got token id 99999, expected token ids in 0..4095"),
        (lambda llm: llm.decode([-1]), "ids: got token id -1"),
        (lambda llm: llm.decode("abc"), "ids: got 'abc'"),
        (lambda llm: llm.encode(5), "text: got 5"),
        (lambda llm: llm.encode("\ud800"), "text: got"),
        (lambda llm: llm.generate("\ud800"), r"prompts\[0\]: got"),
        (lambda llm: llm.generate("a", [None]), r"params\[0\]: got None, expected SamplingParams"),
        (lambda llm: llm.generate("a", draft="no"), "draft: got 'no'"),
        (lambda llm: llm.generate("a", draft=None), "draft: got None"),
        (lambda llm: llm.generate(np.array(5)), r"prompts: got a int64 array of shape \(\), expected a string"),
        (lambda llm: llm.decode(None), "ids: got None"),
        (lambda llm: llm.next_token_logits(None), "ids: got None, expected a list of token ids"),
        (lambda llm: llm.next_token_logits([]), "ids: got 0 tokens, expected 1..1024"),
        (lambda llm: llm.next_token_logits([1] * 2000), "ids: got 2000 tokens, expected 1..1024"),
        (lambda llm: SamplingParams(stop="\ud800"), "stop: got"),
    ],
)
def test_what_a_call_cannot_take_is_named(one, call, message):
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        call(one)


def test_a_drafter_is_never_dropped_in_silence():
    with pytest.raises(InvalidArgument, match="draft"):
        LLM(model=assets() / "target")
    with pytest.raises(InvalidArgument, match="block_size"):
        LLM(draft=None, block_size=8)


def test_a_stream_that_others_finished_or_aborted_still_has_its_events(one):
    short = SamplingParams(max_tokens=3, ignore_eos=True)
    stream = one.stream(PROMPTS[0], short)
    one.generate(PROMPTS[1], SamplingParams(max_tokens=24, ignore_eos=True))
    events = list(stream)
    assert events[-1].output.finish_reason == "length" and len(events[-1].output.token_ids) == 3
    stream = one.stream(PROMPTS[0], short)
    (request,) = one._requests.active
    assert one.abort(request)
    assert [e.finish_reason for e in stream] == ["abort"]


def test_a_stream_that_was_never_begun_is_aborted_when_it_is_dropped(one):
    stream = one.stream(PROMPTS[0], SamplingParams(max_tokens=400, ignore_eos=True))
    assert one.stats()["waiting"] == 1
    del stream
    assert idle(one) and not one._requests.active


def test_a_closed_engine_says_so():
    engine = LLM(device="cpu")
    engine.close()
    with pytest.raises(dflash_rs.DflashError, match="this LLM is closed"):
        engine.generate("a")
    with pytest.raises(dflash_rs.DflashError, match="this LLM is closed"):
        engine.next_token_logits([5])
    # What runs no model goes on.
    assert engine.decode(engine.encode("a")) == "a" and engine.stats()["steps"] == 0 and engine.abort("x") is False


@pytest.mark.parametrize("prompt", [b"import os", [b"import os"], [None], [[1.0]], 5])
def test_what_is_no_prompt_is_refused(one, prompt):
    with pytest.raises(InvalidArgument, match="^prompts"):
        one.generate(prompt)
    assert idle(one)


@pytest.mark.parametrize(
    ("file", "text"),
    [("tokenizer.json", "{"), ("tokenizer.json", None), ("config.json", '"num_hidden_layers": 9')],
)
def test_a_damaged_target_folder_is_one_kind_of_error(tmp_path, file, text):

    folder = shutil.copytree(assets() / "target", tmp_path / "target")
    if text is None:
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    elif file == "config.json":
        config = (folder / file).read_text()
        (folder / file).write_text(config.replace('"num_hidden_layers": 10', text))
    else:
        (folder / file).write_text(text)
    with pytest.raises(dflash_rs.CheckpointError):
        LLM(folder, draft=None, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": ()}, "costs.target: got no points"),
        ({"target": ((1, 0.0),)}, "costs.target: got no time"),
        ({"target": ((1, 2.0), (2, 1.0))}, r"costs.target: got \(2, 1\), expected times"),
        ({"draft": ((1, float("nan")),)}, r"costs.draft: got \(1, NaN\)"),
        ({"draft": ((2, 1.0), (1, 2.0))}, r"costs.draft: got \(1, 2\), expected rows"),
        ({"draft": 3}, "costs.draft: got 3, expected pairs"),
        ({"draft": (("a", 1.0),)}, "costs.draft: got .*, expected pairs"),
    ],
)
def test_costs_that_are_no_times_are_refused_by_name(change, message):
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        StepCosts(**change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matmul_precision": "low"}, "matmul_precision: got 'low', expected 'highest', 'medium' or 'auto'"),
        ({"matmul_precision": "medium", "dtype": "bfloat16"}, "matmul_precision: got 'medium' with torch.bfloat16"),
    ],
)
def test_a_precision_that_does_not_apply_is_refused(options, message):
    with pytest.raises(InvalidArgument, match=message):
        LLM(device="cpu", **options)


def test_precision_auto_is_what_the_processor_can():
    with LLM(device="cpu", matmul_precision="auto") as engine:
        assert engine.matmul_precision == ("medium" if dflash_rs._core.multiplies_bf16() else "highest")
    with LLM(device="cpu", dtype="bfloat16", matmul_precision="auto") as engine:
        assert engine.matmul_precision == "highest"


def test_what_steps_take_corrects_costs_that_were_measured_in_a_busy_moment(monkeypatch):
    """With target passes believed to take a fortnight a row, nothing would ever be drafted."""
    import dflash_rs.engine.build as build

    monkeypatch.setattr(build, "measure", lambda *_: StepCosts.lines(1e-9, 1e6, 1e6, 1e6))
    with LLM(device="cpu", lookup=False) as engine:
        engine.generate(PROMPTS[:2], SamplingParams(max_tokens=64, ignore_eos=True))
        target, draft, _ = engine._loop.policy.planner.costs
        assert max(time for _, time in target) < 1e6 and max(time for _, time in draft) < 1e6


def test_costs_of_the_users_own_stay_as_they_are():
    own = StepCosts.lines(1e-9, 1.0, 1.0, 1.0)
    with LLM(device="cpu", costs=own) as engine:
        engine.generate(PROMPTS[0], SamplingParams(max_tokens=8, ignore_eos=True))
        assert engine._loop.policy.planner.costs == ([(0.0, 1e-9), (1.0, 1e-9 + 1.0)], [(0.0, 1.0), (1.0, 2.0)], 0.0)


def changed(folder, part: str, change) -> str:
    """A copy of the bundled target or drafter with other tensors."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(assets() / part, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


UP = "model.layers.3.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: w[:-1].clone(), r"got shape \[703, 256\], expected \[704, 256\]"),
        (lambda w: w * math.nan, "has values that are not finite"),
        (lambda w: (w * 100).to(torch.int8), "got I8, expected a floating-point type"),
        (lambda w: w > 0, "got BOOL, expected a floating-point type"),
    ],
    ids=["shape", "nan", "int8", "bool"],
)
def test_a_damaged_weight_of_the_target_is_named(tmp_path, damage, message):
    folder = changed(tmp_path / "target", "target", lambda tensors: tensors.update({UP: damage(tensors[UP])}))
    with pytest.raises(dflash_rs.CheckpointError, match=f"{UP}: {message}"):
        LLM(folder, draft=None, device="cpu")


def test_integers_under_the_short_names_of_a_bare_model_are_found_too(tmp_path):
    def strip(tensors):
        short = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(short)

    folder = changed(tmp_path / "good", "target", strip)
    with LLM(folder, draft=None, device="cpu") as engine:
        assert len(engine.generate([[5, 6]], SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids) == 2
    name = UP.removeprefix("model.")
    folder = changed(
        tmp_path / "bad", "target", lambda t: (strip(t), t.update({name: (t[name] * 100).to(torch.int16)}))
    )
    with pytest.raises(dflash_rs.CheckpointError, match=f": {name}: got I16, expected a floating-point type"):
        LLM(folder, draft=None, device="cpu")


def test_tensors_the_target_has_no_place_for_are_a_warning_that_names_some(tmp_path):
    spare = {f"mtp.layers.{i}.weight": torch.ones(2, dtype=torch.int8) for i in range(5)}
    folder = changed(tmp_path / "spare", "target", lambda tensors: tensors.update(spare))
    with pytest.warns(UserWarning) as caught, LLM(folder, draft=None, device="cpu") as engine:
        assert engine.generate("def f", SamplingParams(max_tokens=2, ignore_eos=True))[0].error is None
    (message,) = [str(w.message) for w in caught if "tensors" in str(w.message)]
    assert message.startswith(f"target {folder}: a Qwen3ForCausalLM has no place for 5 of its tensors")
    assert "(mtp.layers.0.weight, mtp.layers.1.weight, mtp.layers.2.weight, ...)" in message
    assert [w.filename for w in caught if "tensors" in str(w.message)] == [__file__]


def test_what_many_checkpoints_carry_along_is_no_reason_to_warn(tmp_path):
    def carry(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)

    folder = changed(tmp_path / "target", "target", carry)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        LLM(folder, draft=None, device="cpu").close()


def nothing_but_zeros(tensors):
    for tensor in tensors.values():
        tensor.zero_()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nothing_but_zeros, r"\S+: is all zeros"),
        (lambda t: t["layers.0.mlp.up_proj.weight"].zero_(), r"layers\.0\.mlp\.up_proj\.weight: is all zeros"),
        (lambda t: t["fc.weight"].view(-1)[7:8].fill_(math.inf), r"fc\.weight: has values that are not finite"),
    ],
    ids=["all", "one", "inf"],
)
def test_a_drafter_that_cannot_be_meant_is_refused(tmp_path, change, message):
    folder = changed(tmp_path / "draft", "draft", change)
    with pytest.raises(dflash_rs.CheckpointError, match=f"{folder}: {message}"):
        LLM(assets() / "target", draft=folder, device="cpu")


@pytest.mark.parametrize("shown", [True, False])
def test_loading_draws_no_bar_and_leaves_the_settings_of_transformers_alone(capfd, shown):
    from huggingface_hub import utils as hub
    from transformers.utils import logging

    logger = logging.get_logger("transformers.modeling_utils")
    before = logging.is_progress_bar_enabled(), hub.are_progress_bars_disabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        inside = logging.is_progress_bar_enabled(), hub.are_progress_bars_disabled(), list(logger.filters)
        capfd.readouterr()
        with pytest.raises(dflash_rs.CheckpointError):
            LLM(assets() / "draft", draft=None, device="cpu")
        LLM(device="cpu").close()
        out, err = capfd.readouterr()
        assert "Loading" not in out + err and "LOAD REPORT" not in out + err
        assert (logging.is_progress_bar_enabled(), hub.are_progress_bars_disabled(), list(logger.filters)) == inside
    finally:
        (logging.enable_progress_bar if before[0] else logging.disable_progress_bar)()
        (hub.disable_progress_bars if before[1] else hub.enable_progress_bars)()


class Index:
    """Neither Python's nor NumPy's, but it indexes a list."""

    def __init__(self, value: int):
        self.value = value

    def __index__(self) -> int:
        return self.value


@pytest.mark.parametrize("kind", [np.int64, np.uint16, Index])
def test_whole_numbers_need_not_be_pythons(kind):
    sizes = dict(
        page_size=8, num_pages=64, max_running=2, max_context=200, max_batch_tokens=256, block_size=4, threads=1
    )
    sampling = dict(top_k=9, seed=7, max_tokens=5, logprobs=1)
    texts = []
    for make in (int, kind):
        with LLM(device="cpu", **{name: make(value) for name, value in sizes.items()}) as engine:
            assert (engine.block_size, engine.max_context, engine.stats()["total_pages"]) == (4, 200, 64)
            o = SamplingParams(
                temperature=0.7,
                stop_token_ids=[make(4095)],
                logit_bias={make(17): 2.0},
                **{name: make(value) for name, value in sampling.items()},
            )
            output = engine.generate(PROMPTS[0], o)[0]
            assert output.metrics["seed"] == 7 and json.dumps(output.metrics)
            texts.append((output.text, len(output.logprobs[0].top)))
    assert texts[0] == texts[1]
    with pytest.raises(InvalidArgument, match="^max_running: got"):
        LLM(device="cpu", max_running=kind(0))


@pytest.mark.parametrize("value", [True, np.True_, 2.0, np.float64(2), "2", np.array([2, 2])], ids=repr)
def test_what_is_no_whole_number_is_no_size(value):
    for name in ("page_size", "num_pages", "max_running", "max_context", "max_batch_tokens", "block_size", "threads"):
        with pytest.raises(InvalidArgument, match=f"^{name}: got "):
            LLM(device="cpu", **{name: value})
    for name in ("top_k", "seed", "max_tokens", "logprobs"):
        with pytest.raises(InvalidArgument, match=f"^{name}: got "):
            SamplingParams(**{name: value})


def test_pages_that_the_machine_has_no_memory_for_are_refused_before_any_of_it_is_taken(monkeypatch):
    """A cache in several tensors is given by the system whatever it has, and ends the process when it is written to."""
    monkeypatch.setattr(build, "_host_memory", lambda: 64 << 20)
    with pytest.raises(
        InvalidArgument, match=r"num_pages, page_size: got 1000 pages .* expected a cache that fits the memory"
    ):
        LLM(max_context=256, num_pages=1000)
    LLM(max_context=256, num_pages=20).close()
