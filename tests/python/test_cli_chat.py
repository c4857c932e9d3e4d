"""`dflash-rs chat` with an engine without models: turns, streams, colours, what ends it."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest
from fake_llm import FakeLLM

from dflash_rs import cli
from dflash_rs.errors import InvalidArgument


class ChatLLM(FakeLLM):
    """Remembers what it was asked; its answers are those of `FakeLLM` to the last message."""

    def __init__(self, **options):
        super().__init__(**options)
        self.asked, self.templates, self.broken = [], [], None

    def encode_chat(self, messages, chat_template=None):
        self.templates.append(chat_template)
        if self.broken:
            raise InvalidArgument(self.broken)
        return [1]

    def stream_chat(self, messages, params, chat_template=None):
        if messages[-1]["content"] == "too long":
            raise InvalidArgument("messages: got 9 tokens, expected 1..8")
        self.asked.append([(m["role"], m["content"]) for m in messages])
        return Events(self.stream([messages[-1]["content"]], params))


class Events:
    def __init__(self, events):
        self.events = events

    def __enter__(self):
        return self.events

    def __exit__(self, *exc):
        pass


@pytest.fixture
def engines(monkeypatch):
    made: list[ChatLLM] = []

    def make(args, **more):
        made.append(ChatLLM(**({"draft": None} if args.no_draft else {})))
        return made[-1]

    monkeypatch.setattr(cli.engine, "make_engine", make)
    return made


def answer(text: str, tokens: int = 6) -> str:
    return FakeLLM().generate([text], SimpleNamespace(seed=None, temperature=0, max_tokens=tokens))[0].text


def chat(words: str, stdin: str | None = None, monkeypatch=None) -> int:
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    return cli.main(["chat", "--max-tokens", "6", *words.split()])


def test_messages_are_answered_one_after_the_other_and_each_knows_the_ones_before(engines, capsys):
    assert chat("--system brief --message one --message two --quiet") == 0
    out = capsys.readouterr()
    assert out.out == f"{answer('one')}\n{answer('two')}\n" and out.err == ""
    first = [("system", "brief"), ("user", "one")]
    assert engines[0].asked == [first, [*first, ("assistant", answer("one")), ("user", "two")]]
    assert engines[0].closed


def test_lines_of_a_pipe_are_turns_until_it_ends_or_quits(engines, monkeypatch, capsys):
    assert chat("", "one\n\ntwo\n/reset\nthree\n/quit\nfour\n", monkeypatch) == 0
    captured = capsys.readouterr()
    assert captured.out == "".join(answer(t) + "\n" for t in ("one", "two", "three"))
    assert captured.err.count("tau") == 3 and "> " not in captured.err
    assert engines[0].asked[1][0] == ("user", "one") and engines[0].asked[2] == [("user", "three")]


def test_a_last_line_without_an_end_and_no_line_at_all_are_fine(engines, monkeypatch, capsys):
    assert chat("--quiet", "one", monkeypatch) == 0
    assert chat("--quiet", "", monkeypatch) == 0
    assert capsys.readouterr().out == answer("one") + "\n"


def test_colours_and_no_draft_are_those_of_generate(engines, capsys):
    assert chat("--message one --color always --quiet") == 0
    coloured = capsys.readouterr().out
    assert "\x1b[32m" in coloured and "\x1b[1;33m" in coloured
    assert chat("--message one --color always --quiet --no-draft") == 0
    plain = capsys.readouterr().out
    assert "\x1b[32m" not in plain and "\x1b[1;33m" in plain


def test_a_model_that_cannot_chat_says_so_before_anything_is_read(engines, monkeypatch, capsys):
    monkeypatch.setattr(ChatLLM, "encode_chat", lambda self, messages, **more: _refuse())
    assert chat("", "one\n", monkeypatch) == 2
    captured = capsys.readouterr()
    assert "chat_template: got none" in captured.err and captured.out == "" and not engines[0].asked


def _refuse():
    raise InvalidArgument("chat_template: got none")


def test_a_template_of_ones_own_is_passed_on(engines, capsys):
    assert chat("--message one --quiet --chat-template t.jinja") == 0
    assert engines[0].templates == ["t.jinja"]


def test_what_cannot_be_asked_ends_a_script_and_not_a_person(engines, monkeypatch, capsys):
    class Person(io.StringIO):
        def isatty(self):
            return True

    assert chat("--quiet", "one\ntoo long\ntwo\n", monkeypatch) == 2
    assert "messages: got 9 tokens" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", Person("one\ntoo long\n/what\ntwo\n"))
    assert cli.main(["chat", "--max-tokens", "6"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "".join(answer(t) + "\n" for t in ("one", "two"))
    assert "messages: got 9 tokens" in captured.err and "/what is no command" in captured.err
    assert engines[1].asked[1] == [("user", "one"), ("assistant", answer("one")), ("user", "two")]


def test_a_word_behind_a_slash_is_a_command_or_a_mistake_and_behind_a_space_a_message(engines, monkeypatch, capsys):
    for end in ("", "/quit\n"):
        assert chat("--quiet", " /one\n/two words\n/three\nfour\n" + end, monkeypatch) == 2
        captured = capsys.readouterr()
        assert captured.out == "".join(answer(t) + "\n" for t in ("/one", "/two words", "four"))
        assert "/three is no command: /quit ends" in captured.err


def test_ctrl_c_in_an_answer_takes_the_question_back_and_at_the_prompt_ends_the_command(engines, monkeypatch, capsys):
    class Person(io.StringIO):
        def isatty(self):
            return True

        def readline(self, *size):
            line = super().readline(*size)
            if not line:
                raise KeyboardInterrupt
            return line

    whole = ChatLLM.stream_chat

    def interrupted(self, messages, params, **more):
        if messages[-1]["content"] == "one":
            raise KeyboardInterrupt
        return whole(self, messages, params, **more)

    monkeypatch.setattr(ChatLLM, "stream_chat", interrupted)
    monkeypatch.setattr(sys, "stdin", Person("one\ntwo\n"))
    assert cli.main(["chat", "--max-tokens", "6", "--quiet"]) == 130
    assert engines[0].asked == [[("user", "two")]] and engines[0].closed


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--message", ""], "--message: got an empty text"), (["--max-tokens", "0"], "max_tokens: got 0")],
)
def test_what_chat_cannot_do_is_refused_by_name(words, said, engines, capsys):
    assert cli.main(["chat", "--message", "x", *words]) == 2
    assert said in capsys.readouterr().err
