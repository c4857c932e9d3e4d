"""The command `dflash-rs`: generate, chat, bench, check, train, models, doctor.

Nothing heavy is imported before the arguments are understood: `--help` and a misspelt option answer at once.
Results go to standard output, everything said about them to standard error, so that output can be piped. Text is written in
the terminal's encoding, what it cannot show as an escape; JSON is ASCII. One file per command.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from dflash_rs import extras
from dflash_rs.cli import bench, chat, check, doctor, generate, models, train
from dflash_rs.cli.arguments import EXIT_CODES, FORMATTER, Version
from dflash_rs.cli.console import (
    BAD_INPUT,
    FAILED,
    INTERRUPTED,
    OK,
    Unwritable,
    complain,
    crash,
    emit,
    prepare_streams,
    say,
    settle,
    warn,
)
from dflash_rs.cli.engine import prepare_libraries
from dflash_rs.errors import DflashError, InvalidArgument, OutOfPages

__all__ = ["build_parser", "main"]

# The extra that brings a module, for the message when it is missing.
EXTRAS = {
    "torch": "torch",
    "transformers": "torch",
    "tokenizers": "torch",
    "safetensors": "torch",
    "gguf": "gguf",
    "llguidance": "structured",
    "rich": "torch",
    "matplotlib": "bench",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; of what a user did only SystemExit leaves it, argparse's."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        closed = prepare_streams()
        try:
            code = _run(arguments, debug, closed)
        except SystemExit as end:  # argparse's, after --help for example
            emit("")
            if not end.code and "stdout" in closed:
                raise _closed() from None
            raise
        emit("")
        return code
    except KeyboardInterrupt:
        say("\ninterrupted")
        settle(sys.stdout)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left (`| head`): nothing to say, and nobody to say it to.
        settle(sys.stdout, sys.stderr)
        return OK
    except Unwritable as error:
        settle(sys.stdout)
        return complain(str(error), FAILED, debug)
    except ModuleNotFoundError as error:
        module = (error.name or "").split(".")[0]
        if module not in EXTRAS:
            return crash(error, debug)
        return complain(f"this needs {module}: {extras.install(EXTRAS[module])}", FAILED, debug)
    except DflashError as error:
        return complain(str(error), BAD_INPUT if isinstance(error, ValueError | OutOfPages) else FAILED, debug)
    except Exception as error:  # the last net: a defect is reported, not dumped
        return crash(error, debug)


def _run(arguments: Sequence[str], debug: bool, closed: set[str]) -> int:
    parser = build_parser()
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        # The command's own usage, unless the word stands before the command.
        (parser if arguments[0].startswith("-") else args.parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    args.words = list(arguments)
    if "stdout" in closed:
        raise _closed()
    prepare_libraries()
    with warnings.catch_warnings():
        if not debug:
            warnings.showwarning = warn
        return args.run(args)


def _closed() -> InvalidArgument:
    return InvalidArgument("standard output: got a closed one, expected a place to write to (> /dev/null discards)")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
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
        formatter_class=FORMATTER,
    )
    parser.add_argument("--version", action=Version)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (generate, chat, bench, check, train, models, doctor):
        command.add(commands)
    for kind in commands.choices.values():
        kind.set_defaults(parser=kind)
    return parser
