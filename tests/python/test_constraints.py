"""Allowed tokens, bad words, processors of logits and grammars: each row by its own path, so that the text is the plain one."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from dflash_rs import InvalidArgument, MissingPackage, SamplingParams, StructuredOutputsParams, extras

torch = pytest.importorskip("torch")
pytest.importorskip("llguidance")

from toy_models import VOCAB, LookUp, RecurrentTarget  # noqa: E402

from dflash_rs import LLM  # noqa: E402
from dflash_rs.engine.constraints import Constraints, edit  # noqa: E402
from dflash_rs.structured import Grammars, NoToken  # noqa: E402

PROMPTS = ["def add(a, b):\n", "import os\n\n\ndef main(", "class Stack:\n    ", "x = "]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
    },
    "required": ["name", "count"],
    "additionalProperties": False,
}
REGEX = r"[a-z]{2,6}(, [0-9]{1,3}){1,4};"


def shifted(output: list[int], row: torch.Tensor) -> torch.Tensor:
    """Something that hangs on the whole output: what was said at even places becomes likelier, and a token in turn is out."""
    row[output[::2]] += 0.5
    row[len(output) % 7 :: 7] = -torch.inf
    return row


def against(prompt: list[int], output: list[int], row: torch.Tensor) -> np.ndarray:
    row[prompt] -= 1.0
    row[output] -= 0.25
    return row.numpy()


def structured(**what) -> StructuredOutputsParams:
    return StructuredOutputsParams(**what)


MATRIX = {
    "json": {"structured_outputs": structured(json=SCHEMA, disable_any_whitespace=True)},
    "regex": {"structured_outputs": structured(regex=REGEX)},
    "choice": {"structured_outputs": structured(choice=["return a + b", "return a", "pass"])},
    "grammar": {"structured_outputs": structured(grammar='root ::= item (", " item)*\nitem ::= "a" | [0-9]+')},
    "allowed": {"allowed_token_ids": list(range(20, 1500, 3))},
    "bad words": {"bad_words": ["return", "self", "def", "a + b", " in"]},
    "processors": {"logits_processors": [shifted, against]},
    "all": {
        "structured_outputs": structured(regex="[a-z ]*;"), "bad_words": ["the", "a"], "logits_processors": [shifted],
        "repetition_penalty": 1.2, "logit_bias": {40: 2.0}, "logprobs": 2, "min_tokens": 5,
    },
}  # fmt: skip


def params(name, **more) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 32, **MATRIX[name], **more})


def said(outputs):
    assert all(o.error is None for o in outputs), [o.error for o in outputs]
    return [(o.text, o.token_ids, o.finish_reason, o.logprobs) for o in outputs]


def idle(llm) -> bool:
    stats = llm.stats()
    free = stats["free_pages"] + stats["cached_pages"] == stats["total_pages"]
    return free and not llm._requests.active and not llm._requests.constrained


@pytest.fixture(
    scope="module",
    params=[(0, False), (11, False), (0, True), (11, True)],
    ids=["chains", "trees", "chains ahead", "trees ahead"],
)
def llm(request):
    torch.set_num_threads(1)
    nodes, overlap = request.param
    with LLM(device="cpu", max_running=3, adaptive=False, tree_nodes=nodes, overlap=overlap) as made:
        yield made


@pytest.fixture(scope="module")
def chains():
    with LLM(device="cpu", max_running=4, adaptive=False) as made:
        yield made


# ---- the same text -------------------------------------------------------------------------------------------------------


@pytest.mark.pair
@pytest.mark.parametrize("name", MATRIX)
def test_the_text_is_the_plain_one_greedy_and_seeded(llm, name):
    asked = [params(name, temperature=t, seed=7) for t in (0.0, 0.9)] * 2
    plain = said(llm.generate(PROMPTS, asked, draft=False))
    drafted = llm.generate(PROMPTS, asked)
    assert said(drafted) == plain
    assert idle(llm)
    # What the drafter has in mind is hardly ever one of three choices.
    accepted = sum(sum(o.metrics["accept_histogram"][1:]) for o in drafted)
    assert name == "choice" or accepted > 0, "no draft was ever accepted"


@pytest.mark.pair
def test_requests_without_constraints_share_batches_and_are_as_if_alone(llm):
    free = SamplingParams(temperature=0.8, seed=3, max_tokens=30)
    asked = [free, params("json"), dataclasses.replace(free, logprobs=1), params("processors", temperature=0.7, seed=1)]
    alone = [said(llm.generate([prompt], one, draft=False))[0] for prompt, one in zip(PROMPTS, asked)]
    assert said(llm.generate(PROMPTS, asked)) == alone
    assert said(llm.generate(PROMPTS[::-1], asked[::-1]))[::-1] == alone
    assert idle(llm)


@pytest.mark.pair
def test_a_stream_gives_the_same_and_what_was_left_is_forgotten(llm):
    whole = said(llm.generate(PROMPTS[:2], params("json")))
    got = {0: "", 1: ""}
    with llm.stream(PROMPTS[:2], params("json")) as events:
        for event in events:
            got[event.index] += event.text
    assert [got[0], got[1]] == [one[0] for one in whole]
    with llm.stream(PROMPTS, params("regex", max_tokens=200)) as events:
        ids = {next(events).request_id for _ in range(4)}
    assert ids and idle(llm)
    assert said(llm.generate(PROMPTS[:2], params("json"))) == whole


@pytest.mark.pair
def test_an_abort_leaves_the_others_as_they_were(llm):
    expected = said(llm.generate(PROMPTS[:3], params("processors")))
    stream, texts = llm.stream(PROMPTS[:3], params("processors")), ["", "", ""]
    for count, event in enumerate(stream):
        texts[event.index] += event.text
        if count == 5:
            ended = event.index
            assert llm.abort(event.request_id)
    assert all(texts[i] == expected[i][0] for i in range(3) if i != ended)
    assert expected[ended][0].startswith(texts[ended]) and idle(llm)


@pytest.mark.pair
def test_an_interruption_in_the_middle_of_a_grammar_loses_nothing(chains, monkeypatch):
    expected = said(chains.generate(PROMPTS[:2], params("json")))
    from dflash_rs.structured import Grammar

    allowed, calls = Grammar.allowed, iter(range(10**9))

    def interrupted(self, may_end):
        if next(calls) == 9:
            raise KeyboardInterrupt
        return allowed(self, may_end)

    first, rest = chains.stream(PROMPTS[0], params("json")), chains.stream(PROMPTS[1], params("json"))
    with monkeypatch.context() as patch:
        patch.setattr(Grammar, "allowed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(first)
    (output,) = [event.output for event in rest if event.output is not None]
    assert (output.text, output.token_ids) == expected[1][:2] and idle(chains)


@pytest.mark.pair
def test_requests_that_give_way_go_on_where_they_were():
    sizes = {"page_size": 4, "num_pages": 22, "max_context": 100, "max_batch_tokens": 12, "max_running": 3}
    asked = [
        params("json", max_tokens=40),
        params("processors", max_tokens=50, ignore_eos=True),
        params("bad words", max_tokens=50, ignore_eos=True),
    ]
    with LLM(device="cpu", adaptive=False, **sizes) as small, LLM(device="cpu", adaptive=False) as large:
        outputs = small.generate([prompt * 2 for prompt in PROMPTS[:3]], asked)
        assert small.stats()["retractions"] > 0
        assert said(outputs) == said(large.generate([prompt * 2 for prompt in PROMPTS[:3]], asked, draft=False))


# ---- what it means -------------------------------------------------------------------------------------------------------


@pytest.mark.pair
@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_what_is_asked_for_is_what_comes(chains, seed):
    warm = {"temperature": 0.0 if seed is None else 1.0, "seed": seed, "max_tokens": 64}
    for prompt in PROMPTS:
        (output,) = chains.generate(prompt, params("json", **warm))
        value = json.loads(output.text)
        assert output.finish_reason == "stop" and list(value) == ["name", "count"]
        assert (
            len(value["name"]) <= 9 and 0 <= value["count"] <= 999 and " " not in output.text.replace(value["name"], "")
        )
        (output,) = chains.generate(prompt, params("regex", **warm))
        assert output.finish_reason == "stop" and re.fullmatch(REGEX, output.text)
        (output,) = chains.generate(prompt, params("choice", **warm))
        assert output.text in ("return a + b", "return a", "pass") and output.finish_reason == "stop"
        (output,) = chains.generate(prompt, params("grammar", **warm))
        assert re.fullmatch(r"(a|[0-9]+)(, (a|[0-9]+))*(, ?)?", output.text)
        (output,) = chains.generate(prompt, params("allowed", **warm))
        assert set(output.token_ids) <= set(range(20, 1500, 3)) and output.finish_reason == "length"
    (output,) = chains.generate(PROMPTS[0], SamplingParams(structured_outputs={"json_object": True}, **warm))
    assert output.text.startswith("{") and (
        output.finish_reason == "length" or isinstance(json.loads(output.text), dict)
    )


@pytest.mark.pair
def test_bad_words_do_not_come_alone_nor_behind_a_space_nor_over_several_tokens(chains):
    words = ("return", "self", "    ", "a + b", "):")
    words = tuple(word for word in words if word.strip())
    told = SamplingParams(temperature=0.8, seed=2, max_tokens=60, ignore_eos=True)
    spellings = [chains.encode(text) for word in words for text in (word, " " + word)]
    assert any(len(ids) > 1 for ids in spellings) and any(len(ids) == 1 for ids in spellings)

    def held(ids, output):
        return any(output[i : i + len(ids)] == ids for i in range(len(output)))

    free = chains.generate(PROMPTS * 3, told)
    assert sum(any(held(ids, o.token_ids) for ids in spellings) for o in free) > 3, "the test has something to find"
    for output in chains.generate(PROMPTS * 3, dataclasses.replace(told, bad_words=words)):
        assert not any(held(ids, output.token_ids) for ids in spellings)


@pytest.mark.pair
def test_processors_are_asked_about_paths_that_begin_with_the_output(chains):
    asked: list[tuple[list[int], list[int]]] = []

    def look(prompt, output, row):
        assert row.dtype == torch.float32 and row.shape == (chains.vocab_size,) and row.device.type == "cpu"
        asked.append((prompt, output))
        return row

    told = SamplingParams(max_tokens=24, ignore_eos=True, logits_processors=[look])
    (plain,) = chains.generate(PROMPTS[0], told, draft=False)
    assert [output for _, output in asked] == [plain.token_ids[:i] for i in range(24)]
    asked.clear()
    (drafted,) = chains.generate(PROMPTS[0], told)
    assert (
        drafted.token_ids
        == plain.token_ids
        == chains.generate(PROMPTS[0], dataclasses.replace(told, logits_processors=()))[0].token_ids
    )
    assert all(prompt == chains.encode(PROMPTS[0]) for prompt, _ in asked)
    paths = [output for _, output in asked]
    # Every place of the output was asked about, and what else was asked about leaves it by a draft that was not taken.
    assert all(plain.token_ids[:i] in paths for i in range(24))
    wrong = [path for path in paths if path != plain.token_ids[: len(path)]]
    assert wrong and all(path[0] == plain.token_ids[0] for path in wrong)


@pytest.mark.pair
def test_a_processor_sees_raw_logits_and_scores_are_of_these(chains):
    rows = []

    def only(output, row):
        rows.append(row.clone())
        row[:] = -np.inf
        row[100 + len(output)] = 0.0
        return row

    (output,) = chains.generate("x = ", SamplingParams(max_tokens=3, logits_processors=[only], logprobs=2), draft=False)
    assert output.token_ids == [100, 101, 102]
    for place, (row, scored) in enumerate(zip(rows, output.logprobs, strict=True)):
        ids = chains.encode("x = ") + output.token_ids[:place]
        assert np.allclose(row.numpy(), chains.next_token_logits(ids), atol=1e-3)
        own = row.log_softmax(-1)
        assert scored.logprob == pytest.approx(own[100 + place].item(), abs=1e-4)
        assert [token for token, _ in scored.top] == own.topk(2).indices.tolist()


@pytest.mark.pair
def test_a_complete_text_can_only_end_and_may_end_by_a_stop_token(chains):
    stop = chains.encode("\n")[0]
    told = SamplingParams(structured_outputs={"regex": "[0-9]{3}"}, max_tokens=20)
    (output,) = chains.generate("x = ", told)
    assert output.token_ids[-1] in chains.eos_token_ids and len(output.text) == 3
    (output,) = chains.generate("x = ", dataclasses.replace(told, ignore_eos=True, stop_token_ids=[stop]))
    assert output.token_ids[-1] == stop and output.finish_reason == "stop"


@pytest.mark.pair
def test_a_text_that_stops_otherwise_is_a_beginning(chains):
    told = params("json", stop=['"count'], max_tokens=40)
    for draft in (True, False):
        (output,) = chains.generate("x = ", told, draft=draft)
        assert output.finish_reason == "stop" and output.text.startswith('{"name":"') and output.text.endswith(",")


# ---- ends without a token --------------------------------------------------------------------------------------------------


def raises_at(place):
    def process(output, row):
        if len(output) == place:
            raise RuntimeError(f"nothing at {place}")
        return row

    return process


DEAD = {
    "raises": (lambda _: {"logits_processors": [raises_at(9)]}, "logits_processors[0]: raised RuntimeError: 'nothing at 9'"),
    "no row": (lambda _: {"logits_processors": [lambda o, r: r if len(o) < 9 else None]}, "logits_processors[0]: returned None, expected a row of 4096"),
    "all out": (lambda _: {"logits_processors": [lambda o, r: r if len(o) < 9 else r - np.inf]}, "logits_processors: got no token that may come next"),
    "allowed and regex": (
        lambda llm: {"structured_outputs": {"regex": "[0-9]*"}, "allowed_token_ids": llm.encode("x")},
        "allowed_token_ids, structured_outputs: got no token",
    ),
    "too short": (lambda _: {"structured_outputs": {"regex": "ab"}, "min_tokens": 9}, "structured_outputs: got a text that is complete, and is not to end yet"),
}  # fmt: skip


@pytest.mark.pair
@pytest.mark.parametrize("name", DEAD)
def test_a_dead_end_is_an_error_of_that_request_alone_with_the_text_before_it(llm, name):
    make, message = DEAD[name]
    dead = SamplingParams(max_tokens=30, ignore_eos=name not in ("allowed and regex", "too short"), **make(llm))
    free = SamplingParams(max_tokens=30)
    expected = said(llm.generate(PROMPTS[1:3], free))
    ends = []
    for draft in (True, False):
        first, failed, last = llm.generate([PROMPTS[1], PROMPTS[0], PROMPTS[2]], [free, dead, free], draft=draft)
        assert said([first, last]) == expected
        assert failed.finish_reason == "error" and message in failed.error and "\n" not in failed.error
        ends.append((failed.token_ids, failed.text))
        assert idle(llm)
    assert ends[0] == ends[1], "with drafts it ends where it ends without"
    assert len(ends[0][0]) == {"allowed and regex": 0, "too short": len(ends[0][0])}.get(name, 9)


@pytest.mark.pair
def test_a_dead_end_behind_the_end_of_a_text_is_none(llm):
    (free,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=40), draft=False)
    stop = free.text[6:9]
    place = len(llm.generate(PROMPTS[0], SamplingParams(max_tokens=40, stop=stop), draft=False)[0].token_ids)
    told = SamplingParams(max_tokens=40, stop=stop, logits_processors=[raises_at(place)])
    for draft in (True, False):
        (output,) = llm.generate(PROMPTS[0], told, draft=draft)
        assert output.error is None and output.finish_reason == "stop" and len(output.token_ids) == place


def test_what_is_no_logit_is_the_error_of_its_processor(chains):
    for value, made in ((np.nan, "nan"), (np.inf, "inf"), (1e300, "inf")):

        def changed(output, row, value=value):
            return np.where(np.arange(len(row)) == 7, value, row.double().numpy())

        told = SamplingParams(logits_processors=[lambda output, row: row, changed])
        for draft in (True, False):
            (output,) = chains.generate("x", told, draft=draft)
            said = f"logits_processors[1]: returned {made} for token id 7, expected a number, or -inf"
            assert output.finish_reason == "error" and said in output.error

    def likeliest(output, row):
        return torch.where(row == row.max(), row, -torch.inf)

    (output,) = chains.generate("x", SamplingParams(max_tokens=2, logits_processors=[likeliest]))
    assert output.finish_reason == "length"


# ---- refusals --------------------------------------------------------------------------------------------------------------

REFUSED = [
    (dict(allowed_token_ids=[]), "allowed_token_ids: got [], expected a list of at least one token id, or None"),
    (dict(allowed_token_ids=[-1]), "allowed_token_ids: got -1, expected an integer in 0"),
    (dict(bad_words="word"), "bad_words: got 'word', expected a list of strings"),
    (dict(bad_words=["a", " "]), "bad_words[1]: got ' ', expected a string with more than white space"),
    (dict(bad_words=["\n"]), "bad_words[0]: got '\\n', expected a string with more than white space"),
    (dict(stop=["a", ""]), "stop[1]: got '', expected a non-empty string"),
    (dict(stop=["a", "b", 5]), "stop[2]: got 5, expected a non-empty string"),
    (dict(stop=""), "stop: got '', expected a non-empty string"),
    (dict(logits_processors=[len, 5]), "logits_processors[1]: got 5, expected a function"),
    (dict(structured_outputs={"choice": ["a", ""]}), "structured_outputs.choice[1]: got '', expected a non-empty string"),
    *((dict(truncate_prompt_tokens=most), f"truncate_prompt_tokens: got {most}, expected -1 or an integer in 1..2147483647") for most in (0, -2)),
    (dict(logits_processors=len), "logits_processors: got <built-in function len>, expected a list of functions"),
    (dict(structured_outputs="json"), "structured_outputs: got 'json', expected StructuredOutputsParams"),
    (dict(structured_outputs={}), "structured_outputs: got nothing, expected one of json, regex, choice, grammar, json_object"),
    (dict(structured_outputs={"xml": 1}), "structured_outputs: got 'xml', expected some of json, regex"),
    (dict(structured_outputs={"regex": "a", "choice": ["b"]}), "structured_outputs: got regex and choice, expected one of"),
    (dict(structured_outputs={"json": "{"}), "structured_outputs.json: got '{' (Expecting property name"),
    (dict(structured_outputs={"json": [1]}), "structured_outputs.json: got [1], expected a JSON schema"),
    (dict(structured_outputs={"json": {"a": {1, 2}}}), "structured_outputs.json: got a mapping that is no JSON (Object of type set"),
    (dict(structured_outputs={"choice": []}), "structured_outputs.choice: got [], expected a list of at least one non-empty string"),
    (dict(structured_outputs={"regex": ""}), "structured_outputs.regex: got '', expected a non-empty string"),
    (dict(structured_outputs={"json_object": 1}), "structured_outputs.json_object: got 1, expected True or False"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_meant_is_refused_by_name(options, message):
    with pytest.raises(InvalidArgument) as caught:
        SamplingParams(**options)
    assert str(caught.value).startswith(message)


UNFIT = [
    (dict(allowed_token_ids=[5, 4096]), "allowed_token_ids: got token id 4096, expected token ids in 0..4095"),
    (dict(structured_outputs={"json": {"type": 5}}), "structured_outputs.json: got '{\"type\": 5}', expected one that can be followed: type must be"),
    (dict(structured_outputs={"regex": "a(?=b)"}), "structured_outputs.regex: got 'a(?=b)', expected one that can be followed: at 1(8): invalid regex"),
    (dict(structured_outputs={"grammar": "root ::= nothing"}), "structured_outputs.grammar: got 'root ::= nothing', expected one that can be followed: "),
    (dict(structured_outputs={"regex": "a"}, ignore_eos=True), "structured_outputs: got some and no token that may end a text"),
]  # fmt: skip


@pytest.mark.pair
@pytest.mark.parametrize(("options", "message"), UNFIT, ids=[message for _, message in UNFIT])
def test_what_does_not_fit_the_model_names_the_prompt_and_the_others_run(chains, options, message):
    wrong, right = SamplingParams(**options), SamplingParams(max_tokens=2)
    with pytest.raises(InvalidArgument) as caught:
        chains.generate(["a", "b"], [right, wrong])
    assert str(caught.value).startswith(f"params[1].{message}") and len(str(caught.value)) < 400
    good, bad = chains.generate(["a", "b"], [right, wrong], on_error="return")
    assert good.error is None and bad.error == str(caught.value) and idle(chains)


def test_parameters_with_constraints_are_values():
    told = [params(name) for name in MATRIX]
    assert len({*told, *(params(name) for name in MATRIX)}) == len(MATRIX)
    assert dataclasses.replace(told[0], seed=1).structured_outputs == told[0].structured_outputs
    assert told[0].structured_outputs.json == json.dumps(SCHEMA)
    with pytest.raises(dataclasses.FrozenInstanceError):
        told[0].structured_outputs.json = "{}"


WITHOUT = """
import sys
sys.modules["llguidance"] = None
from dflash_rs import MissingPackage, SamplingParams
from dflash_rs.engine.constraints import Constraints
made = Constraints(None, [b"a"], 1, [0])
assert made.make(SamplingParams(allowed_token_ids=[0])) is not None
try:
    made.make(SamplingParams(structured_outputs={"regex": "a"}))
