"""The command `dflash-rs`: generate, bench, train, doctor.

Nothing heavy is imported before the arguments are understood: `--help` and a misspelt option answer at once.
Results go to standard output, everything said about them to standard error, so that output can be piped. Text is written in
the terminal's encoding, what it cannot show as an escape; JSON is ASCII.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
import json
import os
import re
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from typing import Any, TextIO

from dflash_rs.errors import DflashError, InvalidArgument, OutOfPages

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

EXIT_CODES = """exit codes:
  0    done
  1    it failed while running (for `bench`: also when a float32 text differs with drafting;
       for `doctor`: when the bundled pair cannot generate, or SGLang cannot serve)
  2    the arguments, a prompt or a checkpoint cannot be used
  130  interrupted with Ctrl-C"""

# The extra that brings a module, for the message when it is missing.
EXTRAS = {
    "torch": "torch",
    "transformers": "torch",
    "tokenizers": "torch",
    "safetensors": "torch",
    "rich": "torch",
    "matplotlib": "bench",
}


class Unwritable(DflashError):
    """Standard output takes no more: the disk is full, for example."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; of what a user did only SystemExit leaves it, argparse's."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        closed = prepare_streams()
        try:
            code = _run(arguments, debug, closed)
        except SystemExit:  # argparse's, after --help for example
            emit("")
            raise
        emit("")
        return code
    except KeyboardInterrupt:
        _say("\ninterrupted")
        _settle(sys.stdout)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left (`| head`): nothing to say, and nobody to say it to.
        _settle(sys.stdout, sys.stderr)
        return OK
    except Unwritable as error:
        _settle(sys.stdout)
        return _complain(str(error), FAILED, debug)
    except ModuleNotFoundError as error:
        module = (error.name or "").split(".")[0]
        if module not in EXTRAS:
            return _crash(error, debug)
        return _complain(f"this needs {module}: pip install 'dflash-rs[{EXTRAS[module]}]'", FAILED, debug)
    except DflashError as error:
        return _complain(str(error), BAD_INPUT if isinstance(error, ValueError | OutOfPages) else FAILED, debug)
    except Exception as error:  # the last net: a defect is reported, not dumped
        return _crash(error, debug)


def _run(arguments: Sequence[str], debug: bool, closed: set[str]) -> int:
    args = build_parser().parse_args(arguments)
    args.words = list(arguments)
    if "stdout" in closed:
        raise InvalidArgument("standard output: got a closed one, expected a place to write to (> /dev/null discards)")
    prepare_libraries()
    with warnings.catch_warnings():
        if not debug:
            warnings.showwarning = _warn
        return args.run(args)


def _warn(message: Warning | str, *_: Any) -> None:
    _say(f"dflash-rs: warning: {message}")


def _say(message: str) -> None:
    # Ctrl-C ends the reader of a pipe, too, and what is left to say must not change the exit code.
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:
        _settle(sys.stderr)


def _complain(message: str, code: int, debug: bool = False) -> int:
    _say((traceback.format_exc() if debug else "") + f"dflash-rs: error: {message}")
    return code


def _crash(error: Exception, debug: bool) -> int:
    advice = "" if debug else "\nRun the same command with --debug for the traceback."
    return _complain(f"{type(error).__name__}: {error}{advice}", FAILED, debug)


# --- streams -----------------------------------------------------------------------------------------------------


