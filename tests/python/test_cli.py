"""The command line: what it prints, what it refuses and how it ends, with an engine without models."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from fake_llm import FakeEvent, FakeLLM

from dflash_rs import cli
from dflash_rs.errors import CheckpointError, DflashError, InvalidArgument


@pytest.fixture
def fake(monkeypatch):
    """Replaces the engine; the list collects every engine the command makes."""
    engines: list[FakeLLM] = []

    def make(args, **more):
        names = ("model", "draft", "block_size", "threads")
        given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
        if getattr(args, "no_draft", False):
            given["draft"] = None
        engines.append(FakeLLM(**(given | more)))
        return engines[-1]

    monkeypatch.setattr(cli, "make_engine", make)
    return engines


def test_help_answers_without_loading_torch():
    code = (
        "import sys; from dflash_rs.cli import main\n"
        "try: main(['generate', '--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'dflash_rs.llm'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout and "exit codes:" in done.stdout


@pytest.mark.parametrize("command", ["generate", "bench", "train", "doctor"])
def test_every_command_explains_itself(command, capsys):
    parser = cli.build_parser()
    with pytest.raises(SystemExit) as end:
        parser.parse_args([command, "--help"])
    assert end.value.code == 0
    assert "usage: dflash-rs " + command in capsys.readouterr().out


def test_json_prints_one_object_per_prompt_and_nothing_else(fake, capsys):
    assert cli.main(["generate", "--json", "one", "two", "--max-tokens", "6", "--seed", "3"]) == 0
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [line["prompt"] for line in lines] == ["one", "two"]
    assert all({"text", "token_ids", "finish_reason", "metrics"} <= set(line) for line in lines)
    assert all(len(line["token_ids"]) == 6 and line["metrics"]["seed"] == 3 for line in lines)
    assert captured.err == ""
    assert fake[0].closed


def test_the_streamed_text_is_the_generated_text_in_prompt_order(fake, capsys):
    assert cli.main(["generate", "one", "second", "--max-tokens", "8", "--color", "never"]) == 0
    expected = FakeLLM().generate(["one", "second"], SimpleNamespace(seed=None, temperature=0, max_tokens=8))
    captured = capsys.readouterr()
    assert captured.out == f"one{expected[0].text}\n\nsecond{expected[1].text}\n\n"
    assert captured.err.count("tau 2.33 over 3 passes") == 2


def test_no_draft_gives_the_same_text(fake, capsys):
    assert cli.main(["generate", "one", "--quiet"]) == 0
    assert cli.main(["generate", "one", "--quiet", "--no-draft"]) == 0
    assert fake[1].options == {"draft": None}
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_colour_tells_drafts_from_the_models_own_tokens(fake, capsys):
    assert cli.main(["generate", "one", "--max-tokens", "4", "--color", "always", "--quiet"]) == 0
    legend, text = capsys.readouterr().out.splitlines()
    assert "accepted drafts" in legend and "the model itself" in legend
    tokens = FakeLLM().generate(["one"], SimpleNamespace(seed=None, temperature=0, max_tokens=4))[0].text
    own, draft = "\x1b[1;33m", "\x1b[32m"
    end = "\x1b[0m"
    assert text.endswith(f"{own}{tokens[0]}{end}{draft}{tokens[1:3]}{end}{own}{tokens[3]}{end}")


def test_colour_follows_the_terminal_and_no_color(monkeypatch):
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert cli.Painter.choose("auto", terminal).enabled
    assert not cli.Painter.choose("auto", io.StringIO()).enabled
    monkeypatch.setenv("NO_COLOR", "1")
    assert not cli.Painter.choose("auto", terminal).enabled
    assert cli.Painter.choose("always", terminal).enabled


@pytest.mark.parametrize(
    ("text", "tokens", "accepted", "expected"),
    [
        ("abc", [97, 98, 99], 2, ("ab", "c")),
        ("a", [97], 0, ("", "a")),
        ("ab", [97, 98], 2, ("ab", "")),
        # The last token's text was cut off by a stop string.
        ("a", [97, 98], 1, ("a", "")),
        ("", [97, 98], 1, ("", "")),
    ],
)
def test_a_delta_is_split_without_losing_or_adding_a_character(text, tokens, accepted, expected):
    event = FakeEvent(0, text, tokens, accepted)
    assert cli.split_delta(event, FakeLLM().decode) == expected


def test_later_streams_wait_for_their_turn():
    written: list[str] = []
    ordered = cli.Ordered(3, written.append)
    ordered.add(0, "a")
    ordered.add(1, "x")
    ordered.add(2, "p", done=True)
    ordered.add(0, "b", done=True)
    ordered.add(1, "y")
    assert "".join(written) == "abxy"
    ordered.add(1, "z", done=True)
    assert "".join(written) == "abxyzp"


def test_every_sampling_option_reaches_the_engine():
    words = (
        "generate x --max-tokens 9 --temperature 0.5 --top-k 4 --top-p 0.9 --min-p 0.1 --seed 7 "
        "--repetition-penalty 1.1 --presence-penalty 0.2 --frequency-penalty 0.3 --logit-bias 5=-2 --logit-bias 6=1.5 "
        "--stop-token-id 3 --stop-token-id 4 --logprobs 2 --ignore-eos"
    ).split()
    args = cli.build_parser().parse_args([*words, "--stop", "\\n\\n"])
    params = cli.sampling_from(args)
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p) == (9, 0.5, 4, 0.9)
    assert (params.min_p, params.seed, params.repetition_penalty) == (0.1, 7, 1.1)
    assert (params.presence_penalty, params.frequency_penalty, params.logprobs) == (0.2, 0.3, 2)
    assert dict(params.logit_bias) == {5: -2.0, 6: 1.5}
    assert list(params.stop_token_ids) == [3, 4] and list(params.stop) == ["\n\n"] and params.ignore_eos


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["generate", "x", "--logit-bias", "five"], "--logit-bias"),
        (["generate", "x", "--threads", "0"], "--threads"),
        (["generate", "x", "--temprature", "1"], "--temprature"),
        (["bench", "--suite", "nothing"], "--suite"),
        (["bench", "--concurrency", "1,zero"], "--concurrency"),
        (["nothing"], "nothing"),
        ([], "COMMAND"),
    ],
)
def test_a_word_that_cannot_be_understood_ends_with_code_2(words, named, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate"], "PROMPT: got none"),
        (["generate", ""], "PROMPT: got an empty text"),
        (["generate", "--prompt-file", "/nowhere/at/all"], "No such file"),
        (["bench", "--max-tokens", "1", "--prompt-file", "/nowhere/at/all"], "--max-tokens: got 1"),
        (["generate", "x", "--max-tokens", "0"], "max_tokens: got 0"),
        (["generate", "x", "--temperature", "-1"], "temperature: got -1.0"),
    ],
)
def test_bad_input_ends_with_code_2_and_no_traceback(words, message, fake, capsys):
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CheckpointError("model.safetensors: 12 bytes missing"), 2),
        (DflashError("no pages left"), 1),
        (RuntimeError("something broke"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_failures_have_their_exit_code_and_no_traceback(error, code, fake, monkeypatch, capsys):
    def fail(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(FakeLLM, "stream", fail)
    assert cli.main(["generate", "x"]) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err and (str(error) or "interrupted") in err
    assert fake[0].closed


def test_debug_shows_the_traceback(fake, monkeypatch):
    def fail(self, *args, **kwargs):
        raise RuntimeError("something broke")

    monkeypatch.setattr(FakeLLM, "stream", fail)
    with pytest.raises(RuntimeError):
        cli.main(["generate", "x", "--debug"])


def test_a_missing_extra_is_named_with_its_command(monkeypatch, capsys):
    def missing(args, **more):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(cli, "make_engine", missing)
    assert cli.main(["generate", "x"]) == 1
    assert "pip install 'dflash-rs[torch]'" in capsys.readouterr().err


def test_a_failed_request_ends_with_code_1_and_its_reason(fake, monkeypatch, capsys):
    def generate(self, prompts, params, draft=True):
        outputs = FakeLLM._one(self, 0, prompts[0], params, True)[:1]
        outputs[0].finish_reason = "error"
        outputs[0].error = "NaN logits"
        return list(outputs)

    monkeypatch.setattr(FakeLLM, "generate", generate)
    assert cli.main(["generate", "--json", "x"]) == 1
    assert "prompt 1: NaN logits" in capsys.readouterr().err


def test_a_prompt_may_come_from_standard_input(fake, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert cli.main(["generate", "-", "--json", "--max-tokens", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "from a pipe"


def test_bench_json_on_standard_output_is_only_json(fake, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    words = ["bench", "--prompt-file", str(prompts), "--repeat", "1", "--max-tokens", "6", "--concurrency", "1,2"]
    assert cli.main([*words, "--json", "-"]) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert len(data["rows"]) == 8 and data["header"]["command"].startswith("dflash-rs bench")
    assert "speed-up" in captured.err


def test_bench_fails_when_a_float32_text_differs(monkeypatch, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n")
    monkeypatch.setattr(cli, "make_engine", lambda args, **more: FakeLLM(change=2))
    words = ["bench", "--prompt-file", str(prompts), "--repeat", "1", "--max-tokens", "6"]
    assert cli.main(words) == 1
    assert "differs at token 2" in capsys.readouterr().out


def test_the_reference_suite_says_how_to_get_its_package(fake, monkeypatch, tmp_path, capsys):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "dflash" else real(name, *a))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n")
    assert cli.main(["bench", "--suite", "reference", "--prompt-file", str(prompts)]) == 1
    assert "pip install --no-deps dflash==0.1.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--draft", "d"], "--draft: got a drafter without --model"),
        (["--model", "m"], "--model: got a target without a drafter"),
        (["--model", "m", "--draft", "d", "--no-draft"], "--no-draft: got --draft, too"),
    ],
)
def test_models_that_do_not_go_together_are_refused_before_anything_loads(words, message, capsys):
    assert cli.main(["generate", "x", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("value", ["-1", "1e-9", "a", "nan", ""])
def test_a_temperature_that_cannot_be_sampled_at_ends_bench_before_a_model_is_loaded(value, fake, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", f"--temperature={value}"])
    assert end.value.code == 2 and fake == []
    assert f"argument --temperature: got {value!r}, expected temperatures" in capsys.readouterr().err


def test_every_option_is_explained():
    parser = cli.build_parser(["train"])
    kinds = [parser]
    for kind in kinds:
        for action in kind._actions:
            if isinstance(action, argparse._SubParsersAction):
                kinds += action.choices.values()
    assert len(kinds) > 8
    for kind in kinds:
        for action in kind._actions:
            assert action.help or isinstance(action, argparse._SubParsersAction), (kind.prog, action.dest)


@pytest.mark.parametrize("value", ["-5", "1.5", "a"])
def test_a_seed_that_is_none_ends_bench_before_a_model_is_loaded(value, fake, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", f"--seed={value}"])
    assert end.value.code == 2 and fake == []
    assert f"argument --seed: got {value!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["drafter", "--target", "/nope", "--responses", "/nope", "--corpus", "/nope"],
        ["responses", "--target", "/nope", "--corpus", "/nope"],
        ["target", "--corpus", "CORPUS", "--data", "/nope"],
    ],
    ids=lambda words: words[0],
)
def test_training_on_what_is_not_there_is_one_line_and_exit_code_2(words, tmp_path, capsys):
    words = [str(tmp_path / "corpus") if word == "CORPUS" else word for word in words]
    assert cli.main(["train", *words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dflash-rs: error: --") and "got /nope, which does not exist" in error
    assert len(error.splitlines()) == 1


def test_a_file_of_prompts_that_begins_with_a_bracket_is_text_unless_it_is_json(tmp_path):
    from dflash_rs.bench.workloads import read_prompts

    (tmp_path / "text").write_text("[x for x in y]\ndef f(\n")
    assert [p.text for p in read_prompts(tmp_path / "text")] == ["[x for x in y]", "def f("]
    (tmp_path / "braces").write_text("{x for x in y}\n")
    assert [p.text for p in read_prompts(tmp_path / "braces")] == ["{x for x in y}"]
    (tmp_path / "list").write_text('["a", "b"]')
    assert [p.text for p in read_prompts(tmp_path / "list")] == ["a", "b"]
    (tmp_path / "broken.json").write_text('["a", ')
    with pytest.raises(InvalidArgument, match="not a JSON list"):
        read_prompts(tmp_path / "broken.json")
