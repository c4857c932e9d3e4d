"""Conversations: what `LLM.chat` takes and refuses, what templates make of it, where turns end."""

from __future__ import annotations

import shutil

import pytest

torch = pytest.importorskip("torch")

from dflash_rs import LLM, InvalidArgument, SamplingParams  # noqa: E402
from dflash_rs.config import assets  # noqa: E402

# The bundled tokenizer has no template. This one ends every turn by a special token that is no end-of-text token.
TEMPLATE = (
    "{% if tools %}# tools {{ tools | length }}\n{% endif %}"
    "{% for m in messages %}# {{ m.role }}\n{{ m.content }}<|mask|>{% endfor %}"
    "{% if add_generation_prompt %}# assistant{{ tail }}\n{% endif %}"
)
TALK = [{"role": "user", "content": "def add(a, b):"}]


@pytest.fixture(scope="module")
def llm():
    torch.set_num_threads(1)
    with LLM(device="cpu", adaptive=False) as engine:
        yield engine


def ids(llm, text):
    return list(llm.tokenizer(text, add_special_tokens=False).input_ids)


def test_a_conversation_is_what_the_template_makes_of_it(llm):
    long = [{"role": "system", "content": "Be brief."}, *TALK]
    expected = "# system\nBe brief.<|mask|># user\ndef add(a, b):<|mask|># assistant!\n"
    got = llm.encode_chat(long, chat_template=TEMPLATE, chat_template_kwargs={"tail": "!"}, tools=None)
    assert got == ids(llm, expected)
    output = llm.chat(long, SamplingParams(max_tokens=6), chat_template=TEMPLATE, chat_template_kwargs={"tail": "!"})[0]
    assert output.prompt == got
    assert output.text == llm.generate([got], SamplingParams(max_tokens=6))[0].text


def test_tools_and_content_in_parts_reach_the_template(llm):
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    got = llm.encode_chat(parts, chat_template=TEMPLATE, tools=[{"type": "function", "function": {"name": "f"}}])
    assert got == ids(llm, "# tools 1\n# user\na\nb<|mask|># assistant\n")


def test_an_answer_that_calls_a_tool_may_say_nothing(llm):
    talk = [*TALK, {"role": "assistant", "content": None, "tool_calls": [{}]}, {"role": "tool", "content": "3"}]
    assert llm.encode_chat(talk, chat_template=TEMPLATE)


def test_a_last_message_can_be_gone_on_with(llm):
    talk = [*TALK, {"role": "assistant", "content": "    return"}]
    how = {"chat_template": TEMPLATE, "add_generation_prompt": False, "continue_final_message": True}
    assert llm.encode_chat(talk, **how) == ids(llm, "# user\ndef add(a, b):<|mask|># assistant\n    return")
    assert llm.chat(talk, SamplingParams(max_tokens=3), **how)[0].token_ids


def test_several_conversations_are_answered_in_order_and_with_parameters_of_their_own(llm):
    talks = [TALK, [{"role": "user", "content": "class Stack:"}]]
    each = [SamplingParams(max_tokens=3), SamplingParams(max_tokens=5)]
    outputs = llm.chat(talks, each, chat_template=TEMPLATE)
    assert [len(o.token_ids) for o in outputs] == [3, 5]
    assert [o.prompt for o in outputs] == [llm.encode_chat(talk, chat_template=TEMPLATE) for talk in talks]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_answer_is_the_same_drafted_or_not_streamed_or_not(llm, temperature):
    params = SamplingParams(max_tokens=24, temperature=temperature, seed=5)
    drafted = llm.chat(TALK, params, chat_template=TEMPLATE)[0]
    plain = llm.chat(TALK, params, chat_template=TEMPLATE, draft=False)[0]
    with llm.stream_chat(TALK, params, chat_template=TEMPLATE) as events:
        streamed = "".join(event.text for event in events)
    assert drafted.token_ids == plain.token_ids and drafted.text == plain.text == streamed


def test_an_answer_ends_at_the_token_that_the_template_writes_behind_one(llm):
    end = llm.tokenizer.convert_tokens_to_ids("<|mask|>")
    assert end not in llm.eos_token_ids
    # The model never says it by itself.
    biased = {"max_tokens": 8, "logit_bias": {end: 1000.0}}
    output = llm.chat(TALK, SamplingParams(**biased), chat_template=TEMPLATE)[0]
    assert (output.token_ids, output.text, output.finish_reason) == ([end], "", "stop")
    on = llm.chat(TALK, SamplingParams(**biased, ignore_eos=True), chat_template=TEMPLATE)[0]
    assert on.token_ids == [end] * 8
    late = llm.chat(TALK, SamplingParams(**biased, min_tokens=3), chat_template=TEMPLATE)[0]
    assert end not in late.token_ids[:3] and late.token_ids[3:] == [end]


