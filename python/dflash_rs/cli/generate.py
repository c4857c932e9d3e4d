"""`dflash-rs generate`: completes prompts and shows which tokens were drafted."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO

from dflash_rs.arguments import shown
from dflash_rs.cli import console, engine
from dflash_rs.cli.arguments import EXIT_CODES, FORMATTER, add_debug, add_engine, positive
from dflash_rs.cli.display import Ordered, Painter, Progress, output_json, split_delta, summary
from dflash_rs.errors import InvalidArgument


def add(commands: Any) -> None:
    """Adds the command."""
    generate = commands.add_parser(
        "generate",
        help="complete prompts and show which tokens were drafted",
        description="Complete prompts with the bundled pair or with your own models.",
        formatter_class=FORMATTER,
        epilog="""examples:
  dflash-rs generate 'def fibonacci(n):' --max-tokens 64
  dflash-rs generate --example 3 --temperature 0.7 --seed 1
  dflash-rs generate 'def mean(' --temperature 1 --n 4 --json
  echo 'class Stack:' | dflash-rs generate - --json
  dflash-rs generate --prompt-file prompts.txt --json --max-tokens 256 > answers.jsonl
  dflash-rs generate 'x = ' --regex '[0-9]+;' --temperature 1
  dflash-rs generate --model Qwen/Qwen3-4B --draft path/to/Qwen3-4B-DFlash-b16 'Prove that 2 is prime.'

