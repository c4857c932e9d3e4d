"""`dflash-rs train`: the trainings of `dflash_rs.train` as commands."""

from __future__ import annotations

from typing import Any

from dflash_rs.cli.arguments import EXIT_CODES, FORMATTER, add_debug
from dflash_rs.train.cli import add_parsers


def add(commands: Any) -> None:
    """Adds the command."""
    train = commands.add_parser(
        "train",
        help="train a small target, or a drafter (DFlash, MTP) for a target",
        description="Train a small target model, or a drafter (DFlash, MTP) for an existing target.",
        formatter_class=FORMATTER,
        epilog="""examples:
  dflash-rs train target --corpus runs/corpus --out runs/target
  dflash-rs train responses --target runs/target --corpus runs/corpus --out runs/responses
  dflash-rs train drafter --target runs/target --responses runs/responses --corpus runs/corpus --out runs/draft
  dflash-rs train mtp --target runs/target --responses runs/responses --corpus runs/corpus --out runs/mtp
  dflash-rs train report --target runs/target --draft runs/draft --prompts runs/prompts.json

Every step says with --help what it reads and writes. For training at large scale see docs/training.md.

"""
        + EXIT_CODES,
    )
    kinds = train.add_subparsers(metavar="WHAT", required=True)
    add_parsers(kinds)
    for kind in kinds.choices.values():
        add_debug(kind)
        kind.set_defaults(parser=kind)
