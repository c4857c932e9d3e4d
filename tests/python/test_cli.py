"""The command line: what it prints, what it refuses and how it ends, with an engine without models."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_llm import FakeEvent, FakeLLM

from dflash_rs import SamplingParams, StructuredOutputsParams, cli, extras
from dflash_rs.cli import display
from dflash_rs.errors import CheckpointError, DflashError, InvalidArgument, OutOfPages


@pytest.fixture
def fake(monkeypatch):
    """Replaces the engine; the list collects every engine the command makes."""
    engines: list[FakeLLM] = []

    def make(args, **more):
        names = ("model", "draft", "block_size", "threads", "max_context", "max_running", "adaptive")
        given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
        if getattr(args, "no_draft", False):
            given["draft"] = None
        engines.append(FakeLLM(**(given | more)))
        return engines[-1]

    monkeypatch.setattr(cli.engine, "make_engine", make)
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


@pytest.mark.parametrize("command", ["generate", "chat", "bench", "check", "train", "doctor"])
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
    assert display.Painter.choose("auto", terminal).enabled
    assert not display.Painter.choose("auto", io.StringIO()).enabled
    monkeypatch.setenv("NO_COLOR", "1")
    assert not display.Painter.choose("auto", terminal).enabled
    assert display.Painter.choose("always", terminal).enabled


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
    assert display.split_delta(event, FakeLLM().decode) == expected


def test_later_streams_wait_for_their_turn():
    written: list[str] = []
    ordered = display.Ordered(3, written.append)
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
        "generate x --max-tokens 9 --min-tokens 4 --temperature 0.5 --top-k 4 --top-p 0.9 --min-p 0.1 --seed 7 "
        "--repetition-penalty 1.1 --presence-penalty 0.2 --frequency-penalty 0.3 --logit-bias 5=-2 --logit-bias 6=1.5 "
        "--stop-token-id 3 --stop-token-id 4 --logprobs 2 --ignore-eos --allowed-token-id 8 --allowed-token-id 9 --bad-word no "
        "--max-drafts 2 --prompt-logprobs 1 --truncate-prompt-tokens 30 --special-tokens --include-stop-str-in-output"
    ).split()
    args = cli.build_parser().parse_args([*words, "--stop", "\\n\\n", "--bad-word", "not so", "--regex", "[a-z]+"])
    params = cli.generate.sampling_from(args)
    assert (params.max_tokens, params.min_tokens) == (9, 4)
    assert (params.temperature, params.top_k, params.top_p) == (0.5, 4, 0.9)
    assert (params.min_p, params.seed, params.repetition_penalty) == (0.1, 7, 1.1)
    assert (params.presence_penalty, params.frequency_penalty, params.logprobs) == (0.2, 0.3, 2)
    assert dict(params.logit_bias) == {5: -2.0, 6: 1.5}
    assert list(params.stop_token_ids) == [3, 4] and list(params.stop) == ["\n\n"] and params.ignore_eos
    assert (params.allowed_token_ids, params.bad_words) == ((8, 9), ("no", "not so"))
    assert params.structured_outputs == StructuredOutputsParams(regex="[a-z]+")
    default = SamplingParams()
    same = [name for name in SamplingParams.__dataclass_fields__ if getattr(params, name) == getattr(default, name)]
    assert (params.max_drafts, params.prompt_logprobs, params.truncate_prompt_tokens) == (2, 1, 30)
    assert not params.skip_special_tokens and params.include_stop_str_in_output
    # Functions have no words, and answers of one prompt no lines of their own.
    assert same == ["n", "logits_processors"], "an option that the words above leave out"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--json-schema", '{"type": "array"}'], {"json": '{"type": "array"}'}),
        (["--json-schema", "FILE"], {"json": '{"type": "object"}'}),
        (["--json-object"], {"json_object": True}),
        (["--regex", "a|b"], {"regex": "a|b"}),
        (["--choice", "yes", "--choice", "no"], {"choice": ["yes", "no"]}),
        (["--ebnf", 'root ::= "a"'], {"grammar": 'root ::= "a"'}),
        (["--ebnf", "FILE"], {"grammar": '{"type": "object"}'}),
    ],
)
def test_what_an_output_has_to_be_is_said_on_the_command_line_or_in_a_file(words, wanted, tmp_path):
    (tmp_path / "a file").write_text('{"type": "object"}')
    words = [str(tmp_path / "a file") if word == "FILE" else word for word in words]
    for command in ("generate x", "chat"):
        params = cli.generate.sampling_from(cli.build_parser().parse_args([*command.split(), *words]))
        assert params.structured_outputs == StructuredOutputsParams(**wanted)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--json-schema", "no-such-file"],
            "--json-schema: got 'no-such-file', expected a JSON schema ({...}) or a file with one (No such file",
        ),
        (["--json-schema", "{"], "structured_outputs.json: got '{' ("),
        (
            ["--ebnf", "no-such-file"],
            "--ebnf: got 'no-such-file', expected a grammar (root ::= ...) or a file with one (No such file",
        ),
        (["--regex", "a", "--json-object"], "structured_outputs: got regex and json_object, expected one of"),
        (["--regex", ""], "structured_outputs.regex: got '', expected a non-empty string"),
    ],
)
def test_what_an_output_cannot_be_is_refused_before_anything_loads(words, message, capsys):
    assert cli.main(["generate", "x", *words]) == cli.BAD_INPUT
    assert capsys.readouterr().err.startswith(f"dflash-rs: error: {message}")


def test_nothing_given_is_what_sampling_params_mean_by_nothing():
    assert cli.generate.sampling_from(cli.build_parser().parse_args(["generate", "x"])) == SamplingParams()


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
        (["generate", "x", "--max-tokens", "3", "--min-tokens", "4"], "min_tokens: got 4, expected an integer in 0..3"),
        (["generate", "x", "--logit-bias", "5=1", "--logit-bias", "5=2"], "--logit-bias: got token id 5 2 times"),
        (["generate", "x", "--temperature", "-1"], "temperature: got -1.0"),
        (["bench", "--suite", "reference", "--draft", "lookup"], "--draft: got lookup, expected one DFlash drafter"),
        (["bench", "--suite", "reference", "--draft", "auto", "--draft", "x"], "--draft: got auto, x, expected one"),
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


@pytest.mark.parametrize(("error", "code"), [(RuntimeError("it broke"), 1), (CheckpointError("it broke"), 2)])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(error, code, fake, monkeypatch, capsys):
    def fail(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(FakeLLM, "stream", fail)
    assert cli.main(["generate", "x", "--debug"]) == code
    err = capsys.readouterr().err
    assert "Traceback" in err and "it broke" in err.splitlines()[-1]


def test_a_missing_extra_is_named_with_its_command(monkeypatch, capsys):
    def missing(args, **more):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(cli.engine, "make_engine", missing)
    assert cli.main(["generate", "x"]) == 1
    assert f": {extras.install('torch')}\n" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--json"], []])
def test_a_failed_request_among_many_is_named_with_its_reason_and_ends_with_code_1(
    words, fake, monkeypatch, capsys, tmp_path
):
    whole = FakeLLM._one

    def one(self, index, prompt, params, draft):
        output, groups = whole(self, index, prompt, params, draft)
        if prompt == "bad":
            output.finish_reason, output.error = "error", "NaN logits"
        return output, groups

    monkeypatch.setattr(FakeLLM, "_one", one)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("good\n\nbad\n")
    assert cli.main(["generate", "--max-tokens", "4", "first", "--prompt-file", str(prompts), *words]) == 1
    captured = capsys.readouterr()
    assert f"dflash-rs: error: prompt 3 ({prompts}: line 3): NaN logits\n" in captured.err
    assert "good" in captured.out and "first" in captured.out


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


def test_bench_measures_every_drafter_it_is_given(fake, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    words = [
        "bench",
        "--prompt-file",
        str(prompts),
        "--repeat",
        "1",
        "--max-tokens",
        "6",
        "--temperature",
        "0",
        "--json",
        "-",
    ]
    assert cli.main([*words, "--draft", "auto", "--draft", "lookup"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 4
    assert [engine.options["draft"] for engine in fake] == ["auto", "lookup"]


def test_bench_fails_when_a_float32_text_differs(monkeypatch, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n")
    monkeypatch.setattr(cli.engine, "make_engine", lambda args, **more: FakeLLM(change=2))
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


@pytest.mark.parametrize(("words", "said"), [("--temperature 0.5 --seed 3", True), ("--seed 3", False), ("", False)])
def test_the_summary_has_the_seed_of_texts_that_are_drawn(words, said, fake, capsys):
    assert cli.main(["generate", "one", "--max-tokens", "4", *words.split()]) == 0
    err = capsys.readouterr().err
    assert "4 tokens in" in err and ("seed 3" in err) is said and ("seed" in err) is said


def test_a_number_of_prompts_that_none_is_is_no_file(fake, capsys):
    for number in ("-1", "0", "+0"):
        with pytest.raises(SystemExit) as end:
            cli.main(["bench", "--prompts", number])
        assert end.value.code == 2 and fake == []
        assert f"argument --prompts: got {number!r}, expected an integer of at least 1" in capsys.readouterr().err


def test_a_drafter_without_a_model_is_the_bundled_targets_as_in_the_library(monkeypatch):
    asked = []
    monkeypatch.setattr("dflash_rs.llm.LLM", lambda **options: asked.append(options) or FakeLLM())
    assert cli.main(["generate", "x", "--quiet", "--draft", "path/to/drafter"]) == 0
    assert asked[0]["draft"] == "path/to/drafter" and "model" not in asked[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", ""], "--model: got '', and there is no such folder"),
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


def parsers() -> Iterator[argparse.ArgumentParser]:
    """The parser and those of all commands, of their commands, too."""
    kinds = [cli.build_parser()]
    for kind in kinds:
        yield kind
        for action in kind._actions:
            if isinstance(action, argparse._SubParsersAction):
                kinds += action.choices.values()


def test_every_option_is_explained():
    assert len(list(parsers())) == 18
    for kind in parsers():
        for action in kind._actions:
            assert action.help or isinstance(action, argparse._SubParsersAction), (kind.prog, action.dest)


def test_every_help_has_examples_that_the_command_line_takes():
    for kind in parsers():
        examples = re.findall(r"^  (.*dflash-rs .*)$", kind.epilog.partition("examples:\n")[2], re.MULTILINE)
        assert examples, kind.prog
        for example in examples:
            command = example.partition(" | ")[2] or example
            words = shlex.split(command.partition(" > ")[0], comments=True)
            words = words[: words.index("(needs:")] if "(needs:" in words else words
            assert words.pop(0) == "dflash-rs" and " ".join(words).startswith(
                kind.prog.removeprefix("dflash-rs").strip()
            )
            cli.build_parser().parse_args(words)


@pytest.mark.parametrize("columns", [1, 20, 40, 200])
def test_every_help_fits_any_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    for kind in parsers():
        assert "usage:" in kind.format_help()


@pytest.mark.parametrize("value", ["-5", "1.5", "a"])
def test_a_seed_that_is_none_ends_bench_before_a_model_is_loaded(value, fake, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", f"--seed={value}"])
    assert end.value.code == 2 and fake == []
    assert f"argument --seed: got {value!r}" in capsys.readouterr().err


def test_training_threads_are_those_that_the_machine_has(tmp_path, capsys):
    most = os.cpu_count() or 1
    words = ["train", "target", "--corpus", str(tmp_path / "corpus"), "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--threads", str(most + 1)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dflash-rs: error: --threads: got {most + 1}, expected an integer in 1..{most}")


@pytest.mark.parametrize("command", ["generate x", "bench", "check", "train target --corpus a --out b", "doctor"])
def test_an_unknown_option_is_answered_with_the_usage_of_its_command(command, fake, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([*command.split(), "--nothing"])
    error = capsys.readouterr().err
    name = " ".join(word for word in command.partition(" --")[0].split() if word != "x")
    assert end.value.code == 2 and error.startswith(f"usage: dflash-rs {name} [-h]")
    assert error.endswith(f"dflash-rs {name}: error: unrecognized arguments: --nothing\n")
    with pytest.raises(SystemExit):
        cli.main(["--nothing", *command.split()])
    assert capsys.readouterr().err.startswith("usage: dflash-rs [-h]")


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


@pytest.mark.parametrize("option", ["--out", "--store-features"])
def test_a_folder_of_a_training_that_cannot_be_made_is_named_at_once(option, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    places = {"--out": tmp_path / "out"} | {option: tmp_path / "file" / "out"}
    words = [word for place in places.items() for word in map(str, place)]
    here = str(tmp_path)
    assert cli.main(["train", "drafter", "--target", here, "--responses", here, *words]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"dflash-rs: error: {option}: got {tmp_path / 'file' / 'out'}, expected a folder, or where one can be made; {tmp_path / 'file'} is none\n"
    )


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


# --- many prompts --------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_json_lines_come_in_the_order_of_the_prompts_each_as_soon_as_it_can(fake, monkeypatch):
    written: list[tuple[str, int]] = []
    turns = [0]
    whole = FakeLLM.stream

    def stream(self, prompts, params, draft=True):
        # The second prompt ends first, with its first event.
        for number, event in enumerate(whole(self, prompts, params, draft)):
            turns[0] += 1
            if number == 1:
                event.finish_reason, event.output = "length", self._one(1, prompts[1], params, draft)[0]
            if number == 1 or event.index != 1:
                yield event

    monkeypatch.setattr(FakeLLM, "stream", stream)
    monkeypatch.setattr(cli.console, "emit", lambda text: written.append((text, turns[0])))
    llm = FakeLLM()
    prompts = [SimpleNamespace(text=text, where="") for text in ("one", "two", "three")]
    params = SimpleNamespace(seed=None, temperature=0, max_tokens=7, n=1)
    cli.generate.stream_outputs(llm, prompts, params, None, display.Progress(3, None))
    assert [json.loads(text)["prompt"] for text, _ in written] == ["one", "two", "three"]
    # "one" ends in its third turn, two events before the last; "two", ready long before, comes at once behind it.
    last = turns[0]
    assert [turn for _, turn in written] == [last - 2, last - 2, last]


def test_json_is_ascii_whatever_the_terminal_shows(fake, capsys):
    assert cli.main(["generate", "--json", "\u2192", "--max-tokens", "2"]) == 0
    out = capsys.readouterr().out
    assert out.isascii() and json.loads(out)["prompt"] == "\u2192"


def test_progress_is_for_a_terminal_that_does_not_show_the_text(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "30")

    def shown(err, out, count=3, **given) -> str:
        monkeypatch.setattr(sys, "stderr", err)
        monkeypatch.setattr(sys, "stdout", out)
        progress = display.Progress.choose(SimpleNamespace(**({"json": True, "quiet": False} | given)), count)
        progress.show(1, 12)
        progress.clear()
        return err.getvalue()

    line = shown(Terminal(), io.StringIO())
    # One line, no wider than the terminal, and gone afterwards.
    assert line.startswith("\r\x1b[K1 of 3 prompts, 12 tokens") and line.endswith("\r\x1b[K") and "\n" not in line
    assert len(line.split("\x1b[K")[1].strip("\r")) <= 29
    assert shown(Terminal(), io.StringIO(), json=False) and shown(Terminal(), Terminal())
    for nothing in (
        shown(io.StringIO(), io.StringIO()),
        shown(Terminal(), Terminal(), json=False),
        shown(Terminal(), io.StringIO(), count=1),
        shown(Terminal(), io.StringIO(), quiet=True),
    ):
        assert nothing == ""
    monkeypatch.setenv("TERM", "dumb")
    assert shown(Terminal(), io.StringIO()) == ""


def test_progress_leaves_nothing_behind_in_what_is_written(fake, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert cli.main(["generate", "--json", "one", "two", "--max-tokens", "4"]) == 0
    rest = re.sub(r"\r\x1b\[K(\d of 2 prompts[^\r]*)?", "", terminal.getvalue())
    assert [json.loads(line)["prompt"] for line in rest.splitlines()] == ["one", "two"]
    assert terminal.getvalue().count("of 2 prompts") >= 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (InvalidArgument("prompts[1]: got 9 tokens"), "prompt 2 (FILE: line 2): got 9 tokens"),
        (InvalidArgument("prompt: got 9 tokens"), "prompt 2 (FILE: line 2): got 9 tokens"),
        (OutOfPages("9 pages needed"), "prompt 2 (FILE: line 2): 9 pages needed"),
        (InvalidArgument("logit_bias: got 9"), "logit_bias: got 9"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "bench"])
def test_a_prompt_among_many_that_cannot_be_taken_is_named(command, error, said, fake, monkeypatch, tmp_path, capsys):
    whole = FakeLLM.stream

    def stream(self, prompts, params, draft=True):
        if "bad" in prompts:
            raise error
        return whole(self, prompts, params, draft)

    monkeypatch.setattr(FakeLLM, "stream", stream)
    file = tmp_path / "prompts.txt"
    file.write_text("good\nbad\nbad\n")
    assert cli.main([command, "--prompt-file", str(file), "--max-tokens", "2"]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"dflash-rs: error: {said.replace('FILE', str(file))}\n" and captured.out == ""
    assert fake[0].closed


def test_sizes_of_the_engine_are_options(fake, tmp_path):
    words = ["--max-context", "99", "--no-adaptive", "--max-tokens", "2"]
    assert cli.main(["generate", "x", "--max-running", "3", *words]) == 0
    assert fake[0].options == {"max_context": 99, "max_running": 3, "adaptive": False}
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n")
    assert cli.main(["bench", "--prompt-file", str(prompts), "--repeat", "1", "--concurrency", "2", *words]) == 0
    assert fake[1].options == {"max_context": 99, "max_running": 2, "adaptive": False, "prefix_cache": False}
    with pytest.raises(SystemExit):  # that is --concurrency there
        cli.main(["bench", "--max-running", "3"])


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "--logprobs", "2"], "--logprobs: got 2 without --json"),
        (["-", "-"], "PROMPT: got - 2 times, expected it once"),
        (["-"], "PROMPT: got an empty standard input"),
        (["a", "\udcff"], "PROMPT: got bytes that are not UTF-8 (byte 0)"),
        (["a", "--stop", "x\udcff"], "--stop: got bytes that are not UTF-8 (byte 1)"),
    ],
)
def test_what_generate_cannot_do_is_refused_by_name_before_anything_loads(words, message, fake, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert cli.main(["generate", *words]) == 2
    assert message in capsys.readouterr().err and fake == []


def test_words_that_the_locale_could_not_read_are_taken_for_utf8(fake, capsys):
    text = os.fsdecode("→".encode()) if sys.getfilesystemencoding() == "ascii" else "\udce2\udc86\udc92"
    assert cli.main(["generate", "--json", text, "--max-tokens", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "→"


@pytest.mark.parametrize("place", ["nowhere/x.png", ".", "", "x" * 300])
@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_place_that_cannot_be_written_to_is_refused_and_nothing_made(
    option, place, fake, tmp_path, monkeypatch, capsys
):
    if option == "--plot":
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", option, place]) == 2
    assert f"{option}: got {place or repr(place)}, expected a file that can be written" in capsys.readouterr().err
    assert fake == [] and list(tmp_path.iterdir()) == []


def test_plot_and_json_do_not_share_a_file(fake, tmp_path, capsys):
    assert cli.main(["bench", "--json", str(tmp_path / "x.png"), "--plot", str(tmp_path / "." / "x.png")]) == 2
    assert "expected another file than --json" in capsys.readouterr().err and fake == []


def test_training_names_the_number_it_cannot_use(tmp_path, capsys):
    for words, said in (
        (["prompts", "--count", "0"], "--count: got 0, expected at least 1"),
        (["target", "--save-every", "0"], "--save-every: got 0, expected at least 1"),
        (["target", "--threads", "-1"], "--threads: got -1, expected at least 0"),
    ):
        assert cli.main(["train", *words, "--corpus", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err == f"dflash-rs: error: {said}\n"


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"\xef\xbb\xbfimport os\r\nimport sys\r\n", ["import os", "import sys"]),
        (b'\xef\xbb\xbf["a", "b"]', ["a", "b"]),
        ("def f():\x0c\n# \u2028 is no end of a line\n".encode(), ["def f():\x0c", "# \u2028 is no end of a line"]),
        ('{"prompt": "a\u2028b"}\n{"prompt": "c"}\n'.encode(), ["a\u2028b", "c"]),
        (b"[" * 100_000, ["[" * 100_000]),
        (b"[" + b"1" * 5000 + b"]", ["[" + "1" * 5000 + "]"]),
    ],
    ids=["lines with a mark", "JSON with a mark", "form feeds", "JSON lines", "brackets", "digits"],
)
def test_a_file_of_prompts_is_read_as_it_was_meant(content, prompts, tmp_path):
    from dflash_rs.bench.workloads import read_prompts

    (tmp_path / "prompts").write_bytes(content)
    assert [prompt.text for prompt in read_prompts(tmp_path / "prompts")] == prompts


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("text", b"a\xff\n", "not UTF-8 text (byte 1)"),
        ("empty", b"", "contains no prompt"),
        ("blank", b"\n \n", "contains no prompt"),
        ("a.json", b"[" * 100_000, "not a JSON list"),
        ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt": 1}\n', "line 3: prompt: got 1, expected a text"),
        (
            "c.json",
            b'[{"prompt": "a", "id": "x", "max_tokens": 3}]',
            "entry 0: max_tokens: got 3, expected no sampling option",
        ),
        (
            "d.jsonl",
            b'{"prompt": "a", "max_new_tokens": 3}',
            "line 1: max_new_tokens: got 3, expected no sampling option",
        ),
        ("b.jsonl", b'{"prompt": "a"}\n{', "line 2 is not JSON"),
        ("folder", None, "Is a directory"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_used_ends_with_code_2(name, content, said, fake, tmp_path, capsys):
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    assert cli.main(["generate", "--prompt-file", str(path)]) == 2
    err = capsys.readouterr().err
    assert str(path) in err and said in err and len(err.splitlines()) == 1 and fake == []


# --- from outside: streams, encodings, signals, missing packages --------------------------------------------------------

# The command with the engine of these tests, as a process of its own.
FAKED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from fake_llm import FakeLLM
from dflash_rs import cli
cli.engine.make_engine = lambda args, **more: FakeLLM()
sys.exit(cli.main())
"""


