"""What the engine needs of a model and nothing more: a recurrent target and a drafter that are none of the package's run through `LLM`."""

import numpy as np
import pytest
from interruptions import finish_interrupted
from models_helpers import qwen3_target
from toy_models import VOCAB, LookUp, RecurrentTarget

from dflash_rs import LLM, SamplingParams
from dflash_rs.errors import InvalidArgument
from dflash_rs.models.target import TargetModel

BYTES = [bytes([65 + token]) for token in range(VOCAB)]
SHARED = [(5 * i + 3) % VOCAB for i in range(41)]
PROMPTS = [SHARED[:n] + [n % VOCAB, 7] for n in (1, 3, 9, 17, 30, 41)] + [[11], [2, 4] * 20]
PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=30),
    "seeded": SamplingParams(temperature=0.9, top_p=0.95, seed=3, max_tokens=30),
    "penalised": SamplingParams(temperature=0.7, seed=9, repetition_penalty=1.3, max_tokens=30),
}


def engine(target, draft=None, **options) -> LLM:
    # What drafts is the drafter alone.
    options = {"page_size": 4, "max_running": 5, "adaptive": False, "lookup": False, **options}
    return LLM.from_parts(target, draft, tokenizer=None, token_bytes=BYTES, **options)


def by_hand(target: RecurrentTarget, prompt: list[int], count: int) -> list[int]:
    """The greedy text, from the definition: the whole state anew for each token."""
    text = list(prompt)
    for _ in range(count):
        h = np.zeros(target.hidden_size)
        for token in text:
            h = target.state.decay[token] * h + target.state.gain[token]
        text.append(int((h @ target.head).astype(np.float32).argmax()))
    return text[len(prompt) :]


def told(texts) -> LookUp:
    draft = LookUp()
    draft.texts = [prompt + text for prompt, text in zip(PROMPTS, texts, strict=True)]
    return draft


def ids(outputs) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def test_a_recurrent_target_says_what_its_definition_says():
    target = RecurrentTarget()
    with engine(target) as llm:
        assert ids(llm.generate(PROMPTS, PARAMS["greedy"])) == [by_hand(target, p, 30) for p in PROMPTS]
        assert llm.next_token_logits(PROMPTS[3]).argmax() == by_hand(target, PROMPTS[3], 1)[0]


@pytest.fixture(scope="module")
def plain() -> dict[str, list[list[int]]]:
    """Texts of the requests alone, without drafts and without reuse."""
    with engine(RecurrentTarget(), max_running=1, prefix_cache=False) as llm:
        return {name: [ids(llm.generate([p], params))[0] for p in PROMPTS] for name, params in PARAMS.items()}


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefix_cache": False},
        {"max_batch_tokens": 7},
        {"max_batch_tokens": 9, "page_size": 1},
        {"num_pages": 24, "max_running": 8},
        {"adaptive": True},
    ],
    ids=["together", "no reuse", "chunks", "chunks of any length", "few pages", "adaptive"],
)
def test_drafts_change_nothing_of_a_recurrent_targets_text(plain, name, options):
    target, draft = RecurrentTarget(), told(plain[name])
    with engine(target, draft, **options) as llm:
        for _ in range(3):
            assert ids(llm.generate(PROMPTS, PARAMS[name])) == plain[name]
            with llm.stream([PROMPTS[3], PROMPTS[5]], PARAMS[name]) as gone:
                next(gone)
        stats = llm.stats()
        assert stats["running"] == stats["waiting"] == 0
        assert draft.injected > 0 and stats["tau"] > 1.5
        assert (stats["retractions"] > 0) == ("num_pages" in options)
        assert (target.state.copied > 0) == options.get("prefix_cache", True)
        assert stats["state_checkpoints"] <= 2 * llm.config.max_running
        slots = llm.config.max_running * (3 if options.get("prefix_cache", True) else 1)
        assert stats["state_bytes"] == slots * target.state.bytes_per_slot