"""
        + EXIT_CODES,
    )
    generate.add_argument(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help="text to continue; - reads it from standard input; after -- it may begin with a dash",
    )
    generate.add_argument("--prompt-file", metavar="FILE", help="JSON list, JSON lines, or one prompt per line; UTF-8")
    generate.add_argument("--example", type=positive, metavar="N", help="the N-th bundled held-out prompt")
    group = add_engine(generate)
    group.add_argument(
        "--max-running", type=positive, metavar="N", help="prompts that are answered at a time; default: 32"
    )
    generate.add_argument("--no-draft", action="store_true", help="decode without speculation: the same text, slower")
    add_sampling(generate)
    generate.add_argument(
        "--json",
        action="store_true",
        help="one JSON object per prompt and line, in the order of the prompts, each as soon as it and those before it are done",
    )
    generate.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="auto: on a terminal unless NO_COLOR is set",
    )
    generate.add_argument("--quiet", action="store_true", help="no summary and no progress on standard error")
    add_debug(generate)
    generate.set_defaults(run=run)


# How an option of SamplingParams is read from the command line, by the type of its field.
_READS: dict[str, dict[str, Any]] = {
    "int": {"type": int},
    "int | None": {"type": int},
    "float": {"type": float},
    "bool": {"action": "store_true", "default": None},
    "str | Sequence[str]": {"action": "append"},
    "Sequence[int]": {"action": "append", "type": int},
    "Sequence[int] | None": {"action": "append", "type": int},
    "Sequence[str]": {"action": "append"},
    "Mapping[int, float]": {"action": "append", "type": lambda text: _bias(text)},
}


def add_sampling(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """Adds the options of SamplingParams, but those named in `without`."""
    from dflash_rs.sampling import SamplingParams

    group = parser.add_argument_group("sampling (honoured exactly, with and without drafting)")
    for option in fields(SamplingParams):
        told = option.metadata["help"]
        if option.name in without or told is None or str(option.type) not in _READS:
            continue
        reads = dict(_READS[str(option.type)])
        if option.metadata["metavar"] is not None:
            reads["metavar"] = option.metadata["metavar"]
        # What may be given repeatedly names one at a time.
        name = option.name.removesuffix("s") if str(option.type).startswith("Sequence[") else option.name
        group.add_argument("--" + name.replace("_", "-"), dest=option.name, help=told, **reads)
    group.add_argument(
        "--special-tokens",
        action="store_false",
        default=None,
        dest="skip_special_tokens",
        help="show tokens that are no text by their names",
    )
    shape = parser.add_argument_group("what the text has to be (one of these)")
    shape.add_argument(
        "--json-schema", metavar="SCHEMA", help="JSON that this schema describes: the schema, or a file with it"
    )
    shape.add_argument("--json-object", action="store_true", default=None, help="any JSON object")
    shape.add_argument("--regex", metavar="REGEX", help="what this regular expression matches as a whole")
    shape.add_argument("--choice", action="append", metavar="TEXT", help="one of these; given repeatedly")
    shape.add_argument(
        "--ebnf", metavar="GRAMMAR", help="what this grammar (root ::= ...) derives: the grammar, or a file with it"
    )


def _bias(text: str) -> tuple[int, float]:
    token, equals, value = text.partition("=")
    try:
        if not equals:
            raise ValueError
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected TOKEN_ID=BIAS, for example 42=-1.5") from None


def run(args: argparse.Namespace) -> int:
    """`dflash-rs generate`."""
    for name, count in (("--logprobs", args.logprobs), ("--prompt-logprobs", args.prompt_logprobs)):
        if count is not None and not args.json:
            raise InvalidArgument(f"{name}: got {count} without --json, which alone shows log-probabilities")
    prompts = collect_prompts(args, sys.stdin)
    params = sampling_from(args)
    llm = engine.make_engine(args)
    progress = Progress.choose(args, len(prompts) * params.n)
    try:
        paint = None if args.json else Painter.choose(args.color, sys.stdout)
        outputs = stream_outputs(llm, prompts, params, paint, progress)
    finally:
        progress.clear()
        llm.close()
    code = console.OK
    for i, output in enumerate(outputs):
        if output.finish_reason == "error":
            code = console.complain(
                f"{engine.called(i // params.n, prompts)}: {output.error or 'the engine gave no reason'}",
                console.FAILED,
            )
        elif not args.quiet and not args.json:
            console.say(summary(output, params))
    return code


def stream_outputs(
    llm: Any, prompts: Sequence[Any], params: Any, paint: Painter | None, progress: Progress
) -> list[Any]:
    """Answers all prompts at once and writes them in order, text as it comes or, without `paint`, JSON as it is done; returns the
    finished outputs, all answers to a prompt side by side."""

    def write(text: str) -> None:
        if text:
            progress.clear()
            console.emit(text)

    # What cannot be taken is refused here, before anything is written.
    events = engine.begin(llm, prompts, params)
    answers = params.n
    ordered = Ordered(len(prompts) * answers, write)
    finished: list[Any] = [None] * (len(prompts) * answers)
    if paint is not None:
        write(paint.legend())
        for i in range(len(finished)):
            ordered.add(i, paint("prompt", prompts[i // answers].text))
    done = tokens = 0
    for event in events:
        tokens += len(event.token_ids)
        place = event.index * answers + event.answer
        if paint is not None:
            drafted, own = split_delta(event, llm.decode)
            ordered.add(place, paint("draft", drafted) + paint("own", own))
        if event.finish_reason is not None:
            done += 1
            finished[place] = event.output
            if paint is None:
                end = json.dumps(output_json(event.output, prompts[event.index])) + "\n"
            else:
                end = "\n\n" if len(finished) > 1 else "\n"
            ordered.add(place, end, done=True)
        progress.show(done, tokens)
    return finished


def sampling_from(args: argparse.Namespace) -> Any:
    """SamplingParams with the options that were given."""
    from dflash_rs.sampling import SamplingParams

    given = {option.name: getattr(args, option.name, None) for option in fields(SamplingParams)}
    options = {name: value for name, value in given.items() if value is not None}
    if args.logit_bias is not None:
        options["logit_bias"] = dict(args.logit_bias)
        if len(options["logit_bias"]) < len(args.logit_bias):
            named = [token for token, _ in args.logit_bias]
            twice = next(token for token in named if named.count(token) > 1)
            raise InvalidArgument(f"--logit-bias: got token id {twice} {named.count(twice)} times, expected it once")
    if args.bad_words is not None:
        options["bad_words"] = [console.as_text("--bad-word", text) for text in args.bad_words]
    shape = {
        "json": _text_of("--json-schema", args.json_schema, "a JSON schema ({...})", "{"),
        "json_object": args.json_object,
        "regex": None if args.regex is None else console.as_text("--regex", args.regex),
        "choice": None if args.choice is None else [console.as_text("--choice", text) for text in args.choice],
        "grammar": _text_of("--ebnf", args.ebnf, "a grammar (root ::= ...)", ":"),
    }
    if any(value is not None for value in shape.values()):
        options["structured_outputs"] = {name: value for name, value in shape.items() if value is not None}
    if args.stop is not None:
        stops = [console.as_text("--stop", text) for text in args.stop]
        options["stop"] = [text.replace("\\n", "\n").replace("\\t", "\t") for text in stops]
    return SamplingParams(**options)


def _text_of(name: str, given: str | None, expected: str, mark: str) -> str | None:
    """What was given if it has the mark of such texts, else what is in the file of that name."""
    if given is None:
        return None
    text = console.as_text(name, given)
    if mark in text:
        return text
    try:
        return Path(text).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise InvalidArgument(f"{name}: got {shown(text)}, expected {expected} or a file with one ({why})") from None


def collect_prompts(args: argparse.Namespace, stdin: TextIO) -> list[Any]:
    """The prompts of `generate` in the order they will be answered."""
    from dflash_rs.bench.workloads import Prompt, held_out_prompts, read_prompts

    if args.prompts.count("-") > 1:
        raise InvalidArgument(f"PROMPT: got - {args.prompts.count('-')} times, expected it once: it takes all there is")
    prompts = []
    for text in args.prompts:
        where = ""
        if text == "-":
            where = "standard input"
            if stdin.isatty() and not args.quiet:
                console.say("Type the prompt; Ctrl-D on a line of its own ends it.")
            text = console.read_all(stdin)
            if not text:
                raise InvalidArgument("PROMPT: got an empty standard input, expected at least one character")
        text = console.as_text("PROMPT", text)
        if not text:
            raise InvalidArgument("PROMPT: got an empty text, expected at least one character")
        prompts.append(Prompt(text, where=where))
    if args.prompt_file is not None:
        prompts += read_prompts(args.prompt_file)
    if args.example is not None:
        examples = held_out_prompts()
        if args.example > len(examples):
            raise InvalidArgument(f"--example: got {args.example}, expected 1 to {len(examples)}")
        prompts.append(examples[args.example - 1])
    if not prompts:
        raise InvalidArgument("PROMPT: got none, expected a text, -, --prompt-file or --example N")
    return prompts
