"""What users of vLLM's LLM and SGLang's Engine write: several answers, own ids, dicts, ends of texts, scores of prompts; and names that are not ours."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from dflash_rs import InvalidArgument, SamplingParams, elsewhere

torch = pytest.importorskip("torch")

from dflash_rs import LLM  # noqa: E402
from dflash_rs.text import with_special_tokens  # noqa: E402

pytestmark = pytest.mark.pair
PROMPTS = ["def add(a, b):\n", "import os\n\n\ndef main(", "class Stack:\n    "]
WARM = SamplingParams(temperature=0.9, seed=5, max_tokens=16)


@pytest.fixture(scope="module")
def llm():
    torch.set_num_threads(1)
    with LLM(device="cpu", max_running=4, adaptive=False) as engine:
        yield engine


def idle(engine: LLM) -> bool:
    stats, requests = engine.stats(), engine._requests
    free = stats["free_pages"] + stats["cached_pages"] == stats["total_pages"]
    return free and not (requests.active or requests.named or requests.constrained)


# ---- several answers ---------------------------------------------------------------------------------------------------------


def test_answers_have_the_seeds_that_follow_and_stand_in_order(llm):
    for draft in (True, False):
        outputs = llm.generate(PROMPTS, dataclasses.replace(WARM, n=3), draft=draft)
        assert [len(o.outputs) for o in outputs] == [3, 3, 3] and all(o.outputs[0] is o for o in outputs)
        for prompt, output in zip(PROMPTS, outputs):
            assert [(a.answer, a.metrics["seed"], a.prompt) for a in output.outputs] == [
                (i, 5 + i, prompt) for i in range(3)
            ]
            alone = [llm.generate(prompt, dataclasses.replace(WARM, seed=5 + i))[0] for i in range(3)]
            assert [a.token_ids for a in output.outputs] == [a.token_ids for a in alone]
    assert len({a.text for a in outputs[0].outputs}) > 1
    (last,) = llm.generate("x", dataclasses.replace(WARM, seed=2**64 - 1, n=2, max_tokens=1))
    assert [a.metrics["seed"] for a in last.outputs] == [2**64 - 1, 0]
    (fresh,) = llm.generate("x", SamplingParams(temperature=1.0, n=2, max_tokens=1))
    seeds = [a.metrics["seed"] for a in fresh.outputs]
    assert seeds[1] == seeds[0] + 1
    assert dataclasses.asdict(fresh)["text"] == fresh.text and fresh.outputs[1].outputs is fresh.outputs
    assert idle(llm)


def test_answers_come_by_a_stream_with_their_numbers(llm):
    whole = llm.generate(PROMPTS[:2], dataclasses.replace(WARM, n=2))
    texts: dict[tuple[int, int], str] = {}
    ids = set()
    for event in llm.stream(PROMPTS[:2], dataclasses.replace(WARM, n=2)):
        texts[event.index, event.answer] = texts.get((event.index, event.answer), "") + event.text
        ids.add(event.request_id)
        assert event.output is None or event.output.outputs == [event.output]
    assert texts == {(i, j): whole[i].outputs[j].text for i in range(2) for j in range(2)} and len(ids) == 4


def test_answers_have_constraints_of_their_own(llm):
    told = dataclasses.replace(WARM, n=3, structured_outputs={"regex": "[a-z]+(, [a-z]+){2}"}, max_tokens=40)
    (output,) = llm.generate("names: ", told)
    assert len({a.text for a in output.outputs}) > 1
    assert all(a.finish_reason == "length" or a.text.count(", ") == 2 for a in output.outputs)


# ---- own names ---------------------------------------------------------------------------------------------------------------


def test_requests_may_have_names_of_the_callers_own(llm):
    outputs = llm.generate(PROMPTS[:2], WARM, request_ids=["a", "b"])
    assert [o.request_id for o in outputs] == ["a", "b"] and idle(llm)
    assert llm.generate("x", WARM, request_ids="alone")[0].request_id == "alone"
    with llm.stream(
        PROMPTS[:2], dataclasses.replace(WARM, n=2, max_tokens=200, ignore_eos=True), request_ids=["a", "b"]
    ) as events:
        assert next(events).request_id in ("a", "b")
        with pytest.raises(InvalidArgument, match="^request_ids: got 'b', expected one that no unfinished request has"):
            llm.generate("x", WARM, request_ids=["b"])
        assert llm.abort("a") and not llm.abort("a") and not llm.abort("c")
        rest = list(events)
    ended = [(e.request_id, e.answer, e.finish_reason) for e in rest if e.output is not None]
    assert sorted(ended) == [("a", 0, "abort"), ("a", 1, "abort"), ("b", 0, "length"), ("b", 1, "length")]
    assert idle(llm)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a"], "request_ids: got 1, expected one for each of 2 prompts"),
        (["a", "a"], "request_ids: got 'a' twice, expected each once"),
        (["a", ""], "request_ids: got ['a', ''], expected a non-empty string for each prompt"),
        ([1, 2], "request_ids: got [1, 2], expected a non-empty string"),
        (5, "request_ids: got 5, expected a non-empty string"),
    ],
)
def test_names_that_cannot_be_are_refused(llm, given, message):
    with pytest.raises(InvalidArgument) as caught:
        llm.generate(["x", "y"], WARM, request_ids=given)
    assert str(caught.value).startswith(message) and idle(llm)


# ---- as others write it --------------------------------------------------------------------------------------------------------


def test_prompts_and_parameters_may_be_mappings_and_go_by_their_other_name(llm):
    expected = llm.generate(PROMPTS[0], WARM)[0].token_ids
    ids = llm.encode(PROMPTS[0])
    as_dict = {"temperature": 0.9, "seed": 5, "max_tokens": 16}
    for prompt in (
        PROMPTS[0],
        {"prompt": PROMPTS[0]},
        {"prompt_token_ids": ids},
        {"prompt_token_ids": np.array(ids)},
        [{"prompt": PROMPTS[0]}],
    ):
        for told in (WARM, as_dict, [as_dict] if isinstance(prompt, list) else as_dict):
            (output,) = llm.generate(prompt, sampling_params=told)
            assert output.token_ids == expected
    assert llm.generate({"prompt": PROMPTS[0]}, WARM)[0].prompt == PROMPTS[0]
    assert llm.generate({"prompt_token_ids": np.array(ids)}, WARM)[0].prompt == ids
    assert llm.generate({"prompt": PROMPTS[0], "prompt_token_ids": ids}, WARM)[0].prompt == PROMPTS[0]
    assert [e.output for e in llm.stream("x", sampling_params=as_dict) if e.output]
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    talk = [{"role": "user", "content": PROMPTS[0]}]
    for told in ({"params": as_dict}, {"sampling_params": as_dict}, {"sampling_params": WARM}):
        assert llm.chat(talk, chat_template=template, **told)[0].token_ids == expected


WRONG = [
    (dict(prompts={"text": "x"}), "prompts[0]: got 'text', expected some of prompt, prompt_token_ids"),
    (dict(prompts={"prompt": "x", "multi_modal_data": {}}), "multi_modal_data: got {}, expected no such option: this engine does not have it"),
    (dict(prompts=[{"prompt": 5}]), "prompts[0].prompt: got 5, expected a string, or prompt_token_ids"),
    (dict(prompts=["a", {"prompt": "x", "prompt_token_ids": [1]}]), "prompts[1].prompt_token_ids: got [1] beside the prompt 'x', whose tokens are others"),
    (dict(prompts={"prompt": 5, "prompt_token_ids": [1]}), "prompts[0].prompt_token_ids: got [1] beside the prompt 5, whose"),
    (dict(prompts={"prompt_token_ids": ["a"]}), "prompts[0].prompt_token_ids: got an entry 'a'"),
    (dict(prompts="x", params={"temperatur": 1}), "params: got 'temperatur', expected some of temperature, top_k"),
    (dict(prompts="x", params=[{"temperatur": 1}]), "params[0]: got 'temperatur', expected some of temperature, top_k"),
    (dict(prompts="x", params=[{"temperature": -1}]), "params[0].temperature: got -1, expected 0 (greedy)"),
    (dict(prompts="x", params={"max_new_tokens": 5}), "max_new_tokens: got 5, expected max_tokens, as it is called here"),
    (dict(prompts="x", params=WARM, sampling_params=WARM), "sampling_params: got it beside params, expected one of them"),
    (dict(prompts="x", lora_request=1), "lora_request: got 1, expected no such option"),
    (dict(prompts="x", rid="a"), "rid: got 'a', expected request_ids, as it is called here"),
    (dict(prompt="x"), "prompt: got 'x', expected prompts, as it is called here"),
    (dict(input_ids=[1]), "input_ids: got [1], expected token ids as prompts, as it is called here"),
    (dict(prompts="x", stream=True), "stream: got True, expected the calls stream and astream, as it is called here"),
    (dict(prompts="x", use_beam_search=True), "use_beam_search: got True, expected no such option"),
    (dict(prompts="x", max_new_tokens=3), "max_new_tokens: got 3, expected max_tokens of SamplingParams, as it is called here"),
    (dict(prompts="x", use_tqdm=1), "use_tqdm: got 1, expected True or False"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_wrong_with_them_is_named(llm, call, message):
    with pytest.raises(InvalidArgument) as caught:
        llm.generate(**call)
    assert str(caught.value).startswith(message) and idle(llm)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SamplingParams(best_of=2), "best_of: got 2, expected no such option: this engine does not have it"),
        (lambda: SamplingParams(use_beam_search=True), "use_beam_search: got True, expected no such option"),
        (lambda: SamplingParams(regex="a"), "regex: got 'a', expected structured_outputs={'regex': ...}, as it is called here"),
        (lambda: SamplingParams(guided_json={}), "guided_json: got {}, expected structured_outputs={'json': ...}, as it is called here"),
        (lambda: SamplingParams(guided_regex="a"), "guided_regex: got 'a', expected structured_outputs={'regex': ...}, as"),
        (lambda: SamplingParams(guided_choice=["a"]), "guided_choice: got ['a'], expected structured_outputs={'choice': ...}, as"),
        (lambda: SamplingParams(logprob_start_len=0), "logprob_start_len: got 0, expected prompt_logprobs, as it is called here"),
        (lambda: LLM(revision="x"), "revision: got 'x', expected no such option"),
        (lambda: LLM(download_dir="x"), "download_dir: got 'x', expected no such option"),
        (lambda: LLM(tokenizer_mode="slow"), "tokenizer_mode: got 'slow', expected no such option"),
        (lambda: LLM(kv_cache_dtype="fp8"), "kv_cache_dtype: got 'fp8', expected no such option"),
        (lambda: LLM(num_speculative_tokens=4), "num_speculative_tokens: got 4, expected block_size, as it is called here"),
        (lambda: LLM(tensor_parallel_size=2), "tensor_parallel_size: got 2, expected no such option"),
        (lambda: LLM(max_model_len=99), "max_model_len: got 99, expected max_context, as it is called here"),
    ],
)  # fmt: skip
def test_options_of_other_engines_are_told_what_they_are_called_here(make, message):
    with pytest.raises(InvalidArgument) as caught:
        make()
    assert str(caught.value).startswith(message)


def test_other_names_are_pythons_to_refuse_and_none_of_ours_is_in_the_tables(llm):
    for call in (
        lambda: SamplingParams(nothing=1),
        lambda: LLM(nothing=1),
        lambda: llm.generate("x", nothing=1),
        lambda: llm.stream("x", nothing=1),
    ):
        with pytest.raises(TypeError, match="unexpected keyword argument 'nothing'"):
            call()
    assert not elsewhere.SAMPLING.keys() & SamplingParams.__dataclass_fields__.keys()
    for table, functions in (
        (elsewhere.ENGINE, (LLM.__init__,)),
        (elsewhere.CALLS, (LLM.generate, LLM.stream, LLM.chat)),
    ):
        for function in functions:
            assert not table.keys() & inspect.signature(function).parameters.keys()


def test_every_name_of_theirs_in_the_guide_is_one_of_the_tables():
    """The columns of vLLM and SGLang: a word that stands alone in code is an option, and is ours, too, or refused by name."""
    guide = (Path(__file__).parents[2] / "docs/guide.md").read_text(encoding="utf-8")
    table = guide.partition("### Coming from vLLM or SGLang")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| ")][1:]
    theirs = {name for row in rows for cell in row for name in re.findall(r"`([a-z_]+)(?:=[^`(]*)?`", cell)}
    ours = {*SamplingParams.__dataclass_fields__, *inspect.signature(LLM.generate).parameters}
    # What comes back is no option, and what a call is named neither.
    not_options = {"stop_reason", "finish_reason", "async_generate"}
    refused = elsewhere.SAMPLING.keys() | elsewhere.CALLS.keys() | elsewhere.ENGINE.keys()
    assert len(theirs) > 40 and theirs - ours - not_options <= refused


def test_progress_is_shown_on_standard_error_and_taken_away(llm, monkeypatch):
    told = io.StringIO()
    monkeypatch.setattr(sys, "stderr", told)
    outputs = llm.generate(PROMPTS * 2, WARM, use_tqdm=True)
    assert len(outputs) == 6 and " of 6 prompts, " in told.getvalue() and told.getvalue().endswith("\r\x1b[K")


# ---- how much is drafted -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [0, 11])
def test_a_request_drafts_no_more_than_it_says_and_says_the_same(nodes):
    with LLM(device="cpu", max_running=4, adaptive=False, tree_nodes=nodes) as engine:
        told = [SamplingParams(max_tokens=40, max_drafts=most) for most in (0, 1, 3, None)]
        outputs = engine.generate(PROMPTS[:1] * 4, told)
        assert len({tuple(o.token_ids) for o in outputs}) == 1
        drafted = [len(o.metrics["accepted_per_position"]) for o in outputs]
        assert drafted[0] == 0 and outputs[0].metrics["drafted_steps"] == 0
        assert drafted[1] == 1 < drafted[2] <= 3 < drafted[3]
        assert all(sum(o.metrics["accept_histogram"][1:]) > 0 for o in outputs[1:])
        before = engine.stats()
        engine.generate(PROMPTS, dataclasses.replace(WARM, max_drafts=2))
        after = engine.stats()
        assert 0 < after["verified"] - before["verified"] <= 2 * (after["passes"] - before["passes"])


# ---- ends of texts -------------------------------------------------------------------------------------------------------------


def test_an_output_says_what_ended_it(llm):
    (free,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=30))
    assert free.finish_reason == "length" and free.stop_reason is None
    first, second = free.text[5:8], free.text[10:14]
    for draft in (True, False):
        (output,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=30, stop=[second, first]), draft=draft)
        assert (output.finish_reason, output.stop_reason) == ("stop", first) and first not in output.text
        token = free.token_ids[6]
        (output,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=30, stop_token_ids=[4095, token]), draft=draft)
        assert (output.finish_reason, output.stop_reason) == ("stop", token)
    (output,) = llm.generate("x = ", SamplingParams(structured_outputs={"regex": "[0-9]"}))
    assert output.finish_reason == "stop" and output.stop_reason is None, "an end-of-text token"
    eos = llm.eos_token_ids[0]
    (output,) = llm.generate(
        "x = ", SamplingParams(structured_outputs={"regex": "[0-9]"}, stop_token_ids=[eos], ignore_eos=True)
    )
    assert output.stop_reason == eos


def test_what_ended_a_text_is_part_of_it_if_that_is_asked_for(llm):
    (free,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=30))
    stop, token = free.text[7:10], free.token_ids[8]
    for draft in (True, False):
        for include in (False, True):
            told = SamplingParams(max_tokens=30, stop=stop, include_stop_str_in_output=include)
            (output,) = llm.generate(PROMPTS[0], told, draft=draft)
            end = free.text.index(stop) + (len(stop) if include else 0)
            assert output.text == free.text[:end] == "".join(e.text for e in llm.stream(PROMPTS[0], told, draft=draft))
            for also in ((), ("no such text",)):
                told = SamplingParams(
                    max_tokens=30, stop_token_ids=[token], stop=also, include_stop_str_in_output=include
                )
                (output,) = llm.generate(PROMPTS[0], told, draft=draft)
                kept = output.token_ids if include else output.token_ids[:-1]
                assert output.token_ids[-1] == token and output.text == llm.decode(kept)
                assert output.text == "".join(e.text for e in llm.stream(PROMPTS[0], told, draft=draft))


def test_special_tokens_are_shown_if_they_are_not_to_be_skipped(llm):
    eos = llm.eos_token_ids[0]
    name = llm.tokenizer.convert_ids_to_tokens(eos)
    assert with_special_tokens(llm.tokenizer, llm._bytes)[eos] == name.encode() and llm._bytes[eos] == b""
    told = SamplingParams(
        max_tokens=6,
        logits_processors=[
            lambda output, row: row if len(output) != 2 else row.fill_(-np.inf).index_fill_(0, torch.tensor([eos]), 0.0)
        ],
        ignore_eos=True,
    )
    (plain,) = llm.generate(PROMPTS[0], told)
    (shown,) = llm.generate(PROMPTS[0], dataclasses.replace(told, skip_special_tokens=False))
    assert plain.token_ids == shown.token_ids and plain.token_ids[2] == eos
    assert name not in plain.text and shown.text.replace(name, "") == plain.text and shown.text.count(name) == 1
    # Stop strings see them then; what ends the text is left out as it is with any other.
    (ended,) = llm.generate(PROMPTS[0], dataclasses.replace(told, skip_special_tokens=False, stop=name))
    assert ended.stop_reason == name and ended.text == llm.decode(plain.token_ids[:2])
    (ended,) = llm.generate(PROMPTS[0], dataclasses.replace(told, skip_special_tokens=False, ignore_eos=False))
    assert ended.finish_reason == "stop" and ended.text == llm.decode(plain.token_ids[:2])
    (ended,) = llm.generate(
        PROMPTS[0],
        dataclasses.replace(told, skip_special_tokens=False, ignore_eos=False, include_stop_str_in_output=True),
    )
    assert ended.text == llm.decode(plain.token_ids[:2]) + name


# ---- prompts -------------------------------------------------------------------------------------------------------------------


def test_a_prompt_is_cut_at_its_front(llm):
    ids = llm.encode(PROMPTS[1] * 3)
    (short,) = llm.generate([ids[-7:]], WARM)
    for prompt in (ids, PROMPTS[1] * 3):
        (output,) = llm.generate(prompt, dataclasses.replace(WARM, truncate_prompt_tokens=7))
        assert output.token_ids == short.token_ids and output.metrics["prompt_tokens"] == 7 and output.prompt == prompt
    (whole,) = llm.generate(ids, dataclasses.replace(WARM, truncate_prompt_tokens=10**6))
    assert whole.metrics["prompt_tokens"] == len(ids)
    (most,) = llm.generate([[5, 6] * 2000], dataclasses.replace(WARM, truncate_prompt_tokens=-1))
    assert most.metrics["prompt_tokens"] == llm.max_context - 1
    with pytest.raises(InvalidArgument, match="^truncate_prompt_tokens: got 0, expected -1 or an integer in 1.."):
        SamplingParams(truncate_prompt_tokens=0)


@pytest.mark.parametrize("chunk", [5, 1024])
def test_tokens_of_a_prompt_are_scored_by_the_models_own_logits_cached_or_not(chunk):
    with LLM(device="cpu", max_running=2, adaptive=False, max_batch_tokens=chunk, page_size=4) as engine:
        prompt = PROMPTS[1] * 2
        ids = engine.encode(prompt)
        told = SamplingParams(max_tokens=4, prompt_logprobs=3, logprobs=0)
        for cached in (False, True):
            outputs = engine.generate([prompt, ids], [told, SamplingParams(max_tokens=4)])
            assert (outputs[0].metrics["cached_prompt_tokens"] > 0) == cached
            assert outputs[1].prompt_logprobs is None and outputs[0].token_ids == outputs[1].token_ids
            scores = outputs[0].prompt_logprobs
            assert scores[0] is None and [s.token_id for s in scores[1:]] == ids[1:]
            for place, score in enumerate(scores[1:], 1):
                row = torch.from_numpy(engine.next_token_logits(ids[:place])).double().log_softmax(-1)
                assert score.logprob == pytest.approx(row[ids[place]].item(), abs=1e-4)
                assert [t for t, _ in score.top] == row.topk(3).indices.tolist()
        assert json.dumps(dataclasses.asdict(outputs[0]))
        (one,) = engine.generate([[7]], dataclasses.replace(told, prompt_logprobs=0))
        assert one.prompt_logprobs == [None]


def test_prompts_are_scored_while_others_run_and_for_every_answer(llm):
    long = dataclasses.replace(WARM, max_tokens=60, ignore_eos=True)
    expected = llm.generate(PROMPTS[0], long)[0].token_ids
    with llm.stream(PROMPTS[0], long) as events:
        first = next(events)
        (output,) = llm.generate(PROMPTS[1], dataclasses.replace(WARM, n=2, prompt_logprobs=0, max_tokens=3))
        assert output.outputs[0].prompt_logprobs == output.outputs[1].prompt_logprobs != None  # noqa: E711
        tokens = first.token_ids + [token for event in events for token in event.token_ids]
    assert tokens == expected


def test_a_target_with_state_scores_prompts_in_chunks():
    from toy_models import VOCAB, RecurrentTarget

    target = RecurrentTarget()
    options = dict(tokenizer=None, token_bytes=None, max_running=2, page_size=4, num_pages=64, max_batch_tokens=4)
    with LLM.from_parts(target, None, **options) as engine:
        engine._requests._detokenizer = lambda skip: None
        ids = np.random.default_rng(0).integers(0, VOCAB, 11).tolist()
        (output,) = engine.generate([ids], SamplingParams(max_tokens=2, prompt_logprobs=1))
        for place, score in enumerate(output.prompt_logprobs[1:], 1):
            row = torch.from_numpy(engine.next_token_logits(ids[:place])).double().log_softmax(-1)
            assert score.logprob == pytest.approx(row[ids[place]].item(), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(n=0), "n: got 0, expected an integer in 1..1024"),
        (dict(n=2), "n: got 2, expected 1 with temperature 0: greedy answers are all the same"),
        (dict(prompt_logprobs=65), "prompt_logprobs: got 65, expected an integer in 0..64"),
        (dict(max_drafts=-1), "max_drafts: got -1, expected an integer in 0"),
        (dict(skip_special_tokens=1), "skip_special_tokens: got 1, expected True or False"),
        (dict(include_stop_str_in_output=None), "include_stop_str_in_output: got None, expected True or False"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(InvalidArgument) as caught:
        SamplingParams(**options)
    assert str(caught.value).startswith(message)