except MissingPackage as error:
    print(error)
"""


def test_without_llguidance_the_extra_is_named_and_the_rest_works():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=300)
    assert done.stderr == "" and done.stdout.startswith("structured_outputs needs llguidance (")
    assert extras.install("structured") in done.stdout and issubclass(MissingPackage, ImportError)


# ---- parts -----------------------------------------------------------------------------------------------------------------

LETTERS = [bytes([97 + i]) for i in range(26)] + [b"", b"ab", b"0"]


def test_a_grammar_goes_back_as_far_as_it_came_and_ends_by_the_tokens_it_was_told():
    # This tokenizer writes a space in front, so the longest tokens are taken where one text only is left.
    grammar = Grammars(LETTERS, lambda text: [26]).begin(structured(choice=["ab0", "abc"]), [26, 28])
    assert np.flatnonzero(grammar.allowed(True)).tolist() == [27]
    grammar.push(27)
    assert np.flatnonzero(grammar.allowed(True)).tolist() == [2, 28]
    grammar.push(2)
    assert np.flatnonzero(grammar.allowed(True)).tolist() == [26, 28]
    with pytest.raises(NoToken, match="complete, and is not to end yet"):
        grammar.allowed(False)
    with pytest.raises(NoToken, match="got token 3, which the grammar does not allow"):
        grammar.push(3)
    grammar.pop()
    grammar.pop()
    assert np.flatnonzero(grammar.allowed(True)).tolist() == [27]
    grammar.push(27)
    grammar.reset()
    assert np.flatnonzero(grammar.allowed(True)).tolist() == [27]


def test_a_text_that_is_forced_is_cut_as_the_tokenizer_cuts_it():
    letters = lambda text: [ord(c) - 97 for c in text]  # noqa: E731
    grammar = Grammars(LETTERS, letters).begin(structured(regex="(ab){3}"), [26])
    assert np.flatnonzero(grammar.allowed(True)).tolist() == [0]
    # Where several are possible any token of them is allowed.
    grammar = Grammars(LETTERS, letters).begin(structured(regex="(ab|ac){3}"), [26])
    grammar.push(0)
    assert np.flatnonzero(grammar.allowed(True)).tolist() == [1, 2]


def test_rows_are_edited_by_the_branch_they_are_on_and_those_no_walk_reaches_are_left_out():
    asked = []

    def look(output, row):
        asked.append(output)
        row[3] = -np.inf
        return row

    tokenizer = lambda text, add_special_tokens: SimpleNamespace(input_ids=[ord(c) - 97 for c in text.strip()])  # noqa: E731
    made = Constraints(tokenizer, LETTERS, 29, [26]).make(SamplingParams(logits_processors=[look], bad_words=["gh"]))
    made.begin([1], SimpleNamespace(tokens=lambda: [9]))
    # 0 ─┬─ g(1) ─┬─ h(3)      out: a bad word
    #    │        └─ 26(4) ─ 5 behind the end
    #    └─ d(2) ─ 6           out: the processor
    plan = SimpleNamespace(
        request_ids=np.array([7, 8]), logit_starts=np.array([0, 2, 9]), query_starts=np.array([0, 2, 9]), is_prefill=np.array([False, False]),
        token_ids=np.array([0, 0, 9, 6, 3, 7, 26, 1, 1]), parents=np.array([-1, 0, -1, 0, 0, 1, 1, 4, 2]),
    )  # fmt: skip
    logits = np.random.default_rng(0).normal(size=(9, 29)).astype(np.float32)
    edited = edit(plan, {8: made}, lambda rows: logits[rows])
    assert edited.rows.tolist() == [2, 3] and asked == [[9], [9, 6]] and edited.reasons == [None, None]
    assert np.array_equal(edited.raw, logits[[2, 3]])
    assert np.flatnonzero(np.isneginf(edited.logits[0])).tolist() == [3]
    assert np.flatnonzero(np.isneginf(edited.logits[1])).tolist() == [3, 7]
    assert edit(plan, {}, None) is None and edit(plan, {5: made}, None) is None


def test_words_that_the_tokenizer_has_no_tokens_for_are_refused():
    for ids in ([], [3, 29]):
        made = Constraints(lambda text, ids=ids, **_: SimpleNamespace(input_ids=ids), LETTERS, 29, [26])
        with pytest.raises(
            InvalidArgument, match=r"^bad_words\[0\]: got 'word', expected a word that this tokenizer has tokens for"
        ):
            made.make(SamplingParams(bad_words=["word"]))
    with pytest.raises(InvalidArgument, match="bad_words: got some, expected none: this engine has no tokenizer"):
        Constraints(None, LETTERS, 29, [26]).make(SamplingParams(bad_words=["word"]))


def test_a_target_with_state_takes_constraints_as_well():
    target, draft = RecurrentTarget(), LookUp()

    class Words:
        added_tokens_decoder, all_special_tokens, all_special_ids = {}, [], []

        def __call__(self, text, **_):
            return SimpleNamespace(input_ids=[ord(c) % VOCAB for c in text])

        def decode(self, ids, **_):
            return "".join(chr(65 + i) for i in ids)

    with LLM.from_parts(
        target, draft, tokenizer=Words(), token_bytes=None, max_running=2, page_size=4, num_pages=64, adaptive=False
    ) as made:
        told = SamplingParams(
            temperature=0.8,
            seed=4,
            max_tokens=30,
            allowed_token_ids=range(5, 40),
            logits_processors=[lambda o, r: r - 0.1 * len(o)],
        )
        plain = made.generate([[1, 2, 3], [4, 5]], told, draft=False)
        draft.texts = [o.prompt + o.token_ids for o in plain]
        drafted = made.generate([[1, 2, 3], [4, 5]], told)
        assert [o.token_ids for o in drafted] == [o.token_ids for o in plain]
        assert all(5 <= token < 40 for o in drafted for token in o.token_ids)
        assert sum(sum(o.metrics["accept_histogram"][1:]) for o in drafted) > 0
        with pytest.raises(
            InvalidArgument, match="^structured_outputs: got some, expected none: this tokenizer's tokens have no bytes"
        ):
            made.generate([[1]], SamplingParams(structured_outputs={"regex": "a"}))