@pytest.mark.parametrize(("running", "pages"), [(1, 51), (4, 80), (8, 51)])
def test_states_take_their_share_of_the_memory_that_the_engine_chooses_its_pages_for(running, pages):
    target = RecurrentTarget()
    target.kv_bytes_per_token, target.state.bytes_per_slot = 1 << 20, 16 << 20
    with engine(target, max_running=running) as llm:
        # Of 512 MiB, beside the states and two copies of each; at least one request of 200 tokens fits, and no more than all of them.
        assert (llm.stats()["total_pages"], llm.stats()["state_bytes"]) == (pages, running * 3 * (16 << 20))


def test_a_later_turn_goes_on_from_the_copy_of_an_earlier_one(plain):
    target = RecurrentTarget()
    with engine(target) as llm:
        first = llm.generate([PROMPTS[5]], PARAMS["greedy"])[0]
        again = llm.generate([PROMPTS[5]], PARAMS["greedy"])[0]
        assert again.token_ids == first.token_ids
        assert (first.metrics["cached_prompt_tokens"], again.metrics["cached_prompt_tokens"]) == (0, 40)
        turn = PROMPTS[5] + first.token_ids + [1, 2, 3]
        third, fourth = (llm.generate([turn], PARAMS["greedy"])[0] for _ in range(2))
        assert third.token_ids == fourth.token_ids == by_hand(target, turn, 30)
        assert third.metrics["cached_prompt_tokens"] == 40 and fourth.metrics["cached_prompt_tokens"] > 68


@pytest.mark.parametrize("fault", ["keep all", "keep nothing", "run on", "restore nothing", "save too early"])
def test_a_broken_state_is_seen(plain, monkeypatch, fault):
    target, draft = RecurrentTarget(), told(plain["greedy"])
    state = target.state
    keep, run, save = state.keep, state.run, state.save
    if fault == "keep all":
        monkeypatch.setattr(
            state, "keep", lambda rows, n: keep(rows, np.array([len(state.passed[r]) - 1 for r in rows]))
        )
    elif fault == "keep nothing":
        monkeypatch.setattr(state, "keep", lambda rows, n: keep(rows, n - (n > 1)))
    elif fault == "run on":

        def spoil(row, tokens, start):
            states = run(row, tokens, start)
            state.rows[row] = states[-1]
            return states

        monkeypatch.setattr(state, "run", spoil)
        monkeypatch.setattr(state, "keep", lambda rows, n: None)
    elif fault == "restore nothing":
        monkeypatch.setattr(state, "restore", lambda rows, checkpoints: None)
        monkeypatch.setattr(state, "alloc", lambda *room: type(state).alloc(state, *room))
    else:
        monkeypatch.setattr(state, "save", lambda rows, n, checkpoints: save(rows, 0 * n, checkpoints))
    with engine(target, draft) as llm:
        texts = [ids(llm.generate(PROMPTS, PARAMS["greedy"])) for _ in range(2)]
    assert any(text != plain["greedy"] for text in texts)


def test_a_step_that_is_called_off_leaves_states_as_they_were(plain, monkeypatch):
    target, draft = RecurrentTarget(), told(plain["greedy"])
    with engine(target, draft, max_batch_tokens=9) as llm:
        texts, calls = finish_interrupted(llm, llm.stream(PROMPTS, PARAMS["greedy"]), monkeypatch)
    assert calls > 20 and [texts[i] for i in range(len(PROMPTS))] == plain["greedy"]


def test_trees_are_refused_for_a_target_with_state():
    with pytest.raises(InvalidArgument, match="tree_nodes: got 8, expected 0 with a target that keeps state"):
        engine(RecurrentTarget(), LookUp(), tree_nodes=8)


def test_a_drafter_that_is_none_of_ours_drafts_for_an_ordinary_target():
    target, draft, prompts = TargetModel(qwen3_target()), LookUp(), [p for p in PROMPTS]
    table = [bytes([32 + token]) for token in range(target.vocab_size)]
    with LLM.from_parts(
        target, draft, tokenizer=None, token_bytes=table, page_size=4, adaptive=False, lookup=False
    ) as llm:
        texts = ids(llm.generate(prompts, PARAMS["greedy"], draft=False))
        draft.texts = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        assert ids(llm.generate(prompts, PARAMS["greedy"])) == texts
        assert llm.stats()["tau"] > 1.2 and "state_checkpoints" not in llm.stats()
