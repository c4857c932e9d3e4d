"""The bundled hybrid pair: drafts that are accepted in earnest by a target with recurrent layers and experts, and texts that stay the same."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from dflash_rs import LLM, InvalidArgument, SamplingParams, StepCosts, cli
from dflash_rs.bench.workloads import held_out_prompts
from dflash_rs.config import assets
from dflash_rs.engine import build
from dflash_rs.options import pick_models

pytestmark = pytest.mark.pair

NAME = "bundled-hybrid"
PROMPTS = [prompt.text for prompt in held_out_prompts(6)]
PARAMS = {
    "greedy": [SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)] * 6,
    "seeded": [SamplingParams(temperature=0.7, seed=i, max_tokens=32, ignore_eos=True) for i in range(6)],
}


def engine(**options) -> LLM:
    return LLM(NAME, max_context=256, **options)


@functools.cache
def plain(name: str) -> list[list[int]]:
    with LLM(NAME, None, max_context=256, max_running=1, prefix_cache=False) as llm:
        return [output.token_ids for output in llm.generate(PROMPTS, PARAMS[name])]


def test_its_name_is_that_of_a_small_target_with_state_and_of_its_drafter():
    target, draft = pick_models(NAME, "auto")
    assert (target, draft) == (NAME, assets() / "hybrid-draft")
    assert pick_models(NAME, None) == (NAME, None)
    with pytest.raises(InvalidArgument, match="draft: got 'bundled-hybrid', the name of a target, expected 'auto'"):
        pick_models(NAME, NAME)
    folders = [assets() / "hybrid-target", assets() / "hybrid-draft"]
    assert sum(file.stat().st_size for folder in folders for file in folder.iterdir()) < 15e6
    with engine() as llm:
        kinds = llm._target.config.layer_types
        assert kinds == 2 * (3 * ["linear_attention"] + ["full_attention"]) and llm.block_size == 8
        assert llm._target.state is not None and Path(llm.draft_dir) == draft


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("options", [{}, {"max_batch_tokens": 40, "page_size": 4}], ids=["together", "chunks"])
def test_texts_are_the_same_with_drafts_and_without_and_several_tokens_are_kept_at_a_time(name, options):
    with engine(adaptive=False, **options) as llm:
        for _ in range(2):
            outputs = llm.generate(PROMPTS, PARAMS[name])
            assert [output.token_ids for output in outputs] == plain(name)
        assert llm.stats()["tau"] > 1.4


@pytest.mark.parametrize("name", PARAMS)
def test_texts_in_bfloat16_are_the_same_with_drafts_and_without(name):
    prompts, params = PROMPTS[:3], PARAMS[name][:3]
    with LLM(NAME, None, max_context=256, max_running=1, prefix_cache=False, device="cpu", dtype="bfloat16") as llm:
        expected = [output.token_ids for output in llm.generate(prompts, params)]
    with engine(adaptive=False, device="cpu", dtype="bfloat16") as llm:
        assert [output.token_ids for output in llm.generate(prompts, params)] == expected
        assert llm.stats()["tau"] > 1.4


@pytest.mark.parametrize(("row", "tau"), [(0.0, 1.4), (2.0, 1.0)], ids=["rows are free", "a row costs two passes"])
def test_as_much_is_drafted_as_pays(row, tau):
    costs = StepCosts.lines(1.0, row, 0.1, 0.0)
    # What is looked up is certain now and then, and pays even so.
    with engine(costs=costs, lookup=False) as llm:
        outputs = llm.generate(PROMPTS, PARAMS["greedy"])
        assert [output.token_ids for output in outputs] == plain("greedy")
        found = llm.stats()["tau"]
        assert found > tau if tau > 1 else found < 1.2


def test_the_battery_finds_no_text_that_differs(capsys):
    words = ["check", "--model", NAME, "--prompts", "2", "--max-tokens", "16", "--rejected", "40", "--rounds", "1"]
    assert cli.main([*words, "--max-context", "256"]) == 0
    assert capsys.readouterr().out.count("\n") > 10


def test_states_that_the_machine_has_no_memory_for_are_refused_before_any_of_it_is_taken(monkeypatch):
    monkeypatch.setattr(build, "_host_memory", lambda: 64 << 20)
    with pytest.raises(
        InvalidArgument, match=r"max_running: got 400, .* their states and copies of them take [\d,.]+ GiB"
    ):
        engine(max_running=400)
    engine(max_running=4).close()
