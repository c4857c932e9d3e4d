"""Chains drafted inside a step by the random numbers of the target's draws: the tokens that the host would draft, more of them right, the same text."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "python")]
from second import second  # noqa: E402
from test_engine import PROMPTS, engine, exact, tokens  # noqa: E402, F401

from dflash_rs import SamplingParams, _core  # noqa: E402
from dflash_rs.config import assets  # noqa: E402
from dflash_rs.engine.device import drafting  # noqa: E402

pytestmark = pytest.mark.pair
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
HOT = [SamplingParams(temperature=1.0, seed=2**63 + seed, max_tokens=32, ignore_eos=True) for seed in range(4)]


def a_part(folder):
    draft = shutil.copytree(assets() / "draft", folder / "draft")
    (draft / "draft_vocab.json").write_text(json.dumps([token for token in range(2, 4096) if token % 7]))
    return draft


def candidates(runtime, blocks):
    """All that the drafter may propose, and their probabilities."""
    if hasattr(runtime, "selector"):
        found, log_probs = runtime.select(blocks.hidden, blocks.logits, blocks.anchors, runtime.selector.top_k)
        return found.numpy(), log_probs.exp().numpy()
    chances, found = blocks.logits.float().softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    return runtime.proposals.named(found).numpy(), chances.numpy()


@pytest.mark.parametrize("kind", [None, a_part, functools.partial(second, noise=0.03)], ids=["all", "a part", "second"])
def test_drafts_are_what_the_host_drafts_of_all_candidates(exact, tmp_path, monkeypatch, kind):  # noqa: F811
    each = [
        GREEDY,
        *(SamplingParams(temperature=heat, seed=seed, max_tokens=12) for heat, seed in ((0.8, 2**63 + 5), (1.2, 7))),
    ]
    options = {} if kind is None else {"model": assets() / "target", "draft": kind(tmp_path)}
    made_of, plans, others = drafting.chains, [], 0
    # Without graphs and overlap every pass is that of the step that was launched last, and its plan knows all.
    with engine(cuda_graphs=False, overlap=False, **options) as made:
        launch = made._loop.backend.launch

        def launched(step):
            plans.append(step.plan)
            return launch(step)

        def watched(draft, blocks, sampling):
            nonlocal others
            drafts, plan = made_of(draft, blocks, sampling), plans[-1]
            rows, (found, chances) = plan.draft_rows, candidates(draft, blocks)
            first = plan.context_lens[rows].astype(np.int64) + 1
            known = slice(0, rows.size)  # the padding follows
            expected, _ = _core.couple(
                found[known], chances[known], plan.seeds[rows], first, plan.temperatures[rows], 1
            )
            assert np.array_equal(drafts.numpy()[known], expected[:, :, 0])
            others += int((expected[:, :, 0] != found[known, :, 0]).sum())
            return drafts

        monkeypatch.setattr(made._loop.backend, "launch", launched)
        monkeypatch.setattr(drafting, "chains", watched)
        made.generate(PROMPTS[:3], each)
    assert others > 10, "the numbers never favoured another token than the likeliest"


def test_more_drafts_of_hot_requests_are_right_and_their_text_is_the_same(exact, monkeypatch):  # noqa: F811
    made_of, shares = drafting.chains, []
    with engine() as made:
        plain = tokens(made.generate(PROMPTS, HOT, draft=False))
        for coupled in (True, False):
            if not coupled:
                monkeypatch.setattr(drafting, "chains", lambda draft, blocks, sampling: made_of(draft, blocks, None))
                made._loop.backend.graphs.forget()
            before = made.stats()
            assert tokens(made.generate(PROMPTS, HOT)) == plain
            now = made.stats()
            shares.append((now["accepted"] - before["accepted"]) / (now["passes"] - before["passes"]))
    assert shares[0] > 1.5 * shares[1], shares


def test_greedy_batches_draft_as_if_there_were_no_draws(exact):  # noqa: F811
    with engine() as made:
        greedy = tokens(made.generate(PROMPTS[:2], GREEDY))
        graphs = made._loop.backend.graphs._captured
        assert {key[5] for key in graphs if key[0] == "draft"} == {False}
        # Beside a request that samples they are drafted the same tokens, by the graph that draws.
        before = made.stats()["accepted"]
        alone = made.generate(PROMPTS[:2], GREEDY)
        beside = made.generate(PROMPTS[:3], [GREEDY, GREEDY, HOT[0]])
        assert tokens(beside)[:2] == greedy == tokens(alone)
        for a, b in zip(alone, beside[:2], strict=True):
            assert a.metrics["accept_histogram"] == b.metrics["accept_histogram"]
        assert made.stats()["accepted"] > before
        assert {key[5] for key in graphs if key[0] == "draft"} == {False, True}


class Drawing:
    def choose(self, hidden, logits, anchors, draw):
        return draw(logits)


def test_logits_that_are_no_numbers_are_drafted_some_token(gpu):
    from dflash_rs import cuda

    logits = torch.zeros(2, 3, 50, dtype=torch.bfloat16)
    logits[0, 1], logits[1, 2, 4], logits[1, 0] = torch.nan, torch.inf, -torch.inf
    packed = torch.arange(8)
    blocks = drafting.Blocks(torch.tensor([0, 4, 8], dtype=torch.int32), packed[:2], packed, packed, logits, logits)
    sampling = cuda.sampling_rows([{"seed": 3}, {"temperature": 0.0}], "cpu").rows
    drafts = drafting.chains(Drawing(), blocks, sampling)
    assert drafts.shape == (2, 3) and (drafts[0, 1], drafts[1, 2], drafts[1, 0]) == (0, 0, 0)
    assert drafts[1, 1] == 0 and 0 < drafts[0, 0] < 50 and 0 < drafts[0, 2] < 50