def outside(words: str, *, shell: str = "{}", stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess:
    """Runs ``dflash-rs WORDS`` with the fake engine in a shell that redirects it as `shell` says; output as bytes."""
    command = shlex.join([sys.executable, "-c", FAKED, str(Path(__file__).parent)]) + f" {words}"
    return subprocess.run(
        ["bash", "-c", shell.format(command)],
        input=stdin,
        capture_output=True,
        env=os.environ | environment,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("words", "shell", "code", "out", "err"),
    [
        ("generate x --max-tokens 2 --quiet", "{} <&-", 0, b"xqr\n", b""),
        ("generate -", "{} <&-", 2, b"", b"PROMPT: got an empty standard input"),
        ("generate x", "{} >&-", 2, b"", b"standard output: got a closed one"),
        ("generate x --max-tokens 2", "{} 2>&-", 0, b"xqr\n", b""),
        ("generate ''", "{} 2>&-", 2, b"", b""),
        ("generate x", "{} <&- >&- 2>&-", 2, b"", b""),
        ("generate x", "{} >/dev/full", 1, b"", b"dflash-rs: error: standard output: No space left on device\n"),
        ("--help", "{} >/dev/full", 1, b"", b"dflash-rs: error: standard output: No space left on device\n"),
        ("generate x --max-tokens 300 --quiet", "{} | head -c 1; exit ${{PIPESTATUS[0]}}", 0, b"x", b""),
        ("generate ''", "{} 2> >(exec <&-)", 2, b"", b""),
        (
            "bench --json - --prompts 1 --max-tokens 2 --repeat 1",
            "{} >/dev/full",
            1,
            b"",
            b"standard output: No space left",
        ),
        ("doctor --nothing", "{} >&-", 2, b"", b"unrecognized arguments: --nothing"),
        ("--help", "{} >&-", 2, b"", b"standard output: got a closed one"),
        ("train target --help", "{} >&-", 2, b"", b"standard output: got a closed one"),
        ("--version", "{} >&-", 2, b"", b"standard output: got a closed one"),
    ],
)
def test_streams_that_are_closed_full_or_left_cost_no_traceback(words, shell, code, out, err):
    done = outside(words, shell=shell)
    assert (done.returncode, done.stdout) == (code, out), done.stderr
    assert err in done.stderr if err else done.stderr == b""
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr


def test_what_a_terminal_cannot_show_is_an_escape():
    done = outside("generate '→ü' --max-tokens 2 --quiet", PYTHONIOENCODING="latin-1")
    assert done.returncode == 0 and done.stdout.startswith(b"\\u2192\xfc"), done
    # Where the locale knows ASCII only, words and input are taken for UTF-8.
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = outside("generate '→ü' --max-tokens 2 --quiet", **plain)
    assert done.returncode == 0 and done.stdout.startswith(b"\\u2192\\xfc"), done
    done = outside("generate - --json --max-tokens 2", stdin="→".encode(), **plain)
    assert json.loads(done.stdout)["prompt"] == "→", done


def test_input_that_is_no_text_is_refused_and_a_byte_order_mark_is_none_of_it():
    done = outside("generate -", stdin=b"a\xffb")
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"PROMPT: got standard input that is not UTF-8 (byte 1)" in done.stderr
    done = outside("generate - --json --max-tokens 2", stdin=b"\xef\xbb\xbfa\r\nb\n")
    assert json.loads(done.stdout)["prompt"] == "a\r\nb\n"


WITHOUT = """
import sys
class Gone:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("torch", "transformers", "tokenizers", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Gone())
from dflash_rs.cli import main
for words in sys.argv[1:]:
    try:
        code = main(words.split())
    except SystemExit as end:
        code = end.code
    print("CODE", code, flush=True)
"""


def test_without_torch_every_help_works_and_the_rest_says_what_to_install(tmp_path):
    helps = [f"{kind.prog.removeprefix('dflash-rs').strip()} --help" for kind in parsers()]
    train = f"train target --corpus {tmp_path / 'corpus'} --out {tmp_path / 'out'}"
    command = [sys.executable, "-c", WITHOUT, *helps, "generate x", train]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert re.findall(r"^CODE (\d+)$", done.stdout, re.MULTILINE) == ["0"] * len(helps) + ["1", "1"], done.stderr
    assert done.stderr == (
        f"dflash-rs: error: LLM needs torch and transformers (No module named 'torch'): {extras.install('torch')}\n"
        f"dflash-rs: error: this needs torch: {extras.install('torch')}\n"
    )


INTERRUPTED = """
import os, signal, sys
stage = sys.argv[1]
signal.signal(signal.SIGINT, signal.default_int_handler)
def interrupt(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)
if stage == "import":
    class Slow:
        def find_spec(self, name, *_):
            if name == "torch":
                interrupt()
    sys.meta_path.insert(0, Slow())
elif stage == "input":
    sys.stdin.read = interrupt
elif stage == "close":
    from dflash_rs import llm
    llm.LLM = type("LLM", (), {
        "__init__": lambda self, **_: None, "stream": lambda self, *_: interrupt(), "close": interrupt,
    })
from dflash_rs.cli import main
sys.exit(main(["generate", "-" if stage == "input" else "x"]))
"""


@pytest.mark.parametrize("stage", ["import", "input", "close"])
def test_ctrl_c_at_any_stage_ends_with_code_130_and_no_traceback(stage):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, stage],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n")
