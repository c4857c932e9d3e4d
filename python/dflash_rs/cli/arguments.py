"""Arguments that several commands take, and what is expected of their words."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from dflash_rs.cli import console

EXIT_CODES = """exit codes:
  0    done
  1    it failed while running (for `bench`: also when a float32 text differs with drafting;
       for `check`: when a text differs by more than rounding;
       for `doctor`: when the bundled pair cannot generate, or SGLang cannot serve)
  2    the arguments, a prompt or a checkpoint cannot be used
  130  interrupted with Ctrl-C"""

FORMATTER = argparse.RawDescriptionHelpFormatter


class Version(argparse.Action):
    """`--version`: shows it and ends."""

    def __init__(self, option_strings: Sequence[str], dest: str, **_: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from dflash_rs import __version__

        console.emit(f"dflash-rs {__version__}\n")
        parser.exit(console.OK)


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Adds `--debug`."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_engine(parser: argparse.ArgumentParser, *, drafters: bool = False) -> Any:
    """Adds what `engine.make_engine` takes, and returns the group. With `drafters`, `--draft` may be given several times: a list."""
    group = parser.add_argument_group("models and engine")
    group.add_argument(
        "--model",
        metavar="PATH",
        help="target: folder, GGUF file, Hugging Face id, a name of `dflash-rs models list`, or bundled-hybrid; default: the bundled pair",
    )
    group.add_argument(
        "--draft",
        metavar="PATH",
        action="append" if drafters else "store",
        help="its drafter (DFlash, MTP): folder or Hugging Face id; lookup: drafts from the text itself, for any target; default: what "
        "comes with a known or bundled model"
        + ("; may be repeated, each is measured beside plain decoding of its own" if drafters else ""),
    )
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
        type=positive,
        metavar="N",
        help="CPU threads; default: at most 2 for the bundled pair, else torch's choice",
    )
    group.add_argument("--block-size", type=positive, metavar="B", help="anchor and B-1 drafts; default: the drafter's")
    group.add_argument(
        "--tree-nodes",
        type=positive,
        metavar="N",
        help="draft trees of at most N tokens; default: chains, one token per place",
    )
    group.add_argument(
        "--lookup",
        action=argparse.BooleanOptionalAction,
        help="beside the drafter, look drafts up in the text itself, and take what promises more; the same text; default: where that can be",
    )
    group.add_argument(
        "--no-adaptive",
        action="store_false",
        default=None,
        dest="adaptive",
        help="draft and verify whole blocks, however little it pays; the same text",
    )
    group.add_argument("--page-size", type=positive, metavar="N", help="tokens per KV page; default: 16")
    group.add_argument(
        "--num-pages",
        type=positive,
        metavar="N",
        help="KV pages in the pool; default: what running prompts can fill, within 512 MiB",
    )
    group.add_argument(
        "--max-context",
        type=positive,
        metavar="N",
        help="tokens of a prompt and its text together; default: the target's limit",
    )
    return group


def positive(text: str) -> int:
    """An integer of at least 1."""
    digits = text.strip()
    # More digits than any size has, and Python converts some thousands at most.
    value = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 20 else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of at least 1")
    return value


def integers(text: str) -> tuple[int, ...]:
    """Integers of at least 1 between commas."""
    return tuple(positive(part) for part in text.split(","))


def seed(text: str) -> int:
    """An integer of at least 0 that fits into 63 bits."""
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of at least 0")
    return int(text)