def prepare_streams() -> set[str]:
    """Makes the three standard streams safe to use, and returns the names of those that the caller had closed.

    A descriptor that is free would be given to the next file that is opened, and then be written to by whoever means the
    stream. And no character that a terminal cannot show may end the command.
    """
    closed = {name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None}
    if closed:
        while (free := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(free)
    for name in closed:
        setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    return closed


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Has what is written to standard output within arrive: whoever reads along sees it now."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Unwritable(f"standard output: {error.strerror or error}") from None


def emit(text: str) -> None:
    """Writes to standard output, at once."""
    with writing():
        sys.stdout.write(text)


def _settle(*streams: TextIO) -> None:
    """Has these streams flushed, or, where nobody takes it, what they hold and what comes go nowhere: the interpreter flushes
    them when it exits, and answers a failure with a traceback and a code of its own."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def as_text(name: str, text: str) -> str:
    """A word of the command line, whose bytes are taken for UTF-8 where the locale could not read them."""
    if text.isascii() or not re.search("[\ud800-\udfff]", text):
        return text
    try:
        return os.fsencode(text).decode()
    except UnicodeError as error:
        raise InvalidArgument(f"{name}: got bytes that are not UTF-8 (byte {error.start}), expected text") from None


def read_all(stdin: TextIO) -> str:
    """The text on standard input; in the locale's encoding, where that is more than ASCII, else UTF-8."""
    if isinstance(stdin, io.TextIOWrapper):
        own = codecs.lookup(stdin.encoding).name
        stdin.reconfigure(encoding="utf-8" if own == "ascii" else own, errors="strict")
    try:
        return stdin.read().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        kind = error.encoding.upper()
        raise InvalidArgument(
            f"PROMPT: got standard input that is not {kind} (byte {error.start}), expected text"
        ) from None
    except OSError as error:  # a folder, for example
        raise InvalidArgument(f"PROMPT: standard input cannot be read: {error.strerror or error}") from None


# --- arguments ---------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="dflash-rs",
        description="Lossless DFlash speculative decoding.",
        epilog="""examples:
  dflash-rs generate 'def fibonacci(n):' --max-tokens 64
  dflash-rs bench --suite demo
  dflash-rs doctor

Every command says more, and how to use it, with --help.

"""
        + EXIT_CODES,
        formatter_class=formatter,
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    generate = commands.add_parser(
        "generate",
        help="complete prompts and show which tokens were drafted",
        description="Complete prompts with the bundled pair or with your own models.",
        formatter_class=formatter,
        epilog="""examples:
  dflash-rs generate 'def fibonacci(n):' --max-tokens 64
  dflash-rs generate --example 3 --temperature 0.7 --seed 1
  echo 'class Stack:' | dflash-rs generate - --json
  dflash-rs generate --prompt-file prompts.txt --json --max-tokens 256 > answers.jsonl
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
    generate.add_argument("--example", type=_positive, metavar="N", help="the N-th bundled held-out prompt")
    engine = _add_engine(generate)
    engine.add_argument(
        "--max-running", type=_positive, metavar="N", help="prompts that are answered at a time; default: 32"
    )
    generate.add_argument("--no-draft", action="store_true", help="decode without speculation: the same text, slower")
    _add_sampling(generate)
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
    _add_debug(generate)
    generate.set_defaults(run=run_generate)

    bench = commands.add_parser(
        "bench",
        help="measure DFlash against plain decoding",
        description=(
            "Measure tokens/s with and without drafting on the same engine in one run, and check that the texts agree.\n"
            "Beside each tau stand the tau of a prompt look-up on the same outputs and their share of repeated 4-grams."
        ),
        formatter_class=formatter,
        epilog="""examples:
  dflash-rs bench --suite demo
  dflash-rs bench --suite demo --concurrency 1,2,4,8 --json results.json --plot speedup.png
  dflash-rs bench --suite demo --profile --temperature 0
  dflash-rs bench --suite reference --json -      (needs: pip install --no-deps dflash==0.1.0)

"""
        + EXIT_CODES,
    )
    bench.add_argument("--suite", choices=("demo", "reference"), default="demo", help="default: demo")
    bench.add_argument(
        "--concurrency", type=_integers, default=(1,), metavar="N,N", help="requests at once; default: 1"
    )
    bench.add_argument(
        "--temperature",
        type=_temperatures,
        metavar="T,T",
        help="default: 0,0.7 (reference: 0); above 0 runs are seeded",
    )
    bench.add_argument(
        "--seed", type=_seed, default=1, metavar="N", help="prompt i is sampled with seed + i; default: 1"
    )
    bench.add_argument("--repeat", type=_positive, default=3, metavar="N", help="runs per arm; default: 3")
    bench.add_argument("--prompts", type=_positive, metavar="N", help="use the first N prompts; default: all")
    bench.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="your prompts instead of the bundled held-out ones: JSON list, JSON lines, or one per line; UTF-8",
    )
    bench.add_argument("--max-tokens", type=_positive, default=96, metavar="N", help="per prompt; default: 96")
    _add_engine(bench)
    bench.add_argument("--json", metavar="PATH", help="write header and rows; - writes to standard output")
    bench.add_argument("--plot", metavar="FILE.png", help="draw speed-up over concurrency and the acceptance histogram")
    bench.add_argument("--profile", action="store_true", help="show where the step's time goes")
    _add_debug(bench)
    bench.set_defaults(run=run_bench)

    train = commands.add_parser(
        "train",
        help="train a small target, or a DFlash drafter for a target",
        description="Train a small target model, or a DFlash drafter for an existing target.",
        formatter_class=formatter,
        epilog="""examples:
  dflash-rs train target --corpus runs/corpus --out runs/target
  dflash-rs train responses --target runs/target --corpus runs/corpus --out runs/responses
  dflash-rs train drafter --target runs/target --responses runs/responses --corpus runs/corpus --out runs/draft
  dflash-rs train report --target runs/target --draft runs/draft --prompts runs/prompts.json

Every step says with --help what it reads and writes. For training at large scale see docs/training.md.

"""
        + EXIT_CODES,
    )
    from dflash_rs.train.cli import add_parsers

    kinds = train.add_subparsers(metavar="WHAT", required=True)
    add_parsers(kinds)
    for kind in kinds.choices.values():
        _add_debug(kind)

    doctor = commands.add_parser(
        "doctor",
        help="say what works here, what is missing and how to get it",
        description="Look at this machine and installation; exit code 0 when the bundled pair generates, with --sglang when "
        "SGLang can serve with DFLASH_RS.",
        formatter_class=formatter,
        epilog="examples:\n  dflash-rs doctor\n  dflash-rs doctor --json\n  dflash-rs doctor --sglang\n\n" + EXIT_CODES,
    )
    doctor.add_argument(
        "--sglang", action="store_true", help="look at the SGLang worker instead of the embedded engine"
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object instead of text")
    _add_debug(doctor)
    doctor.set_defaults(run=run_doctor)
    return parser


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **_: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from dflash_rs import __version__

        emit(f"dflash-rs {__version__}\n")
        parser.exit(OK)


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _add_engine(parser: argparse.ArgumentParser) -> Any:
    group = parser.add_argument_group("models and engine")
    group.add_argument("--model", metavar="PATH", help="target: folder or Hugging Face id; default: the bundled pair")
    group.add_argument("--draft", metavar="PATH", help="its DFlash drafter: folder or Hugging Face id")
    group.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ...; default: auto")
    group.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16; default: auto")
    group.add_argument(
        "--matmul-precision",
        choices=("highest", "medium", "auto"),
        help="medium multiplies in bfloat16 (float32 on a CPU only), auto does where the processor can; default: auto for "
        "the bundled pair, highest for other models and for --suite reference",
    )
    group.add_argument(
        "--threads",
        type=_positive,
        metavar="N",
        help="CPU threads; default: at most 2 for the bundled pair, else torch's choice",
    )
    group.add_argument(
        "--block-size", type=_positive, metavar="B", help="anchor and B-1 drafts; default: the drafter's"
    )
    group.add_argument(
        "--tree-nodes",
        type=_positive,
        metavar="N",
        help="draft trees of at most N tokens; default: chains, one token per place",
    )
    group.add_argument(
        "--no-adaptive",
        action="store_false",
        default=None,
        dest="adaptive",
        help="draft and verify whole blocks, however little it pays; the same text",
    )
    group.add_argument("--page-size", type=_positive, metavar="N", help="tokens per KV page; default: 16")
    group.add_argument(
        "--num-pages",
        type=_positive,
        metavar="N",
        help="KV pages in the pool; default: what running prompts can fill, within 512 MiB",
    )
    group.add_argument(
        "--max-context",
        type=_positive,
        metavar="N",
        help="tokens of a prompt and its text together; default: the target's limit",
    )
    return group


# How an option of SamplingParams is read from the command line, by the type of its field.
_READS: dict[str, dict[str, Any]] = {
    "int": {"type": int},
    "int | None": {"type": int},
    "float": {"type": float},
    "bool": {"action": "store_true", "default": None},
    "str | Sequence[str]": {"action": "append"},
    "Sequence[int]": {"action": "append", "type": int},
    "Mapping[int, float]": {"action": "append", "type": lambda text: _bias(text)},
}


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    from dflash_rs.sampling import SamplingParams

    group = parser.add_argument_group("sampling (honoured exactly, with and without drafting)")
    for option in fields(SamplingParams):
        reads = dict(_READS[option.type])
        if option.metadata["metavar"] is not None:
            reads["metavar"] = option.metadata["metavar"]
        # What may be given repeatedly names one at a time.
        name = option.name.removesuffix("s") if option.type == "Sequence[int]" else option.name
        group.add_argument("--" + name.replace("_", "-"), dest=option.name, help=option.metadata["help"], **reads)


def _positive(text: str) -> int:
    digits = text.strip()
    # More digits than any size has, and Python converts some thousands at most.
    value = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 20 else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of at least 1")
    return value


def _integers(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of at least 0")
    return int(text)


def _temperatures(text: str) -> tuple[float, ...]:
    from dflash_rs.sampling import SamplingParams

    try:
        return tuple(float(SamplingParams(temperature=float(part)).temperature) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected temperatures, for example 0,0.7") from None


def _bias(text: str) -> tuple[int, float]:
    token, equals, value = text.partition("=")
    try:
        if not equals:
            raise ValueError
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected TOKEN_ID=BIAS, for example 42=-1.5") from None


# --- what the commands share ---------------------------------------------------------------------------------------


def prepare_libraries() -> None:
    """Keeps the loaders' progress bars and notes out of our streams, and torch's threads from waiting awake for long. Only works
    before their first import."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "OMP_WAIT_POLICY" not in os.environ:
        # Turns of a loop: about half a millisecond. Left alone it is sixteen of them at every operation whose threads are not all
        # there, which on a busy machine is nearly every one.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def make_engine(args: argparse.Namespace, **more: Any) -> Any:
    """`dflash_rs.LLM` with the options that were given; its own defaults hold for the others."""
    plain = getattr(args, "no_draft", False)
    if args.draft is not None and args.model is None:
        raise InvalidArgument("--draft: got a drafter without --model; a drafter belongs to one target")
    if args.draft is not None and plain:
        raise InvalidArgument("--no-draft: got --draft, too; expected one of them")
    if args.model is not None and args.draft is None and not plain:
        raise InvalidArgument("--model: got a target without a drafter, expected --draft PATH or --no-draft, too")
    from dflash_rs.llm import LLM

    names = (
        "model",
        "draft",
        "device",
        "dtype",
        "matmul_precision",
        "threads",
        "block_size",
        "tree_nodes",
        "adaptive",
        "page_size",
        "num_pages",
        "max_context",
        "max_running",
    )
    options = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    if plain:
        options["draft"] = None
    if args.model is None and args.matmul_precision is None and getattr(args, "suite", None) != "reference":
        options["matmul_precision"] = "auto"
    if args.model is None and args.threads is None:
        # Its matrices are small: two threads share a block's products well, more were never measured.
        options["threads"] = min(
            2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )
    return LLM(**(options | more))


def sampling_from(args: argparse.Namespace) -> Any:
    """SamplingParams with the options that were given."""
    from dflash_rs.sampling import SamplingParams

    given = {option.name: getattr(args, option.name) for option in fields(SamplingParams)}
    options = {name: value for name, value in given.items() if value is not None}
    if args.logit_bias is not None:
        options["logit_bias"] = dict(args.logit_bias)
        if len(options["logit_bias"]) < len(args.logit_bias):
            named = [token for token, _ in args.logit_bias]
            twice = next(token for token in named if named.count(token) > 1)
            raise InvalidArgument(f"--logit-bias: got token id {twice} {named.count(twice)} times, expected it once")
    if args.stop is not None:
        stops = [as_text("--stop", text) for text in args.stop]
        options["stop"] = [text.replace("\\n", "\n").replace("\\t", "\t") for text in stops]
    return SamplingParams(**options)


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
                _say("Type the prompt; Ctrl-D on a line of its own ends it.")
            text = read_all(stdin)
            if not text:
                raise InvalidArgument("PROMPT: got an empty standard input, expected at least one character")
        text = as_text("PROMPT", text)
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


# --- generate ------------------------------------------------------------------------------------------------------


class Painter:
    """Text with a style when colour is on: accepted drafts, the model's own tokens, the prompt, a refusal."""

    STYLES = {"draft": "32", "own": "1;33", "prompt": "2", "bad": "1;31"}

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    @classmethod
    def choose(cls, wish: str, stream: TextIO) -> Painter:
        """`auto` follows the terminal and the NO_COLOR convention (set and not empty: no colour)."""
        if wish != "auto":
            return cls(wish == "always")
        dumb = os.environ.get("TERM") == "dumb"
        return cls(stream.isatty() and not os.environ.get("NO_COLOR") and not dumb)

    def __call__(self, style: str, text: str) -> str:
        if not self.enabled or not text:
            return text
        return f"\x1b[{self.STYLES[style]}m{text}\x1b[0m"

    def legend(self) -> str:
        """One line that explains the colours; empty without colour."""
        if not self.enabled:
            return ""
        return f"{self('draft', 'accepted drafts')}  {self('own', 'the model itself')}  {self('prompt', 'prompt')}\n"


def split_delta(event: Any, decode: Callable[[list[int]], str]) -> tuple[str, str]:
    """An event's text as (accepted drafts, the model's own token); the two joined are exactly the event's text.

    The event carries one text for all its tokens. Its own last token is found at the end of that text; where it is
    not there (a character spread over two tokens, a stop string cut off) the whole text goes to the larger share.
    """
    own = event.token_ids[event.accepted :]
    if not own:
        return event.text, ""
    if event.accepted == 0:
        return "", event.text
    tail = decode(list(own))
    if tail and event.text.endswith(tail):
        return event.text[: len(event.text) - len(tail)], tail
    return event.text, ""


class Ordered:
    """Writes several interleaved streams in the order of their prompts: the first one live, the rest when it ends."""

    def __init__(self, count: int, write: Callable[[str], None]) -> None:
        self._write = write
        self._waiting: list[list[str]] = [[] for _ in range(count)]
        self._done = [False] * count
        self._turn = 0

    def add(self, index: int, text: str, done: bool = False) -> None:
        """Takes one piece of stream `index`; `done` ends it."""
        if index == self._turn:
            self._write(text)
        else:
            self._waiting[index].append(text)
        self._done[index] = self._done[index] or done
        while self._turn < len(self._done) and self._done[self._turn]:
            self._turn += 1
            if self._turn < len(self._done):
                self._write("".join(self._waiting[self._turn]))


class Progress:
    """One line on a terminal that says how many prompts are done. It is taken away before anything else is written, and left
    out where it would share the terminal with streamed text."""

    EVERY = 0.1  # seconds

    def __init__(self, total: int, stream: TextIO | None) -> None:
        self.total, self._stream = total, stream
        self._begin = time.monotonic()
        self._last = -self.EVERY
        self._shown = False

    @classmethod
    def choose(cls, args: argparse.Namespace, total: int) -> Progress:
        """On standard error, if that is a terminal and there are several prompts to wait for."""
        fits = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and (args.json or not sys.stdout.isatty())
        return cls(total, sys.stderr if fits and total > 1 and not args.quiet else None)

    def show(self, done: int, tokens: int) -> None:
        """So many prompts are done, so many tokens were written."""
        now = time.monotonic()
        if self._stream is None or now - self._last < self.EVERY:
            return
        self._last = now
        rate = tokens / max(now - self._begin, 1e-9)
        line = f"{done} of {self.total} prompts, {tokens} tokens, {rate:.0f} tokens/s"
        room = shutil.get_terminal_size().columns - 1
        self._stream.write(f"\r\x1b[K{line[:room]}")
        self._stream.flush()
        self._shown = True

    def clear(self) -> None:
        """Takes the line away."""
        if self._stream is not None and self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._shown = False


def run_generate(args: argparse.Namespace) -> int:
    """`dflash-rs generate`."""
    if args.logprobs is not None and not args.json:
        raise InvalidArgument(f"--logprobs: got {args.logprobs} without --json, which alone shows log-probabilities")
    prompts = collect_prompts(args, sys.stdin)
    params = sampling_from(args)
    llm = make_engine(args)
    progress = Progress.choose(args, len(prompts))
    try:
        paint = None if args.json else Painter.choose(args.color, sys.stdout)
        outputs = stream_outputs(llm, prompts, params, paint, progress)
    finally:
        progress.clear()
        llm.close()
    code = OK
    for i, output in enumerate(outputs):
        if output.finish_reason == "error":
            code = _complain(f"{called(i, prompts)}: {output.error or 'the engine gave no reason'}", FAILED)
        elif not args.quiet and not args.json:
            _say(summary(output))
    return code


def called(index: int, prompts: Sequence[Any]) -> str:
    """How messages call a prompt: by its number, and by where it stands if that is elsewhere."""
    where = prompts[index].where
    return f"prompt {index + 1}" + (f" ({where})" if where else "")


def stream_outputs(
    llm: Any, prompts: Sequence[Any], params: Any, paint: Painter | None, progress: Progress
) -> list[Any]:
    """Answers all prompts at once and writes them in order, text as it comes or, without `paint`, JSON as it is done; returns the
    finished outputs."""

    def write(text: str) -> None:
        if text:
            progress.clear()
            emit(text)

    # What cannot be taken is refused here, before anything is written.
    events = begin(llm, prompts, params)
    ordered = Ordered(len(prompts), write)
    finished: list[Any] = [None] * len(prompts)
    if paint is not None:
        write(paint.legend())
        for i, prompt in enumerate(prompts):
            ordered.add(i, paint("prompt", prompt.text))
    done = tokens = 0
    for event in events:
        tokens += len(event.token_ids)
        if paint is not None:
            drafted, own = split_delta(event, llm.decode)
            ordered.add(event.index, paint("draft", drafted) + paint("own", own))
        if event.finish_reason is not None:
            done += 1
            finished[event.index] = event.output
            if paint is None:
                end = json.dumps(output_json(event.output, prompts[event.index])) + "\n"
            else:
                end = "\n\n" if len(prompts) > 1 else "\n"
            ordered.add(event.index, end, done=True)
        progress.show(done, tokens)
    return finished


def begin(llm: Any, prompts: Sequence[Any], params: Any) -> Any:
    """The events of all prompts. A prompt that cannot be taken is an error that names it."""
    try:
        return llm.stream([prompt.text for prompt in prompts], params)
    except (InvalidArgument, OutOfPages) as error:
        # One that comes of a prompt alone is about that prompt, unless it is about an option.
        for i, prompt in enumerate(prompts):
            try:
                llm.stream([prompt.text], params).close()
            except type(error) as alone:
                own = re.match(r"prompts?(\[\d+\])?: ", str(alone))
                if own or isinstance(alone, OutOfPages):
                    said = str(alone)[own.end() if own else 0 :]
                    raise type(error)(f"{called(i, prompts)}: {said}") from None
        raise


def output_json(output: Any, prompt: Any) -> dict[str, Any]:
    """An output as `generate --json` prints it."""
    return {
        "prompt": prompt.text,
        "text": output.text,
        "token_ids": list(output.token_ids),
        "finish_reason": output.finish_reason,
        "logprobs": None if output.logprobs is None else [asdict(one) for one in output.logprobs],
        "metrics": output.metrics,
        "error": output.error,
    }


def summary(output: Any) -> str:
    """One line about a finished output."""
    m = output.metrics
    parts = [f"{m['output_tokens']} tokens in {m['total_s']:.2f} s", f"{m['tokens_per_s']:.1f} tokens/s"]
    if m["steps"]:
        parts.append(f"tau {m['tau']:.2f} over {m['steps']} passes")
    parts.append(f"first token after {1000 * m['ttft_s']:.0f} ms")
    if m.get("seed") is not None:
        parts.append(f"seed {m['seed']}")
    return f"[{', '.join(parts)}; ended by {output.finish_reason}]"


# --- bench, doctor ---------------------------------------------------------------------------------------------------


def run_bench(args: argparse.Namespace) -> int:
    """`dflash-rs bench`."""
    from dflash_rs.bench import report
    from dflash_rs.bench.runner import Plan, run_demo
    from dflash_rs.bench.workloads import Setting, held_out_prompts, read_prompts
    from dflash_rs.sampling import SamplingParams

    default = (0.0,) if args.suite == "reference" else (0.0, 0.7)
    temperatures = args.temperature or default
    settings = tuple(Setting(t, args.seed if t > 0 else None) for t in temperatures)
    plan = Plan(settings, args.concurrency, args.repeat, args.max_tokens, args.profile)
    if args.plot is not None and args.json is not None and os.path.realpath(args.plot) == os.path.realpath(args.json):
        raise InvalidArgument(f"--plot: got {args.plot}, expected another file than --json")
    prompts = read_prompts(args.prompt_file, args.prompts) if args.prompt_file else held_out_prompts(args.prompts)
    if args.plot is not None:
        report.need_matplotlib(args.plot)
        report.need_place("--plot", args.plot)
    if args.json not in (None, "-"):
        report.need_place("--json", args.json)

    heads: list[dict[str, Any]] = []

    def engine(concurrency: int) -> Any:
        # Without prefix reuse: every run computes its prompts itself, whichever arm ran before.
        llm = make_engine(args, max_running=concurrency, prefix_cache=False)
        if not heads:
            try:
                begin(llm, prompts, SamplingParams(max_tokens=args.max_tokens)).close()
            except BaseException:
                llm.close()
                raise
            heads.append(report.header(args.words, llm))
        return llm

    if args.suite == "reference":
        from dflash_rs.bench.reference import ReferenceLoop, run_reference

        ReferenceLoop.require()
        rows = run_reference(engine, ReferenceLoop.beside, prompts, plan, _say)
    else:
        rows = run_demo(engine, prompts, plan, _say)

    lines = [report.table(rows), report.machine(heads[0]), *report.remarks(rows)]
    if args.profile:
        lines.append(report.profile_table(rows))
    if args.json == "-":
        _say("\n".join(lines))
    else:
        emit("\n".join(lines) + "\n")
    if args.json == "-":
        with writing():
            report.write_json(args.json, heads[0], rows)
    elif args.json is not None:
        report.write_json(args.json, heads[0], rows)
    if args.plot is not None:
        report.plot(args.plot, heads[0], rows)
    differs = any(not row.identical_to_plain for row in rows if row.mode != "z-lab")
    return FAILED if differs and heads[0].get("dtype") == "float32" else OK


def run_doctor(args: argparse.Namespace) -> int:
    """`dflash-rs doctor`."""
    from dflash_rs import doctor

    checks = doctor.examine_part("sglang") if args.sglang else doctor.examine()
    job = ("SGLang", "serve") if args.sglang else ("The bundled pair", "generate")
    if args.json:
        emit(json.dumps(doctor.to_json(checks), indent=2) + "\n")
    else:
        emit(doctor.to_text(checks, Painter.choose("auto", sys.stdout), job) + "\n")
    return OK if doctor.works(checks) else FAILED


if __name__ == "__main__":
    sys.exit(main())
