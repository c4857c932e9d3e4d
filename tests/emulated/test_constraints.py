"""Constrained requests in steps that stay on the emulated GPU: their rows are drawn on the host, between the target and the walk."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_engine import PROMPTS, engine, exact, tokens  # noqa: E402, F401

from dflash_rs import SamplingParams  # noqa: E402
from dflash_rs.engine.device import aside  # noqa: E402

pytest.importorskip("llguidance")
pytestmark = pytest.mark.pair


def shifted(output, row):
    row[output[::2]] += 0.5
    row[len(output) % 7 :: 7] = -torch.inf
    return row


MATRIX = {
    "json": {"structured_outputs": {"json": {"type": "object", "properties": {"a": {"type": "integer", "maximum": 99}}, "required": ["a"]}}},
    "regex": {"structured_outputs": {"regex": r"[a-z]{2,6}(, [0-9]{1,3}){1,4};"}, "temperature": 0.9, "seed": 3},
    "allowed": {"allowed_token_ids": range(20, 1500, 3), "temperature": 0.7, "seed": 5, "top_p": 0.9},
    "processors": {"logits_processors": [shifted], "logprobs": 2},
    "penalties": {"bad_words": ["return", "self", "a + b"], "repetition_penalty": 1.3, "logit_bias": {40: 2.0}, "temperature": 0.8, "seed": 6},
}  # fmt: skip


@pytest.fixture(scope="module", params=[0, 11], ids=["chains", "trees"])
def llm(request, exact):  # noqa: F811
    with engine(tree_nodes=request.param) as made:
        yield made


def params(name):
    return SamplingParams(**{"max_tokens": 16, **MATRIX[name]})


def told(outputs):
    scores = [[(s.token_id, s.logprob, s.top) for s in o.logprobs] if o.logprobs else None for o in outputs]
    return tokens(outputs), scores


@pytest.mark.parametrize("name", MATRIX)
def test_the_text_is_the_plain_one(llm, name):
    plain = told(llm.generate(PROMPTS[:3], params(name), draft=False))
    drafted = llm.generate(PROMPTS[:3], params(name))
    assert told(drafted) == plain
    assert name == "json" or sum(sum(o.metrics["accept_histogram"][1:]) for o in drafted) > 0


def test_others_in_the_batch_are_as_if_alone_and_their_rows_stay_on_the_device(llm, monkeypatch):
    free = SamplingParams(temperature=0.8, seed=11, max_tokens=16)
    each = [free, params("regex"), free]
    alone = [tokens(llm.generate([prompt], [one], draft=False))[0] for prompt, one in zip(PROMPTS, each)]
    edit, fetched = aside.edit, []

    def watched(plan, constrained, fetch):
        (request,) = constrained
        its = np.flatnonzero(plan.request_ids == request)

        def counted(rows):
            fetched.append(rows.size)
            assert all(plan.logit_starts[i] <= rows.min() and rows.max() < plan.logit_starts[i + 1] for i in its)
            return fetch(rows)

        return edit(plan, constrained, counted)

    monkeypatch.setattr(aside, "edit", watched)
    outputs = llm.generate(PROMPTS[:3], each)
    assert tokens(outputs) == alone and fetched
    before = llm.stats()["steps_ahead"]
    assert tokens(llm.generate([PROMPTS[0]], free)) == alone[:1]
    assert llm.stats()["steps_ahead"] > before, "without constraints steps are launched ahead"


def test_a_dead_end_is_where_plain_decoding_has_it(llm):
    def process(output, row):
        if len(output) == 7:
            raise RuntimeError("seven")
        return row

    free = SamplingParams(max_tokens=12, ignore_eos=True)
    dead = SamplingParams(max_tokens=12, ignore_eos=True, logits_processors=[process])
    expected = tokens(llm.generate(PROMPTS[:2], free, draft=False))
    for draft in (True, False):
        good, failed = llm.generate(PROMPTS[:2], [free, dead], draft=draft)
        assert tokens([good]) == expected[:1]
        assert failed.finish_reason == "error" and "logits_processors[0]: raised RuntimeError: 'seven'" in failed.error
        assert failed.token_ids == expected[1][0][:7]


def test_requests_that_draft_less_than_others_say_the_same(llm):
    each = [SamplingParams(temperature=0.8, seed=4, max_tokens=16, max_drafts=most) for most in (0, 2, None)]
    plain = tokens(llm.generate(PROMPTS[:3], each, draft=False))
    outputs = llm.generate(PROMPTS[:3], each)
    assert tokens(outputs) == plain
    drafted = [len(o.metrics["accepted_per_position"]) for o in outputs]
    assert drafted[0] == 0 < drafted[1] <= 2 < drafted[2]