def test_a_template_may_be_a_file_or_that_of_the_checkpoint(tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)
    shutil.copytree(assets() / "target", tmp_path / "target")
    (tmp_path / "target" / "chat_template.jinja").write_text(TEMPLATE)
    with LLM(tmp_path / "target", draft=None, device="cpu") as own:
        expected = own.encode_chat(TALK)
        assert own.encode_chat(TALK, chat_template=file) == own.encode_chat(TALK, chat_template=str(file)) == expected
        assert expected == ids(own, "# user\ndef add(a, b):<|mask|># assistant\n")
        assert own.chat(TALK, SamplingParams(max_tokens=2))[0].prompt == expected


def test_a_later_turn_finds_the_pages_of_the_earlier_ones(llm):
    talk = [{"role": "user", "content": "class Tree:\n    def insert(self, value):\n        if value < self.value:\n"}]
    first = llm.chat(talk, SamplingParams(max_tokens=24), chat_template=TEMPLATE)[0]
    talk += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "Go on."}]
    second = llm.chat(talk, SamplingParams(max_tokens=4), chat_template=TEMPLATE)[0]
    assert second.metrics["cached_prompt_tokens"] >= len(first.prompt) // 16 * 16


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (None, "messages: got None, expected a list of messages"),
        ("hello", "messages: got 'hello', expected a list of messages"),
        ([], "messages: got [], expected"),
        ([[]], "messages[0]: got [], expected a list of at least one message"),
        (["hello"], "messages[0]: got 'hello', expected a message"),
        ([{"content": "x"}], "messages[0]: got {'content': 'x'} without a role"),
        ([*TALK, {"role": "user"}], "messages[1]: got {'role': 'user'} without a content"),
        ([{"role": 3, "content": "x"}], "messages[0].role: got 3, expected a name"),
        ([{"role": "user", "content": None}], "messages[0].content: got None, expected a string"),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content: got '\\ud800', expected a string without lone"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type: got 'image_url'"),
        ([{"role": "user", "content": [3]}], "messages[0].content[0]: got 3"),
        ([TALK, [{"role": "user"}]], "messages[1][0]: got {'role': 'user'} without a content"),
        ([TALK, "x"], "messages[1]: got 'x'"),
    ],
)
def test_a_message_that_is_none_is_named(llm, messages, said):
    with pytest.raises(InvalidArgument) as error:
        llm.chat(messages, chat_template=TEMPLATE)
    assert said in str(error.value)


def test_with_on_error_return_the_other_conversations_are_answered(llm):
    talks = [TALK, [{"role": "user"}], TALK]
    outputs = llm.chat(talks, SamplingParams(max_tokens=2), chat_template=TEMPLATE, on_error="return")
    assert [o.finish_reason for o in outputs] == ["length", "error", "length"]
    assert outputs[1].error.startswith("messages[1][0]: got")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"chat_template": None}, "chat_template: got none, and the tokenizer of"),
        ({"chat_template": 3}, "chat_template: got 3, expected a Jinja text"),
        ({"chat_template": "nowhere.jinja"}, "chat_template: got 'nowhere.jinja', expected a Jinja text or a file"),
        ({"chat_template": "{% if %}"}, "chat_template: got a template that Jinja cannot read: Expected an expression"),
        ({"chat_template": "{{ raise_exception('users first') }}"}, "chat template refuses: users first"),
        ({"add_generation_prompt": 1}, "add_generation_prompt: got 1, expected True or False"),
        ({"continue_final_message": True}, "continue_final_message: got True with add_generation_prompt=True"),
        ({"tools": "f"}, "tools: got 'f', expected a list of tools"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs: got [], expected a mapping"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs: got 'tokenize', expected names beside"),
    ],
)
def test_what_a_template_cannot_be_is_named(llm, options, said):
    with pytest.raises(InvalidArgument) as error:
        llm.chat(TALK, **{"chat_template": TEMPLATE} | options)
    assert said in str(error.value)


def test_a_conversation_that_is_too_long_is_named(llm):
    with pytest.raises(InvalidArgument, match=r"messages: got \d+ tokens, expected 1\.\."):
        llm.chat([{"role": "user", "content": "x = 1\n" * 2000}], chat_template=TEMPLATE)
    with pytest.raises(InvalidArgument, match=r"messages\[1\]: got \d+ tokens"):
        llm.chat([TALK, [{"role": "user", "content": "x = 1\n" * 2000}]], chat_template=TEMPLATE)
